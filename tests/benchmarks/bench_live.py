"""The whole loop under load: against the simulator, and policy against policy.

`virtual`: all real cores and engines in virtual time (`virtual.py`), whose figures no other load of the machine can
touch. `processes`: real ones over NATS, as `mell up` starts them. Their engines are fake and sleep through their steps,
so that what is measured is who holds what and when; but a busy machine stretches steps and latencies, so its load
stands beside them. BENCH_SECONDS (of arrivals), BENCH_RATE_PERCENT (requests per 100 seconds), BENCH_SEED, BENCH_SEEDS
(how many, in virtual time), BENCH_WORKERS; BENCH_SVG names a file for the plot.
"""

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from mell_scheduler.settings import SchedulerSettings
from mell_scheduler.sim.html import as_svg
from mell_scheduler.sim.memory import MemorySettings
from mell_scheduler.sim.report import PolicyFigures, figures_of
from mell_scheduler.sim.requests import US_PER_S, Request, Scaling
from mell_scheduler.sim.series import Window
from mell_scheduler.sim.simulate import Simulation, live_core, prepare, simulate
from mell_shared.process import loop_factory
from tests.benchmarks.figures import print_table, size
from tests.benchmarks.live import LiveCluster, LiveRun, Shape, differences, recorded, write_trace
from tests.benchmarks.virtual import run_virtually

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

SECONDS = size("SECONDS", 200)
RATE_PER_S = size("RATE_PERCENT", 50) / 100
SEED = size("SEED", 0)
POLICIES = ("repack", "mell", "load-balance-drain", "load-balance", "worst-fit")
LENGTHS = 2048 / 15_500
"""`paper:RATE` on workers of 2,048 tokens, as long against them as on an A100 with LLaMA-2-13B."""


WAYS = ("virtual", "processes")


@pytest.mark.parametrize("way", WAYS)
def test_live_against_simulated(tmp_path: Path, way: str) -> None:
    """A recorded load live on 8 workers, and the same requests through the simulator at the rates measured."""
    shape = Shape(size("WORKERS", 8))
    for seed in _seeds(way):
        run = _runs(way, tmp_path / str(seed), ["repack"], shape, seed)[0]
        wrong = differences(run)
        assert not wrong, wrong[:3]
        live, simulated = _live_figures(run), _simulated(tmp_path, run)
        rows = [
            [name.replace("_", " "), f"{a:,.2f}", f"{b:,.2f}", f"{a / b - 1:+.1%}" if b else ""]
            for name in ("gpu_seconds", "gpu_peak", "volume_bound_gpu_seconds", "ratio", "moves", "preemptions")
            for a, b in [(float(getattr(live, name)), float(getattr(simulated, name)))]
        ]
        print_table(
            f"Live ({way}) against simulated: {_conditions(way, run, seed)}; {run.decode_tokens_per_s:.2f} tokens/s"
            f" measured; {len(run.logged)} placements and moves live, the same when the event log is replayed",
            ["figure", "live", "simulated", "difference"],
            rows,
        )
        _print_moves([run])


@pytest.mark.parametrize("way", WAYS)
def test_live_policies(tmp_path: Path, way: str) -> None:
    """The same load on five policies, 6 workers each; processes all at once, so that all meet the same machine."""
    shape = Shape(size("WORKERS", 6))
    head = ["policy", "GPU-seconds", "simulated", "moves done/begun", "tokens moved", "preemptions", "queued"]
    head += ["TTFT p50 / p99, ms", "between tokens p50 / p99 / max, ms"]
    for seed in _seeds(way):
        runs = _runs(way, tmp_path / str(seed), POLICIES, shape, seed)
        rows = [_row(run, _live_figures(run), _simulated(tmp_path, run)) for run in runs]
        print_table(f"Policies live ({way}): {_conditions(way, runs[0], seed)}", head, rows)
        _print_moves(runs)
        lines = {run.policy: _in_use(run) for run in runs}
        path = Path(os.environ.get("BENCH_SVG", tmp_path / "live.svg"))
        if seed == SEED:
            path.write_text(as_svg("Workers in use, live", lines))
            print(f"\nplot: {path}")  # noqa: T201 - figures are for reading


def _seeds(way: str) -> range:
    return range(SEED, SEED + (size("SEEDS", 3) if way == "virtual" else 1))


def _runs(way: str, folder: Path, policies: Sequence[str], shape: Shape, seed: int) -> list[LiveRun]:
    folder.mkdir()
    requests = _requests(shape, seed)
    if way == "virtual":
        return [run_virtually(policy, shape, requests) for policy in policies]
    return _side_by_side(folder, policies, shape, write_trace(folder / "planned.csv", requests))


