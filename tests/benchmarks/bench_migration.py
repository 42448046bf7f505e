import asyncio
import random
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.engine_runner import EngineThread
from mell_gpu_worker.model_store import pull
from mell_scheduler.policy.transfer import split_point
from mell_shared.memory_bus import Faults, MemoryBroker
from mell_shared.messages.scheduler import MigrationCommitted
from mell_shared.models import default_model_dir
from mell_shared.process import loop_factory
from tests.benchmarks.bench_transport import Source, filled, target
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, size, spread, verdict
from tests.benchmarks.moving import FAKE, Movers, movers
from tests.gpu_worker.fleet import PREFILL_TOKEN_US, STEP_US, Fleet, PacedRunner, play
from tests.gpu_worker.streaming import SmallFrontend

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]

MIB = 2**20
ROUNDS = size("MOVES", 7)
KV_BYTES = 46_080
"""Of one token, as the default model's in float32."""
BLOCK_BYTES = 16 * KV_BYTES
ENGINE_STEP_US = 25_000
LENGTHS = (128, 512, 2_000, 8_000)


def run(main: Any) -> Any:
    """Run on the event loop that services use."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def flags(transport: str, kv_blocks: int = 640) -> list[str]:
    """A worker whose KV is as large as the default model's."""
    sizes = ["--kv-blocks", str(kv_blocks), "--fake-kv-bytes-per-token", str(KV_BYTES)]
    speed = ["--fake-step-us", str(ENGINE_STEP_US), "--fake-prefill-token-us", "20"]
    return [*FAKE, *sizes, *speed, "--transport", transport]


