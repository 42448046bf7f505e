"""Memory mode by the paper's definitions, and what the report makes of it."""

import itertools
from collections.abc import Sequence

import pytest

from mell_scheduler.policy import POLICY_NAMES, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move, Reason
from mell_scheduler.sim.driver import PolicyDriver
from mell_scheduler.sim.memory import MemoryRun, MemorySettings
from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.report import PolicyFigures, figures_of
from mell_scheduler.sim.requests import US_PER_S, Request, Workload
from mell_scheduler.sim.series import Series, Window, percentile


def fake_clock() -> int:
    """A clock that takes no time."""
    return 0


def run(
    requests: list[Request], until_s: float, policy: str = "best-fit", move_s: float = 0.0, **settings: float
) -> MemoryRun:
    """Run to the end and hand back the run."""
    memory = MemorySettings(capacity_tokens=100, decode_tokens_per_s=10.0, move_s=move_s, **settings)  # type: ignore[arg-type]
    driver = PolicyDriver(make_policy(policy, PolicySettings(hold_both_ends=move_s > 0)))
    simulated = MemoryRun(Workload("w", requests), memory, driver, fake_clock)
    for _ in simulated.run(until_s):
        driver.policy.check()
    return simulated


def at(second: float, prompt: int, output: int) -> Request:
    """A request that arrives at a second."""
    return Request(round(second * US_PER_S), prompt, output)


def test_a_request_grows_and_leaves() -> None:
    """It counts from the second it arrives in, grows by the rate, and is gone when its output is done."""
    series = run([at(1, 20, 30)], 6).series
    assert series.tokens == [0, 20, 30, 40, 0, 0]
    assert series.gpus == [0, 1, 1, 1, 0, 0]


def test_departures_come_before_arrivals() -> None:
    """In one second a departure's room is there for an arrival."""
    series = run([at(0, 90, 10), at(1, 90, 10)], 3).series
    assert series.gpus == [1, 1, 0]


def test_overload_preempts_without_migration() -> None:
    """A GPU that outgrows its memory preempts its latest request, which is placed anew at its size."""
    series = run([at(0, 50, 40), at(0, 40, 40)], 4).series
    assert series.preemptions == [0, 1, 0, 0]
    assert series.gpus == [1, 2, 2, 2]
    assert series.tokens == [90, 110, 130, 150]


def test_overload_moves_with_migration() -> None:
    """A policy that migrates moves a request away before anything is preempted."""
    series = run([at(0, 50, 40), at(0, 40, 40)], 4, policy="repack").series
    assert sum(series.preemptions) == 0
    assert series.moves == [0, 1, 0, 0]
    assert series.moved_tokens == [0, 50, 0, 0]


def test_a_move_holds_both_ends_for_its_time() -> None:
    """With `move_s` both GPUs count while the move is under way, and it is planned before the overflow."""
    series = run([at(0, 40, 60), at(0, 40, 40)], 5, policy="repack", move_s=1.0).series
    assert sum(series.preemptions) == 0
    assert sum(series.moves) == 1
    assert series.moves.index(1) < 2


def test_epochs_may_be_longer_than_a_second() -> None:
    """Between epochs nothing moves, so an overload preempts."""
    series = run([at(0, 50, 40), at(0, 40, 40)], 4, policy="repack", epoch_s=2.0).series
    assert sum(series.preemptions) == 1


def test_a_fixed_fleet_makes_requests_wait() -> None:
    """With as many GPUs as allowed in use, arrivals wait in order."""
    series = run([at(0, 80, 20), at(0, 80, 20), at(1, 30, 10)], 6, max_gpus=1).series
    assert series.waiting == [1, 2, 1, 1, 0, 0]
    assert max(series.gpus) == 1


class Refusing(PolicyDriver):
    """Plans a move into a full GPU, as a scheduler with stale reports might."""

    def __init__(self) -> None:
        super().__init__(make_policy("best-fit"))
        self.failures: list[Move] = []

    def epoch(self, now_us: int) -> list[Move]:
        """One mistaken move."""
        cluster = self.policy.cluster  # type: ignore[attr-defined]
        if now_us != US_PER_S:
            return []
        item = cluster.items["r0"]
        target = cluster.items["r1"].gpu
        return [cluster.begin_move(item, target, Reason.OVERLOAD)]

    def failed(self, move: Move, now_us: int) -> None:
        """Keep it."""
        self.failures.append(move)
        super().failed(move, now_us)


