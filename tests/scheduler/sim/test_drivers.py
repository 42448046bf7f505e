"""The simulator's two drivers: the bare policy, and the scheduler core that runs live."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mell_scheduler.core import MigrationSettled, StartMigration
from mell_scheduler.policy import POLICY_NAMES, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move
from mell_scheduler.sim.core_driver import CoreDriver
from mell_scheduler.sim.driver import Driver, PolicyDriver
from mell_scheduler.sim.memory import MemoryRun, MemorySettings
from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.requests import Request, Workload
from mell_scheduler.sim.roofline import Roofline
from mell_scheduler.sim.series import Window
from mell_scheduler.sim.slo import measure
from mell_scheduler.sim.timed import TimedRun, TimedSettings

CAPACITY = 15_500
MIGRATING = ("repack", "repack-frugal", "mell", "load-balance", "load-balance-drain")


class Recorder:
    """A driver that writes down every answer it passes on."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.answers: list[object] = []

    def gpu_started(self, spec: GpuSpec, now_us: int) -> None:
        """Pass on."""
        self.driver.gpu_started(spec, now_us)

    def gpu_stopped(self, gpu_id: GpuId, now_us: int) -> None:
        """Pass on."""
        self.driver.gpu_stopped(gpu_id, now_us)

    def gpus_wanted(self, queued_blocks: int) -> int:
        """Pass on."""
        return self.driver.gpus_wanted(queued_blocks)

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """Pass on, and write down who went where."""
        gpu_id = self.driver.arrived(item, now_us)
        self.answers.append((now_us, item.item_id, gpu_id))
        return gpu_id

    def finished(self, item_id: ItemId, now_us: int) -> None:
        """Pass on."""
        self.driver.finished(item_id, now_us)

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """Pass on."""
        self.driver.reported(gpu_id, item_ids, blocks, now_us)

    def epoch(self, now_us: int) -> list[Move]:
        """Pass on, and write down the moves."""
        moves = self.driver.epoch(now_us)
        self.answers.append((now_us, moves))
        return moves

    def committed(self, move: Move, now_us: int) -> None:
        """Pass on."""
        self.driver.committed(move, now_us)

    def failed(self, move: Move, now_us: int) -> None:
        """Pass on."""
        self.driver.failed(move, now_us)

    def deferred(self, move: Move, now_us: int) -> None:
        """Pass on."""
        self.driver.deferred(move, now_us)


def answers(driver: Driver, settings: MemorySettings, until_s: float, rate_per_s: float) -> tuple[list[object], int]:
    """Every decision of a run, and how many requests were preempted."""
    recorder = Recorder(driver)
    run = MemoryRun(paper_workload(rate_per_s, 5), settings, recorder, lambda: 0)
    for _ in run.run(until_s):
        pass
    return recorder.answers, sum(run.series.preemptions)


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("move_s", [0.0, 2.0])
def test_policy_and_core_decide_the_same(name: str, move_s: float) -> None:
    """On one workload both drivers give the same placements and the same moves, in the same order."""
    memory = MemorySettings(CAPACITY, move_s=move_s)
    settings = PolicySettings(hold_both_ends=move_s > 0, cooldown_epochs=2)
    bare, preempted = answers(PolicyDriver(make_policy(name, settings)), memory, 240.0, 1.1)
    core = CoreDriver(name, settings, memory.predicted_growth)
    through_core, _ = answers(core, memory, 240.0, 1.1)
    assert through_core == bare
    moves = [move for answer in bare if isinstance(answer, tuple) and len(answer) == 2 for move in answer[1]]
    assert bool(moves) == (name in MIGRATING), "the workload should make these policies move something"
    assert preempted >= 0


def test_the_core_is_told_how_each_move_came_out() -> None:
    """Every order of the core is settled once, but those still under way."""
    memory = MemorySettings(CAPACITY, move_s=2.0)
    driver = CoreDriver("repack", PolicySettings(), memory.predicted_growth)
    driver.commands = []
    answers(driver, memory, 200.0, 1.1)
    begun = [c.order.migration for c in driver.commands if isinstance(c, StartMigration)]
    settled = [c.migration for c in driver.commands if isinstance(c, MigrationSettled)]
    assert len(set(begun)) == len(begun) > 20
    assert len(set(settled)) == len(settled)
    assert set(settled) <= set(begun)
    assert len(begun) - len(settled) < 10


def test_a_core_serves_timed_mode_too() -> None:
    """With queues, starting GPUs, refusals and a step profile the core serves all that the policy alone serves."""
    roofline = Roofline.of("llama-2-13b", "a100-40", 1)
    settings = replace(TimedSettings(roofline), max_gpus=40)
    latencies = []
    for driver in (PolicyDriver(make_policy("repack")), CoreDriver("repack", PolicySettings())):
        run = TimedRun(paper_workload(0.3, 3), settings, driver)
        for _ in run.run(120.0, 600.0):
            pass
        latencies.append(measure(run, Window(0.0, 120.0)))
    assert [latency.unfinished for latency in latencies] == [0, 0]
    assert latencies[1].gpu_hours == pytest.approx(latencies[0].gpu_hours, rel=0.1)


def test_the_core_outlives_its_last_worker() -> None:
    """With no spares a pause stops every GPU, for longer than a live scheduler would remember the model."""
    requests = [Request(0, 400, 40), Request(200_000_000, 400, 40)]
    roofline = Roofline.of("llama-2-13b", "a100-40")
    run = TimedRun(Workload("w", requests), TimedSettings(roofline, spares=0), CoreDriver("repack", PolicySettings()))
    for _ in run.run(201.0, 60.0):
        pass
    assert [sequence.finished_s is not None for sequence in run.sequences] == [True, True]
    assert 0 in run.series.gpus[10:]
