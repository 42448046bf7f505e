"""All migrations of one worker, from here and to here: who each command and event is for."""

from mell_gpu_worker.core.commands import Command
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import (
    BlocksSent,
    FrontendAnswered,
    FrontendUnanswered,
    LinkClosed,
    LinkEvent,
    PeerAnswered,
    PeerUnanswered,
)
from mell_gpu_worker.core.migration.source import Source
from mell_gpu_worker.core.migration.tables import SourcePhase, TargetPhase
from mell_gpu_worker.core.migration.target import Target
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Phase
from mell_shared.messages.frontend import Claim
from mell_shared.messages.worker import (
    CommitMigration,
    ExtendKv,
    KvRefused,
    Migrate,
    MigrateRefused,
    PeerCommand,
    ReleaseKv,
    ReserveKv,
    WorkerReply,
)

_TAKEN = "this migration is known here already, at its other end"
_HELD = frozenset({TargetPhase.OFFERING, TargetPhase.RESERVED, TargetPhase.JOINING})
_STANDING_STILL = frozenset(
    {SourcePhase.STOPPING, SourcePhase.SENDING, SourcePhase.COMMITTING, SourcePhase.ASKING},
)


class Moves:
    """Both roles of a worker in migrations. `proceed` is to be called after every event."""

    def __init__(self, config: WorkerConfig, residents: Residents) -> None:
        self.source = Source(config, residents)
        self.target = Target(config, residents)
        self._loans = residents.batcher.loans
        self._residents = residents

    def __bool__(self) -> bool:
        """Whether any sequence is on its way, or a transfer not closed."""
        return bool(self.source.moving or self.target.coming or self._loans)

    def order(self, migrate: Migrate, now_us: int) -> tuple[WorkerReply, list[Command]]:
        """A scheduler orders a move from here."""
        if migrate.migration in self.target.coming:
            return MigrateRefused(reason="busy", message=_TAKEN), []
        return self.source.order(migrate, now_us)

    def asked(
        self, asked: PeerCommand, reply_to: str, grammar_fault: str | None, now_us: int
    ) -> tuple[WorkerReply | None, list[Command]]:
        """Another worker asks; the reply is None if it comes later, to `reply_to`."""
        match asked:
            case ReserveKv():
                if asked.migration in self.source.moving:
                    return KvRefused(reason="busy", message=_TAKEN), []
                return self.target.reserve(asked, reply_to, grammar_fault, now_us)
            case ExtendKv():
                return self.target.extend(asked, reply_to, now_us)
            case CommitMigration():
                return self.target.commit(asked, reply_to, now_us)
            case ReleaseKv():
                return self.target.release(asked, now_us)

    def take(
        self,
        event: PeerAnswered | PeerUnanswered | FrontendAnswered | FrontendUnanswered,
        now_us: int,
    ) -> list[Command]:
        """Take in an answer or the lack of one; what belongs to no move changes nothing."""
        match event:
            case PeerAnswered():
                return self.source.answered(event, now_us)
            case PeerUnanswered():
                return self.source.unanswered(event, now_us)
            case FrontendAnswered() | FrontendUnanswered():
                reply = event.reply if isinstance(event, FrontendAnswered) else None
                ruled = self.target.ruled if isinstance(event.message, Claim) else self.source.ruled
                return ruled(event.message.migration, reply, now_us)

    def take_link(self, event: LinkEvent, now_us: int) -> list[Command]:
        """Take in news of a transfer; what belongs to no move changes nothing."""
        if isinstance(event, LinkClosed) or (isinstance(event, BlocksSent) and event.migration in self.source.moving):
            self._loans.take_back(event.migration)
        if event.migration in self.source.moving:
            return self.source.link(event, now_us)
        if event.migration in self.target.coming:
            return self.target.link(event, now_us)
        return []

    def proceed(self, now_us: int) -> list[Command]:
        """Notice what time and the batch have done to the sequences that move."""
        said = self.source.proceed(now_us) if self.source.moving else []
        return said + self.target.proceed(now_us) if self.target.coming else said

    @property
    def wake_us(self) -> int | None:
        """When `proceed` is due at the latest, if ever."""
        times = (self.source.wake_us, self.target.wake_us)
        return min((time_us for time_us in times if time_us is not None), default=None)

    def check(self) -> None:
        """Assert that the batch agrees about who arrives, who stands still, and who is unclaimed."""
        batcher, coming = self._residents.batcher, self.target.coming.values()
        held = {id(m.sequence) for m in coming if m.standing.phase in _HELD}
        assert held == {id(sequence) for sequence in batcher.arriving}, "room is held for no migration, or not held"
        claiming = {id(m.sequence) for m in coming if m.standing.phase is TargetPhase.CLAIMING and m.sequence.live}
        unclaimed = {id(row) for row in (*batcher.running, *batcher.waiting) if row.unclaimed}
        assert claiming == unclaimed, "an unclaimed sequence belongs to no claim"
        still = {id(m.sequence) for m in self.source.moving.values() if m.standing.phase in _STANDING_STILL}
        halted = {id(row) for row in (*batcher.running, *batcher.waiting) if row.halted}
        assert still == halted, "a sequence stands still for no migration"
        gone = [m for m in self.source.moving.values() if m.sequence.halted and m.sequence.phase is Phase.WAITING]
        assert not any(m.needs_blocks for m in gone), "what is being sent from a sequence's blocks is gone"
