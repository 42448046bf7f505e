"""Takes sequences in: holds room, lets it be filled, claims them, and runs them once they are granted."""

from mell_gpu_worker.core.commands import AskFrontend, CloseLink, Command, OfferKv, PublishEvent, Reply, TellDropped
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import KvOffered, LinkEvent, LinkFailed, RoundArrived
from mell_gpu_worker.core.migration.adoption import adopt, start
from mell_gpu_worker.core.migration.incoming import Incoming, Question
from mell_gpu_worker.core.migration.past import Past
from mell_gpu_worker.core.migration.rules import fault
from mell_gpu_worker.core.migration.tables import (
    TARGET_ROLE,
    Act,
    TargetEvent,
    TargetPhase,
    begin,
    due,
    transition,
)
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Limits, Phase, arriving
from mell_shared.messages.frontend import FrontendReply, Granted, Refused
from mell_shared.messages.worker import (
    CaughtUp,
    CommitGranted,
    CommitMigration,
    CommitRefused,
    ExtendKv,
    KvRefused,
    KvReleased,
    ReleaseKv,
    ReserveKv,
    WorkerReply,
)

_HELD = frozenset({TargetPhase.OFFERING, TargetPhase.RESERVED, TargetPhase.JOINING})
_OVER = "this migration is not (any more) known here"


