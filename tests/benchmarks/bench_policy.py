"""How fast the policies decide: arrivals, reports and epochs at 10 to 10,000 GPUs of 100 requests each.

Means are of processor time, which neighbours disturb least; percentiles need a clock for each call, and so wall time.
"""

from collections.abc import Callable, Sequence
from random import Random
from time import perf_counter_ns, process_time_ns

import pytest

from mell_scheduler.policy import Policy, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move
from mell_scheduler.sim.driver import PolicyDriver
from mell_scheduler.sim.memory import MemoryRun, MemorySettings
from mell_scheduler.sim.requests import US_PER_S, Request, Workload
from mell_scheduler.sim.series import percentile
from tests.benchmarks.figures import print_table, size

CAPACITY = 10_000
PER_GPU = 100
HEAD = ("GPUs", "arrival p50, us", "arrival p99, us", "arrival", "departure", "report", "epoch of nothing to do, ms")
BUSY_HEAD = ("GPUs", "arrival p99, us", "report, us", "epoch, ms", "all of a second, ms")
POLICIES = ("repack", "mell", "load-balance-drain", "best-fit")


def filled(name: str, gpus: int) -> Policy:
    """A cluster about 85% full, of mixed sizes around C/118, and a tenth as many standby GPUs."""
    random = Random(1)
    policy = make_policy(name)
    for index in range(gpus + gpus // 10 + 1):
        policy.add_gpu(GpuSpec(f"g{index}", CAPACITY, host=f"h{index // 8}"))
    for index in range(gpus):
        for at in range(PER_GPU):
            policy.place(Item(f"i{index}-{at}", random.randint(20, 150)), f"g{index}")
    return policy


def timed(action: Callable[[int], object], times: int) -> list[float]:
    """Microseconds of wall time that each call took."""
    out = []
    for at in range(times):
        start = perf_counter_ns()
        action(at)
        out.append((perf_counter_ns() - start) / 1e3)
    return out


def mean_us(action: Callable[[int], object], times: int) -> float:
    """Microseconds of processor time that a call took on average."""
    start = process_time_ns()
    for at in range(times):
        action(at)
    return (process_time_ns() - start) / times / 1e3


def settle(policy: Policy) -> None:
    """One epoch, all moves committed."""
    for move in policy.epoch(0):
        policy.moved(move.item_id)


def newcomers(times: int, batch: str) -> list[Item]:
    """Arrivals of mixed sizes."""
    random = Random(2)
    return [Item(f"{batch}{at}", random.randint(20, 150)) for at in range(times)]


def arrivals_and_departures(policy: Policy, times: int) -> tuple[list[float], float, float]:
    """Wall time of each arrival; mean processor time of an arrival and of a departure."""
    for item in newcomers(times, "warm"):
        policy.allocate(item)
        policy.depart(item.item_id)
    singly, together = newcomers(times // 2, "a"), newcomers(times // 2, "b")
    each = timed(lambda at: policy.allocate(singly[at]), len(singly))
    arrival_us = mean_us(lambda at: policy.allocate(together[at]), len(together))
    leaving = [item for item in (*singly, *together) if policy.gpu_of(item.item_id) is not None]
    departure_us = mean_us(lambda at: policy.depart(leaving[at].item_id), len(leaving))
    return each, arrival_us, departure_us


def report(policy: Policy, gpus: int) -> Callable[[int], object]:
    """One GPU's report of all its sequences, each one block greater."""
    growth = [0] * gpus
    rows = [policy.items_on(f"g{index}") for index in range(gpus)]
    sizes = [[policy.size_of(item_id) for item_id in row] for row in rows]

    def take(at: int) -> object:
        gpu = at % gpus
        growth[gpu] += 1
        return policy.update_gpu(f"g{gpu}", rows[gpu], [size + growth[gpu] for size in sizes[gpu]])

    return take


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", POLICIES)
def test_decisions(name: str) -> None:
    """A table of microseconds; BENCH_POLICY_GPUS: the largest cluster, 10,000 takes 2 GB and minutes."""
    rows = []
    for gpus in (g for g in (10, 100, 1_000, 10_000) if g <= size("POLICY_GPUS", 1_000)):
        policy = filled(name, gpus)
        for _ in range(3):
            settle(policy)
        arrivals, arrival_us, departure_us = arrivals_and_departures(policy, min(2_000, gpus * 20))
        report_us = mean_us(report(policy, gpus), max(2_000, gpus))
        settle(policy)
        figures = [percentile(arrivals, 0.5), percentile(arrivals, 0.99), arrival_us, departure_us, report_us]
        figures.append(mean_us(lambda _, p=policy: settle(p), 3) / 1e3)  # type: ignore[misc]
        rows.append([f"{gpus:,}", *(f"{figure:,.1f}" for figure in figures)])
    print_table(f"Policy {name}, {PER_GPU} requests on each GPU", HEAD, rows)


class Stopwatch(PolicyDriver):
    """Times each kind of call that a simulation makes, in microseconds."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.spent: dict[str, list[float]] = {"arrival": [], "report": [], "epoch": []}

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """Timed."""
        start = perf_counter_ns()
        gpu_id = super().arrived(item, now_us)
        self.spent["arrival"].append((perf_counter_ns() - start) / 1e3)
        return gpu_id

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """Timed."""
        start = perf_counter_ns()
        super().reported(gpu_id, item_ids, blocks, now_us)
        self.spent["report"].append((perf_counter_ns() - start) / 1e3)

    def epoch(self, now_us: int) -> list[Move]:
        """Timed."""
        start = perf_counter_ns()
        moves = super().epoch(now_us)
        self.spent["epoch"].append((perf_counter_ns() - start) / 1e3)
        return moves


def busy(gpus: int, seconds: int) -> Workload:
    """About `gpus` full GPUs of 100 requests each, that come, grow by a block a second, and go."""
    random = Random(3)
    now_us, requests = 0.0, []
    while now_us < seconds * US_PER_S:
        now_us += random.expovariate(gpus * 100 / 60.0) * US_PER_S
        requests.append(Request(round(now_us), random.randint(20, 120), random.randint(30, 90)))
    return Workload("busy", requests)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["repack", "mell"])
def test_a_busy_second(name: str) -> None:
    """A full cluster in steady state: what all decisions of one second take, by size.

    BENCH_GPUS: the largest; 1,000 take minutes to fill.
    """
    rows = []
    for gpus in (10, size("GPUS", 100)):
        watch = Stopwatch(make_policy(name, PolicySettings(hold_both_ends=False)))
        run = MemoryRun(busy(gpus, 100), MemorySettings(CAPACITY, 1.0), watch, perf_counter_ns)
        for now_s in run.run(100):
            if now_s == 90:
                watch.spent = {kind: [] for kind in watch.spent}
        arrivals, reports, epochs = (watch.spent[kind] for kind in ("arrival", "report", "epoch"))
        total_ms = (sum(arrivals) + sum(reports) + sum(epochs)) / len(epochs) / 1e3
        figures = [
            percentile(arrivals, 0.99),
            sum(reports) / len(reports),
            sum(epochs) / len(epochs) / 1e3,
            total_ms,
        ]
        rows.append([f"{run.series.gpus[-1]:,}", *(f"{figure:,.1f}" for figure in figures)])
    print_table(f"Policy {name}, one second of a busy cluster in steady state", BUSY_HEAD, rows)
