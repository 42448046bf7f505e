import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from mell_shared.bus import Delivery
from mell_shared.codec import decode, encode
from mell_shared.messages.frontend import TOKENS_GENERATED, TokensGenerated
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.scheduler import SCHEDULER_EVENT, WorkerReport
from mell_shared.messages.worker import WORKER_COMMAND, Submit
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, spread

pytestmark = pytest.mark.benchmark

ROUNDS = 7
ROWS = 200
IDS = tuple(f"chatcmpl-{row:024x}.0.0" for row in range(ROWS))

STEP = TokensGenerated(
    worker="worker-0123abcd",
    sequences=IDS,
    generations=[1] * ROWS,
    first_indices=list(range(ROWS)),
    counts=[1] * ROWS,
    token_ids=list(range(ROWS)),
)
SUBMIT = Submit(
    sequence=IDS[0],
    generation=1,
    frontend="frontend-0123abcd",
    model="smollm2-135m",
    prompt_ids=list(range(8000)),
    sampling=SamplingParams(seed=1),
)
REPORT = WorkerReport(
    worker="worker-0123abcd",
    number=1,
    free_blocks=100,
    used_blocks=900,
    sequences=IDS,
    generations=[1] * ROWS,
    tokens=[500] * ROWS,
    blocks=[32] * ROWS,
    states=[0] * ROWS,
)


HEAD = ("what", "median (range)", "unit")


def row(name: str, unit: str, figures: list[float]) -> list[str]:
    """Return a table's row: a median with its range over the rounds."""
    return [name, spread(figures, 1), unit]


def mean_us(work: Callable[[], object], repeats: int = 200) -> float:
    """Return the mean time of `work` in microseconds of this process's CPU."""
    begun_ns = time.process_time_ns()
    for _ in range(repeats):
        work()
    return (time.process_time_ns() - begun_ns) / repeats / 1000


def test_codec() -> None:
    """CPU time to encode and decode one step of 200 rows, a report of 200 rows, and a prompt of 8,000 ids."""
    works: dict[str, Callable[[], object]] = {}
    rows: list[list[str]] = []
    for name, message, adapter in (
        ("TokensGenerated, 200 rows", STEP, TOKENS_GENERATED),
        ("WorkerReport, 200 rows", REPORT, SCHEDULER_EVENT),
        ("Submit, 8000 prompt ids", SUBMIT, WORKER_COMMAND),
    ):
        data = encode(message)
        rows.append([name, f"{len(data):,}", "bytes"])
        works[f"encode {name}"] = lambda message=message: encode(message)  # type: ignore[misc]
        works[f"decode {name}"] = lambda adapter=adapter, data=data: decode(adapter, data)  # type: ignore[misc]
    works["make TokensGenerated, 200 rows"] = lambda: TokensGenerated(**dict(STEP))
    figures: dict[str, list[float]] = {name: [] for name in works}
    memory: list[float] = []
    for _ in range(ROUNDS):
        memory.append(memory_read_gb_per_s())
        for name, work in works.items():
            figures[name].append(mean_us(work))
    rows += [row(name, "CPU us", measured) for name, measured in figures.items()]
    rows.append(row("memory read", "GB/s", memory))
    print_table(f"Codec, {ROUNDS} rounds", HEAD, rows)


def test_bus(tmp_path: Path) -> None:
    """Steps of 200 rows through a real server, encoded and decoded, and request/reply; both ends in this process."""
    with NatsServer(tmp_path) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_bus_rounds(server.url))


async def _bus_rounds(url: str) -> None:
    source, target = await NatsBus.connect(url), await NatsBus.connect(url)
    arrived = asyncio.Semaphore(0)

    async def read(delivery: Delivery) -> None:
        decode(TOKENS_GENERATED, delivery.data)
        arrived.release()

    async def count(_delivery: Delivery) -> None:
        arrived.release()

    async def answer(delivery: Delivery) -> None:
        await target.publish(delivery.reply_to, delivery.data)

    await target.subscribe("steps", read)
    await target.subscribe("bytes", count)
    await target.subscribe("echo", answer)
    steps: list[float] = []
    messages: list[float] = []
    small: list[float] = []
    trips: list[float] = []
    memory: list[float] = []
    for _ in range(ROUNDS):
        memory.append(memory_read_gb_per_s())
        steps.append(await _rate(source, "steps", lambda: encode(STEP), arrived, 1000))
        payload = encode(STEP)
        messages.append(await _rate(source, "bytes", lambda payload=payload: payload, arrived, 5000))  # type: ignore[misc]
        small.append(await _rate(source, "bytes", lambda: bytes(200), arrived, 10_000))
        trips += await _trips_us(source, 500)
    trips.sort()
    rows = [
        row("steps encoded, sent, decoded", "steps/s", steps),
        row("token rows so delivered", "rows/s", [rate * ROWS for rate in steps]),
        row(f"messages of {len(encode(STEP)):,} bytes, uncoded", "msg/s", messages),
        row("messages of 200 bytes, uncoded", "msg/s", small),
        row("request/reply p50", "us", [trips[len(trips) // 2]]),
        row("request/reply p99", "us", [trips[len(trips) * 99 // 100]]),
        row("memory read", "GB/s", memory),
    ]
    print_table(f"Bus: a real server, both ends in one process, {ROUNDS} rounds", HEAD, rows)
    assert target.stats.dropped == 0
    await source.close()
    await target.close()


async def _rate(bus: NatsBus, subject: str, make: Callable[[], bytes], arrived: asyncio.Semaphore, count: int) -> float:
    begun_s = time.perf_counter()
    for number in range(count):
        await bus.publish(subject, make())
        if number % 10 == 9:
            await asyncio.sleep(0)
    for _ in range(count):
        await arrived.acquire()
    return count / (time.perf_counter() - begun_s)


async def _trips_us(bus: NatsBus, count: int) -> list[float]:
    trips: list[float] = []
    for _ in range(count):
        begun_ns = time.perf_counter_ns()
        await bus.request("echo", b"x" * 198, 5.0)
        trips.append((time.perf_counter_ns() - begun_ns) / 1000)
    return trips
