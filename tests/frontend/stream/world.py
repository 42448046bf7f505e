"""A frontend core among workers and a scheduler on a network that loses, repeats, delays and reorders everything.

The model's workers compute the right tokens while they own a sequence and garbage as soon as they do not, without
knowing it themselves: whatever garbage reaches a reader was taken from somebody who was not the owner.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from mell_frontend.generation import SequenceRequest
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
    SubmitAnswered,
    SubmitFailed,
    Ticked,
    TokensArrived,
)
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.frontend import (
    AbortMigration,
    Claim,
    Evicted,
    FrontendControl,
    FrontendReply,
    Granted,
    MigrationAborted,
    Refused,
    StreamStatus,
    StreamStatusReply,
    TokensGenerated,
)
from mell_shared.messages.sampling import FinishReason, SamplingParams
from mell_shared.messages.scheduler import Placed, PlaceReply, PlaceRequest, Queued, Rejected
from mell_shared.messages.worker import (
    Cancel,
    Resend,
    Submit,
    SubmitAccepted,
    SubmitRefused,
)

GARBAGE = 4_000_000_000
MAX_TOKENS = 12
ASK = AskPlacement | SubmitSequence | AskResend | CancelSequence


def right_token(sequence: str, index: int) -> int:
    """Return the token at an output index."""
    return sum(sequence.encode()) * 100 + index


@dataclass
class Held:
    """A sequence at a worker; `ids` are its output so far, `finish` is set when it has ended there."""

    generation: int
    ids: list[int]
    finish: FinishReason | None = None


@dataclass
class Worker:
    """One incarnation of a worker."""

    name: str
    alive: bool = True
    full: bool = False
    held: dict[str, Held] = field(default_factory=dict)
    answered: dict[tuple[str, int], SubmitAccepted | SubmitRefused] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    """By migration: what it copied and has no answer for."""


@dataclass
class Reader:
    """What one reader has got."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    closed: bool = False


