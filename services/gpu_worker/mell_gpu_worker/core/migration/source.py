"""Moves sequences away: notices what happens to each, asks the table what that means, and does it."""

from mell_gpu_worker.core.commands import (
    AskFrontend,
    AskPeer,
    CloseLink,
    Command,
    OpenLink,
    PublishEvent,
    SendBlocks,
)
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import (
    AskFailure,
    BlocksSent,
    LinkEvent,
    LinkFailed,
    LinkOpened,
    PeerAnswered,
    PeerUnanswered,
)
from mell_gpu_worker.core.migration.copying import CatchingUp, Copying
from mell_gpu_worker.core.migration.orders import Orders
from mell_gpu_worker.core.migration.outgoing import LinkState, Outgoing
from mell_gpu_worker.core.migration.past import Past
from mell_gpu_worker.core.migration.releases import Releases
from mell_gpu_worker.core.migration.tables import (
    SOURCE_ROLE,
    Act,
    SourceEvent,
    SourcePhase,
    due,
    transition,
)
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Phase
from mell_shared.messages.frontend import FrontendReply, MigrationAborted
from mell_shared.messages.worker import (
    CaughtUp,
    CommandInvalid,
    CommitGranted,
    CommitMigration,
    CommitRefused,
    ExtendKv,
    KvRefused,
    KvReserved,
    Migrate,
    MigrateAccepted,
    MigrateRefused,
    ReleaseKv,
    ReserveKv,
    WorkerReply,
)

_MISSES = 3
"""Questions that a target may leave unanswered in a row while it prefills."""
_STEPS_TO_STOP = 2
"""Steps that a sequence may still take before it stands still: the one under way, and the next."""
_WHOLE = frozenset({SourcePhase.RESERVING, SourcePhase.COPYING, SourcePhase.STOPPING, SourcePhase.SENDING})
"""Until a commit is sent, the sequence must keep what is being copied, if anything is."""
_LINKED = frozenset({SourcePhase.COPYING, SourcePhase.STOPPING, SourcePhase.SENDING})
_FAILURES: dict[AskFailure, str] = {
    "timeout": "timeout",
    "no_responder": "unreachable",
    "disconnected": "unreachable",
    "invalid": "unsupported",
}
"""As reasons of `MigrationFailed`."""