def test_a_worker_drops_incoming_moves_first() -> None:
    """A GPU short of memory refuses what is coming before it preempts what it has."""
    driver = Refusing()
    memory = MemorySettings(100, 1.0, move_s=3.0)
    simulated = MemoryRun(Workload("w", [at(0, 60, 50), at(0, 60, 50)]), memory, driver, fake_clock)
    for _ in simulated.run(5):
        pass
    assert [m.item_id for m in driver.failures] == ["r0"]
    assert sum(simulated.series.preemptions) == 0
    assert driver.policy.gpu_of("r0") == "gpu0"


class Watched(PolicyDriver):
    """Adds up what is physically on each GPU, from the calls alone."""

    def __init__(self, name: str) -> None:
        super().__init__(make_policy(name, PolicySettings(hold_both_ends=False)))
        self.capacity = 0
        self.sizes: dict[GpuId, int] = {}
        self.most = 0

    def gpu_started(self, spec: GpuSpec, now_us: int) -> None:
        """Note the capacity."""
        self.capacity = spec.capacity_blocks
        super().gpu_started(spec, now_us)

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """Note the sizes."""
        self.sizes[gpu_id] = sum(blocks)
        super().reported(gpu_id, item_ids, blocks, now_us)

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """No arrival may overload."""
        gpu_id = super().arrived(item, now_us)
        assert gpu_id is None or self.policy.used_blocks(gpu_id) <= self.capacity
        return gpu_id


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_no_policy_loses_a_token(name: str) -> None:
    """Whatever is moved or preempted, the tokens held are those of an undisturbed run, second by second."""
    requests = list(paper_workload(2.0, seed=1, span_s=200.0).requests)
    driver = Watched(name)
    simulated = MemoryRun(Workload("w", requests), MemorySettings(12_000, 20.0), driver, fake_clock)
    for _ in simulated.run(250.0):
        pass
    assert simulated.series.tokens == _undisturbed(requests, 250, 20)
    for tokens, gpus in zip(simulated.series.tokens, simulated.series.gpus, strict=True):
        assert gpus >= -(-tokens // 12_000), "fewer GPUs than the volume bound"


def _undisturbed(requests: list[Request], until_s: int, rate: int) -> list[int]:
    totals = [0] * until_s
    for request in requests:
        start = -(-request.arrival_us // US_PER_S)
        for step in itertools.count():
            if step * rate >= request.output_tokens or start + step >= until_s:
                break
            totals[start + step] += request.prompt_tokens + step * rate
    return totals


def test_figures_follow_their_definitions() -> None:
    """Means are over the window; the bound is the sum of ceil(tokens / capacity)."""
    series = Series(
        time_s=[0.0, 1.0, 2.0, 3.0],
        gpus=[9, 2, 3, 9],
        tokens=[900, 150, 201, 900],
        moves=[5, 1, 3, 5],
        moved_tokens=[500, 10, 30, 500],
        preemptions=[7, 1, 0, 7],
        waiting=[0, 0, 0, 0],
    )
    assert figures_of(series, Window(1.0, 3.0), 100, [1_000, 3_000], 4) == PolicyFigures(
        gpu_mean=2.5,
        gpu_peak=3,
        gpu_seconds=5.0,
        volume_bound_gpu_seconds=5.0,
        ratio=1.0,
        memory_use=351 / 500,
        moves=4,
        moves_per_s=2.0,
        moved_tokens_per_s=20.0,
        preemptions=1,
        rejected=4,
        decision_p50_us=1.0,
        decision_p99_us=3.0,
    )


def test_percentiles_are_values_that_occurred() -> None:
    """The nearest-rank percentile; none of nothing is zero."""
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile([4, 1, 3, 2], 0.99) == 4
    assert percentile([], 0.5) == 0.0
