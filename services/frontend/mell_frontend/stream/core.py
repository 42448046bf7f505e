"""The frontend as arbiter: every event of its sequences comes in here, every command goes out.

Pure and deterministic: no IO, no clock, no randomness; the same events at the same times give the same commands.

Why a frontend decides who may continue a sequence: it shares the fate of the client, so there is exactly one of
it, and nobody has to agree with it. It alone raises the generation, and it takes tokens only from the present
owner in the present generation. So schedulers and workers may be late, wrong, or two at once: that costs work
that is thrown away, never a token twice, left out or out of order.

Three rules carry that (`check` and the state machine tests hold them):
- a generation has at most one owner; taking a sequence from an owner raises the generation first;
- a new owner begins exactly at the accepted length, by `Submit` with the ids so far or by a grant;
- accepted tokens are never taken back.
"""

from typing import assert_never

from mell_frontend.stream.book import Book
from mell_frontend.stream.commands import Command
from mell_frontend.stream.control import Arbiter
from mell_frontend.stream.events import (
    CancelAnswered,
    CancelFailed,
    ConnectionLost,
    ConnectionRestored,
    ControlArrived,
    Event,
    PlaceAnswered,
    PlaceFailed,
    ResendAnswered,
    ResendFailed,
    SequenceClosed,
    SequenceOpened,
    StoodStill,
    SubmitAnswered,
    SubmitFailed,
    SubmitTooLong,
    Ticked,
    TokensArrived,
)
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.liveness import Liveness
from mell_frontend.stream.placing import Placing
from mell_frontend.stream.stats import StreamStats
from mell_frontend.stream.status import StatusJudge
from mell_frontend.stream.tokens import TokenIntake
from mell_shared.messages.frontend import AbortMigration, Claim, Evicted, StreamStatus


class FrontendCore:
    """All sequences of one frontend, `frontend` being its process id; begins as connected."""

    def __init__(self, frontend: str, limits: StreamLimits | None = None) -> None:
        limits = limits or StreamLimits()
        self.frontend = frontend
        self.stats = StreamStats()
        self._book = Book(limits.max_ended)
        self._life = Life(frontend, limits, self._book, self.stats)
        self._placing = Placing(limits, self._book, self._life)
        self._intake = TokenIntake(limits, self._book, self._life, self.stats)
        self._arbiter = Arbiter(limits, self._book, self._life, self._intake, self.stats)
        self._status = StatusJudge(limits, self._book, self._life)
        self._liveness = Liveness(limits, self._book, self._life, self._intake)

    @property
    def open_sequences(self) -> int:
        """How many sequences have not ended."""
        return len(self._book.open)

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Return what to do now that `event` happened; `now_us` never runs backwards."""
        match event:
            case TokensArrived(message):
                return self._intake.take(message, now_us)
            case ControlArrived():
                return self._asked(event, now_us)
            case PlaceAnswered() | PlaceFailed() | SubmitAnswered() | SubmitFailed() | SubmitTooLong():
                return self._answered(event, now_us)
            case ResendAnswered() | ResendFailed() | CancelAnswered() | CancelFailed():
                return self._settled(event, now_us)
            case SequenceOpened() | SequenceClosed():
                return self._wanted(event, now_us)
            case Ticked() | StoodStill() | ConnectionLost() | ConnectionRestored():
                return self._passed(event, now_us)
            case _:
                assert_never(event)

    def check(self) -> None:
        """Derive every invariant again and assert it."""
        self._book.check()

    def _wanted(self, event: SequenceOpened | SequenceClosed, now_us: int) -> list[Command]:
        match event:
            case SequenceOpened(request):
                return self._life.open(request, now_us)
            case SequenceClosed(sequence):
                return self._life.close(sequence, now_us)

    def _asked(self, event: ControlArrived, now_us: int) -> list[Command]:
        match event.message:
            case StreamStatus() as status:
                return self._status.judge(event.reply_to, status, now_us)
            case Claim() as claim:
                return self._arbiter.claim(event.reply_to, claim, now_us)
            case AbortMigration() as abort:
                return self._arbiter.abort(event.reply_to, abort, now_us)
            case Evicted() as eviction:
                return self._arbiter.evict(event.reply_to, eviction, now_us)

    def _answered(
        self, event: PlaceAnswered | PlaceFailed | SubmitAnswered | SubmitFailed | SubmitTooLong, now_us: int
    ) -> list[Command]:
        match event:
            case PlaceAnswered():
                return self._placing.place_answered(event, now_us)
            case PlaceFailed():
                return self._placing.place_failed(event, now_us)
            case SubmitAnswered():
                return self._placing.submit_answered(event, now_us)
            case SubmitFailed():
                return self._placing.submit_failed(event, now_us)
            case SubmitTooLong():
                return self._placing.submit_too_long(event, now_us)

    def _settled(
        self, event: ResendAnswered | ResendFailed | CancelAnswered | CancelFailed, now_us: int
    ) -> list[Command]:
        match event:
            case ResendAnswered():
                return self._liveness.resend_answered(event, now_us)
            case ResendFailed():
                return self._liveness.resend_failed(event, now_us)
            case CancelAnswered():
                return self._liveness.cancel_answered(event)
            case CancelFailed():
                return self._liveness.cancel_failed(event, now_us)

    def _passed(self, event: Ticked | StoodStill | ConnectionLost | ConnectionRestored, now_us: int) -> list[Command]:
        match event:
            case Ticked():
                return self._liveness.ticked(now_us)
            case StoodStill():
                return self._liveness.stood_still(now_us)
            case ConnectionLost():
                return self._liveness.connection_lost(now_us)
            case ConnectionRestored():
                return self._liveness.connection_restored(now_us)
