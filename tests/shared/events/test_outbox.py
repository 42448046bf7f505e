"""The outbox: numbers, order, what a full queue and a lost broker leave behind."""

import asyncio
import json
from typing import Any

from mell_shared.events.data import GpusWanted, SchedulerState, WorkerLeft
from mell_shared.events.memory import MemoryEventStore
from mell_shared.events.outbox import Outbox
from mell_shared.testing import run_virtually

SOURCE = "/mell/scheduler/s1"


def wanted(gpus: int) -> GpusWanted:
    """An event to tell apart."""
    return GpusWanted(model="m", gpus=gpus)


def state() -> SchedulerState:
    """A snapshot."""
    return SchedulerState(term=1, policy="repack", workers=(), models=(), queued=0, sequences=0, migrating=0)


def written(store: MemoryEventStore) -> list[dict[str, Any]]:
    """The events in the stream."""
    return [json.loads(event.body) for event in store.events]


def numbers(store: MemoryEventStore) -> list[int]:
    """Their numbers."""
    return [int(event["sequence"]) for event in written(store)]


async def settled(outbox: Outbox) -> None:
    """Wait until nothing is queued, an hour at most."""
    async with asyncio.timeout(3600):
        while outbox.queued:  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.1)


def test_events_are_cloudevents_numbered_from_one() -> None:
    """Source and number name an event; the state comes first."""
    store = MemoryEventStore()

    async def main() -> None:
        outbox = Outbox(store, SOURCE, state)
        async with outbox.running():
            outbox.emit(wanted(3))
            await settled(outbox)

    run_virtually(main())
    first, second = written(store)
    assert first["type"] == "scheduler.state"
    assert {name: value for name, value in second.items() if name != "time"} == {
        "specversion": "1.0",
        "id": "2",
        "source": SOURCE,
        "type": "gpus.wanted",
        "subject": "m",
        "datacontenttype": "application/json",
        "sequence": "2",
        "sequencetype": "Integer",
        "data": {"model": "m", "gpus": 3},
    }
    assert second["time"].endswith("Z")


def test_a_lost_broker_costs_nothing_while_there_is_room() -> None:
    """What could not be written is written later, in order, each once, also what went half through."""
    store = MemoryEventStore()

    async def main() -> None:
        outbox = Outbox(store, SOURCE, lambda: None)
        async with outbox.running():
            store.reachable = False
            for gpus in range(50):
                outbox.emit(wanted(gpus))
            await asyncio.sleep(60)
            assert store.events == []
            assert outbox.stats.failures > 3
            store.room, store.reachable = 20, True
            await asyncio.sleep(60)
            assert numbers(store) == list(range(1, 21))
            store.room = None
            await settled(outbox)
        assert (outbox.stats.written, outbox.stats.dropped) == (50, 0)

    run_virtually(main())
    assert numbers(store) == list(range(1, 51))


def test_what_finds_no_room_leaves_a_hole_and_a_snapshot_behind_it() -> None:
    """The reader sees by the numbers what is missing, and then how things stand."""
    store = MemoryEventStore()

    async def main() -> None:
        outbox = Outbox(store, SOURCE, state, limit=10, snapshot_s=1e9)
        async with outbox.running():
            await settled(outbox)
            store.reachable = False
            for gpus in range(25):
                outbox.emit(wanted(gpus))
            assert (outbox.queued, outbox.stats.dropped) == (10, 15)
            store.reachable = True
            await settled(outbox)
            outbox.emit(wanted(99))

    run_virtually(main())
    assert numbers(store) == [*range(1, 12), 27, 28]
    assert [event["type"] for event in written(store)[-2:]] == ["scheduler.state", "gpus.wanted"]


def test_an_event_that_the_broker_never_takes_holds_up_no_other() -> None:
    """One that is larger than a message may be is lost, which its number tells; those behind it are written."""
    store = MemoryEventStore()
    store.most_bytes = 500

    async def main() -> None:
        outbox = Outbox(store, SOURCE, lambda: None)
        async with outbox.running():
            outbox.emit(wanted(1))
            outbox.emit(WorkerLeft(worker="w", reason="x" * 500))
            outbox.emit(wanted(3))
            await settled(outbox)
        assert (outbox.stats.written, outbox.stats.dropped) == (2, 1)

    run_virtually(main())
    assert numbers(store) == [1, 3]


def test_the_state_is_told_from_time_to_time() -> None:
    """Whoever comes late, or slept longer than events are kept, knows after a minute."""
    store = MemoryEventStore()

    async def main() -> None:
        async with Outbox(store, SOURCE, state, snapshot_s=60.0).running():
            await asyncio.sleep(150)

    run_virtually(main())
    assert [event["type"] for event in written(store)] == ["scheduler.state"] * 3


def test_a_stop_waits_for_the_last_events_but_not_for_ever() -> None:
    """Two seconds; what is then unwritten is lost with the process."""
    store = MemoryEventStore()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        outbox = Outbox(store, SOURCE, lambda: None)
        async with outbox.running():
            outbox.emit(wanted(1))
        assert numbers(store) == [1]
        outbox = Outbox(store, "/other", lambda: None)
        async with outbox.running():
            store.reachable = False
            outbox.emit(wanted(2))
            began_s = loop.time()
        assert loop.time() - began_s == 2.0

    run_virtually(main())
    assert numbers(store) == [1]