class Source:
    """All migrations from this worker."""

    def __init__(self, config: WorkerConfig, residents: Residents) -> None:
        self.moving: dict[str, Outgoing] = {}
        self._config = config
        self._limits = config.moves
        self._residents = residents
        self._batcher = residents.batcher
        self._orders = Orders(config, residents)
        self._past = Past()
        self._releases = Releases(config.moves.peer_timeout_us)

    # --- orders

    def order(self, migrate: Migrate, now_us: int) -> tuple[WorkerReply, list[Command]]:
        """Begin to move a sequence, or say why not; a repeat gets the first answer, or hears that it failed."""
        if migrate.migration in self.moving:
            return MigrateAccepted(), []
        past = self._past.reply(migrate.migration, now_us)
        if past is not None:
            return past, []
        refused = self._orders.refusal(migrate, self.moving.values())
        if refused is not None:
            self._past.remember(migrate.migration, refused, now_us)
            return refused, []
        move = self.moving[migrate.migration] = self._orders.begin(migrate, now_us)
        return MigrateAccepted(), [self._ask(move, move.reserve(self._config, now_us), self._limits.peer_timeout_us)]

    @staticmethod
    def _ask(move: Outgoing, question: ReserveKv | ExtendKv | CommitMigration, timeout_us: int) -> Command:
        move.question = question
        return AskPeer(move.target, question, timeout_us)

    # --- what the target says

    def answered(self, event: PeerAnswered, now_us: int) -> list[Command]:
        """Take in a target's answer; one to a question that is not open any more changes nothing."""
        if isinstance(event.message, ReleaseKv):
            self._releases.answered(event.message)
            return []
        move = self.moving.get(event.message.migration)
        if move is None or move.question != event.message:
            return []
        move.question, move.misses = None, 0
        return self._take_answer(move, event, now_us)

    def _take_answer(self, move: Outgoing, event: PeerAnswered, now_us: int) -> list[Command]:
        what, reason, message = SourceEvent.UNANSWERED, "unsupported", "its answer makes no sense"
        match event.message, event.reply:
            case ReserveKv(), KvReserved() as held if self._sensible(move, held):
                self._held(move, held)
                what, reason, message = SourceEvent.RESERVED, "", ""
            case ExtendKv() as asked, CaughtUp() as reply:
                return self._caught_up(move, asked, reply.computed_tokens, now_us)
            case CommitMigration(), CommitGranted():
                what, reason, message = SourceEvent.GRANTED, "", ""
            case _, (KvRefused() | CommitRefused()) as refused:
                what, reason, message = SourceEvent.REFUSED, refused.reason, refused.message
            case _, CommandInvalid() as invalid:
                message = invalid.message
            case _:
                pass
        return self._apply(move, what, now_us, reason, message)

    def unanswered(self, event: PeerUnanswered, now_us: int) -> list[Command]:
        """A target did not answer: ask on while it prefills, else that is an event of its own."""
        if isinstance(event.message, ReleaseKv):
            return self._releases.unanswered(event)
        move = self.moving.get(event.message.migration)
        if move is None or move.question != event.message:
            return []
        move.question = None
        move.misses += 1
        if isinstance(event.message, ExtendKv) and event.failure == "timeout" and move.misses < _MISSES:
            return []
        text = f"{event.worker} did not answer {type(event.message).__name__} ({event.failure.replace('_', ' ')})"
        return self._apply(move, SourceEvent.UNANSWERED, now_us, _FAILURES[event.failure], text)

    @staticmethod
    def _sensible(move: Outgoing, held: KvReserved) -> bool:
        return held.held_tokens % move.block_tokens == 0 and held.held_tokens < len(move.sequence.token_ids)

    def _held(self, move: Outgoing, held: KvReserved) -> None:
        move.held = held
        if move.by_ids:
            told = move.sequence.prompt_tokens + move.known_outputs
            move.catching = CatchingUp(told, told - 1, held.held_tokens)
            return
        first = max(move.split_tokens, held.held_tokens)
        move.copying = Copying(first // move.block_tokens)
        if move.split_tokens > held.held_tokens:
            move.catching = CatchingUp(move.split_tokens, move.split_tokens, held.held_tokens)

    def _caught_up(self, move: Outgoing, asked: ExtendKv, computed: int, now_us: int) -> list[Command]:
        catching, tokens = move.catching, len(move.sequence.token_ids)
        assert catching is not None
        catching.answered(computed)
        move.known_outputs = max(move.known_outputs, asked.first_index + len(asked.output_ids))
        if not move.by_ids:
            return []
        if move.freezing:
            # What it has computed stays; its last block, if not full, is sent whole.
            move.mode, move.catching, move.freezing = "kv", None, False
            move.copying = Copying(max(computed // move.block_tokens, move.first_slot_block))
        elif catching.reached and not catching.exhausted(tokens, self._limits.token_rounds):
            if not self._tail_small(move):
                catching.next_round(tokens)
        elif catching.stalled or (catching.reached and not self._tail_small(move)):
            return self._fall_back(move, now_us)
        return []

    def _fall_back(self, move: Outgoing, now_us: int) -> list[Command]:
        """The target's prefill does not catch up with the sequence: send KV instead."""
        assert move.held is not None
        if "kv" in self._config.spec.migration_modes and move.held.address:
            move.freezing = True
            return []
        assert move.catching is not None
        if not move.catching.reached:
            # Slow or not to be seen, but there is no other way: until the move itself takes too long.
            return []
        return self._apply(move, SourceEvent.REFUSED, now_us, "timeout", "the target's prefill does not catch up")

    # --- what the link and the frontend say

    def link(self, event: LinkEvent, now_us: int) -> list[Command]:
        """Take in what happened to a move's transfer."""
        move = self.moving[event.migration]
        match event:
            case LinkOpened() if move.link is LinkState.OPENING:
                move.link = LinkState.OPEN
            case BlocksSent(size_bytes=size_bytes, took_us=took_us):
                assert move.copying is not None
                move.copying.confirm(size_bytes, took_us)
            case LinkFailed(reason=reason, message=message) if move.standing.phase in _LINKED:
                why = "link" if reason == "refused" else reason
                return self._apply(move, SourceEvent.LINK_FAILED, now_us, why, message)
            case _:
                pass
        return []

    def ruled(self, migration: str, reply: FrontendReply | None, now_us: int) -> list[Command]:
        """The frontend says who owns the sequence, or nothing sensible (None)."""
        move = self.moving.get(migration)
        if move is None or move.standing.phase not in {SourcePhase.ASKING, SourcePhase.RESUMED}:
            return []
        if not isinstance(reply, MigrationAborted):
            return self._apply(move, SourceEvent.UNANSWERED, now_us)
        return self._apply(move, SourceEvent.OWNED if reply.owned else SourceEvent.DISOWNED, now_us)

    # --- what is to be noticed, and to be done next

    def proceed(self, now_us: int) -> list[Command]:
        """Notice what has become of each moving sequence; send and ask what is due."""
        said: list[Command] = []
        for move in tuple(self.moving.values()):
            self._note_tokens(move, now_us)
            while (event := self._noticed(move, now_us)) is not None:
                said += self._apply(move, event, now_us, *self._why(move, event))
            said += self._send(move) + self._tell(move)
        return said

    @property
    def wake_us(self) -> int | None:
        """When `proceed` is due at the latest, if ever."""
        times = [t for m in self.moving.values() for t in (m.standing.until_us, m.standing.again_us) if t is not None]
        return min(times, default=None)

    @staticmethod
    def _note_tokens(move: Outgoing, now_us: int) -> None:
        if move.sequence.outputs != move.outputs:
            move.outputs, move.token_us = move.sequence.outputs, now_us

    def _noticed(self, move: Outgoing, now_us: int) -> SourceEvent | None:
        phase = move.standing.phase
        if phase is SourcePhase.OVER:
            return None
        preempted = move.sequence.phase is Phase.WAITING and phase in _WHOLE
        if not move.sequence.live or (preempted and move.needs_blocks):
            return SourceEvent.LOST
        if phase is SourcePhase.COPYING and self._tail_small(move):
            return SourceEvent.TAIL_SMALL if move.fits else SourceEvent.REFUSED
        if phase is SourcePhase.STOPPING and not move.sequence.in_step:
            return SourceEvent.STOPPED
        if phase is SourcePhase.SENDING and self._all_sent(move):
            return SourceEvent.ALL_SENT
        return due(SOURCE_ROLE, move.standing, now_us)

    @staticmethod
    def _why(move: Outgoing, event: SourceEvent) -> tuple[str, str]:
        """Reason and words of what is noticed here, should the move fail with it."""
        if event is SourceEvent.LATE and move.standing.phase is SourcePhase.COPYING:
            return "timeout", "it took too long to copy"
        if event is SourceEvent.REFUSED:
            return "no_room", "it grew beyond the room at the target while that was being asked for"
        if event is SourceEvent.LOST:
            return ("ended", "it ended here") if not move.sequence.live else ("preempted", "it was preempted here")
        return "", ""

    def _tail_small(self, move: Outgoing) -> bool:
        if move.room_tokens < _STEPS_TO_STOP:
            return True
        copying, catching = move.copying, move.catching
        if copying is not None:
            sent = move.link is LinkState.OPEN and copying.tail_small(move.full_blocks, self._limits.kv_rounds)
            return sent and (catching is None or catching.reached)
        assert catching is not None
        assert move.held is not None
        tokens = len(move.sequence.token_ids)
        return not move.freezing and catching.tail_small(tokens, move.held.step_tokens, self._limits.token_rounds)

    @staticmethod
    def _all_sent(move: Outgoing) -> bool:
        copying = move.copying
        return copying is None or (not copying.busy and copying.sent >= move.used_blocks)

    def _send(self, move: Outgoing) -> list[Command]:
        """Open the link when it is needed; send blocks when it is free."""
        phase, copying, held = move.standing.phase, move.copying, move.held
        if copying is None or held is None or phase not in {SourcePhase.COPYING, SourcePhase.SENDING}:
            return []
        limits = self._limits
        if move.link is LinkState.NONE:
            move.link = LinkState.OPENING
            return [OpenLink(move.migration, held.address, held.secret, held.size_bytes, limits.link_us)]
        if move.link is LinkState.OPENING:
            return []
        last = phase is SourcePhase.SENDING
        blocks = copying.next_blocks(move.used_blocks if last else move.full_blocks, limits.send_blocks)
        if not blocks:
            return []
        table = [move.sequence.blocks[block] for block in blocks]
        self._batcher.loans.lend(move.migration, table)
        slots = tuple(zip((block - move.first_slot_block for block in blocks), table, strict=True))
        timeout_us = limits.send_us
        if last:
            timeout_us = copying.tail_timeout_us(len(blocks), limits.tail_least_us, limits.tail_us)
        return [SendBlocks(move.migration, slots, timeout_us)]

    def _tell(self, move: Outgoing) -> list[Command]:
        """Tell ids, and ask how far the target is, while there is anything to wait for."""
        catching = move.catching
        if move.standing.phase is not SourcePhase.COPYING or catching is None or move.question is not None:
            return []
        if catching.reached and not move.freezing:
            return []
        return [self._ask(move, move.extend(), self._limits.peer_timeout_us)]

    # --- doing what the table says

    def _apply(
        self, move: Outgoing, event: SourceEvent, now_us: int, reason: str = "", message: str = ""
    ) -> list[Command]:
        move.standing, acts = transition(SOURCE_ROLE, move.standing, event, now_us, self._limits)
        if reason and not move.reason:
            move.reason, move.message = reason, message
        said = [command for act in acts for command in self._do(move, act, now_us)]
        if move.standing.phase is SourcePhase.OVER:
            del self.moving[move.migration]
            self._past.remember(move.migration, _looking_back(move, failed=Act.FAIL in acts), now_us)
        return said

    def _do(self, move: Outgoing, act: Act, now_us: int) -> list[Command]:
        match act:
            case Act.STOP:
                move.sequence.halted, move.question = True, None
            case Act.RESUME:
                move.sequence.halted = False
            case Act.FREE:
                move.sequence.halted = False
                self._residents.leave(move.sequence, now_us)
            case Act.COMMIT:
                return [self._ask(move, move.commit(now_us), self._limits.commit_timeout_us)]
            case Act.ABORT:
                return [AskFrontend(move.sequence.frontend, move.abort(), self._limits.claim_timeout_us)]
            case Act.CLOSE:
                return [] if move.link is LinkState.NONE else [CloseLink(move.migration)]
            case Act.RELEASE:
                return [self._releases.send(move.target, move.migration)]
            case Act.FAIL:
                return [PublishEvent(move.failed())]
            case Act.PAUSE:
                pass
            case _:
                raise AssertionError(f"a source does not {act}")
        return []


def _looking_back(move: Outgoing, *, failed: bool) -> MigrateAccepted | MigrateRefused:
    """What a repeated order is told of a move that is over: whoever leads only now has not heard why it failed."""
    return MigrateRefused(reason=move.reason, message=move.message) if failed else MigrateAccepted()
