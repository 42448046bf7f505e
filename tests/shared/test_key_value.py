import asyncio
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from mell_shared.clock import SystemClock
from mell_shared.key_value import Entry, KeyValue, KeyValueConflictError, KeyValueError, KeyValueUnavailableError
from mell_shared.memory_key_value import MemoryBucket, MemoryKeyValue
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_key_value import NatsKeyValue
from mell_shared.nats_server import NatsServer
from tests.conftest import BusFactory

MakeStores = Callable[[float], tuple[KeyValue, KeyValue]]
WAIT_S = 10.0


@pytest_asyncio.fixture(params=["memory", "nats"])
async def stores(request: pytest.FixtureRequest, connect_bus: BusFactory) -> AsyncIterator[MakeStores]:
    """Make two processes' ways to one new bucket with a time to live in seconds."""
    first, second = await connect_bus(), await connect_bus()

    def make(ttl_s: float) -> tuple[KeyValue, KeyValue]:
        if request.param == "memory":
            bucket = MemoryBucket(SystemClock(), round(ttl_s * 1e6))
            return MemoryKeyValue(bucket), MemoryKeyValue(bucket)
        name = f"test-{secrets.token_hex(4)}"
        return NatsKeyValue(first, name, ttl_s), NatsKeyValue(second, name, ttl_s)

    yield make


async def test_what_one_writes_the_other_reads(stores: MakeStores) -> None:
    """A key has no value at first; then everybody reads the last one with its revision, which rises."""
    mine, yours = stores(60)
    assert await yours.read("lease", WAIT_S) is None
    revision = await mine.write("lease", b"1", 0, WAIT_S)
    assert await yours.read("lease", WAIT_S) == Entry(b"1", revision)
    later = await yours.write("lease", b"2", revision, WAIT_S)
    assert later > revision
    assert await mine.read("lease", WAIT_S) == Entry(b"2", later)


async def test_only_one_of_two_writers_wins(stores: MakeStores) -> None:
    """A write that names an old revision, or none where there is a value, changes nothing."""
    mine, yours = stores(60)
    revision = await mine.write("lease", b"mine", 0, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await yours.write("lease", b"yours", 0, WAIT_S)
    later = await mine.write("lease", b"mine again", revision, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await yours.write("lease", b"yours", revision, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await yours.erase("lease", revision, WAIT_S)
    assert await yours.read("lease", WAIT_S) == Entry(b"mine again", later)


async def test_an_erased_key_is_free_at_once(stores: MakeStores) -> None:
    """After its holder erased it the key reads as never written, and anyone may take it."""
    mine, yours = stores(60)
    revision = await mine.write("lease", b"mine", 0, WAIT_S)
    await mine.erase("lease", revision, WAIT_S)
    assert await yours.read("lease", WAIT_S) is None
    assert await yours.write("lease", b"yours", 0, WAIT_S) > revision


async def test_a_key_nobody_renews_expires(stores: MakeStores) -> None:
    """Past its time to live a key is gone and free, without anyone's doing."""
    mine, yours = stores(0.3)
    await mine.write("lease", b"mine", 0, WAIT_S)
    async with asyncio.timeout(30):
        while await yours.read("lease", WAIT_S) is not None:  # noqa: ASYNC110 - expiry sets no event
            await asyncio.sleep(0.01)
    assert await yours.write("lease", b"yours", 0, WAIT_S) > 0


async def test_without_a_connection_the_store_says_so(connect_bus: BusFactory) -> None:
    """A store that cannot be reached raises its own error, in memory and over a closed bus."""
    memory = MemoryKeyValue(MemoryBucket(SystemClock(), 1_000_000))
    memory.reachable = False
    bus = await connect_bus()
    await bus.close()
    for store in (memory, NatsKeyValue(bus, "test-closed", 1.0)):
        for attempt in (
            store.read("lease", WAIT_S),
            store.write("lease", b"", 0, WAIT_S),
            store.erase("lease", 1, WAIT_S),
        ):
            with pytest.raises(KeyValueError):
                await attempt


async def test_a_broker_that_stands_still_costs_the_time_out(tmp_path: Path) -> None:
    """No answer is an error after the time given, and the same store works again afterwards."""
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        store = NatsKeyValue(bus, "test", 60)
        await store.write("lease", b"1", 0, WAIT_S)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(KeyValueError, match="in time"):
            await store.read("lease", 0.05)
        os.kill(server.pid, signal.SIGCONT)
        entry = await store.read("lease", WAIT_S)
        assert entry is not None
        assert entry.value == b"1"
        await bus.close()


async def test_a_bucket_that_was_deleted_is_made_again(connect_bus: BusFactory) -> None:
    """Somebody's clean-up costs one error, not the service."""
    bus = await connect_bus()
    store = NatsKeyValue(bus, "test-deleted", 60)
    await store.write("lease", b"1", 0, WAIT_S)
    await bus.client.jetstream().delete_key_value("test-deleted")
    with pytest.raises(KeyValueError, match="test-deleted is gone"):
        await store.write("lease", b"2", 0, WAIT_S)
    assert await store.write("lease", b"2", 0, WAIT_S) == 1


async def test_a_bucket_that_forgets_too_soon_is_refused(connect_bus: BusFactory) -> None:
    """Keys that expire before the holder thinks so would make two holders; the error says what to do."""
    bus = await connect_bus()
    await NatsKeyValue(bus, "test-short", 1.0).read("lease", WAIT_S)
    with pytest.raises(KeyValueUnavailableError, match="test-short keeps keys for"):
        await NatsKeyValue(bus, "test-short", 60.0).read("lease", WAIT_S)


async def test_a_broker_without_jetstream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to start the broker, or how to do without."""
    write_config = NatsServer._write_config

    def without_jetstream(server: NatsServer) -> None:
        write_config(server)
        plain = json.loads(server._config.read_text())
        del plain["jetstream"]
        server._config.write_text(json.dumps(plain))

    monkeypatch.setattr(NatsServer, "_write_config", without_jetstream)
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        with pytest.raises(KeyValueUnavailableError, match="-js"):
            await NatsKeyValue(bus, "test", 60).read("lease", WAIT_S)
        await bus.close()


async def test_an_outcome_s_errors_are_the_store_s_own(connect_bus: BusFactory) -> None:
    """What the broker refuses for another reason (a bad key) is the store's error too."""
    store = NatsKeyValue(await connect_bus(), "test-keys", 60)
    with pytest.raises(KeyValueError):
        await store.read("a b", WAIT_S)
