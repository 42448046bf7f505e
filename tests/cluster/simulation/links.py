"""The data plane: KV from one worker's pool to another's over links that are cut, slow or damage what they carry.

A block is copied at a moment of its own during a send, as the memory is just then: whoever gives blocks away that are
lent, or writes to them, is seen in the text.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

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
from tests.cluster.simulation.chance import Chance, Key
from tests.cluster.simulation.clock import EventQueue
from tests.cluster.simulation.network import Conditions

if TYPE_CHECKING:
    from tests.cluster.simulation.worker import WorkerProcess

_QUICK_US = 2_000
_MOST_CLOSING_US = 50_000
_MOST_BLOCK_US = 20_000
_MOST_NOTICE_US = 1_500_000
"""How late the other side of a link that was cut learns of it."""


@dataclass(slots=True, eq=False)
class End:
    """One worker's end of a migration's transfer."""

    worker: "WorkerProcess"
    migration: str
    blocks: tuple[int, ...] = ()
    """What a target offered."""
    secret: bytes = b""
    peer: "End | None" = None
    failed: bool = False
    closing: bool = False
    closed: bool = False
    sends: int = 0

    def tell(self, event: LinkEvent) -> None:
        """Let the worker know, unless it may hear nothing more of this link."""
        if not self.closed:
            self.worker.take(partial(self._hear, event))

    def _hear(self, event: LinkEvent) -> None:
        if not self.closed:
            self.worker.handle(event)


@dataclass(slots=True)
class _Send:
    """Blocks under way."""

    command: SendBlocks
    source: End
    target: End
    left: set[int] = field(default_factory=set)
    """Slots not copied yet."""
    over: bool = False
    damaged: bool = False


class Links:
    """All transfers of the cluster. `corrupting`: machines whose next send is damaged on its way."""

    checks = True
    """Whether damage is noticed; off only to show that the text tells of it."""

    def __init__(self, queue: EventQueue, chance: Chance, conditions: Conditions) -> None:
        self.corrupting: set[str] = set()
        self.sent_blocks = 0
        self.most_block_us = _MOST_BLOCK_US
        self._queue = queue
        self._chance = chance
        self._conditions = conditions
        self._ends: dict[tuple[str, str], End] = {}
        self._count = 0

    def perform(self, worker: "WorkerProcess", command: LinkCommand) -> None:
        """Do what a worker's core wants of a transfer."""
        key = (worker.name, command.migration)
        end = self._ends.get(key)
        if end is None:
            end = self._ends[key] = End(worker, command.migration)
        match command:
            case OfferKv():
                self._offer(end, command)
            case OpenLink():
                self._open(end, command)
            case SendBlocks():
                self._send(end, command)
            case CloseLink():
                end.closing = True
                self._after("close", _MOST_CLOSING_US, partial(self._close, end))

    def cut(self, node: str, other: str | None = None) -> None:
        """Break the links of a machine, or only those to one other machine."""
        for end in list(self._ends.values()):
            peer = end.peer
            if peer is not None and end.worker.node == node and other in (None, peer.worker.node):
                self._break(end, "the connection was cut")
                self._break(peer, "the connection was cut")

    def die(self, worker: "WorkerProcess") -> None:
        """A worker is gone: its peers learn it, sooner or later."""
        for end in [end for end in self._ends.values() if end.worker is worker]:
            end.closed = True
            del self._ends[worker.name, end.migration]
            if end.peer is not None:
                self._break(end.peer, "the peer is gone")

    def lent(self, worker: "WorkerProcess") -> bool:
        """Whether a transfer of the worker is not closed."""
        return any(end.worker is worker for end in self._ends.values())

    # --- a transfer's life

    def _offer(self, end: End, command: OfferKv) -> None:
        end.blocks = command.blocks
        end.secret = self._chance.number("secret", end.worker.name, end.migration).to_bytes(8, "little") * 2
        size_bytes = len(command.blocks) * end.worker.engine.spec.block_bytes
        offered = KvOffered(end.migration, end.worker.name, end.secret, size_bytes)
        self._after("offer", _QUICK_US, partial(end.tell, offered))
        late = LinkFailed(end.migration, "timeout", "the offer's lifetime is over")
        end.worker.after(command.lifetime_us, partial(self._fail, end, late))

    def _open(self, end: End, command: OpenLink) -> None:
        peer = self._ends.get((command.address, command.migration))
        if peer is None or not peer.worker.alive or not self._conditions.joined(end.worker, peer.worker):
            self._fail_soon(end, "unreachable", "nobody is there")
        elif peer.secret != command.secret or peer.closing or peer.failed or peer.peer is not None:
            self._fail_soon(end, "refused", "no such offer")
        else:
            end.peer, peer.peer = peer, end
            self._after("open", _QUICK_US, partial(self._opened, end))

    def _opened(self, end: End) -> None:
        if not end.failed and not end.closing:
            end.tell(LinkOpened(end.migration))

    def _close(self, end: End) -> None:
        if not end.worker.alive:
            return
        # The last it hears of this link, and not lost on a worker that stands still just now.
        end.worker.take(partial(end.worker.handle, LinkClosed(end.migration)))
        end.closed = True
        self._ends.pop((end.worker.name, end.migration), None)
        if end.peer is not None and not end.peer.closed:
            self._after("gone", _QUICK_US, partial(self._break_now, end.peer, "the peer has left"))

    # --- sending

    def _send(self, source: End, command: SendBlocks) -> None:
        target = source.peer
        assert target is not None, "blocks are sent over an open link"
        source.sends += 1
        name: tuple[Key, ...] = (source.worker.name, source.migration, source.sends)
        send = _Send(command, source, target, {slot for slot, _ in command.blocks})
        send.damaged = source.worker.node in self.corrupting
        self.corrupting.discard(source.worker.node)
        took_us = 1 + sum(self._chance.between(100, self.most_block_us, "block", *name, slot) for slot in send.left)
        took_us *= source.worker.slowness
        for slot, block in command.blocks:
            at_us = self._chance.between(0, took_us - 1, "copy", *name, slot)
            self._queue.after(at_us, partial(self._copy, send, slot, block))
        self._queue.after(took_us, partial(self._arrive, send, took_us))
        late = LinkFailed(source.migration, "timeout", "sending takes too long")
        source.worker.after(command.timeout_us, partial(self._give_up, send, late))

    def _copy(self, send: _Send, slot: int, block: int) -> None:
        source, target = send.source, send.target
        if send.over or source.closed or target.closed or source.failed or target.failed:
            return
        into = target.blocks[slot]
        for worker, used in ((source.worker, block), (target.worker, into)):
            assert worker.core.batcher.pool.references(used), f"{worker.name} gave away block {used}, which is lent"
        assert into not in target.worker.writing, f"{target.worker.name} writes to block {into} while it is received"
        target.worker.engine.kv_block(into)[:] = source.worker.engine.kv_block(block)
        if send.damaged:
            target.worker.engine.kv_block(into)[0] ^= 1
        send.left.discard(slot)
        self.sent_blocks += 1

    def _arrive(self, send: _Send, took_us: int) -> None:
        source, target = send.source, send.target
        if send.over or send.left or source.failed or target.failed:
            return
        send.over = True
        if send.damaged and self.checks:
            wrong = "a checksum is wrong"
            self._fail(target, LinkFailed(target.migration, "corrupt", wrong))
            self._fail(source, LinkFailed(source.migration, "corrupt", wrong))
            return
        size_bytes = len(send.command.blocks) * source.worker.engine.spec.block_bytes
        arrived = RoundArrived(target.migration, tuple(slot for slot, _ in send.command.blocks))
        # The source hears that all is in place before or after the target's core does.
        self._after("arrived", _QUICK_US, partial(target.tell, arrived))
        self._after("sent", _QUICK_US, partial(self._confirm, source, size_bytes, took_us))

    def _confirm(self, source: End, size_bytes: int, took_us: int) -> None:
        if not source.failed:
            source.tell(BlocksSent(source.migration, size_bytes, took_us))

    def _give_up(self, send: _Send, late: LinkFailed) -> None:
        if not send.over:
            send.over = True
            self._fail(send.source, late)

    # --- failing

    def _fail_soon(self, end: End, reason: LinkFailure, message: str) -> None:
        failed = LinkFailed(end.migration, reason, message)
        self._after("fail", _QUICK_US, partial(self._fail, end, failed))

    def _break(self, end: End, why: str) -> None:
        self._after("notice", _MOST_NOTICE_US, partial(self._break_now, end, why))

    def _break_now(self, end: End, why: str) -> None:
        self._fail(end, LinkFailed(end.migration, "link", why))

    @staticmethod
    def _fail(end: End, failed: LinkFailed) -> None:
        if not end.failed and not end.closed:
            end.failed = True
            end.tell(failed)

    def _after(self, what: str, most_us: int, action: partial[None]) -> None:
        self._count += 1
        self._queue.after(self._chance.between(50, most_us, "link", what, self._count), action)
