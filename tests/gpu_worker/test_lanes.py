import asyncio
from collections import Counter

import pytest

from mell_gpu_worker.surroundings import LaneOptions
from mell_shared.codec import encode
from mell_shared.messages.lanes import LaneGreeting, ProbeRequested
from mell_shared.messages.scheduler import LaneMeasured

from .fleet import Fleet, play
from .streaming import SUBJECTS

EAGER = LaneOptions(probes_per_minute=8, stagger_s=0.1)


def measured(fleet: Fleet) -> Counter[tuple[str, str]]:
    """The lanes that schedulers have heard of, and how often."""
    return Counter((e.worker, e.target) for e in fleet.frontend.events if isinstance(e, LaneMeasured))


def test_workers_measure_the_lanes_between_them() -> None:
    """Each newcomer and those that are there: once each way, over the real transport, told to schedulers."""

    async def scene(fleet: Fleet) -> None:
        async with fleet.worker("w1", lanes=EAGER), fleet.worker("w2", lanes=EAGER), fleet.worker("w3", lanes=EAGER):
            await asyncio.sleep(10)
            names = ("w1", "w2", "w3")
            assert measured(fleet) == Counter((a, b) for a in names for b in names if a != b)
            events = [event for event in fleet.frontend.events if isinstance(event, LaneMeasured)]
            assert all(event.bytes_per_s > 0 and event.latency_us > 0 for event in events)
            await fleet.nothing_left()

    play(scene, "other", lanes=LaneOptions(probes_per_minute=0))


def test_a_newcomer_is_measured_by_so_many_and_no_more() -> None:
    """The bound holds whatever the size of the cluster; those refused do not insist."""

    async def scene(fleet: Fleet) -> None:
        few = LaneOptions(probes_per_minute=2, stagger_s=0.1)
        async with fleet.worker("new", lanes=few):
            await asyncio.sleep(30)
            lanes = measured(fleet)
            assert sum(count for (_, target), count in lanes.items() if target == "new") == 2
            assert sum(count for (source, _), count in lanes.items() if source == "new") <= 2
            await asyncio.sleep(300)
            assert measured(fleet) == lanes

    play(scene, *(f"w{number}" for number in range(6)), lanes=EAGER)


def test_workers_of_another_layout_do_not_measure_each_other() -> None:
    """Nothing can move between them."""

    async def scene(fleet: Fleet) -> None:
        async with fleet.worker("w2", lanes=EAGER, block_tokens=8):
            await asyncio.sleep(10)
            assert not measured(fleet)

    play(scene, "w1", lanes=EAGER)


def test_a_slow_or_dead_lane_costs_only_its_figure() -> None:
    """A peer that does not answer, or whose link stands still, is left alone; moves and others go on."""

    async def scene(fleet: Fleet) -> None:
        layout = fleet.workers["w1"].service.core.config.spec.kv_layout
        ghost = LaneGreeting(worker="ghost", kv_layout=layout)
        await fleet.frontend.bus.publish(SUBJECTS.all_lanes, encode(ghost))
        fleet.network.touch = lambda link: link.back.stop()
        async with fleet.worker("w2", lanes=EAGER):
            await asyncio.sleep(60)
            assert not measured(fleet)
            fleet.network.touch = lambda link: None
            async with fleet.worker("w3", lanes=EAGER):
                await asyncio.sleep(60)
                assert set(measured(fleet)) >= {("w1", "w3"), ("w3", "w1")}

    play(scene, "w1", lanes=EAGER)


@pytest.mark.parametrize("data", [b"rubbish", encode(ProbeRequested(worker="x", kv_layout="another"))])
def test_nonsense_at_the_lanes_is_dropped(data: bytes) -> None:
    """Nothing is offered, nothing is answered, the worker is alive."""

    async def scene(fleet: Fleet) -> None:
        await fleet.frontend.bus.publish(SUBJECTS.worker_lanes("w1"), data, reply_to="test.nowhere")
        await asyncio.sleep(1)
        assert not fleet.workers["w1"].task.done()
        assert not fleet.transports["w1"].tasks

    play(scene, "w1", lanes=EAGER)
