"""A frontend process: the real stream core; readers are the judge's."""

from typing import assert_never

from mell_frontend.generation import SequenceRequest
from mell_frontend.peers import Timeouts
from mell_frontend.stream.commands import (
    AskPlacement,
    AskResend,
    CancelSequence,
    Command,
    DeliverTokens,
    FailSequence,
    ReplyControl,
    SubmitSequence,
    TellWaiting,
)
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.events import (
    AskFailure,
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
    Ticked,
    TokensArrived,
)
from mell_shared.messages.frontend import FRONTEND_CONTROL, TOKENS_GENERATED, Claim, FrontendControl, TokensGenerated
from mell_shared.messages.scheduler import PLACE_REPLY, Placed, Queued, Rejected
from mell_shared.messages.worker import (
    WORKER_REPLY,
    CancelDone,
    CommandInvalid,
    ResendDone,
    SubmitAccepted,
    SubmitRefused,
)
from mell_shared.subjects import Subjects
from tests.cluster.simulation.clock import LocalClock
from tests.cluster.simulation.process import Answered, Process
from tests.cluster.simulation.surroundings import Surroundings

TICK_US = 50_000


class FrontendProcess(Process):
    """One incarnation of a frontend."""

    def __init__(self, node: str, name: str, clock: LocalClock, around: Surroundings) -> None:
        super().__init__(node, name, clock)
        self.network = around.network
        self.judge = around.judge
        self.core = FrontendCore(name)
        self._claims: dict[str, Claim] = {}
        self._timeouts = Timeouts()
        self._subjects = Subjects()

    def start(self) -> None:
        """Join the broker and begin to live."""
        self.network.connect(self)
        self.network.listen(self, self._subjects.frontend_tokens(self.name), TOKENS_GENERATED, self._got_tokens)
        self.network.listen(self, self._subjects.frontend_control(self.name), FRONTEND_CONTROL, self._asked)
        self.every(TICK_US, lambda: self.handle(Ticked()), after_standstill=lambda: self.handle(StoodStill()))

    def open(self, request: SequenceRequest) -> None:
        """Let a client begin to read."""
        self.take(lambda: self.handle(SequenceOpened(request)))

    def close(self, sequence: str) -> None:
        """Let a client leave."""
        self.take(lambda: self.handle(SequenceClosed(sequence)))

    def connection_lost(self) -> None:
        """The connection to the broker is down."""
        self.handle(ConnectionLost())

    def connection_restored(self) -> None:
        """It is up again."""
        self.handle(ConnectionRestored())

    def handle(self, event: Event) -> None:
        """Give the core an event and do what it wants."""
        commands = self.core.handle(event, self.clock.now_us())
        self.judge.saw(self.name, event, commands)
        self.core.check()
        for command in commands:
            self._perform(command, event)

    def _got_tokens(self, message: TokensGenerated, reply_to: str) -> None:
        self.handle(TokensArrived(message))

    def _asked(self, message: FrontendControl, reply_to: str) -> None:
        if isinstance(message, Claim):
            self._claims[reply_to] = message
        self.handle(ControlArrived(reply_to, message))

    def _perform(self, command: Command, cause: Event) -> None:
        match command:
            case DeliverTokens():
                self.judge.delivered(command, cause)
            case FailSequence():
                self.judge.failed(command)
            case TellWaiting(sequence):
                self.judge.waits(sequence)
            case ReplyControl(reply_to, reply):
                self.judge.answered(self._claims.pop(reply_to, None), reply)
                self.network.publish(self, reply_to, reply)
            case AskPlacement():
                self._place(command)
            case SubmitSequence():
                self._submit(command)
            case AskResend():
                self._resend(command)
            case CancelSequence():
                self._cancel(command)
            case _:
                assert_never(command)

    def _place(self, command: AskPlacement) -> None:
        key = (command.message.sequence, command.ask)

        def answered(reply: object) -> None:
            good = isinstance(reply, Placed | Queued | Rejected)
            self.handle(PlaceAnswered(*key, reply) if good else PlaceFailed(*key, _failure(reply)))

        timeout_us = round(self._timeouts.place_s * 1e6)
        self.network.request(
            self, self._subjects.place, command.message, replies=PLACE_REPLY, timeout_us=timeout_us, answered=answered
        )

    def _submit(self, command: SubmitSequence) -> None:
        self.judge.submitted(command.message, command.worker)
        key = (command.message.sequence, command.ask)

        def answered(reply: object) -> None:
            good = isinstance(reply, SubmitAccepted | SubmitRefused | CommandInvalid)
            self.handle(SubmitAnswered(*key, reply) if good else SubmitFailed(*key, _failure(reply)))

        subject = self._subjects.worker_commands(command.worker)
        timeout_us = round(self._timeouts.submit_s * 1e6)
        self.network.request(
            self, subject, command.message, replies=WORKER_REPLY, timeout_us=timeout_us, answered=answered
        )

    def _resend(self, command: AskResend) -> None:
        key = (command.message.sequence, command.message.generation)

        def answered(reply: object) -> None:
            if isinstance(reply, ResendDone):
                self.handle(ResendAnswered(*key, reply.known))
            else:
                self.handle(ResendFailed(*key, _failure(reply)))

        self._command(command, answered)

    def _cancel(self, command: CancelSequence) -> None:
        key = (command.message.sequence, command.message.generation)

        def answered(reply: object) -> None:
            done = isinstance(reply, CancelDone)
            self.handle(CancelAnswered(*key) if done else CancelFailed(*key, _failure(reply)))

        self._command(command, answered)

    def _command(self, command: AskResend | CancelSequence, answered: Answered) -> None:
        subject = self._subjects.worker_commands(command.worker)
        timeout_us = round(self._timeouts.command_s * 1e6)
        self.network.request(
            self, subject, command.message, replies=WORKER_REPLY, timeout_us=timeout_us, answered=answered
        )


def _failure(reply: object) -> AskFailure:
    """Return the failure itself; a reply of the wrong kind is as good as none that can be read."""
    match reply:
        case "timeout" | "no_responder" | "disconnected":
            return reply
        case _:
            return "invalid"
