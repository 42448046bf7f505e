"""How long the simulator takes for a day: 440,000 requests of ordinary chat lengths in memory mode, for every policy.

Each policy runs in a process of its own, so that the peak of its memory is its own. BENCH_DAY_S makes the day shorter.
"""

import resource
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter, perf_counter_ns, process_time

import pytest

from mell_scheduler.policy import POLICY_NAMES, PolicySettings
from mell_scheduler.sim.memory import MemoryRun, MemorySettings
from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.requests import Scaling, scaled
from mell_scheduler.sim.simulate import bare_policy
from tests.benchmarks.figures import print_table, size

DAY_S = 24 * 3600
REQUESTS_PER_S = 5.1
CHAT = Scaling(length=0.1)
"""The built-in workload has chat lengths times ten."""


def simulate_day(name: str, told: Connection) -> None:
    """Run one policy; tells requests, processor and wall seconds, peak memory in MB and the mean of GPUs."""
    day_s = size("DAY_S", DAY_S)
    settings = PolicySettings(hold_both_ends=False)
    wall_s, cpu_s = perf_counter(), process_time()
    workload = scaled(paper_workload(REQUESTS_PER_S, 0, day_s), CHAT)
    run = MemoryRun(workload, MemorySettings(15_500), bare_policy(name, settings), perf_counter_ns)
    for _ in run.run(day_s):
        pass
    gpus = sum(run.series.gpus) / len(run.series.gpus)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    told.send((len(workload.requests), process_time() - cpu_s, perf_counter() - wall_s, peak_mb, gpus))


@pytest.mark.benchmark
@pytest.mark.timeout(1_800)
def test_a_day() -> None:
    """A table of seconds and megabytes by policy."""
    rows = []
    for name in POLICY_NAMES:
        ours, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=simulate_day, args=(name, theirs))
        process.start()
        requests, cpu_s, wall_s, peak_mb, gpus = ours.recv()
        process.join()
        rows.append([name, f"{requests:,}", f"{cpu_s:.1f}", f"{wall_s:.1f}", f"{peak_mb:.0f}", f"{gpus:.2f}"])
    head = ("policy", "requests", "CPU, s", "wall, s", "peak memory, MB", "GPUs, mean")
    print_table("A day in memory mode", head, rows)
