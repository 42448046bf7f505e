"""What the scheduler measures of moves, epochs and packing."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from mell_scheduler.core import MigrationSettled
from mell_scheduler.move_metrics import MoveMetrics
from mell_scheduler.packing_metrics import PackingMeter, volume_bound
from mell_shared.testing import run_virtually
from tests.scheduler.script import SECOND, Script, place_request
from tests.scheduler.stage import place, staged, until


def move(**changes: object) -> MigrationSettled:
    """A move by KV that took twice what was expected."""
    fields = {
        "migration": "7-1", "sequence": "s", "source": "a", "target": "b", "outcome": "committed", "reason": "",
        "mode": "kv", "cause": "drain", "blocks": 10, "predicted_us": 100_000, "took_us": 200_000,
        "stopped_us": 7_000, "copied_bytes": 1_000, "copy_us": 1, "prefilled_tokens": 16, "prefill_us": 1,
    }  # fmt: skip
    return MigrationSettled(**{**fields, **changes})  # type: ignore[arg-type]


def test_moves_are_counted_by_mode_cause_and_outcome_and_costs_by_mode() -> None:
    """What failed cost nothing that is known; what was not told or predicted is in no histogram."""
    registry = CollectorRegistry()
    metrics = MoveMetrics(registry)
    metrics.settled(move())
    metrics.settled(move(stopped_us=0, predicted_us=0))
    metrics.settled(move(outcome="failed", cause="overload", mode="tokens"))
    metrics.settled(move(outcome="failed", reason="busy: 8 sequences are being moved from here already"))
    value = registry.get_sample_value
    assert value("mell_moves_total", {"mode": "kv", "cause": "drain", "outcome": "committed"}) == 2
    assert value("mell_moves_total", {"mode": "kv", "cause": "drain", "outcome": "busy"}) == 1
    assert value("mell_moves_total", {"mode": "tokens", "cause": "overload", "outcome": "failed"}) == 1
    kv = {"mode": "kv"}
    assert value("mell_move_copied_bytes_total", kv) == 2_000
    assert value("mell_move_prefilled_tokens_total", kv) == 32
    assert (value("mell_move_seconds_count", kv), value("mell_move_seconds_sum", kv)) == (2, pytest.approx(0.4))
    assert value("mell_move_stopped_seconds_sum", kv) == 0.007
    assert value("mell_move_predicted_seconds_sum", kv) == 0.1
    assert (value("mell_move_cost_ratio_count", kv), value("mell_move_cost_ratio_sum", kv)) == (1, 2.0)
    assert value("mell_move_seconds_count", {"mode": "tokens"}) is None


@pytest.mark.parametrize(
    ("used", "capacities", "bound"),
    [(0, [10], 0), (1, [10, 10], 1), (10, [10, 10], 1), (11, [10, 10], 2), (25, [5, 20, 10], 2), (99, [10], 1)],
)
def test_the_volume_bound_is_what_no_packing_can_beat(used: int, capacities: list[int], bound: int) -> None:
    """The largest workers first; of equal ones the used blocks over one's, rounded up."""
    assert volume_bound(used, capacities) == bound


def test_packing_is_summed_over_the_time_that_this_scheduler_leads() -> None:
    """What was seen last counts until the next look; none between two leaderships."""
    registry = CollectorRegistry()
    meter = PackingMeter()
    registry.register(meter)
    scene = Script()
    scene.up("a", "b")
    meter.look(scene.core, 0)
    scene.report("a", ("s", 1, 160, 10))
    scene.report("b", ("t", 1, 160, 10))
    meter.look(scene.core, 2 * SECOND)
    meter.look(scene.core, 5 * SECOND)
    values = [
        registry.get_sample_value(name, {"model": "m"})
        for name in ("mell_gpus_joined", "mell_gpus_active", "mell_gpus_volume_bound", "mell_packing_ratio")
    ]
    assert values == [2, 2, 1, 2.0]
    seconds = ("mell_gpu_seconds_total", "mell_gpu_volume_bound_seconds_total")
    assert [registry.get_sample_value(name, {"model": "m"}) for name in seconds] == [6.0, 3.0]
    meter.forget()
    meter.look(scene.core, 100 * SECOND)
    assert [registry.get_sample_value(name, {"model": "m"}) for name in seconds] == [6.0, 3.0]


def test_a_live_scheduler_tells_its_epochs_packing_and_queue() -> None:
    """Through its registry, as it is scraped."""

    async def main() -> None:
        async with staged() as stage:
            worker = stage.worker("w1", kv_blocks=12)
            scheduler = stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            await place(bus, place_request("s1"))
            worker.rows = [("s1", 1, 160, 10)]
            waiting = asyncio.create_task(place(bus, place_request("s2")))
            await until(lambda: scheduler.metric("vllm:num_requests_waiting", model_name="m") == 1)
            await waiting
            await until(lambda: scheduler.metric("mell_gpus_active", model="m") == 1)
            assert scheduler.metric("mell_gpus_volume_bound", model="m") == 1
            epochs = scheduler.metric("mell_epoch_seconds_count")
            assert epochs is not None
            await asyncio.sleep(3)
            assert scheduler.metric("mell_epoch_seconds_count") == epochs + 3
            active_s = scheduler.metric("mell_gpu_seconds_total", model="m")
            assert active_s is not None
            assert active_s > 2

    run_virtually(main())
