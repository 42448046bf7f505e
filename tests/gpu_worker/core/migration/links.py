"""A KV transport between fake pools that a test can cut, stall and damage; it holds both sides to their lending."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.engine.fake import FakeEngine

from .network import DELAYS_US, LATENCY_US, MS_US, Network

BLOCK_US = 400
"""Time that one block takes."""


@dataclass(slots=True)
class End:
    """One worker's end of a transfer."""

    name: str
    tell: Callable[[LinkEvent], None]
    core: WorkerCore
    engine: FakeEngine
    closed: bool = False
    failed: bool = False


@dataclass(slots=True)
class Transfer:
    """An offer, and who fills it."""

    target: End
    blocks: tuple[int, ...]
    secret: bytes
    size_bytes: int
    source: End | None = None
    filled: set[int] = field(default_factory=set)
    confirmed: set[int] = field(default_factory=set)


class Links:
    """All transfers of a cluster."""

    def __init__(self, network: Network, arrival_us: int = 2 * MS_US) -> None:
        self._network = network
        self._arrival_us = arrival_us
        """How much later than it might a target hears of a round: perhaps after the commit that follows it."""
        self._offers: dict[str, Transfer] = {}
        self._opened: dict[str, Transfer] = {}
        self.copied_blocks = 0
        network.mourn = self._peer_died

    def perform(self, end: End, command: LinkCommand) -> None:
        """Do what one worker wants."""
        match command:
            case OfferKv():
                self._offer(end, command)
            case OpenLink():
                self._open(end, command)
            case SendBlocks():
                self._send(end, command)
            case CloseLink(migration):
                self._close(end, migration)

    def _offer(self, end: End, command: OfferKv) -> None:
        secret = f"{command.migration} of {end.name}".encode()
        size_bytes = len(command.blocks) * end.engine.spec.block_bytes
        transfer = Transfer(end, command.blocks, secret, size_bytes)
        self._offers[command.migration] = transfer
        offered = KvOffered(command.migration, end.name, secret, size_bytes)
        self._network.later(0, lambda: self._tell(end, offered))
        self._network.later(
            command.lifetime_us, lambda: self._fail(end, command.migration, "timeout", "the offer's lifetime is over")
        )

    def _open(self, end: End, command: OpenLink) -> None:
        verdict = self._network.judge("OpenLink", end.name, command.address)
        migration = command.migration
        if verdict == "lose":
            self._network.later(command.timeout_us, lambda: self._fail(end, migration, "timeout", "no answer"))
            return

        def arrive() -> None:
            transfer = self._offers.get(migration)
            known = transfer is not None and (transfer.secret, transfer.size_bytes) == (
                command.secret,
                command.size_bytes,
            )
            if transfer is None or transfer.target.name in self._network.dead or verdict == "cut":
                self._fail(end, migration, "unreachable", "nobody listens")
            elif not known or transfer.target.closed:
                self._fail(end, migration, "refused", "no such offer")
            else:
                transfer.source = end
                self._opened[migration] = transfer
                self._tell(end, LinkOpened(migration))

        self._network.later(2 * LATENCY_US + DELAYS_US.get(verdict, 0), arrive)

    def _send(self, end: End, command: SendBlocks) -> None:
        migration = command.migration
        transfer = self._opened[migration]
        verdict = self._network.judge("SendBlocks", end.name, transfer.target.name)
        slots = [slot for slot, _ in command.blocks]
        assert not transfer.filled & set(slots), "a slot is sent twice"
        transfer.filled |= set(slots)
        half = len(command.blocks) // 2
        took_us = BLOCK_US * len(command.blocks) + DELAYS_US.get(verdict, 0)
        self._network.later(took_us // 2, lambda: self._copy(transfer, migration, command.blocks[:half]))
        if verdict == "lose":  # somebody is stopped
            self._network.later(command.timeout_us, lambda: self._fail(end, migration, "timeout", "no progress"))
            return
        if verdict in {"cut", "corrupt", "kill sender", "kill receiver"}:
            reason: LinkFailure = "corrupt" if verdict == "corrupt" else "link"
            self._network.later(took_us // 2, lambda: self._fail(end, migration, reason, "damaged"))
            self._network.later(took_us // 2, lambda: self._fail(transfer.target, migration, reason, "damaged"))
            return
        done = BlocksSent(migration, len(slots) * end.engine.spec.block_bytes, took_us)

        self._network.later(command.timeout_us, lambda: self._fail(end, migration, "timeout", "no progress", slots))

        def finish() -> None:
            if self._copy(transfer, migration, command.blocks[half:]):
                transfer.confirmed |= set(slots)
                self._tell(end, done)
                arrived = RoundArrived(migration, tuple(slots))
                self._network.later(self._arrival_us, lambda: self._tell(transfer.target, arrived))

        self._network.later(took_us, finish)

    def _copy(self, transfer: Transfer, migration: str, blocks: tuple[tuple[int, int], ...]) -> bool:
        """Copy blocks as long as both ends are open, else return False; what is not lent is not to be touched."""
        source, target = transfer.source, transfer.target
        assert source is not None
        if any(end.closed or end.failed or end.name in self._network.dead for end in (source, target)):
            return False
        size = source.engine.spec.block_tokens
        for slot, block in blocks:
            place = transfer.blocks[slot]
            assert block in source.core.batcher.loans.of(migration), "a block is read that is not lent"
            assert place in target.core.batcher.loans.of(migration), "a block is written that is not lent"
            target.engine.pool[place * size : (place + 1) * size] = source.engine.pool[
                block * size : (block + 1) * size
            ]
            self.copied_blocks += 1
        return True

    def _close(self, end: End, migration: str) -> None:
        def closed() -> None:
            end.closed = True
            self._tell(end, LinkClosed(migration), last=True)
            transfer = self._opened.get(migration)
            if transfer is not None and transfer.source is not None:
                other = transfer.source if end is transfer.target else transfer.target
                self._network.later(LATENCY_US, lambda: self._fail(other, migration, "link", "the peer has left"))

        self._network.later(LATENCY_US, closed)

    def _peer_died(self, name: str) -> None:
        """A worker is gone: the other ends of its transfers notice."""
        for migration, transfer in self._opened.items():
            for end, other in ((transfer.source, transfer.target), (transfer.target, transfer.source)):
                if end is not None and other is not None and end.name == name:
                    self._fail(other, migration, "link", "the peer is gone")

    def _fail(
        self, end: End, migration: str, reason: LinkFailure, message: str, unless: Sequence[int] | None = None
    ) -> None:
        if unless and self._opened[migration].confirmed.issuperset(unless):
            return
        if not end.failed and not end.closed:
            end.failed = True
            self._tell(end, LinkFailed(migration, reason, message))

    def _tell(self, end: End, event: LinkEvent, *, last: bool = False) -> None:
        if end.name in self._network.dead or (end.closed and not last):
            return
        if end.failed and not last and not isinstance(event, LinkFailed):
            return
        end.tell(event)
