import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_gpu_worker.core.commands import CloseLink, LinkCommand, OfferKv, OpenLink, SendBlocks
from mell_gpu_worker.core.events import (
    BlocksSent,
    KvOffered,
    LinkClosed,
    LinkEvent,
    LinkFailed,
    LinkOpened,
    RoundArrived,
)
from mell_gpu_worker.data_plane import DataPlane
from mell_gpu_worker.surroundings import Surroundings
from mell_gpu_worker.transport.base import TransportOptions
from mell_gpu_worker.transport.memory import MemoryNetwork
from mell_shared.actor import Actor
from mell_shared.memory_bus import MemoryBroker
from mell_shared.subjects import Subjects
from mell_shared.testing import VirtualTimeLoop, run_virtually

BLOCK = 64
SECOND_US = 1_000_000


class End:
    """A data plane over a small pool of its own, and the events it gave."""

    def __init__(self, network: MemoryNetwork) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.pool = bytearray(8 * BLOCK)
        self.events: list[LinkEvent] = []
        self.actor: Actor[LinkEvent] = Actor("end", self._take)
        self.transport = network.transport(TransportOptions(), lambda event, fields: None)
        self.bus = MemoryBroker(seed=1).connect()
        around = Surroundings(bus=self.bus, subjects=Subjects(), clock=loop, transport=self.transport)
        self.plane = DataPlane(around, self.block, put=self.actor.put, spawn=self.actor.spawn)
        self.counts = around.data_counts
        self.started = asyncio.Event()
        self.task = asyncio.create_task(self.actor.run(self.started.set))

    def block(self, index: int) -> memoryview:
        """The memory of a block."""
        return memoryview(self.pool)[index * BLOCK : (index + 1) * BLOCK]

    async def _take(self, event: LinkEvent) -> None:
        self.events.append(event)

    async def do(self, command: LinkCommand, kind: type[LinkEvent]) -> LinkEvent:
        """Carry out a command and return the next event of that kind, or the failure that came instead."""
        known = len(self.events)
        self.plane.perform(command)
        async with asyncio.timeout(60):
            while True:
                for event in self.events[known:]:
                    if isinstance(event, kind | LinkFailed):
                        return event
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        """End the actor, then the plane, as the service does."""
        self.actor.stop()
        await self.task
        await self.plane.close()
        await self.bus.close()
        assert not len(self.plane)
        assert not self.transport.tasks


Scene = Callable[[End, End], Awaitable[None]]


