"""One harness for both buses: connect, cut the link, restore it. The contract's tests run on each."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import pytest
import pytest_asyncio

from mell_shared.bus import Bus
from mell_shared.memory_bus import MemoryBroker, MemoryBus
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer
from tests.processes import stands_still


async def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as `condition` holds; the timeout only ends a test that has failed."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.002)


async def freeze(server: NatsServer) -> None:
    """Make the server stand still: its port accepts and its connections stay, but nothing is answered."""
    os.kill(server.pid, signal.SIGSTOP)
    await eventually(lambda: stands_still(server.pid))


class BusHarness(Protocol):
    """A broker whose connections a test can cut."""

    async def connect(self) -> Bus:
        """Return a new connection, closed after the test."""
        ...

    async def cut(self) -> None:
        """Take the broker away from all connections."""
        ...

    async def restore(self) -> None:
        """Give it back; connections find it by themselves."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class MemoryHarness:
    """The harness over a `MemoryBroker`."""

    def __init__(self) -> None:
        self._broker = MemoryBroker(seed=1)
        self._buses: list[MemoryBus] = []

    async def connect(self) -> Bus:
        """Return a new connection."""
        self._buses.append(self._broker.connect())
        return self._buses[-1]

    async def cut(self) -> None:
        """Disconnect every bus."""
        for bus in self._buses:
            bus.disconnect()

    async def restore(self) -> None:
        """Reconnect every bus."""
        for bus in self._buses:
            bus.reconnect()

    async def close(self) -> None:
        """Close every bus."""
        for bus in self._buses:
            await bus.close()


class NatsHarness:
    """The harness over a real server."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._buses: list[NatsBus] = []

    async def connect(self) -> Bus:
        """Return a new connection."""
        self._buses.append(await NatsBus.connect(self._server.url))
        return self._buses[-1]

    async def cut(self) -> None:
        """Kill the server, as a crash does."""
        self._server.kill()
        await eventually(lambda: not any(bus.connected for bus in self._buses))

    async def restore(self) -> None:
        """Start it again on its port."""
        self._server.start()

    async def close(self) -> None:
        """Close every bus."""
        for bus in self._buses:
            await bus.close()


@pytest.fixture(scope="module")
def mortal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server that tests may kill if they start it again."""
    with NatsServer(tmp_path_factory.mktemp("mortal")) as server:
        yield server


@pytest_asyncio.fixture(params=["memory", "nats"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[BusHarness]:
    """Each bus in turn."""
    made: BusHarness
    made = MemoryHarness() if request.param == "memory" else NatsHarness(request.getfixturevalue("mortal_server"))
    yield made
    await made.close()