class World:
    """Everything around the core. `flights` are messages under way, `late` those that others overtake."""

    def __init__(self) -> None:
        self.core = FrontendCore("f", StreamLimits())
        self.now_us = 0
        self.connected = True
        self.workers: dict[str, Worker] = {}
        self.readers: dict[str, Reader] = {}
        self.flights: list[Callable[[], None]] = []
        self.late: list[Callable[[], None]] = []
        self.asks: dict[int, ASK] = {}
        self.owners: dict[tuple[str, int], str] = {}
        """Who was made the owner of a sequence's generation."""
        self.current: dict[str, tuple[str, int]] = {}
        self.grants: dict[str, tuple[Claim, Granted]] = {}
        """The last of each sequence."""
        self.promised: set[str] = set()
        """Migrations of which a source was told that they are never granted."""
        self._requests: dict[str, tuple[Worker, FrontendControl]] = {}
        self._numbers = 0
        self.decide: Callable[[PlaceRequest], PlaceReply] = self.place_anywhere
        for name in ("a", "b", "c"):
            self.start_worker(name)

    # --- what the rules do

    def start_worker(self, name: str) -> None:
        """Start a new incarnation in the place of one that is gone."""
        self._numbers += 1
        worker = Worker(f"{name}{self._numbers}")
        self.workers[worker.name] = worker

    @property
    def alive(self) -> list[Worker]:
        """The workers that live."""
        return [worker for worker in self.workers.values() if worker.alive]

    def place_anywhere(self, asked: PlaceRequest) -> PlaceReply:
        """Place on a living worker that is not excluded, or on any."""
        free = [worker for worker in self.alive if worker.name not in asked.excluded] or self.alive
        if not free:
            return Rejected(reason="no_worker", message="no worker")
        return Placed(worker=free[self._numbers % len(free)].name)

    def place_stubbornly(self, asked: PlaceRequest) -> PlaceReply:
        """Place on the first worker, whoever is excluded."""
        return Placed(worker=self.alive[0].name)

    def handle(self, event: Event) -> None:
        """Give the core an event and do what it wants."""
        for command in self.core.handle(event, self.now_us):
            self._carry_out(command)
        self.core.check()

    def open(self) -> None:
        """Open a new sequence."""
        self._numbers += 1
        name = f"s{self._numbers}"
        self.readers[name] = Reader()
        sampling = SamplingParams(seed=1, max_tokens=MAX_TOKENS)
        self.handle(SequenceOpened(SequenceRequest(name, "fake", [1, 2], sampling)))

    def close(self, name: str) -> None:
        """Let a reader leave."""
        self.readers[name].closed = True
        self.handle(SequenceClosed(name))

    def deliver(self, place: int) -> None:
        """Let the message at that place arrive."""
        if self.flights:
            self.flights.pop(place % len(self.flights))()

    def hold(self, place: int) -> None:
        """Let others overtake the message at that place."""
        if self.flights:
            self.late.append(self.flights.pop(place % len(self.flights)))

    def repeat(self, place: int) -> None:
        """Let the message at that place arrive, and once more later."""
        if self.flights:
            self.late.append(self.flights[place % len(self.flights)])
            self.deliver(place)

    def deliver_late(self, place: int) -> None:
        """Let one of the messages arrive that others have overtaken."""
        if self.late:
            self.late.pop(place % len(self.late))()

    def lose(self, place: int) -> None:
        """Lose the message at that place."""
        if self.flights:
            self.flights.pop(place % len(self.flights))

    def time_out(self, place: int) -> None:
        """Let an ask fail, whatever becomes of the message or the reply that are under way."""
        if self.asks:
            number = list(self.asks)[place % len(self.asks)]
            self._fail_ask(number, "timeout")

    def tick(self, step_us: int) -> None:
        """Let time pass."""
        self.now_us += step_us
        self.handle(Ticked())

    def disconnect(self) -> None:
        """Cut our own connection: all asks fail, nothing comes or goes."""
        self.connected = False
        self.handle(ConnectionLost())
        for number in list(self.asks):
            self._fail_ask(number, "disconnected")

    def reconnect(self) -> None:
        """Have it again."""
        self.connected = True
        self.handle(ConnectionRestored())

    def kill(self, worker: Worker) -> None:
        """End a worker; what it sent is still under way."""
        worker.alive = False
        worker.held.clear()
        worker.claims.clear()
        self.start_worker(worker.name[0])

    def step(self, worker: Worker, count: int) -> None:
        """Let a worker make `count` tokens of each of its sequences."""
        for name, held in worker.held.items():
            if held.finish is None:
                first_index = len(held.ids)
                self._generate(worker, name, held, count)
                self._publish(worker, name, held, first_index)

    def tell_status(self, worker: Worker) -> None:
        """Let a worker tell the state of its streams."""
        rows = list(worker.held.items())
        status = StreamStatus(
            worker=worker.name,
            sequences=tuple(name for name, _ in rows),
            generations=[held.generation for _, held in rows],
            next_indices=[len(held.ids) for _, held in rows],
            ended=[int(held.finish is not None) for _, held in rows],
        )
        self._ask_frontend(worker, status)

    def copy_to(self, source: Worker, target: Worker, name: str, lag: int) -> None:
        """Let a target copy a sequence from its source, `lag` tokens short, and claim it."""
        held = source.held[name]
        self._numbers += 1
        claim = Claim(
            sequence=name,
            generation=held.generation,
            migration=f"m{self._numbers}",
            source=source.name,
            target=target.name,
            length=max(0, len(held.ids) - lag),
        )
        target.claims[claim.migration] = claim
        self._ask_frontend(target, claim)

    def repeat_claim(self, worker: Worker, place: int) -> None:
        """Let a target ask again."""
        if worker.claims:
            self._ask_frontend(worker, list(worker.claims.values())[place % len(worker.claims)])

    def abort(self, source: Worker, target: Worker, place: int) -> None:
        """Let a source ask that a target's claim never be granted."""
        claims = [claim for claim in target.claims.values() if claim.source == source.name]
        if claims:
            claim = claims[place % len(claims)]
            message = AbortMigration(
                sequence=claim.sequence, generation=claim.generation, migration=claim.migration, source=source.name
            )
            self._ask_frontend(source, message)

    def evict(self, worker: Worker, name: str) -> None:
        """Let a worker give a sequence up."""
        held = worker.held.pop(name)
        self._ask_frontend(
            worker,
            Evicted(worker=worker.name, sequence=name, generation=held.generation, output_ids=held.ids),
        )

    # --- the core's commands

    def _carry_out(self, command: Command) -> None:
        match command:
            case DeliverTokens():
                reader = self.readers[command.sequence]
                assert not reader.ended, "something came after the end"
                reader.ids += command.token_ids
                reader.ended = command.finish_reason is not None
            case FailSequence():
                assert not self.readers[command.sequence].ended, "it failed after its end"
                self.readers[command.sequence].ended = True
            case TellWaiting():
                assert not self.readers[command.sequence].ended
            case ReplyControl():
                self._reply_to_worker(command)
            case SubmitSequence(worker, _, message):
                self._note_owner(message.sequence, message.generation, worker)
                self._send_ask(command)
            case AskPlacement(message=asked):
                if asked.generation > self.current.get(asked.sequence, ("", 0))[1]:
                    self.current[asked.sequence] = ("", asked.generation)  # nobody owns it now
                self._send_ask(command)
            case AskResend() | CancelSequence():
                self._send_ask(command)

    def _note_owner(self, sequence: str, generation: int, worker: str) -> None:
        before = self.owners.setdefault((sequence, generation), worker)
        assert before == worker, f"generation {generation} of {sequence} belongs to {before} and {worker}"
        latest = self.current.get(sequence, ("", 0))
        assert generation >= latest[1], "the generation went back"
        self.current[sequence] = (worker, generation)

    def _send_ask(self, command: ASK) -> None:
        self._numbers += 1
        number = self._numbers
        self.asks[number] = command
        if not self.connected:
            self._fail_later(number)
            return
        self.flights.append(lambda: self._ask_arrived(number, command))

    def _fail_later(self, number: int) -> None:
        self.flights.append(lambda: self._fail_ask(number, "disconnected"))

    def _ask_arrived(self, number: int, command: ASK) -> None:
        if isinstance(command, AskPlacement):
            reply = self.decide(command.message)
            self._answer(number, PlaceAnswered(command.message.sequence, command.ask, reply))
            return
        worker = self.workers.get(command.worker)
        if worker is None or not worker.alive:
            self._fail_ask(number, "no_responder")
            return
        self._answer(number, self._obey(worker, command))

    def _obey(self, worker: Worker, command: SubmitSequence | AskResend | CancelSequence) -> Event:
        message = command.message
        sequence, generation = message.sequence, message.generation
        match message:
            case Submit():
                assert isinstance(command, SubmitSequence)
                return SubmitAnswered(sequence, command.ask, self._submit(worker, message))
            case Cancel():
                if sequence in worker.held and worker.held[sequence].generation == generation:
                    del worker.held[sequence]
                return CancelAnswered(sequence, generation)
            case Resend():
                held = worker.held.get(sequence)
                known = held is not None and held.generation == generation
                if held is not None and known:
                    self._publish(worker, sequence, held, message.first_index)
                return ResendAnswered(sequence, generation, known)

    def _submit(self, worker: Worker, submit: Submit) -> SubmitAccepted | SubmitRefused:
        key = (submit.sequence, submit.generation)
        if key in worker.answered:
            return worker.answered[key]
        newest = max((g for s, g in worker.answered if s == submit.sequence), default=0)
        held = worker.held.get(submit.sequence)
        newest = max(newest, held.generation if held else 0)
        reply: SubmitAccepted | SubmitRefused = SubmitAccepted()
        if worker.full or newest > submit.generation:
            reply = SubmitRefused(reason="no_room", message="")
        else:
            worker.held[submit.sequence] = Held(submit.generation, list(submit.output_ids))
        worker.answered[key] = reply
        return reply

    def _answer(self, number: int, event: Event) -> None:
        self._to_frontend(lambda: self._settle(number, event))

    def _settle(self, number: int, event: Event) -> None:
        if self.asks.pop(number, None) is not None:
            self.handle(event)

    def _fail_ask(self, number: int, failure: AskFailure) -> None:
        command = self.asks.pop(number, None)
        if command is None:
            return
        sequence, generation = command.message.sequence, command.message.generation
        match command:
            case AskPlacement(ask=ask):
                self.handle(PlaceFailed(sequence, ask, failure))
            case SubmitSequence(ask=ask):
                self.handle(SubmitFailed(sequence, ask, failure))
            case AskResend():
                self.handle(ResendFailed(sequence, generation, failure))
            case CancelSequence():
                self.handle(CancelFailed(sequence, generation, failure))

    # --- the workers' messages

    def _generate(self, worker: Worker, name: str, held: Held, count: int) -> None:
        owns = self.current.get(name) == (worker.name, held.generation)
        for index in range(len(held.ids), min(len(held.ids) + count, MAX_TOKENS)):
            held.ids.append(right_token(name, index) if owns else GARBAGE)
        if len(held.ids) >= MAX_TOKENS:
            held.finish = "length"

    def _publish(self, worker: Worker, name: str, held: Held, first_index: int) -> None:
        token_ids = held.ids[first_index:]
        message = TokensGenerated(
            worker=worker.name,
            sequences=(name,),
            generations=[held.generation],
            first_indices=[first_index],
            counts=[len(token_ids)],
            token_ids=token_ids,
            finished={0: held.finish} if held.finish else {},
        )
        self._to_frontend(lambda: self.handle(TokensArrived(message)))

    def _ask_frontend(self, worker: Worker, message: FrontendControl) -> None:
        self._numbers += 1
        inbox = f"inbox{self._numbers}"
        self._requests[inbox] = (worker, message)
        self._to_frontend(lambda: self.handle(ControlArrived(inbox, message)))

    def _to_frontend(self, arrive: Callable[[], None]) -> None:
        """Send something to the frontend; while we are cut off it is lost, now or on arrival."""
        if self.connected:
            self.flights.append(lambda: arrive() if self.connected else None)

    def _reply_to_worker(self, command: ReplyControl) -> None:
        worker, message = self._requests[command.reply_to]
        if isinstance(message, Claim):
            self._judge_claim(message, command.reply)
        if isinstance(message, AbortMigration):
            self._judge_abort(message, command.reply)
        if self.connected:
            self.flights.append(lambda: self._reply_arrived(worker, message, command.reply))

    def _judge_claim(self, claim: Claim, reply: FrontendReply) -> None:
        """Hold the reply against the rules of arbitration, from what was seen of the core from outside."""
        owner = self.current.get(claim.sequence)
        before, granted = self.grants.get(claim.sequence, (None, None))
        if granted is not None and claim == before and owner == (claim.target, granted.generation):
            assert reply == granted or self._over(claim.sequence), "the last grant, repeated, gets the same reply"
            return
        if not isinstance(reply, Granted):
            return
        assert owner == (claim.source, claim.generation), "granted from somebody who is not the owner"
        assert claim.migration not in self.promised, "granted although its source was told never"
        assert claim.length >= len(self.readers[claim.sequence].ids) == reply.accepted
        assert not self._over(claim.sequence)
        self._note_owner(claim.sequence, reply.generation, claim.target)
        self.grants[claim.sequence] = (claim, reply)

    def _judge_abort(self, abort: AbortMigration, reply: FrontendReply) -> None:
        assert isinstance(reply, MigrationAborted)
        if reply.owned:
            assert self.current[abort.sequence] == (abort.source, abort.generation)
            self.promised.add(abort.migration)

    def _over(self, sequence: str) -> bool:
        return self.readers[sequence].ended or self.readers[sequence].closed

    def _reply_arrived(self, worker: Worker, message: FrontendControl, reply: FrontendReply) -> None:
        if not worker.alive:
            return
        match message, reply:
            case StreamStatus(), StreamStatusReply():
                self._follow_status(worker, message, reply)
            case Claim(), Granted():
                self._take_over(worker, message, reply)
            case Claim(), Refused():
                worker.claims.pop(message.migration, None)
            case AbortMigration(), MigrationAborted(owned=False):
                held = worker.held.get(message.sequence)
                if held is not None and held.generation == message.generation:
                    del worker.held[message.sequence]

    def _take_over(self, worker: Worker, claim: Claim, granted: Granted) -> None:
        if worker.claims.pop(claim.migration, None) is None:
            return
        assert claim.length >= granted.accepted
        ids = [right_token(claim.sequence, index) for index in range(granted.accepted)]
        worker.held[claim.sequence] = Held(granted.generation, ids)

    def _follow_status(self, worker: Worker, status: StreamStatus, reply: StreamStatusReply) -> None:
        for row, first_index in reply.resend.items():
            held = worker.held.get(status.sequences[row])
            if held is not None and held.generation == status.generations[row]:
                self._publish(worker, status.sequences[row], held, first_index)
        for row in (*reply.cancel, *reply.ack_end):
            held = worker.held.get(status.sequences[row])
            if held is not None and held.generation == status.generations[row]:
                del worker.held[status.sequences[row]]

    # --- what must hold

    def check(self) -> None:
        """Assert that every reader has exactly the first tokens of its sequence."""
        for name, reader in self.readers.items():
            expected = [right_token(name, index) for index in range(len(reader.ids))]
            assert reader.ids == expected, f"{name}: {reader.ids}"
            assert len(reader.ids) <= MAX_TOKENS

    def heal(self) -> None:
        """Let the network and the scheduler be good again: all sequences come to an end, nothing is left anywhere."""
        if not self.connected:
            self.reconnect()
        self.decide = self.place_anywhere
        for worker in self.alive:
            worker.full = False
        self.flights += self.late
        self.late.clear()
        for _ in range(400):
            self.run_well()
            if self._at_rest():
                return
        raise AssertionError(f"no rest: {self.core.open_sequences} open, held {[w.held for w in self.alive]}")

    def arrive_all(self) -> None:
        """Let everything under way arrive, in order."""
        for _ in range(len(self.flights)):
            self.deliver(0)

    def run_well(self) -> None:
        """Let everybody do a round of work, undisturbed."""
        for worker in self.alive:
            self.step(worker, 1)
            self.tell_status(worker)
            for place in range(len(worker.claims)):
                self.repeat_claim(worker, place)
        while self.flights:
            self.deliver(0)
        for number in list(self.asks):  # lost earlier: their timeouts come
            self._fail_ask(number, "timeout")
        self.tick(300_000)

    def _at_rest(self) -> bool:
        held = any(worker.held for worker in self.alive)
        return not (self.core.open_sequences or self.flights or self.asks or held)


def queue(asked: PlaceRequest) -> PlaceReply:
    """Tell everybody to wait."""
    return Queued(position=0)


def reject(asked: PlaceRequest) -> PlaceReply:
    """Tell everybody that there is no worker."""
    return Rejected(reason="no_worker", message="no worker")