def play(scene: Scene) -> None:
    """Run a scene between a target and a source, and check that nothing is left."""

    async def main() -> None:
        network = MemoryNetwork()
        target, source = End(network), End(network)
        await target.started.wait()
        await source.started.wait()
        source.pool[:] = bytes(range(256)) * (len(source.pool) // 256)
        await scene(target, source)
        await source.close()
        await target.close()
        assert len(asyncio.all_tasks()) == 1

    run_virtually(main())


async def linked(target: End, source: End, blocks: tuple[int, ...] = (5, 3)) -> None:
    """A link of the migration `m`."""
    offered = await target.do(OfferKv("m", blocks, 60 * SECOND_US), KvOffered)
    assert isinstance(offered, KvOffered)
    assert offered.size_bytes == BLOCK * len(blocks)
    command = OpenLink("m", offered.address, offered.secret, offered.size_bytes, SECOND_US)
    assert await source.do(command, LinkOpened) == LinkOpened("m")


def test_blocks_travel_from_pool_to_pool() -> None:
    """Into the slots asked for, told at both ends, and counted."""

    async def scene(target: End, source: End) -> None:
        await linked(target, source)
        sent = await source.do(SendBlocks("m", ((1, 0), (0, 7)), SECOND_US), BlocksSent)
        assert isinstance(sent, BlocksSent)
        assert sent.size_bytes == 2 * BLOCK
        assert bytes(target.block(3)) == bytes(source.block(0))
        assert bytes(target.block(5)) == bytes(source.block(7))
        assert [set(event.slots) for event in target.events if isinstance(event, RoundArrived)] == [{0, 1}]
        assert source.counts.sent_bytes == target.counts.received_bytes == 2 * BLOCK
        for end in (source, target):
            assert await end.do(CloseLink("m"), LinkClosed) == LinkClosed("m")
            assert end.events[-1] == LinkClosed("m")

    play(scene)


def test_the_source_leaving_is_told_at_the_target_and_is_no_fault() -> None:
    """Every transfer ends so."""

    async def scene(target: End, source: End) -> None:
        await linked(target, source)
        await source.do(CloseLink("m"), LinkClosed)
        await asyncio.sleep(0.1)
        assert [event.reason for event in target.events if isinstance(event, LinkFailed)] == ["link"]
        assert not target.counts.failures

    play(scene)


def test_failures_come_with_their_reasons() -> None:
    """Nobody there, a wrong secret, a wrong size, another transport; each counted."""

    async def scene(target: End, source: End) -> None:
        offered = await target.do(OfferKv("m", (1,), 60 * SECOND_US), KvOffered)
        assert isinstance(offered, KvOffered)
        address, secret, size = offered.address, offered.secret, offered.size_bytes
        for name, (where, word, size_bytes, reason) in {
            "a": ("memory://here:99", secret, size, "unreachable"),
            "b": (address, bytes(32), size, "refused"),
            "c": (address, secret, size + 1, "refused"),
            "d": ("tcp://127.0.0.1:1", secret, size, "refused"),
            "e": ("rubbish", secret, size, "refused"),
        }.items():
            failed = await source.do(OpenLink(name, where, word, size_bytes, SECOND_US), LinkOpened)
            assert isinstance(failed, LinkFailed)
            assert (failed.migration, failed.reason) == (name, reason)
            assert failed.message
            await source.do(CloseLink(name), LinkClosed)
        assert source.counts.failures == {"unreachable": 1, "refused": 4}

    play(scene)


def test_an_offer_expires() -> None:
    """Nobody came in its lifetime: a failure, and blocks that come back with the close."""

    async def scene(target: End, source: End) -> None:
        await target.do(OfferKv("m", (1,), SECOND_US), KvOffered)
        await asyncio.sleep(1.1)
        assert isinstance(target.events[-1], LinkFailed)
        assert target.events[-1].reason == "timeout"
        await target.do(CloseLink("m"), LinkClosed)

    play(scene)


def test_too_many_offers_are_refused() -> None:
    """The transport's bound comes back as a failure."""

    async def scene(target: End, source: End) -> None:
        for number in range(TransportOptions().max_offers):
            assert isinstance(await target.do(OfferKv(f"m{number}", (), SECOND_US), KvOffered), KvOffered)
        failed = await target.do(OfferKv("one more", (), SECOND_US), KvOffered)
        assert isinstance(failed, LinkFailed)
        assert failed.reason == "refused"

    play(scene)


@pytest.mark.parametrize("migration", ["m", "never heard of"])
def test_a_close_is_always_answered(migration: str) -> None:
    """Also of what was never opened."""

    async def scene(target: End, source: End) -> None:
        assert await target.do(CloseLink(migration), LinkClosed) == LinkClosed(migration)

    play(scene)


@settings(max_examples=60)
@given(turns=st.integers(0, 40), at_target=st.booleans(), stopped=st.booleans())
def test_a_link_closed_at_any_moment_says_so_last(turns: int, at_target: bool, stopped: bool) -> None:
    """Whatever is under way: one `LinkClosed`, nothing of this link after it, and no write to the memory lent."""

    async def scene(target: End, source: End) -> None:
        closing, other = (target, source) if at_target else (source, target)

        async def transfer() -> None:
            await linked(target, source, (5, 3, 1))
            for _ in range(3):
                await source.do(SendBlocks("m", ((0, 0), (1, 7), (2, 2)), SECOND_US), BlocksSent)

        under_way = asyncio.create_task(transfer())
        for _ in range(turns):
            await asyncio.sleep(0)
        under_way.cancel()
        closing.plane.perform(CloseLink("m"))
        while LinkClosed("m") not in closing.events:  # noqa: ASYNC110 - the very turn is what is looked for
            await asyncio.sleep(0)
        told, memory = len(closing.events), bytes(closing.pool)
        other.plane.perform(CloseLink("m"))
        await asyncio.sleep(3)
        assert closing.events[told - 1] == LinkClosed("m")
        assert closing.events.count(LinkClosed("m")) == 1
        assert len(closing.events) == told
        assert bytes(closing.pool) == memory
        if stopped:
            closing.actor.stop()

    play(scene)


def test_a_service_that_stops_closes_what_is_open() -> None:
    """Without a word to the core: both transfers are ended with their transport."""

    async def scene(target: End, source: End) -> None:
        await linked(target, source)
        assert len(target.plane) == len(source.plane) == 1

    play(scene)
