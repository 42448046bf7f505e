"""Real worker cores over real fake pools, the real arbiter, and a network between them that a test controls."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream import commands as said
from mell_frontend.stream import events as heard
from mell_frontend.stream.core import FrontendCore
from mell_gpu_worker.core.capabilities import Capabilities
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
from mell_gpu_worker.core.events import (
    CommandReceived,
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
    TimePassed,
)
from mell_gpu_worker.core.step import Fetched, StepRow
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.engine.fake import expected_output
from mell_shared.codec import decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import (
    FRONTEND_CONTROL,
    FRONTEND_REPLY,
    TOKENS_GENERATED,
    StreamStatusReply,
    TokenLogprobs,
)
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.scheduler import SCHEDULER_EVENT, MigrationCommitted, MigrationFailed, Placed, Rejected
from mell_shared.messages.worker import WORKER_COMMAND, WORKER_REPLY, Migrate, MigrateRefused, WorkerReply
from mell_shared.models import FAKE_MODEL
from tests.gpu_worker.core.worlds import BLOCK_TOKENS, fake_engine, worker_config

from .links import End, Links
from .network import LATENCY_US, MS_US, SECOND_US, Asker, Network, Plan, undisturbed

STEP_US = 4 * MS_US
PREFILL_TOKEN_US = 100
FRONTEND = "f1"
ALL_MODES = ("kv", "tokens", "hybrid")
FETCHING = Capabilities(kv="fetched")
"""Of engines that fetch KV from one another."""
WAYS: dict[str, tuple[str, dict[str, Any]]] = {mode: (mode, {}) for mode in ALL_MODES} | {
    "kv, fetched": ("kv", {"can": FETCHING, "migration_modes": ("kv", "tokens")})
}
"""Mode and workers of every way to move."""


class Node:
    """A worker core with its engine; its shell is the cluster."""

    def __init__(self, name: str, cluster: "Cluster", **changes: Any) -> None:
        defaults = {"worker": name, "max_model_len": 400, "kv_blocks": 40, "migration_modes": ALL_MODES}
        if changes.get("can") == FETCHING:
            defaults["kv_source"] = f"kv of {name}"
        config = worker_config(**(defaults | changes))
        self.name = name
        self.core = WorkerCore(config, cluster.network.now_us)
        self.engine = fake_engine(config.spec.kv_blocks)
        self.cluster = cluster
        self.ends: dict[str, End] = {}
        self.computed: list[tuple[str, int, int]] = []
        """(sequence, start, count) of every row of every step."""
        self.exited = False
        self._woken_us: int | None = None

    def tell(self, event: Event) -> None:
        """Let something happen to the worker, and do what it wants."""
        network = self.cluster.network
        if self.name in network.dead or self.exited:
            return
        commands = self.core.handle(event, network.now_us)
        self.core.check()
        for command in commands:
            self._perform(command)
        self._sleep()

    def _sleep(self) -> None:
        network, wake_us = self.cluster.network, self.core.wake_us
        if self._woken_us is not None and network.now_us < self._woken_us <= wake_us:
            return
        self._woken_us = wake_us
        network.later(max(0, wake_us - network.now_us), lambda: self._wake(wake_us))

    def _wake(self, due_us: int) -> None:
        if self._woken_us == due_us:
            self._woken_us = None
            self.tell(TimePassed())

    def _perform(self, command: Command) -> None:
        cluster, network = self.cluster, self.cluster.network
        match command:
            case Reply(reply_to, message):
                network.reply(reply_to, type(message).__name__, self.name, _wired(WORKER_REPLY, message))
            case RunStep(rows):
                self.computed += [(row.sequence, row.start, row.count) for row in rows]
                prefill = sum(row.count for row in rows if row.count > 1)
                network.later(STEP_US + PREFILL_TOKEN_US * prefill, lambda: self._finish_step(command))
            case PublishTokens(_, message):
                tokens = heard.TokensArrived(_wired(TOKENS_GENERATED, message))
                network.fly("TokensGenerated", self.name, FRONTEND, lambda: cluster.tell_frontend(tokens))
            case PublishEvent(message):
                cluster.events.append(_wired(SCHEDULER_EVENT, message))
            case AskStatus() | SendEvicted() | AskFrontend():
                self._ask_frontend(command)
            case AskPeer(worker, message, timeout_us):
                asker = Asker(
                    self.name,
                    lambda reply: self.tell(PeerAnswered(worker, message, reply)),
                    lambda why: self.tell(PeerUnanswered(worker, message, why)),
                )
                cluster.ask_worker(asker, worker, message, timeout_us)
            case OfferKv() | OpenLink() | SendBlocks() | CloseLink():
                end = self.ends.get(command.migration)
                if end is None:
                    end = self.ends[command.migration] = End(self.name, self.tell, self.core, self.engine)
                cluster.links.perform(end, command)
            case TellDropped():
                cluster.dropped.append(command)
            case Exit():
                self.exited = True

    def _finish_step(self, command: RunStep) -> None:
        if self.name not in self.cluster.network.dead:
            self.tell(StepFinished(replace(self.engine.execute(command.rows), fetched=_fetched(command.rows))))

    def _ask_frontend(self, command: AskStatus | SendEvicted | AskFrontend) -> None:
        message = command.message

        def answered(reply: Any) -> None:
            match command:
                case AskStatus():
                    assert isinstance(reply, StreamStatusReply)
                    self.tell(StatusAnswered(command.frontend, command.message, reply))
                case SendEvicted():
                    self.tell(EvictionAnswered(command.message.sequence, command.message.generation))
                case AskFrontend():
                    self.tell(FrontendAnswered(command.frontend, command.message, reply))

        def unanswered(_: str) -> None:
            match command:
                case AskStatus():
                    self.tell(StatusUnanswered(command.frontend))
                case SendEvicted():
                    self.tell(EvictionUnanswered(command.message.sequence, command.message.generation))
                case AskFrontend():
                    self.tell(FrontendUnanswered(command.frontend, command.message))

        timeout_us = command.timeout_us if isinstance(command, AskFrontend) else SECOND_US
        self.cluster.ask_frontend(Asker(self.name, answered, unanswered), message, timeout_us)


def _fetched(rows: Iterable[StepRow]) -> dict[int, Fetched]:
    """Say that all full blocks that somebody else has had to be computed by nobody."""
    tokens = {place: row.count // BLOCK_TOKENS * BLOCK_TOKENS for place, row in enumerate(rows) if row.kv_source}
    return {place: Fetched(count, 10 * count, MS_US) for place, count in tokens.items()}


class Reader:
    """What one client got."""

    def __init__(self, request: SequenceRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish: str | None = None
        self.failure: str | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.finish is not None or self.failure is not None


class Cluster:
    """Workers by name, one frontend, a scheduler that places and moves as the test says."""

    def __init__(self, plan: Plan = undisturbed, workers: Iterable[str] = ("w1", "w2"), **changes: Any) -> None:
        self.network = Network(plan)
        self.links = Links(self.network)
        self.nodes = {name: Node(name, self, **changes) for name in workers}
        self.frontend = FrontendCore(FRONTEND)
        self.readers: dict[str, Reader] = {}
        self.events: list[Any] = []
        """What was told to the schedulers."""
        self.dropped: list[TellDropped] = []
        self.moves = 0
        self.place: Callable[[str], str] = lambda _: "w1"
        for node in self.nodes.values():
            node.tell(TimePassed())
        self._tick()

    # --- the frontend's shell

    def tell_frontend(self, event: heard.Event) -> None:
        """Let something happen to the frontend, and do what it wants."""
        if FRONTEND in self.network.dead:
            return
        for command in self.frontend.handle(event, self.network.now_us):
            self._perform(command)
        self.frontend.check()

    def _tick(self) -> None:
        self.tell_frontend(heard.Ticked())
        self.network.later(100 * MS_US, self._tick)

    def _perform(self, command: said.Command) -> None:
        match command:
            case said.DeliverTokens(name, ids, logprobs, finish, _):
                reader = self.readers[name]
                assert not reader.done, "something comes after the end"
                reader.ids += ids
                reader.logprobs += logprobs
                reader.finish = finish
            case said.FailSequence(name, _, message):
                self.readers[name].failure = message
            case said.ReplyControl(reply_to, reply):
                self.network.reply(reply_to, type(reply).__name__, FRONTEND, _wired(FRONTEND_REPLY, reply))
            case said.AskPlacement(ask, message):
                worker = self._placed(message.sequence, message.excluded)
                place = Placed(worker=worker) if worker else Rejected(reason="no_worker", message="none")
                answer = heard.PlaceAnswered(message.sequence, ask, place)
                self.network.later(LATENCY_US, lambda: self.tell_frontend(answer))
            case said.TellWaiting():
                pass
            case _:
                self._ask_about(command)

    def _placed(self, sequence: str, excluded: tuple[str, ...]) -> str | None:
        wanted = self.place(sequence)
        alive = [n.name for n in self.nodes.values() if n.name not in self.network.dead and not n.exited]
        open_ones = [name for name in alive if name not in excluded] or alive
        return wanted if wanted in open_ones else next(iter(open_ones), None)

    def _ask_about(self, command: said.SubmitSequence | said.AskResend | said.CancelSequence) -> None:
        message = command.message

        def answered(reply: Any) -> None:
            match command:
                case said.SubmitSequence():
                    self.tell_frontend(heard.SubmitAnswered(message.sequence, command.ask, reply))
                case said.AskResend():
                    self.tell_frontend(heard.ResendAnswered(message.sequence, message.generation, reply.known))
                case said.CancelSequence():
                    self.tell_frontend(heard.CancelAnswered(message.sequence, message.generation))

        def unanswered(why: Any) -> None:
            match command:
                case said.SubmitSequence():
                    self.tell_frontend(heard.SubmitFailed(message.sequence, command.ask, why))
                case said.AskResend():
                    self.tell_frontend(heard.ResendFailed(message.sequence, message.generation, why))
                case said.CancelSequence():
                    self.tell_frontend(heard.CancelFailed(message.sequence, message.generation, why))

        self.ask_worker(Asker(FRONTEND, answered, unanswered), command.worker, message, 2 * SECOND_US)

    # --- requests

    def ask_worker(self, asker: Asker, worker: str, message: Message, timeout_us: int) -> None:
        """Send a worker a command."""
        command = _wired(WORKER_COMMAND, message)
        node = self.nodes[worker]
        self.network.ask(
            type(message).__name__,
            asker,
            worker,
            lambda reply_to: node.tell(CommandReceived(command, reply_to)),
            timeout_us,
        )

    def ask_frontend(self, asker: Asker, message: Message, timeout_us: int) -> None:
        """Send the frontend a question."""
        question = _wired(FRONTEND_CONTROL, message)
        self.network.ask(
            type(message).__name__,
            asker,
            FRONTEND,
            lambda reply_to: self.tell_frontend(heard.ControlArrived(reply_to, question)),
            timeout_us,
        )

    # --- what tests do

    def open(self, name: str = "a", prompt: bytes = b"hello, my dear", priority: int = 0, **sampling: Any) -> Reader:
        """Open a sequence."""
        params = SamplingParams(**{"seed": 1, "ignore_eos": True, "max_tokens": 40} | sampling)
        request = SequenceRequest(name, FAKE_MODEL, list(prompt), params, priority)
        self.readers[name] = Reader(request)
        self.tell_frontend(heard.SequenceOpened(request))
        return self.readers[name]

    def close(self, name: str) -> None:
        """Let a client leave."""
        self.tell_frontend(heard.SequenceClosed(name))

    def owner(self, name: str = "a") -> tuple[str | None, int]:
        """Who owns a sequence, in which generation, as its frontend has it."""
        sequence = self.frontend._book.open.get(name)
        return (None, 0) if sequence is None else (sequence.owner, sequence.generation)

    def migrate(self, name: str, target: str, mode: str = "kv", **changes: Any) -> str:
        """Order a move of a sequence from where it is; returns the migration's id."""
        owner, generation = self.owner(name)
        self.replies: list[WorkerReply] = []
        self.moves += 1
        if owner is None:
            return ""
        fields = {"split_tokens": 8, "reason": "manual", "term": 1, "migration": f"m{self.moves}"} | changes
        order = Migrate(sequence=name, generation=generation, target=target, mode=mode, **fields)
        self.ask_worker(Asker("scheduler", self.replies.append, lambda _: None), owner, order, SECOND_US)
        return order.migration

    def kill(self, name: str) -> None:
        """End a worker's process."""
        self.network.kill(name)

    def run_until(self, reached: Callable[[], bool], limit_us: int = 60 * SECOND_US) -> None:
        """Let things happen until something is so, which must come about."""
        assert self.network.run_until(reached, limit_us), "it never comes about"

    def run_for(self, after_us: int) -> None:
        """Let things happen for a while."""
        self.network.run_until(lambda: False, after_us)

    def tokens(self, count: int, name: str = "a") -> None:
        """Let things happen until a client has so many tokens."""
        self.run_until(lambda: len(self.readers[name].ids) >= count or self.readers[name].done)

    def finish(self, *, failures: bool = False) -> None:
        """Let every client be served to the end (or given up, if so), and everything settle; check what must hold."""
        over = self.network.dead.__contains__
        self.run_until(lambda: over(FRONTEND) or all(reader.done for reader in self.readers.values()))
        for reader in self.readers.values():
            self.check_text(reader)
            assert failures or reader.failure is None, reader.failure
        self.run_until(lambda: all(self._quiet(node) for node in self._alive), limit_us=90 * SECOND_US)
        self.check_empty()

    @property
    def _alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.name not in self.network.dead and not node.exited]

    @staticmethod
    def _quiet(node: Node) -> bool:
        core = node.core
        idle = not core.moves and not core.moves.source._releases._attempts
        return idle and not len(core.streams) and not core.batcher.computing

    @staticmethod
    def check_text(reader: Reader) -> None:
        """A client got exactly the text that nobody ever moved would have got, as far as it is."""
        request = reader.request
        limit = request.sampling.max_tokens or 1_000
        expected = expected_output(request.prompt_ids, request.sampling, limit)
        assert reader.ids == expected[: len(reader.ids)], "the text is another one"
        assert len(reader.ids) == len(expected) or reader.finish is None, "the text is not complete"
        if request.sampling.logprobs is not None:
            assert len(reader.logprobs) == len(reader.ids), "log-probabilities are missing"
            if request.sampling.logprobs:
                assert [entry.top_ids[0] for entry in reader.logprobs] == reader.ids, "those of other tokens"

    def check_empty(self) -> None:
        """Nothing is left behind anywhere."""
        for node in self._alive:
            batcher = node.core.batcher
            assert not [*batcher.running, *batcher.waiting, *batcher.arriving, *batcher.newcomers], node.name
            assert batcher.pool.free_blocks == batcher.pool.kv_blocks, f"blocks are missing on {node.name}"
            assert not node.core.moves, f"a move is left behind on {node.name}"

    def committed(self) -> list[MigrationCommitted]:
        """Moves that came about."""
        return [event for event in self.events if isinstance(event, MigrationCommitted)]

    def failed(self) -> list[MigrationFailed]:
        """Moves that failed."""
        return [event for event in self.events if isinstance(event, MigrationFailed)]

    def refused(self) -> list[str]:
        """Why the last order was refused, if it was."""
        return [reply.reason for reply in self.replies if isinstance(reply, MigrateRefused)]


def _wired(adapter: Any, message: Message) -> Any:
    """Return what arrives when a message is sent."""
    return decode(adapter, encode(message), unknown_fields="forbid")
