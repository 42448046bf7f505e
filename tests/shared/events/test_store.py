"""The stream's contract, on memory and on a real broker; and what only the real one does."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from nats.js import JetStreamContext

from mell_shared.events.memory import MemoryEventStore
from mell_shared.events.store import EventRecord, EventStore, EventStoreError, EventTooLargeError, Retention
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_event_store import NatsEventStore
from mell_shared.nats_server import NatsServer
from mell_shared.subjects import Subjects, event_stream
from tests.shared.conftest import eventually

KEPT = Retention(3600.0, 10_000_000)


def records(first: int, last: int, kind: str = "worker.active") -> list[EventRecord]:
    """Events with the numbers from `first` to `last`."""
    return [EventRecord(kind, f"/s/{number}", f'{{"n":{number}}}'.encode()) for number in range(first, last + 1)]


async def bodies(store: EventStore, after: int = 0, limit: int = 1_000) -> list[bytes]:
    """What is in the stream."""
    return [event.body for event in await store.read(after, limit)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A broker that tests may kill if they start it again."""
    with NatsServer(tmp_path_factory.mktemp("events")) as running:
        yield running


@pytest_asyncio.fixture
async def bus(server: NatsServer) -> AsyncIterator[NatsBus]:
    """A connection to it."""
    made = await NatsBus.connect(server.url)
    yield made
    await made.close()


@pytest_asyncio.fixture(params=["memory", "nats"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[EventStore]:
    """Each stream in turn, empty."""
    if request.param == "memory":
        yield MemoryEventStore()
        return
    bus = await NatsBus.connect(request.getfixturevalue("server").url)
    subjects = Subjects(request.node.name.partition("[")[0].replace("_", "-")[:40])
    store = NatsEventStore(bus, subjects, KEPT)
    yield store
    await bus.close()


async def test_what_is_written_is_read_in_order(store: EventStore) -> None:
    """In order, with rising positions, the types told, from any place on, and no more than asked for."""
    assert await store.append(records(1, 300)) == 300
    events = await store.read(0, 1_000)
    assert [event.body for event in events] == [record.body for record in records(1, 300)]
    assert {event.type for event in events} == {"worker.active"}
    assert [event.position for event in events] == sorted({event.position for event in events})
    assert await bodies(store, events[9].position, 2) == [b'{"n":11}', b'{"n":12}']
    assert await store.last_position() == events[-1].position
    assert await store.read(events[-1].position, 10) == []


async def test_an_empty_stream_has_no_last_event(store: EventStore) -> None:
    """Nothing is there, and that is no fault."""
    await store.append(records(1, 0))
    assert await store.last_position() == 0
    assert await store.read(0, 10) == []


async def test_a_repeat_is_written_once(store: EventStore) -> None:
    """An event whose confirmation was lost is sent again with its id."""
    await store.append(records(1, 3))
    assert await store.append(records(2, 5)) == 4
    assert await bodies(store) == [record.body for record in records(1, 5)]


async def test_a_dead_broker_is_told_and_outlived(bus: NatsBus, server: NatsServer) -> None:
    """While it is away nothing is written and that is said; what was written is there when it is back."""
    store = NatsEventStore(bus, Subjects("dead"), KEPT)
    await store.append(records(1, 2))
    server.kill()
    await eventually(lambda: not bus.connected)
    with pytest.raises(EventStoreError):
        await store.append(records(3, 4))
    with pytest.raises(EventStoreError):
        await store.read(0, 10)
    server.start()
    await eventually(lambda: bus.connected)
    assert await store.append(records(3, 4)) == 2
    assert await bodies(store) == [record.body for record in records(1, 4)]


async def test_a_deleted_stream_is_made_again(bus: NatsBus) -> None:
    """Somebody's `nats stream rm` costs the events, not those to come."""
    store, context = NatsEventStore(bus, Subjects("deleted"), KEPT), JetStreamContext(bus.client)
    await store.append(records(1, 2))
    await context.delete_stream(event_stream("deleted"))
    with pytest.raises(EventStoreError, match="no such stream"):
        await store.append(records(3, 3))
    assert await store.append(records(3, 3)) == 1
    assert await bodies(store) == [b'{"n":3}']


async def test_what_is_too_large_is_told_and_what_is_before_it_written(bus: NatsBus) -> None:
    """However often it is tried, it would never be taken."""
    store = NatsEventStore(bus, Subjects("large"), KEPT)
    large = EventRecord("worker.active", "/s/3", bytes(bus.max_payload))
    assert await store.append([*records(1, 2), large, *records(4, 4)]) == 2
    for _ in range(2):
        with pytest.raises(EventTooLargeError, match=str(bus.max_payload)):
            await store.append([large, *records(4, 4)])
    assert await store.append(records(4, 4)) == 1
    assert len(await bodies(store)) == 3


async def test_who_makes_no_stream_says_that_there_is_none(bus: NatsBus) -> None:
    """A frontend that is there before any scheduler waits for it."""
    frontends = NatsEventStore(bus, Subjects("early"))
    for work in (frontends.append(records(1, 1)), frontends.read(0, 1), frontends.last_position()):
        with pytest.raises(EventStoreError, match="no such stream"):
            await work
    await NatsEventStore(bus, Subjects("early"), KEPT).append(records(1, 1))
    assert await frontends.append(records(2, 2)) == 1
    assert len(await frontends.read(0, 10)) == 2


async def test_the_stream_is_bounded_as_it_is_set_last(bus: NatsBus) -> None:
    """The oldest go when the size is reached; a later setting changes a stream that is there."""
    subjects, context = Subjects("bounded"), JetStreamContext(bus.client)
    await NatsEventStore(bus, subjects, KEPT).append(records(1, 1))
    store = NatsEventStore(bus, subjects, Retention(60.0, 20_000))
    await store.append(records(2, 1_000))
    config = (await context.stream_info(event_stream("bounded"))).config
    assert (config.max_age, config.max_bytes) == (60.0, 20_000)
    kept = await bodies(store)
    assert kept == [record.body for record in records(1_001 - len(kept), 1_000)]
    assert 10 < len(kept) < 500


async def test_without_jetstream_the_advice_is_clear(tmp_path: Path) -> None:
    """The error names what to start and what to set."""
    access = "authorization { user: a, password: b }\njetstream: disabled\n"
    with NatsServer(tmp_path, access=access) as plain:
        bus = await NatsBus.connect(f"nats://a:b@{plain.address}")
        try:
            with pytest.raises(EventStoreError, match="MELL_EVENTS=off"):
                await NatsEventStore(bus, Subjects(), KEPT).append(records(1, 1))
        finally:
            await bus.close()
