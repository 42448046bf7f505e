"""Random lives of a cluster behind a network that delays, loses, repeats and reorders everything."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mell_scheduler.core import (
    Answer,
    Command,
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    MigrationSettled,
    OperatorAsked,
    OrderDrain,
    PlaceRequested,
    Reply,
    SchedulerCore,
    StartMigration,
    Tick,
)
from mell_scheduler.core.journal import event_line, header_line, replay
from mell_scheduler.core.values import OperatorRequest
from mell_scheduler.policy import POLICY_NAMES, PolicySettings, make_policy
from mell_shared.messages.admin import DrainRequest, MigrateRequest, ModeAsked, MovingRequest, UndrainRequest
from mell_shared.messages.scheduler import (
    MigrationCommitted,
    MigrationFailed,
    Placed,
    PlaceRequest,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
    WorkerSpec,
)
from mell_shared.messages.worker import Drain
from tests.scheduler.script import SECOND, place_request, worker_report, worker_spec

MODELS = ("m", "other")
SEQUENCES = tuple(f"s{number}" for number in range(12))
MODES: tuple[tuple[str, ...], ...] = ((), ("kv",), ("tokens", "kv"))
CORE = CoreSettings(
    queue_limit=4, queue_wait_us=20 * SECOND, overtake_window=3, growth_limit_tokens=64, migration_timeout_us=4 * SECOND
)
POLICY = PolicySettings(head_room=0.1)


@dataclass
class Running:
    """A sequence that truly runs on a worker."""

    generation: int
    tokens: int
    waiting: bool = False
    """Preempted: it holds no block."""


@dataclass
class TrueWorker:
    """A worker as it really is; the scheduler knows only what reaches it."""

    spec: WorkerSpec
    number: int = 0
    draining: bool = False
    sequences: dict[str, Running] = field(default_factory=dict)

    def blocks(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.spec.block_tokens)

    def report(self) -> WorkerReport:
        """Its next report."""
        here = self.sequences.items()
        rows = [(name, s.generation, s.tokens, 0 if s.waiting else self.blocks(s.tokens)) for name, s in here]
        used = min(self.spec.kv_blocks, sum(row[3] for row in rows))
        self.number += 1
        return worker_report(
            self.spec,
            self.number,
            *rows,
            used_blocks=used,
            free_blocks=self.spec.kv_blocks - used,
            draining=self.draining,
            states=[int(s.waiting) for s in self.sequences.values()],
        )


@dataclass
class Heard:
    """What the scheduler was told of a worker, judged anew from the messages alone."""

    spec: WorkerSpec
    report: WorkerReport | None = None
    heard_us: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    """Blocks of rows whose end was delivered after the report."""


@dataclass
class Promise:
    """A placement that nothing has confirmed yet."""

    worker: str
    generation: int
    blocks: int
    deadline_us: int


class SchedulerLives(RuleBasedStateMachine):
    """Anything may happen at any time; the promises of the core must hold all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 0
        self.core = SchedulerCore(make_policy("best-fit", POLICY), CORE, 0)
        self.lines: list[str] = []
        self.said: list[list[Command]] = []
        self.workers: dict[str, TrueWorker] = {}
        self.flight: list[Event] = []
        self.heard: dict[str, Heard] = {}
        self.left: set[str] = set()
        self.last_number: dict[str, int] = {}
        self.promises: dict[str, Promise] = {}
        self.asked: dict[str, tuple[int, PlaceRequest]] = {}
        """Handles without a reply yet: when they came, and for what."""
        self.latest: dict[str, PlaceRequest] = {}
        self.handles = 0
        self.operators: dict[str, int] = {}
        """Operators' handles without an answer yet: when they came."""
        self.orders: list[StartMigration] = []
        """On their way to the sources, or there."""
        self.moving: dict[str, tuple[StartMigration, int]] = {}
        """What the scheduler takes for under way: sequence -> its order, and its blocks then."""

    @initialize(policy=st.sampled_from(POLICY_NAMES), lengths=st.lists(st.integers(1, 200), max_size=6))
    def lead(self, policy: str, lengths: list[int]) -> None:
        """A leader begins, with any policy, over workers that hold something already."""
        self.core = SchedulerCore(make_policy(policy, POLICY), CORE, 0, make_policy("worst-fit", POLICY))
        self.lines.append(header_line(policy, POLICY, CORE))
        self.send(LeadershipTaken(1))
        for number, length in enumerate(lengths):
            if number % 2 == 0:
                self.start_worker(MODELS[0], 24, 4, 16, ("kv",))
            name = f"s{number}"
            self.latest[name] = place_request(name, length, 100)
            self.workers[f"w{number // 2}"].sequences[name] = Running(1, length)
        for _ in range(3 if lengths else 0):
            self.quiet_second()

    # --- the world

    @precondition(lambda self: self.workers)
    @rule()
    def quiet_second(self) -> None:
        """All that is under way arrives, everybody reports, and an epoch passes."""
        self.flight += [worker.report() for worker in self.workers.values()]
        self.deliver_all()
        self.pass_time(SECOND)

    @rule(
        model=st.sampled_from(MODELS),
        blocks=st.integers(2, 24),
        most=st.integers(1, 4),
        size=st.sampled_from([8, 16]),
        modes=st.sampled_from(MODES),
    )
    def start_worker(self, model: str, blocks: int, most: int, size: int, modes: tuple[str, ...]) -> None:
        """A worker starts and announces itself."""
        name = f"w{len(self.workers) + len(self.left)}"
        if len(self.workers) >= 4 or name in self.workers:
            return
        spec = worker_spec(
            name, model=model, kv_blocks=blocks, max_sequences=most, block_tokens=size, migration_modes=modes
        )
        self.workers[name] = TrueWorker(spec)
        self.flight += [WorkerJoined(spec=spec), self.workers[name].report()]

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), twice=st.booleans(), again=st.booleans())
    def report(self, data: st.DataObject, twice: bool, again: bool) -> None:
        """A worker reports, perhaps announcing itself again, perhaps with a copy of the report on the way."""
        worker = data.draw(st.sampled_from(list(self.workers.values())))
        if again:
            self.flight.append(WorkerJoined(spec=worker.spec))
        self.flight += [worker.report()] * (2 if twice else 1)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), gain=st.integers(0, 40))
    def grow(self, data: st.DataObject, gain: int) -> None:
        """Sequences of one worker grow."""
        worker = data.draw(st.sampled_from(list(self.workers.values())))
        for sequence in worker.sequences.values():
            sequence.tokens += gain

    @precondition(lambda self: any(w.sequences for w in self.workers.values()))
    @rule(data=st.data(), told=st.booleans())
    def end(self, data: st.DataObject, told: bool) -> None:
        """A sequence ends; the news may get lost."""
        worker = data.draw(st.sampled_from([w for w in self.workers.values() if w.sequences]))
        name = data.draw(st.sampled_from(list(worker.sequences)))
        generation = worker.sequences.pop(name).generation
        if told:
            self.flight.append(
                SequenceFinished(worker=worker.spec.worker, sequence=name, generation=generation, reason="stop")
            )

    @precondition(lambda self: len(self.workers) > 1)
    @rule(data=st.data())
    def migrate(self, data: st.DataObject) -> None:
        """A sequence turns up elsewhere under a higher generation; the old copy may linger."""
        source, target = data.draw(st.permutations(list(self.workers.values())))[:2]
        if not source.sequences or source.spec.model != target.spec.model:
            return
        name = data.draw(st.sampled_from(list(source.sequences)))
        moved = source.sequences[name]
        target.sequences[name] = Running(moved.generation + 1, moved.tokens)
        if data.draw(st.booleans()):
            del source.sequences[name]

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), again=st.booleans(), lingers=st.booleans())
    def carry_out(self, data: st.DataObject, again: bool, lingers: bool) -> None:
        """A source obeys an order, perhaps late, perhaps twice; its own copy may linger."""
        command = data.draw(st.sampled_from(self.orders))
        if not again:
            self.orders.remove(command)
        order = command.order
        source, target = self.workers.get(command.source), self.workers.get(order.target)
        moved = source.sequences.get(order.sequence) if source else None
        if source is None or target is None or moved is None or moved.generation != order.generation:
            return
        target.sequences[order.sequence] = Running(moved.generation + 1, moved.tokens)
        if not lingers:
            del source.sequences[order.sequence]
        self.flight.append(
            MigrationCommitted(
                worker=order.target,
                source=command.source,
                migration=order.migration,
                sequence=order.sequence,
                generation=moved.generation + 1,
            )
        )

    @precondition(lambda self: self.orders)
    @rule(
        data=st.data(), told=st.booleans(), reason=st.sampled_from(["no_room", "unreachable", "from a later release"])
    )
    def refuse(self, data: st.DataObject, told: bool, reason: str) -> None:
        """An order is refused, or fails on the way, or just gets lost."""
        command = data.draw(st.sampled_from(self.orders))
        self.orders.remove(command)
        order = command.order
        if told:
            self.flight.append(
                MigrationFailed(
                    worker=command.source,
                    migration=order.migration,
                    sequence=order.sequence,
                    generation=order.generation,
                    reason=reason,
                )
            )

    @precondition(lambda self: any(w.sequences for w in self.workers.values()))
    @rule(data=st.data())
    def preempt_or_resume(self, data: st.DataObject) -> None:
        """A worker preempts a sequence, or takes it back."""
        worker = data.draw(st.sampled_from([w for w in self.workers.values() if w.sequences]))
        sequence = data.draw(st.sampled_from(list(worker.sequences.values())))
        sequence.waiting = not sequence.waiting

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), goodbye=st.booleans())
    def stop_worker(self, data: st.DataObject, goodbye: bool) -> None:
        """A worker leaves or just dies."""
        name = data.draw(st.sampled_from(list(self.workers)))
        del self.workers[name]
        if goodbye:
            self.flight.append(WorkerLeft(worker=name, reason="stopped"))

    @precondition(lambda self: self.workers)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["drain", "rehearse", "undrain", "migrate", "pause", "resume"]),
        sequence=st.sampled_from(SEQUENCES),
        mode=st.sampled_from(["auto", "kv", "hybrid"]),
    )
    def operate(self, data: st.DataObject, kind: str, sequence: str, mode: ModeAsked) -> None:
        """An operator orders something; he gets one answer, perhaps after a while."""
        worker = data.draw(st.sampled_from([*self.workers, "nobody"]))
        self.handles += 1
        orders: dict[str, OperatorRequest] = {
            "drain": DrainRequest(worker=worker, deadline_s=1.0),
            "rehearse": DrainRequest(worker=worker, dry_run=True),
            "undrain": UndrainRequest(worker=worker),
            "migrate": MigrateRequest(ask=f"ask{self.handles % 7}", request=sequence, target=worker, mode=mode),
            "pause": MovingRequest(paused=True),
            "resume": MovingRequest(paused=False),
        }
        handle = f"op{self.handles}"
        self.operators[handle] = self.now_us
        self.send(OperatorAsked(handle, orders[kind]))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """A worker begins or stops to drain."""
        worker = data.draw(st.sampled_from(list(self.workers.values())))
        worker.draining = not worker.draining

    # --- the network

    @precondition(lambda self: self.flight)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        """Any message arrives next, perhaps not for the last time."""
        event = data.draw(st.sampled_from(self.flight))
        if not keep:
            self.flight.remove(event)
        self.send(event)

    @precondition(lambda self: self.flight)
    @rule()
    def deliver_all(self) -> None:
        """The network works for once."""
        flight, self.flight = self.flight, []
        for event in flight:
            self.send(event)

    @precondition(lambda self: self.flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A message is lost."""
        self.flight.remove(data.draw(st.sampled_from(self.flight)))

    # --- frontends

    @rule(
        sequence=st.sampled_from(SEQUENCES),
        model=st.sampled_from(MODELS),
        tokens=st.integers(1, 120),
        output=st.none() | st.integers(1, 100),
        order=st.tuples(st.integers(0, 1), st.floats(0, 100)),
    )
    def ask(self, sequence: str, model: str, tokens: int, output: int | None, order: tuple[int, float]) -> None:
        """A frontend asks for a new sequence, or, if it asked before, for its next generation."""
        before = self.latest.get(sequence)
        rest = {"model": before.model if before else model, "generation": before.generation + 1 if before else 1}
        self.place(place_request(sequence, tokens, output, priority=order[0], waited_s=order[1], **rest))

    @precondition(lambda self: self.latest)
    @rule(data=st.data(), older=st.booleans(), exclude=st.booleans())
    def ask_again(self, data: st.DataObject, older: bool, exclude: bool) -> None:
        """A repeat, sometimes one that was delayed for long, sometimes one that excludes what it was given."""
        request = data.draw(st.sampled_from(list(self.latest.values())))
        promise = self.promises.get(request.sequence)
        if older and request.generation > 1:
            request = request.model_copy(update={"generation": request.generation - 1})
        elif exclude and promise:
            request = request.model_copy(update={"excluded": (promise.worker,)})
        self.place(request)

    def place(self, request: PlaceRequest) -> None:
        """Give the core an ask under a new handle; who is placed submits, if the worker is there and willing."""
        self.handles += 1
        handle = f"h{self.handles}"
        self.asked[handle] = (self.now_us, request)
        latest = self.latest.get(request.sequence)
        if latest is None or request.generation >= latest.generation:
            self.latest[request.sequence] = request
            promise = self.promises.get(request.sequence)
            if promise and (promise.generation < request.generation or promise.worker in request.excluded):
                del self.promises[request.sequence]
        self.send(PlaceRequested(handle, request))

    # --- time

    @rule(step_us=st.integers(1, 2 * SECOND))
    def pass_time(self, step_us: int) -> None:
        """Time goes by."""
        self.now_us += step_us
        for name in [n for n, promise in self.promises.items() if promise.deadline_us <= self.now_us]:
            del self.promises[name]
        self.send(Tick())
        late = [handle for handle, (at_us, _) in self.asked.items() if self.now_us >= at_us + CORE.queue_hold_us]
        assert not late, "a request was held for too long"
        late = [handle for handle, at_us in self.operators.items() if self.now_us >= at_us + CORE.queue_hold_us]
        assert not late, "an operator was kept waiting"

    @rule()
    def reconnect(self) -> None:
        """The scheduler's own connection was down for a moment."""
        for heard in self.heard.values():
            heard.heard_us = self.now_us
        self.send(ConnectionRestored())

    # --- what is checked

    def send(self, event: Event) -> None:
        """Give the core an event; check every reply against what the messages so far allow."""
        self.lines.append(event_line(event, self.now_us))
        self.observe(event)
        commands = self.core.handle(event, self.now_us)
        self.said.append(commands)
        for command in commands:
            match command:
                case Reply():
                    self.check_reply(command)
                case StartMigration():
                    self.check_move(command)
                case MigrationSettled():
                    self.settle(command)
                case Answer():
                    del self.operators[command.handle]
                case OrderDrain():
                    del self.operators[command.handle]
                    if command.worker in self.workers:
                        self.workers[command.worker].draining = isinstance(command.order, Drain)
        self.core.check()

    def observe(self, event: Event) -> None:
        """Keep the books that replies are judged by."""
        for name in [n for n, h in self.heard.items() if self.now_us - h.heard_us >= CORE.worker_lost_us]:
            # The core forgets a lost worker at a tick; until then it is silent in both books.
            if isinstance(event, Tick):
                self.forget(name)
        match event:
            case WorkerJoined(spec=spec) if spec.worker not in self.left and spec.worker not in self.heard:
                self.heard[spec.worker] = Heard(spec, None, self.now_us)
            case WorkerLeft(worker=worker):
                self.left.add(worker)
                self.forget(worker)
            case WorkerReport(worker=worker) if worker in self.heard:
                self.observe_report(self.heard[worker], event)
            case SequenceFinished(worker=worker) if worker in self.heard:
                self.observe_end(self.heard[worker], event)

    def observe_report(self, heard: Heard, report: WorkerReport) -> None:
        """A newer report replaces all before, and confirms what it lists."""
        if report.number <= self.last_number.get(report.worker, -1):
            return
        self.last_number[report.worker] = report.number
        heard.report, heard.heard_us, heard.ended = report, self.now_us, {}
        for name, generation in zip(report.sequences, report.generations, strict=True):
            promise = self.promises.get(name)
            here = promise is not None and promise.worker == report.worker
            if promise and generation >= promise.generation + (0 if here else 1):
                del self.promises[name]

    def observe_end(self, heard: Heard, event: SequenceFinished) -> None:
        """An end frees what the last report charged it with, or what was promised to it."""
        promise = self.promises.get(event.sequence)
        if promise and promise.worker == event.worker and event.generation >= promise.generation:
            del self.promises[event.sequence]
        report = heard.report
        if report is None or event.sequence not in report.sequences:
            return
        row = report.sequences.index(event.sequence)
        if event.generation >= report.generations[row]:
            heard.ended[event.sequence] = report.blocks[row]

    def forget(self, worker: str) -> None:
        """A worker is gone, and with it what was promised there."""
        self.heard.pop(worker, None)
        for name in [n for n, promise in self.promises.items() if promise.worker == worker]:
            del self.promises[name]

    def check_move(self, command: StartMigration) -> None:
        """A move is of a sequence that its source reported, between two that can, into memory that is free."""
        order = command.order
        source, target = self.heard[command.source], self.heard[order.target]
        assert order.mode in source.spec.migration_modes
        assert order.mode in target.spec.migration_modes
        assert source.spec.model == target.spec.model
        assert self.now_us >= 2 * CORE.report_interval_us, "a new leader moves nothing yet"
        assert source.report is not None
        assert target.report is not None
        assert not target.report.draining
        assert order.sequence not in self.moving, "moved twice at once"
        row = source.report.sequences.index(order.sequence)
        assert source.report.generations[row] == order.generation
        blocks = source.report.blocks[row]
        assert blocks <= self.free(order.target, order.sequence), "moved into memory that is not free"
        self.moving[order.sequence] = command, blocks
        self.orders.append(command)

    def settle(self, settled: MigrationSettled) -> None:
        """One end is free: the source if the sequence has moved, else the target."""
        command, blocks = self.moving.pop(settled.sequence)
        assert command.order.migration == settled.migration
        record = self.core.ledger.sequences.get(settled.sequence)
        if settled.outcome != "committed" or record is None or record.pending_until_us is None:
            return
        source = self.heard.get(settled.source)
        if source and source.report and settled.sequence in source.report.sequences:
            source.ended[settled.sequence] = blocks
        deadline_us = self.now_us + CORE.submit_timeout_us
        self.promises[settled.sequence] = Promise(settled.target, record.generation, blocks, deadline_us)

    def free(self, worker: str, sequence: str) -> int:
        """Blocks that reports, promises and moves leave, one sequence not counted."""
        heard = self.heard[worker]
        assert heard.report is not None
        promised = [p.blocks for n, p in self.promises.items() if p.worker == worker and n != sequence]
        coming = [b for n, (c, b) in self.moving.items() if c.order.target == worker and n != sequence]
        return heard.report.free_blocks + sum(heard.ended.values()) - sum(promised) - sum(coming)

    def check_reply(self, command: Reply) -> None:
        """Each handle is answered once; a place is given only where there is room."""
        assert command.handle in self.asked, "answered twice, or never asked"
        _, request = self.asked.pop(command.handle)
        assert request.sequence == command.sequence
        if isinstance(command.reply, Placed):
            self.check_place(request, command.reply.worker)

    def check_place(self, request: PlaceRequest, worker: str) -> None:
        """The worker is alive, willing and right, and what reports and promises leave free is enough."""
        heard = self.heard[worker]
        report = heard.report
        assert report is not None, "placed on a worker that was never heard"
        assert heard.spec.model == request.model
        assert worker not in request.excluded
        promise = self.promises.get(request.sequence)
        listed = dict(zip(report.sequences, report.generations, strict=True))
        if promise and (promise.worker, promise.generation) == (worker, request.generation):
            return  # a repeat of an answer not yet confirmed
        if listed.get(request.sequence, 0) >= request.generation and request.sequence not in heard.ended:
            return  # it runs there: the same answer again
        assert self.now_us - heard.heard_us <= 3 * CORE.report_interval_us, "a silent worker"
        assert not report.draining
        blocks = -(-request.prompt_tokens // heard.spec.block_tokens)
        assert 1 not in report.states, "placed where a preempted sequence waits"
        promised = [p for n, p in self.promises.items() if p.worker == worker and n != request.sequence]
        free = self.free(worker, request.sequence)
        assert blocks <= free, f"{blocks} blocks placed on {worker}, which has {free}"
        held = len(listed) - len(heard.ended) + len(promised)
        assert held < heard.spec.max_sequences, "placed over the sequence limit"
        deadline_us = self.now_us + CORE.submit_timeout_us
        self.promises[request.sequence] = Promise(worker, request.generation, blocks, deadline_us)
        self.submit(request, worker)

    def submit(self, request: PlaceRequest, worker: str) -> None:
        """The frontend submits; every third submission gets lost, and a worker without room refuses."""
        true = self.workers.get(worker)
        if true is None or self.handles % 3 == 0:
            return
        used = sum(true.blocks(s.tokens) for s in true.sequences.values())
        if used + true.blocks(request.prompt_tokens) <= true.spec.kv_blocks:
            true.sequences[request.sequence] = Running(request.generation, request.prompt_tokens)

    @invariant()
    def queue_is_bounded(self) -> None:
        """No more requests wait than may."""
        assert len(self.core.waiting) <= CORE.queue_limit
        assert len(self.asked) <= CORE.queue_limit

    def teardown(self) -> None:
        """All are answered in the end, and the same events give the same commands."""
        self.send(LeadershipEnded())
        assert not self.asked, "someone never got a reply"
        assert not self.operators, "an operator never got an answer"
        assert [commands for _, _, commands in replay(self.lines)] == self.said


SchedulerLives.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestSchedulerLives = SchedulerLives.TestCase
