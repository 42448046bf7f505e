"""One contract for the store in memory and the one on a real broker."""

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from mell_shared.clock import ManualClock, SystemClock
from mell_shared.key_value import KeyValue, KeyValueConflictError, KeyValueError, KeyValueUnavailableError
from mell_shared.memory_key_value import MemoryBucket, MemoryKeyValue
from mell_shared.nats_key_value import NatsKeyValue
from tests.conftest import BusFactory

WAIT_S = 60.0


@pytest_asyncio.fixture(params=["memory", "nats"])
async def store(request: pytest.FixtureRequest, connect_bus: BusFactory) -> AsyncIterator[KeyValue]:
    """An empty bucket whose keys live for a minute."""
    if request.param == "memory":
        yield MemoryKeyValue(MemoryBucket(SystemClock(), 60_000_000))
    else:
        yield NatsKeyValue(await connect_bus(), f"test-{secrets.token_hex(4)}", 60.0)


async def test_a_key_without_a_value(store: KeyValue) -> None:
    """Reading what was never written gives None."""
    assert await store.read("key", WAIT_S) is None


async def test_what_was_written_is_read(store: KeyValue) -> None:
    """Value and revision come back."""
    revision = await store.write("key", b"value", 0, WAIT_S)
    entry = await store.read("key", WAIT_S)
    assert entry is not None
    assert (entry.value, entry.revision) == (b"value", revision)


async def test_a_second_creation_conflicts(store: KeyValue) -> None:
    """Revision 0 means that there must be no value."""
    await store.write("key", b"first", 0, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await store.write("key", b"second", 0, WAIT_S)
    entry = await store.read("key", WAIT_S)
    assert entry is not None
    assert entry.value == b"first"


async def test_an_update_needs_the_present_revision(store: KeyValue) -> None:
    """Only who knows the last write may follow it."""
    first = await store.write("key", b"1", 0, WAIT_S)
    second = await store.write("key", b"2", first, WAIT_S)
    assert second > first
    with pytest.raises(KeyValueConflictError):
        await store.write("key", b"3", first, WAIT_S)


async def test_an_erased_key_can_be_created_again(store: KeyValue) -> None:
    """Giving a key back leaves it as if it had expired."""
    revision = await store.write("key", b"1", 0, WAIT_S)
    await store.erase("key", revision, WAIT_S)
    assert await store.read("key", WAIT_S) is None
    assert await store.write("key", b"2", 0, WAIT_S) > revision


async def test_erasing_needs_the_present_revision(store: KeyValue) -> None:
    """Nobody gives back what another holds."""
    revision = await store.write("key", b"1", 0, WAIT_S)
    await store.write("key", b"2", revision, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await store.erase("key", revision, WAIT_S)


async def test_keys_are_apart(store: KeyValue) -> None:
    """A write to one key does not disturb another's revision."""
    revision = await store.write("a", b"1", 0, WAIT_S)
    await store.write("b", b"1", 0, WAIT_S)
    await store.write("a", b"2", revision, WAIT_S)


async def test_memory_keys_expire() -> None:
    """A key not written for the time to live is gone, and can be created anew."""
    clock = ManualClock()
    store = MemoryKeyValue(MemoryBucket(clock, 5_000_000))
    revision = await store.write("key", b"1", 0, WAIT_S)
    clock.advance_us(4_000_000)
    await store.write("key", b"2", revision, WAIT_S)
    clock.advance_us(4_999_999)
    assert await store.read("key", WAIT_S) is not None
    clock.advance_us(1)
    assert await store.read("key", WAIT_S) is None
    await store.write("key", b"3", 0, WAIT_S)


async def test_an_unreachable_memory_store() -> None:
    """A cut connection is an error, not an absent key."""
    store = MemoryKeyValue(MemoryBucket(ManualClock(), 1))
    store.reachable = False
    with pytest.raises(KeyValueError):
        await store.read("key", WAIT_S)


@pytest.mark.connected
async def test_keys_on_the_broker_expire(connect_bus: BusFactory) -> None:
    """The bucket's time to live holds for updated keys too."""
    store = NatsKeyValue(await connect_bus(), f"test-{secrets.token_hex(4)}", 5.0)
    revision = await store.write("key", b"1", 0, WAIT_S)
    await store.write("key", b"2", revision, WAIT_S)
    async with asyncio.timeout(60):
        while await store.read("key", WAIT_S) is not None:  # noqa: ASYNC110 - expiry sets no event
            await asyncio.sleep(0.1)
    await store.write("key", b"3", 0, WAIT_S)


@pytest.mark.connected
async def test_a_bucket_is_shared_by_connections(connect_bus: BusFactory) -> None:
    """Two processes see one key; the second one's creation conflicts."""
    name = f"test-{secrets.token_hex(4)}"
    first = NatsKeyValue(await connect_bus(), name, 60.0)
    second = NatsKeyValue(await connect_bus(), name, 60.0)
    await first.write("key", b"1", 0, WAIT_S)
    with pytest.raises(KeyValueConflictError):
        await second.write("key", b"2", 0, WAIT_S)


@pytest.mark.connected
async def test_a_closed_connection_is_an_error(connect_bus: BusFactory) -> None:
    """Nothing is sent, and nothing waits for a reconnection."""
    bus = await connect_bus()
    store = NatsKeyValue(bus, "test-closed", 60.0)
    await bus.close()
    with pytest.raises(KeyValueError, match="down"):
        await store.write("key", b"1", 0, WAIT_S)


@pytest.mark.connected
async def test_a_deleted_bucket_is_made_again(connect_bus: BusFactory) -> None:
    """An operator's clean-up costs one failed call."""
    bus = await connect_bus()
    name = f"test-{secrets.token_hex(4)}"
    store = NatsKeyValue(bus, name, 60.0)
    revision = await store.write("key", b"1", 0, WAIT_S)
    await bus.client.jetstream().delete_key_value(name)
    with pytest.raises(KeyValueError):
        await store.write("key", b"2", revision, WAIT_S)
    assert await store.read("key", WAIT_S) is None
    await store.write("key", b"3", 0, WAIT_S)


@pytest.mark.connected
async def test_a_bucket_that_forgets_too_soon_is_refused(connect_bus: BusFactory) -> None:
    """A lease on it would be lost while its holder trusts it."""
    bus = await connect_bus()
    name = f"test-{secrets.token_hex(4)}"
    await NatsKeyValue(bus, name, 1.0).read("key", WAIT_S)
    with pytest.raises(KeyValueUnavailableError, match="delete it"):
        await NatsKeyValue(bus, name, 5.0).read("key", WAIT_S)