def _side_by_side(folder: Path, policies: Sequence[str], shape: Shape, trace: Path) -> list[LiveRun]:
    with ExitStack() as stack:
        clusters = [stack.enter_context(LiveCluster(folder / policy, policy, shape)) for policy in policies]

        async def load() -> list[LiveRun]:
            return list(await asyncio.gather(*(cluster.load(trace) for cluster in clusters)))

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runs = runner.run(load())
        for cluster, run in zip(clusters, runs, strict=True):
            cluster.stop(run)
    return runs


def _requests(shape: Shape, seed: int) -> list[Request]:
    # A prompt of words comes out a few tokens longer or shorter than asked for.
    workload = prepare(f"paper:{RATE_PER_S:g}", Scaling(length=LENGTHS, seed=seed), shape.capacity_tokens - 8)
    return [request for request in workload.requests if request.arrival_us < SECONDS * US_PER_S]


def _simulated(folder: Path, run: LiveRun) -> PolicyFigures:
    """What the simulator makes of the requests as they were sent, at the live rates and settings."""
    shape = run.shape
    took_s = [move.took_us / 1e6 for move in run.settled() if move.outcome == "committed"]
    memory = MemorySettings(
        shape.capacity_tokens,
        run.decode_tokens_per_s,
        shape.epoch_s,
        move_s=statistics.median(took_s) if took_s else 0.0,
    )
    trace = write_trace(folder / f"{run.policy}.csv", recorded(run))
    policy = SchedulerSettings().policy_settings()
    simulation = Simulation(str(trace), memory, (run.policy,), until_s=SECONDS, policy_settings=policy)
    report = simulate(simulation, time.perf_counter_ns, make_driver=live_core(shape.epoch_s))
    return report.outcomes[run.policy].figures


def _live_figures(run: LiveRun) -> PolicyFigures:
    return figures_of(run.series(SECONDS), Window(0.0, SECONDS), run.shape.capacity_tokens, [], 0)


def _in_use(run: LiveRun) -> tuple[list[float], list[float]]:
    """Workers in use by time, as steps."""
    series = run.series(SECONDS)
    stepped = [(at_s, gpus) for at_s, gpus in zip(series.time_s, series.gpus, strict=True)]
    corners = [stepped[0], *((at_s, value) for (_, old), (at_s, new) in pairwise(stepped) for value in (old, new))]
    return [at_s for at_s, _ in corners], [float(gpus) for _, gpus in corners]


def _row(run: LiveRun, live: PolicyFigures, simulated: PolicyFigures) -> list[str]:
    done = sum(move.outcome == "committed" for move in run.settled())
    ttft, gaps = run.report["ttft_ms"], run.report["inter_token_ms"]
    return [
        run.policy,
        f"{live.gpu_seconds:,.0f}",
        f"{simulated.gpu_seconds:,.0f} ({live.gpu_seconds / simulated.gpu_seconds - 1:+.1%})",
        f"{done} / {live.moves}",
        f"{live.moved_tokens_per_s * SECONDS:,.0f}",
        str(live.preemptions),
        str(run.queued),
        f"{ttft['p50']:.0f} / {ttft['p99']:.0f}",
        f"{gaps['p50']:.1f} / {gaps['p99']:.1f} / {gaps['max']:.0f}",
    ]


def _print_moves(runs: Sequence[LiveRun]) -> None:
    """How moves came out, by cause; and predicted against real time of those that were made."""
    rows = []
    for run in runs:
        moves = run.settled()
        counted = Counter((move.cause, move.outcome, move.reason.partition(":")[0]) for move in moves)
        done = [move for move in moves if move.outcome == "committed" and move.copy_us]
        predicted = statistics.median([move.predicted_us / 1e3 for move in done]) if done else 0.0
        copied = statistics.median([move.copy_us / 1e3 for move in done]) if done else 0.0
        stopped = statistics.median([move.stopped_us / 1e3 for move in done]) if done else 0.0
        took = statistics.median([move.took_us / 1e3 for move in done]) if done else 0.0
        outcomes = "; ".join(f"{count} {' '.join(filter(None, what))}" for what, count in counted.most_common())
        rows.append([run.policy, f"{predicted:.0f} / {copied:.0f} / {took:.0f}", f"{stopped:.0f}", outcomes])
    head = ["policy", "predicted / copying / order to news, ms", "stopped, ms", "outcomes"]
    print_table("Moves, medians", head, rows)


def _conditions(way: str, run: LiveRun, seed: int) -> str:
    shape = run.shape
    machine = f", load of the machine {', '.join(f'{load:.1f}' for load in os.getloadavg())}"
    return (
        f"{len(run.outcomes)} requests in {SECONDS} s (paper:{RATE_PER_S:g}, seed {seed}, lengths x {LENGTHS:.3f}),"
        f" {shape.workers} workers of {shape.capacity_tokens:,} tokens, steps of {shape.step_us / 1e3:g} ms,"
        f" epochs of {shape.epoch_s:g} s{machine if way == 'processes' else ''}"
    )