class Target:
    """All migrations to this worker. Once `closed` it takes no more, and keeps only what has been committed."""

    def __init__(self, config: WorkerConfig, residents: Residents) -> None:
        self.coming: dict[str, Incoming] = {}
        self.closed = False
        self._config = config
        self._spec = config.spec
        self._limits = config.moves
        self._residents = residents
        self._batcher = residents.batcher
        self._reservations = Past()
        self._commits = Past()
        self._fetches = config.can.kv == "fetched"
        self._by_blocks = not self._fetches and bool({"kv", "hybrid"} & set(config.spec.migration_modes))

    # --- what sources ask; None where the answer comes later

    def reserve(
        self, asked: ReserveKv, reply_to: str, grammar_fault: str | None, now_us: int
    ) -> tuple[WorkerReply | None, list[Command]]:
        """Hold room for a sequence, or refuse at once; the answer comes when an offer of the room is made."""
        move = self.coming.get(asked.migration)
        if move is not None:
            if move.standing.phase is TargetPhase.OFFERING:
                move.reply_to = reply_to
            return move.offered, []
        past = self._reservations.reply(asked.migration, now_us)
        if past is not None:
            return past, []
        said: list[Command] = []
        refused = self._refusal(asked, grammar_fault)
        if refused is None:
            older = self._residents.streams.older(asked.sequence, asked.generation)
            said = [] if older is None else self._residents.give_up(older, now_us)
            refused, more = self._hold(asked, reply_to, now_us)
            said += more
        if refused is not None:
            self._reservations.remember(asked.migration, refused, now_us)
        return refused, said

    def _refusal(self, asked: ReserveKv, grammar_fault: str | None) -> KvRefused | None:
        reason, message = self._fault_now(asked)
        if not reason:
            reason, message = fault(asked, self._config, grammar_fault)
        return KvRefused(reason=reason, message=message) if reason else None

    def _fault_now(self, asked: ReserveKv) -> tuple[str, str]:
        if self.closed:
            return "stopping", "this worker takes nothing new: it is drained or about to stop"
        newest = self._residents.streams.newest_generation(asked.sequence)
        if newest >= asked.generation:
            return "superseded", f"generation {newest} of it is known here"
        if any(move.asked.sequence == asked.sequence for move in self.coming.values()):
            return "busy", "it is moving here already"
        if len(self.coming) >= self._limits.max_incoming:
            return "busy", f"{len(self.coming)} sequences are moving here already"
        return "", ""

    def _hold(self, asked: ReserveKv, reply_to: str, now_us: int) -> tuple[KvRefused | None, list[Command]]:
        limits = Limits(self._spec.max_total_tokens, frozenset(self._config.eos_token_ids))
        sequence = arriving(asked, self._residents.next_order(asked.priority, now_us - asked.age_us), limits)
        tokens = len(sequence.token_ids) + max(1, min(asked.growth_tokens, sequence.max_outputs - sequence.outputs))
        if not self._batcher.reserve(sequence, tokens):
            free = self._batcher.pool.free_blocks
            text = f"{tokens} tokens do not fit now: {free} KV blocks are free"
            return KvRefused(reason="no_room", message=text), []
        sequence.cached_tokens = asked.cached_tokens
        size = self._spec.block_tokens
        standing = begin(TARGET_ROLE, now_us, self._limits)
        move = Incoming(asked, sequence, size, sequence.computed, standing, reply_to, now_us)
        move.computed = sequence.computed
        own = {"kv": len(sequence.token_ids) if self._fetches else 0, "hybrid": asked.split_tokens}
        move.limit_prefill(own.get(asked.mode, len(sequence.token_ids)))
        self.coming[move.migration] = move
        if not self._by_blocks:
            return None, self._offered(move, None, now_us)
        blocks = sequence.blocks[sequence.computed // size :]
        self._batcher.loans.lend(move.migration, blocks)
        move.linked = True
        return None, [OfferKv(move.migration, tuple(blocks), self._limits.reservation_us)]

    def _offered(self, move: Incoming, offer: KvOffered | None, now_us: int) -> list[Command]:
        # What it decodes itself comes first in each step.
        step_tokens = self._batcher.max_step_tokens - len(self._batcher.running)
        move.offered = move.reserved(offer, max(1, step_tokens))
        return self._apply(move, TargetEvent.OFFERED, now_us)

    def extend(self, asked: ExtendKv, reply_to: str, now_us: int) -> tuple[WorkerReply | None, list[Command]]:
        """Take in more ids, and answer once they are computed, or after a while."""
        move = self.coming.get(asked.migration)
        if move is None or move.standing.phase is not TargetPhase.RESERVED:
            return self._gone(asked.migration, now_us), []
        if self._unknown_ids(asked.output_ids) or not move.extend(asked.first_index, asked.output_ids):
            return KvRefused(reason="unsupported", message="these ids do not continue what is held"), []
        move.limit_prefill(asked.prefill_tokens)
        move.question = Question(reply_to, move.sequence.prefill_limit, now_us + self._limits.hold_us)
        return None, self._apply(move, TargetEvent.HEARD, now_us)

    def _gone(self, migration: str, now_us: int) -> WorkerReply:
        past = self._reservations.reply(migration, now_us)
        return past if isinstance(past, KvRefused) else KvRefused(reason="unknown", message=_OVER)

    def _unknown_ids(self, ids: list[int]) -> bool:
        return max(ids, default=0) >= self._config.vocab_size

    def commit(self, commit: CommitMigration, reply_to: str, now_us: int) -> tuple[WorkerReply | None, list[Command]]:
        """Take a sequence over; the answer comes when its frontend has decided."""
        move = self.coming.get(commit.migration)
        if move is not None and move.commit == commit and move.standing.phase is not TargetPhase.SETTLING:
            move.reply_to = reply_to
            return None, []
        past = self._commits.reply(commit.migration, now_us)
        if past is not None:
            return past, []
        if move is None or move.standing.phase is not TargetPhase.RESERVED:
            gone = self._gone(commit.migration, now_us)
            assert isinstance(gone, KvRefused)
            return CommitRefused(reason=gone.reason, message=gone.message), []
        if not self._continues(move, commit):
            return CommitRefused(reason="unsupported", message="these ids do not continue what is held"), []
        move.commit, move.reply_to, move.committed_us = commit, reply_to, now_us
        return None, self._apply(move, TargetEvent.COMMITTED, now_us)

    def _continues(self, move: Incoming, commit: CommitMigration) -> bool:
        if self._unknown_ids(commit.output_ids) or not move.extend(commit.first_index, commit.output_ids):
            return False
        known = len(commit.logprobs)
        return known <= move.sequence.outputs and (not known or move.sequence.sampling.logprobs is not None)

    def release(self, asked: ReleaseKv, now_us: int) -> tuple[WorkerReply, list[Command]]:
        """Free what is held, and refuse a reservation that its own release overtook."""
        move = self.coming.get(asked.migration)
        if move is None:
            if self._reservations.reply(asked.migration, now_us) is None:
                self._reservations.remember(asked.migration, KvRefused(reason="unknown", message=_OVER), now_us)
            return KvReleased(), []
        if move.standing.phase is TargetPhase.SETTLING:
            return KvReleased(), []
        return KvReleased(), self._apply(move, TargetEvent.RELEASED, now_us)

    # --- what the link and the frontend say

    def link(self, event: LinkEvent, now_us: int) -> list[Command]:
        """Take in what happened to a move's transfer."""
        move = self.coming[event.migration]
        phase = move.standing.phase
        match event:
            case KvOffered() if phase is TargetPhase.OFFERING:
                return self._offered(move, event, now_us)
            case RoundArrived(slots=slots):
                move.arrived.update(slots)
                if phase in {TargetPhase.RESERVED, TargetPhase.JOINING}:
                    return self._apply(move, TargetEvent.HEARD, now_us)
            case LinkFailed(reason=reason, message=message) if phase in _HELD and not move.in_place:
                # Refused here means that there are too many offers.
                why = "busy" if reason == "refused" else reason
                return self._apply(move, TargetEvent.LINK_FAILED, now_us, why, message)
            case _:
                pass
        return []

    def ruled(self, migration: str, reply: FrontendReply | None, now_us: int) -> list[Command]:
        """The frontend has decided on the claim, or says nothing sensible (None)."""
        move = self.coming.get(migration)
        if move is None or move.standing.phase is not TargetPhase.CLAIMING:
            return []
        match reply:
            case Granted(accepted=accepted) if accepted <= move.make_claim(self._spec.worker).length:
                move.granted, move.granted_us = reply, now_us
                return self._apply(move, TargetEvent.GRANTED, now_us)
            case Refused(reason=why):
                text = f"the frontend does not grant it ({why})"
                return self._apply(move, TargetEvent.REFUSED, now_us, "superseded", text)
            case _:
                return self._apply(move, TargetEvent.UNANSWERED, now_us)

    # --- what is to be noticed

    def proceed(self, now_us: int) -> list[Command]:
        """Notice what has become of each sequence that is on its way here; answer who waits for that."""
        said: list[Command] = []
        for move in tuple(self.coming.values()):
            self._note_progress(move, now_us)
            while (noticed := self._noticed(move, now_us)) is not None:
                said += self._apply(move, noticed[0], now_us, *noticed[1:])
            said += self._answer(move, now_us)
        return said

    @property
    def wake_us(self) -> int | None:
        """When `proceed` is due at the latest, if ever."""
        times: list[int | None] = []
        for move in self.coming.values():
            times += (move.standing.until_us, move.standing.again_us)
            times.append(move.question.until_us if move.question else None)
        return min((time_us for time_us in times if time_us is not None), default=None)

    @staticmethod
    def _note_progress(move: Incoming, now_us: int) -> None:
        sequence, phase = move.sequence, move.standing.phase
        if phase in _HELD and sequence.computed > move.computed:
            move.computed, move.prefilled_us = sequence.computed, now_us
        elif move.claim is not None and not move.first_token_us and sequence.outputs > move.claim.length:
            move.first_token_us = now_us

    def _noticed(self, move: Incoming, now_us: int) -> tuple[TargetEvent, str, str] | None:
        phase = move.standing.phase
        if phase is TargetPhase.OVER:
            return None
        why = self._lost(move)
        if why is not None:
            return TargetEvent.LOST, *why
        if phase is TargetPhase.JOINING and move.ready:
            return TargetEvent.READY, "", ""
        if phase is TargetPhase.SETTLING and move.first_token_us:
            return TargetEvent.FIRST_OUTPUT, "", ""
        late = due(TARGET_ROLE, move.standing, now_us)
        return None if late is None else (late, "timeout", "nothing was heard of it for too long")

    def _lost(self, move: Incoming) -> tuple[str, str] | None:
        """Why the sequence cannot be held any longer, if that is so."""
        phase, sequence = move.standing.phase, move.sequence
        if phase is TargetPhase.SETTLING:
            return None if sequence.live and sequence.phase is not Phase.WAITING else ("ended", "")
        newest = self._residents.streams.newest_generation(move.asked.sequence)
        if newest > move.asked.generation and phase is not TargetPhase.CLAIMING:
            return "superseded", f"generation {newest} of it is known here"
        if phase in _HELD and sequence.phase is not Phase.ARRIVING:
            return "no_room", "its blocks were needed for others"
        if self.closed and phase in {TargetPhase.OFFERING, TargetPhase.RESERVED}:
            return "stopping", "this worker takes nothing new: it is drained or about to stop"
        return None

    @staticmethod
    def _answer(move: Incoming, now_us: int) -> list[Command]:
        """Tell the source how far it is, if it waits for that and all is computed, or it has waited for long."""
        question, sequence = move.question, move.sequence
        if question is None or move.standing.phase is not TargetPhase.RESERVED:
            return []
        # Not while it is being computed: the source may be about to send the same blocks.
        if sequence.in_step or (sequence.computed < question.goal and now_us < question.until_us):
            return []
        move.question = None
        return [Reply(question.reply_to, CaughtUp(computed_tokens=sequence.computed))]

    def abandon(self, now_us: int, message: str = "this worker ends") -> list[Command]:
        """Nothing that comes can be run here any more."""
        said: list[Command] = []
        for move in tuple(self.coming.values()):
            said += self._apply(move, TargetEvent.LOST, now_us, "stopping", message)
        return said

    # --- doing what the table says

    def _apply(
        self, move: Incoming, event: TargetEvent, now_us: int, reason: str = "", message: str = ""
    ) -> list[Command]:
        move.standing, acts = transition(TARGET_ROLE, move.standing, event, now_us, self._limits)
        if reason:
            move.reason, move.message = reason, message
        said = [command for act in acts for command in self._do(move, act, now_us)]
        if move.standing.phase is TargetPhase.OVER:
            del self.coming[move.migration]
            over = KvRefused(reason=move.reason or "unknown", message=move.message or _OVER)
            self._reservations.remember(move.migration, over, now_us)
        return said

    def _do(self, move: Incoming, act: Act, now_us: int) -> list[Command]:
        match act:
            case Act.START:
                move.question = None
                start(move, self._batcher)
            case Act.FREE if move.sequence.live:
                self._batcher.end(move.sequence)
            case Act.FREE | Act.PAUSE:
                pass
            case _:
                return self._say(move, act, now_us)
        return []

    def _say(self, move: Incoming, act: Act, now_us: int) -> list[Command]:
        said: list[Command] = []
        match act:
            case Act.TELL_RESERVED:
                assert move.offered is not None
                said = self._reply(move, move.offered)
            case Act.CLAIM:
                claim = move.make_claim(self._spec.worker)
                said = [AskFrontend(move.asked.frontend, claim, self._limits.claim_timeout_us)]
            case Act.ADOPT:
                said = adopt(move, self._residents, now_us)
            case Act.TELL_GRANTED:
                assert move.granted is not None
                said = self._settle(move, CommitGranted(generation=move.granted.generation), now_us)
            case Act.REFUSE:
                said = self._refuse(move, now_us)
            case Act.CLOSE:
                linked, move.linked = move.linked, False
                said = [CloseLink(move.migration)] if linked else []
            case Act.TELL_COMMITTED:
                said = [PublishEvent(move.committed(self._spec.worker))] if move.adopted else []
            case _:
                raise AssertionError(f"a target does not {act}")
        return said

    @staticmethod
    def _reply(move: Incoming, reply: WorkerReply) -> list[Command]:
        reply_to, move.reply_to = move.reply_to, ""
        return [Reply(reply_to, reply)] if reply_to else []

    def _settle(self, move: Incoming, reply: CommitGranted | CommitRefused, now_us: int) -> list[Command]:
        self._commits.remember(move.migration, reply, now_us)
        return self._reply(move, reply)

    def _refuse(self, move: Incoming, now_us: int) -> list[Command]:
        """Tell whoever waits that nothing is held; if nobody does, let it be logged."""
        reason, message = move.reason or "unknown", move.message or _OVER
        if move.commit is not None:
            return self._settle(move, CommitRefused(reason=reason, message=message), now_us)
        refused = KvRefused(reason=reason, message=message)
        if move.question is not None:
            return [Reply(move.question.reply_to, refused)]
        said = self._reply(move, refused)
        dropped = TellDropped(move.migration, move.asked.sequence, move.asked.source, reason)
        return said or ([dropped] if move.reason else [])