def shown(moves: list[MigrationCommitted], part: str) -> str:
    """The median and the range of a share of the pause, in milliseconds."""
    return spread([getattr(move, part) / 1e3 for move in moves], 1)


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_bandwidth_of_a_move(transport: str, tmp_path: Path) -> None:
    """KV of about 90 MiB moved between two workers while it decodes, against rounds of the bare transport."""

    async def main() -> tuple[list[float], list[float], list[float]]:
        ours, raw, layer = [], [], []
        async with target() as there, movers(tmp_path, *flags(transport)) as pair:
            source = Source(there, filled(128 * MIB))
            await pair.start("a", 0, 2_000)
            for _ in range(ROUNDS):
                moved = await pair.move("a", mode="kv")
                assert moved.copied_bytes >= 64 * MIB
                ours.append(moved.copied_bytes / moved.copy_us / 1e3)
                sizes = [BLOCK_BYTES] * (moved.copied_bytes // BLOCK_BYTES)
                for kind, figures in ((f"raw {transport}", raw), (transport, layer)):
                    took = await source.took_s(kind, sizes, 2)
                    figures.append(sum(sizes) / took[1] / 1e9)
            await source.close()
        return ours, raw, layer

    ours, raw, layer = run(main())
    rows = []
    for name, base in (("raw transport", raw), ("our transport alone", layer)):
        ratios = [mine / theirs for mine, theirs in zip(ours, base, strict=True)]
        rows.append([name, spread(base, 2), spread(ours, 2), spread(ratios, 2), verdict(ratios, 0.9)])
    head = ["against", "GB/s", "the move, GB/s", "ratio", "goal"]
    title = f"A move of KV over {transport}, {ROUNDS} rounds in turn, memory reads {memory_read_gb_per_s():.1f} GB/s"
    print_table(title, head, rows)


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_pause_of_a_move(transport: str, tmp_path: Path) -> None:
    """From the source's last token to the target's first, over lengths; and what others feel of it."""

    async def main() -> tuple[dict[int, list[Any]], dict[str, list[float]], float]:
        pauses: dict[int, list[Any]] = {}
        async with movers(tmp_path, *flags(transport)) as pair:
            round_trip_us = await pair.round_trip_us()
            await pair.start("other-0", 0, 200)
            await pair.start("other-1", 1, 200)
            windows: list[tuple[int, int]] = []
            for length in LENGTHS:
                name = f"moved-{length}"
                await pair.start(name, 0, length)
                pauses[length] = [await _paused(pair, name, windows) for _ in range(3 * ROUNDS)]
                await pair.end(name)
            others = _others(pair.frontend, windows)
        return pauses, others, round_trip_us

    pauses, others, round_trip_us = run(main())
    limit_ms = (1.5 * ENGINE_STEP_US + round_trip_us) / 1e3
    rows = []
    for length, found in pauses.items():
        moves = [moved for moved, _ in found]
        told = sorted(moved.stopped_us / 1e3 for moved in moves)
        seen = [gap_us / 1e3 for _, gap_us in found]
        shares = [shown(moves, part) for part in ("tail_us", "claim_us", "first_step_us")]
        rows.append([f"{length:,}", spread(told, 1), f"{told[-1]:.1f}", spread(seen, 1), *shares])
    head = ["tokens", "pause, ms", "worst", "gap at the frontend, ms", "tail", "claim", "first step"]
    title = (
        f"Pause over {transport}: steps of {ENGINE_STEP_US / 1e3:.0f} ms, round trip {round_trip_us / 1e3:.2f} ms, "
        f"goal for the median {limit_ms:.1f} ms, for p99 {3 * ENGINE_STEP_US / 1e3:.0f} ms"
    )
    print_table(title, head, rows)
    _print_others("Others' inter-token time on both workers, ms", others)


def test_pause_of_a_move_of_a_real_model(tmp_path: Path) -> None:
    """The default model in float32, one thread a worker: pauses in its own steps, tokens as of a request never moved.

    Two workers and all else on two cores measure contention; what it says of speed holds from 8 cores on.
    """
    real = [
        "--model",
        "smollm2-135m",
        "--threads",
        "1",
        "--kv-blocks",
        "1024",
        "--no-prefix-cache",
        "--transport",
        "tcp",
    ]
    pull("smollm2-135m", default_model_dir(), lambda _stage, _fraction: None)
    like = {"model": "smollm2-135m", "temperature": 0.0}

    async def main() -> tuple[dict[int, list[Any]], dict[str, list[float]], int]:
        pauses: dict[int, list[Any]] = {}
        windows: list[tuple[int, int]] = []
        compared = 0
        async with movers(tmp_path, *real, "--profile-s", "0", "--lane-probes", "0") as pair:
            streams = pair.frontend.streams
            for number in (0, 1):
                await pair.start(f"other-{number}", number, 64, max_tokens=7_000, **like)
            for length in (128, 512, 2_000):
                moved, stays = f"moved-{length}", f"stays-{length}"
                await pair.start(moved, 0, length, max_tokens=5_000, **like)
                pauses[length] = [await _paused(pair, moved, windows) for _ in range(3 * ROUNDS)]
                tokens = list(streams[moved].tokens)
                await pair.end(moved)
                await pair.start(stays, 0, length, max_tokens=len(tokens), **like)
                await pair.frontend.finished(stays)
                assert streams.pop(stays).tokens == tokens
                compared += len(tokens)
            others = _others(pair.frontend, windows)
        return pauses, others, compared

    pauses, others, compared = run(main())
    step_ms = statistics.median(others["between moves"])
    rows = []
    for length, found in pauses.items():
        steps = sorted(moved.stopped_us / 1e3 / step_ms for moved, _ in found)
        shares = [shown([moved for moved, _ in found], part) for part in ("tail_us", "claim_us", "first_step_us")]
        rows.append([f"{length:,}", spread(steps, 2), f"{steps[-1]:.2f}", *shares])
    title = f"Pause over tcp, smollm2-135m: steps of {step_ms:.0f} ms; {compared} tokens as of requests never moved"
    print_table(title, ["tokens", "pause, steps", "worst", "tail, ms", "claim, ms", "first step, ms"], rows)
    _print_others("Others' inter-token time on both workers, ms", others)


async def _paused(pair: Movers, name: str, windows: list[tuple[int, int]]) -> tuple[MigrationCommitted, int]:
    """Move, and find the gap at the frontend where the new owner's tokens begin."""
    clock, stream = pair.frontend.clock, pair.frontend.streams[name]
    begun_us = clock.now_us()
    moved = await pair.move(name, mode="kv")
    windows.append((begun_us, clock.now_us()))
    count = len(stream.tokens)
    await pair.frontend.until(lambda: len(stream.tokens) > count + 4)
    first = next(i for i, at_us in enumerate(stream.arrived_us) if at_us >= begun_us)
    gaps = [pair.gap_us(name, index) for index in range(max(1, first), len(stream.arrived_us))]
    return moved, max(gaps)


def _others(frontend: SmallFrontend, windows: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Inter-token times of the sequences that stay, during moves and between them, from the first move on."""
    gaps: dict[str, list[float]] = defaultdict(list)
    for name in ("other-0", "other-1"):
        arrived = frontend.streams[name].arrived_us
        for before, after in pairwise(at_us for at_us in arrived if at_us >= windows[0][0]):
            moving = any(before < end_us and after > begun_us for begun_us, end_us in windows)
            gaps["during moves" if moving else "between moves"].append((after - before) / 1e3)
    return gaps


def _print_others(title: str, others: dict[str, list[float]]) -> None:
    rows = [
        [when, f"{statistics.median(gaps):.2f}", f"{_percentile(gaps, 99):.2f}", str(len(gaps))]
        for when, gaps in others.items()
    ]
    print_table(title, ["", "p50", "p99", "tokens"], rows)


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def test_pause_of_the_protocol() -> None:
    """The pause in decode steps, in virtual time: messages take up to 1 ms, links carry 1 GB/s, others decode beside.

    What the protocol alone costs, whatever else a machine does.
    """
    rows, others = [], defaultdict[str, list[float]](list)
    for length in LENGTHS:
        moves, gaps = _virtual_moves(length, 8 * ROUNDS)
        steps = sorted(moved.stopped_us / STEP_US for moved in moves)
        parts = ("tail_us", "claim_us", "first_step_us")
        shares = [spread([getattr(moved, part) / STEP_US for moved in moves], 2) for part in parts]
        median, worst = statistics.median(steps), _percentile(steps, 99)
        rows.append([f"{length:,}", f"{median:.2f}", f"{worst:.2f}", *shares])
        for when, found in gaps.items():
            others[when] += found
    head = ["tokens", "median", "p99", "tail", "claim", "first step"]
    goals = f"goals: median {1.5 + 1_000 / STEP_US:.2f}, p99 3"
    print_table(
        f"Pause in steps of {STEP_US / 1e3:.0f} ms, virtual time, {8 * ROUNDS} moves a row; {goals}", head, rows
    )
    _print_others("Others' inter-token time, ms, virtual time", others)


class UnevenRunner(PacedRunner):
    """Steps that vary by a tenth: else two workers would keep step with each other for the whole run."""

    def __init__(self, engine: Engine, thread: EngineThread, step_timeout_s: float) -> None:
        super().__init__(engine, thread, step_timeout_s)
        self._random = random.Random()

    def step_us(self) -> float:
        """What a step takes without prefill."""
        return STEP_US * self._random.uniform(0.9, 1.1)


def _virtual_moves(length: int, count: int) -> tuple[list[MigrationCommitted], dict[str, list[float]]]:
    moves: list[MigrationCommitted] = []
    gaps: dict[str, list[float]] = {}
    pauses = random.Random(length)

    async def scene(fleet: Fleet) -> None:
        fleet.network.throttle(1e9)
        await fleet.start("other-0", "w1", max_tokens=7_000)
        await fleet.start("other-1", "w2", max_tokens=7_000)
        prompt = bytes(65 + position % 26 for position in range(length))
        await fleet.start("a", "w1", max_tokens=7_000, prompt=prompt)
        await fleet.tokens("a", 3)
        windows = []
        for number in range(count):
            await asyncio.sleep(pauses.uniform(0.01, 0.03))
            begun_us = fleet.frontend.clock.now_us()
            moved = await fleet.frontend.move("a", "w2" if number % 2 == 0 else "w1", mode="kv")
            assert isinstance(moved, MigrationCommitted), moved
            windows.append((begun_us, fleet.frontend.clock.now_us()))
            moves.append(moved)
        gaps.update(_others(fleet.frontend, windows))

    sizes = {"kv_blocks": 2_500, "max_step_tokens": 512, "max_model_len": 16_384, "fake_kv_bytes_per_token": 512}
    broker = MemoryBroker(seed=1, faults=Faults(max_delay_us=1_000))
    play(scene, "w1", "w2", broker=broker, prefix_cache=False, runner=UnevenRunner, **sizes)
    return moves, gaps


def test_modes_over_link_speeds() -> None:
    """A request of 4,000 tokens by each mode, over links throttled to a multiple of the target's prefill, virtual time.

    The protocol is real and the rates are given: so this tells what the modes are good for, not what a machine does.
    """
    kv_bytes, tokens, chunk = 4_096, 4_000, 512
    prefill_us = PREFILL_TOKEN_US + STEP_US / chunk
    rows = []
    for speed in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        copy_us = prefill_us / speed
        split = split_point(tokens, copy_us, prefill_us, 16)
        rate = kv_bytes / copy_us * 1e6
        modes = ("kv", "tokens", "hybrid")
        took = {mode: _moved_s(mode, split, rate, tokens, kv_bytes) for mode in modes}
        better = min(took["kv"], took["tokens"])
        times = [f"{took[mode] * 1e3:,.0f}" for mode in modes]
        rows.append([f"{speed:g}", *times, f"{split:,}", f"{took['hybrid'] / better:.2f}"])
    head = ["link / prefill", "kv, ms", "tokens, ms", "hybrid, ms", "split", "hybrid / better of both"]
    print_table(f"Moves of {tokens:,} tokens, from order to commit, in virtual time", head, rows)


def _moved_s(mode: str, split: int, bytes_per_s: float, tokens: int, kv_bytes: int) -> float:
    took: list[float] = []

    async def scene(fleet: Fleet) -> None:
        fleet.network.throttle(bytes_per_s)
        prompt = bytes(65 + position % 26 for position in range(tokens))
        await fleet.start("a", "w1", max_tokens=3_000, prompt=prompt)
        await fleet.tokens("a", 3)
        begun_us = fleet.frontend.clock.now_us()
        order = {"mode": mode, "split_tokens": split if mode == "hybrid" else 0}
        moved = await fleet.frontend.move("a", "w2", **order)
        assert isinstance(moved, MigrationCommitted), moved
        took.append((fleet.frontend.clock.now_us() - begun_us) / 1e6)

    sizes = {"kv_blocks": 480, "max_step_tokens": 512, "fake_kv_bytes_per_token": kv_bytes}
    play(scene, "w1", "w2", **sizes)
    return took[0]


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_an_idle_worker(transport: str, tmp_path: Path) -> None:
    """CPU of a worker that does nothing, data port open, over ten seconds; then with one that has just received KV."""

    async def main() -> list[list[str]]:
        rows = []
        async with movers(tmp_path, *flags(transport)) as pair:
            processes = [psutil.Process(service.process.pid) for service in pair.services]

            async def used(what: str) -> None:
                before = [sum(process.cpu_times()[:2]) for process in processes]
                begun_s = time.perf_counter()
                await asyncio.sleep(10)
                took_s = time.perf_counter() - begun_s
                after = [sum(process.cpu_times()[:2]) for process in processes]
                shares = [(now - then) / took_s for then, now in zip(before, after, strict=True)]
                rows.append([what, ", ".join(f"{share:.2%}" for share in shares)])

            await used("two workers, never used")
            await pair.start("a", 0, 500)
            for _ in range(4):
                await pair.move("a", mode="kv")
            await pair.end("a")
            await asyncio.sleep(3)
            await used("the same after four moves")
        return rows

    print_table(f"{transport}: share of a core while idle", ["", "CPU of each"], run(main()))
