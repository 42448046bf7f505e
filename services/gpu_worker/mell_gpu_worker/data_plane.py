"""KV transfers by migration: carries out the core's link commands on a transport; whatever happens is an event.

Waits for nobody without a deadline, raises nothing that a peer or link can cause, and ends every transfer in order:
what was under way is stopped, then the connection closed, then the blocks are said to be free (`LinkClosed`).
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from mell_gpu_worker.core.commands import CloseLink, LinkCommand, OfferKv, OpenLink, SendBlocks
from mell_gpu_worker.core.events import (
    BlocksSent,
    KvOffered,
    LinkClosed,
    LinkEvent,
    LinkFailed,
    LinkFailure,
    LinkOpened,
    RoundArrived,
)
from mell_gpu_worker.surroundings import Spawn, Surroundings
from mell_gpu_worker.transport.base import (
    SECRET_BYTES,
    CorruptedError,
    DeadlineError,
    Incoming,
    LinkLostError,
    Outgoing,
    ProtocolError,
    RefusedError,
    TransportError,
)

Put = Callable[[LinkEvent], Awaitable[None]]
"""Hands an event to the core, as `Actor.put`."""


@dataclass(slots=True, eq=False)
class _Lane:
    """This end of one migration's transfer, and what is being done with it."""

    incoming: Incoming | None = None
    outgoing: Outgoing | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def end(self) -> None:
        """Stop what is under way, then close: memory is lent until both are done."""
        tasks = tuple(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for end in (self.incoming, self.outgoing):
            if end is not None:
                await end.close()


class DataPlane:
    """The transfers of one worker. `kv_block` gives the memory of a pool block, as the engine port says."""

    def __init__(self, around: Surroundings, kv_block: Callable[[int], Any], put: Put, spawn: Spawn) -> None:
        assert around.transport is not None, "there is nothing to move KV over"
        self._transport = around.transport
        self._clock = around.clock
        self._counts = around.data_counts
        self._kv_block = kv_block
        self._put = put
        self._spawn = spawn
        self._lanes: dict[str, _Lane] = {}
        self._log = structlog.get_logger()

    def __len__(self) -> int:
        """Return the number of transfers that are not closed."""
        return len(self._lanes)

    def perform(self, command: LinkCommand) -> None:
        """Begin what the core wants; never waits."""
        lane = self._lanes.setdefault(command.migration, _Lane())
        match command:
            case OfferKv():
                self._begin(lane, self._offer(lane, command))
            case OpenLink():
                self._begin(lane, self._open(lane, command))
            case SendBlocks():
                self._begin(lane, self._send(lane, command))
            case CloseLink(migration):
                del self._lanes[migration]
                self._spawn(self._close(lane, migration))

    async def close(self) -> None:
        """End every transfer and the transport; no memory is lent afterwards. After the actor's tasks are gone."""
        while self._lanes:
            _, lane = self._lanes.popitem()
            await lane.end()
        await self._transport.close()

    def _begin(self, lane: _Lane, work: Coroutine[Any, Any, None]) -> None:
        task = self._spawn(work)
        if task is not None:
            lane.tasks.add(task)
            task.add_done_callback(lane.tasks.discard)

    async def _close(self, lane: _Lane, migration: str) -> None:
        await lane.end()
        await self._put(LinkClosed(migration))

    # --- a target's end

    async def _offer(self, lane: _Lane, command: OfferKv) -> None:
        assert lane.incoming is None, "a migration has one link"
        migration, lifetime_s = command.migration, command.lifetime_us / 1e6
        secret = secrets.token_bytes(SECRET_BYTES)
        try:
            buffers = [self._kv_block(block) for block in command.blocks]
            lane.incoming = self._transport.offer(secret, buffers, lifetime_s)
            await self._put(KvOffered(migration, self._transport.address, secret, lane.incoming.size_bytes))
            while True:
                arrived = await lane.incoming.receive(lifetime_s)
                self._counts.received_bytes += arrived.size_bytes
                await self._put(RoundArrived(migration, arrived.slots))
        except LinkLostError as error:
            # Every transfer ends so: the source leaves when it is done. Whether it was, the core knows.
            self._log.debug("link_ended", migration=migration, why=str(error))
            await self._put(LinkFailed(migration, "link", str(error)))
        except TransportError as error:
            await self._fail(migration, _reason(error), error)

    # --- a source's end

    async def _open(self, lane: _Lane, command: OpenLink) -> None:
        assert lane.outgoing is None, "a migration has one link"
        migration, timeout_s = command.migration, command.timeout_us / 1e6
        try:
            lane.outgoing = await self._transport.connect(
                command.address, command.secret, command.size_bytes, timeout_s
            )
        except LinkLostError as error:
            await self._fail(migration, "unreachable", error)
        except TransportError as error:
            await self._fail(migration, _reason(error), error)
        else:
            await self._put(LinkOpened(migration))

    async def _send(self, lane: _Lane, command: SendBlocks) -> None:
        assert lane.outgoing is not None, "blocks are sent over an open link"
        migration, begun_us = command.migration, self._clock.now_us()
        try:
            slots = [(slot, self._kv_block(block)) for slot, block in command.blocks]
            sent = await lane.outgoing.send(slots, command.timeout_us / 1e6)
        except TransportError as error:
            await self._fail(migration, _reason(error), error)
        else:
            self._counts.sent_bytes += sent.size_bytes
            self._counts.unchecked_bytes += sent.unchecked_bytes
            await self._put(BlocksSent(migration, sent.size_bytes, self._clock.now_us() - begun_us))

    async def _fail(self, migration: str, reason: LinkFailure, error: TransportError) -> None:
        self._counts.failures[reason] += 1
        self._log.warning("link_failed", migration=migration, reason=reason, why=str(error))
        await self._put(LinkFailed(migration, reason, str(error)))


def _reason(error: TransportError) -> LinkFailure:
    match error:
        case RefusedError():
            return "refused"
        case DeadlineError():
            return "timeout"
        case CorruptedError() | ProtocolError():
            return "corrupt"
        case _:
            return "link"
