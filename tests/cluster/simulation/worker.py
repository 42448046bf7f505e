"""A worker process: the real core over a real fake engine; its commands become messages and steps."""

from typing import assert_never

from mell_gpu_worker.core.commands import (
    AskFrontend,
    AskPeer,
    AskStatus,
    CloseLink,
    Command,
    Exit,
    OfferKv,
    OpenLink,
    PublishEvent,
    PublishTokens,
    Reply,
    RunStep,
    SendBlocks,
    SendEvicted,
    TellDropped,
)
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import (
    AskFailure,
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EngineFailed,
    Event,
    EvictionAnswered,
    EvictionUnanswered,
    FrontendAnswered,
    FrontendUnanswered,
    PeerAnswered,
    PeerUnanswered,
    StatusAnswered,
    StatusUnanswered,
    StepFinished,
    StoodStill,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.step import StepResult
from mell_gpu_worker.core.worker import WorkerCore
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import FRONTEND_REPLY, EvictionTaken, Refused, StreamStatusReply
from mell_shared.messages.worker import WORKER_COMMAND, WORKER_REPLY, WorkerCommand
from mell_shared.subjects import Subjects
from tests.cluster.simulation.clock import LocalClock
from tests.cluster.simulation.process import STOOD_STILL_US, Answered, Process
from tests.cluster.simulation.surroundings import Surroundings
from tests.gpu_worker.core.worlds import fake_engine

FRONTEND_TIMEOUT_US = 1_000_000
SHORTEST_SLEEP_US = 1_000
LONGEST_SLEEP_US = 100_000
"""As in the real shell."""


class WorkerProcess(Process):
    """One incarnation of a worker. `step_us`: what a step takes, beside what each of its tokens takes."""

    def __init__(self, node: str, clock: LocalClock, around: Surroundings, config: WorkerConfig, step_us: int) -> None:
        super().__init__(node, config.spec.worker, clock)
        self.network = around.network
        self.links = around.links
        self.judge = around.judge
        self.engine = fake_engine(config.spec.kv_blocks, config.spec.block_tokens)
        self.core = WorkerCore(config, clock.now_us())
        self.slowness = 1
        self.engine_broken = False
        self.exited = False
        self.writing: frozenset[int] = frozenset()
        """Blocks that the step under way writes to."""
        self._step_us = step_us
        self._steps = 0
        self._subjects = Subjects()

    def start(self) -> None:
        """Join the broker and begin to live."""
        self.network.connect(self)
        for subject in (self._subjects.worker_commands(self.name), self._subjects.all_workers):
            self.network.listen(self, subject, WORKER_COMMAND, self._commanded)
        self._pass_time(self.clock.now_us())

    def ask_to_stop(self) -> None:
        """Hand over a SIGTERM."""
        self.take(lambda: self.handle(StopRequested()))

    def connection_lost(self) -> None:
        """The connection to the broker is down."""
        self.handle(ConnectionLost())

    def connection_restored(self) -> None:
        """It is up again."""
        self.handle(ConnectionRestored())

    def handle(self, event: Event) -> None:
        """Give the core an event and do what it wants."""
        if self.exited:
            return
        commands = self.core.handle(event, self.clock.now_us())
        self.judge.saw(self.name, event, commands)
        self.core.check()
        for command in commands:
            self._perform(command)

    def _pass_time(self, due_us: int) -> None:
        if self.clock.now_us() - due_us > STOOD_STILL_US:
            self.handle(StoodStill())
        self.handle(TimePassed())
        now_us = self.clock.now_us()
        sleep_us = min(max(self.core.wake_us - now_us, SHORTEST_SLEEP_US), LONGEST_SLEEP_US)
        self.after(sleep_us, lambda: self._pass_time(now_us + sleep_us))

    def _commanded(self, command: WorkerCommand, reply_to: str) -> None:
        self.handle(CommandReceived(command, reply_to))

    def _perform(self, command: Command) -> None:
        match command:
            case RunStep():
                self._run(command)
            case PublishTokens(frontend, tokens):
                self.judge.published(self.name, tokens)
                self.network.publish(self, self._subjects.frontend_tokens(frontend), tokens)
            case PublishEvent(event):
                self.network.publish(self, self._subjects.scheduler_events, event)
            case Reply(reply_to, reply):
                self.network.publish(self, reply_to, reply)
            case AskStatus():
                self._ask_status(command)
            case SendEvicted():
                self._send_evicted(command)
            case AskPeer():
                self._ask_peer(command)
            case AskFrontend():
                self._ask_ruling(command)
            case OfferKv() | OpenLink() | SendBlocks() | CloseLink():
                self.links.perform(self, command)
            case TellDropped():
                pass
            case Exit():
                self._exit()
            case _:
                assert_never(command)

    def _exit(self) -> None:
        self.exited = True
        self.alive = False
        self.network.forget(self)
        self.links.die(self)

    def _run(self, command: RunStep) -> None:
        self.writing = self.judge.step_began(self, command.rows)
        tokens = sum(row.count for row in command.rows)
        took_us = (self._step_us + tokens * self._step_us // 20) * self.slowness
        self._steps += 1
        # What a step reads and writes may happen at any time during it: here at its end or its beginning, in turn.
        early = self.engine.execute(command.rows) if self._steps % 2 else None

        def finish() -> None:
            if self.engine_broken:
                self.handle(EngineFailed("the device is gone"))
                return
            result = early or self.engine.execute(command.rows)
            self.judge.step_ends(self, command.rows)
            self.writing = frozenset()
            self.handle(StepFinished(StepResult(result.sampled, took_us, result.failed)))

        self.after(took_us, finish)

    def _ask_status(self, command: AskStatus) -> None:
        def answered(reply: object) -> None:
            if isinstance(reply, StreamStatusReply):
                self.handle(StatusAnswered(command.frontend, command.message, reply))
            else:
                self.handle(StatusUnanswered(command.frontend))

        self._ask_frontend(command.frontend, command.message, FRONTEND_TIMEOUT_US, answered)

    def _send_evicted(self, command: SendEvicted) -> None:
        key = (command.message.sequence, command.message.generation)

        def answered(reply: object) -> None:
            known = isinstance(reply, EvictionTaken | Refused)
            self.handle(EvictionAnswered(*key) if known else EvictionUnanswered(*key))

        self._ask_frontend(command.frontend, command.message, FRONTEND_TIMEOUT_US, answered)

    def _ask_ruling(self, command: AskFrontend) -> None:
        def answered(reply: object) -> None:
            if isinstance(reply, Message):
                self.handle(FrontendAnswered(command.frontend, command.message, reply))
            else:
                self.handle(FrontendUnanswered(command.frontend, command.message))

        self._ask_frontend(command.frontend, command.message, command.timeout_us, answered)

    def _ask_frontend(self, frontend: str, message: Message, timeout_us: int, answered: Answered) -> None:
        subject = self._subjects.frontend_control(frontend)
        self.network.request(self, subject, message, replies=FRONTEND_REPLY, timeout_us=timeout_us, answered=answered)

    def _ask_peer(self, command: AskPeer) -> None:
        def answered(reply: object) -> None:
            if isinstance(reply, Message):
                self.handle(PeerAnswered(command.worker, command.message, reply))
            else:
                self.handle(PeerUnanswered(command.worker, command.message, _failure(reply)))

        subject = self._subjects.worker_commands(command.worker)
        self.network.request(
            self, subject, command.message, replies=WORKER_REPLY, timeout_us=command.timeout_us, answered=answered
        )


def _failure(reply: object) -> AskFailure:
    match reply:
        case "timeout" | "no_responder" | "disconnected":
            return reply
        case _:
            return "invalid"
