"""The worker's spans: each sequence while it runs here, each move out of here and into here."""

from collections.abc import Iterable
from dataclasses import dataclass

from mell_gpu_worker.core.commands import Command, PublishEvent, Reply
from mell_gpu_worker.core.events import CommandReceived, Event, TimePassed
from mell_gpu_worker.core.worker import WorkerCore
from mell_shared.messages.scheduler import MigrationCommitted, MigrationFailed, SequenceFinished
from mell_shared.messages.worker import (
    KvRefused,
    Migrate,
    MigrateAccepted,
    PeerCommand,
    ReleaseKv,
    ReserveKv,
    Submit,
    SubmitAccepted,
    WorkerCommand,
    WorkerReply,
)
from mell_shared.tracing import Attributes, Span, Tracer, trace_of

_SWEEP_US = 50_000
_LONGEST_ARRIVAL_US = 60_000_000


@dataclass(frozen=True, slots=True)
class _Run:
    """The span of a sequence here, or of its leaving; of this generation."""

    generation: int
    span: Span


@dataclass(frozen=True, slots=True)
class _Arrival:
    span: Span
    reply_to: str
    since_us: int


class WorkerTraces:
    """Spans of what is here now, told by the core's events and commands."""

    def __init__(self, tracer: Tracer, core: WorkerCore) -> None:
        self._tracer = tracer
        self._core = core
        self._runs: dict[str, _Run] = {}
        """By sequence."""
        self._departures: dict[str, _Run] = {}
        """By sequence: one at a time moves."""
        self._arrivals: dict[str, _Arrival] = {}
        """By migration."""
        self._asked: dict[str, str] = {}
        """The same by whom to answer: a reservation may be refused later."""
        self._swept_us = 0

    def follow(self, event: Event, commands: Iterable[Command], now_us: int) -> None:
        """Begin and end spans by what happened and what came of it."""
        if not self._tracer.on:
            return
        if isinstance(event, CommandReceived):
            replies = [command.message for command in commands if isinstance(command, Reply)]
            self._take(event.command, event.reply_to, replies, now_us)
        for command in commands:
            if isinstance(command, PublishEvent):
                self._tell(command.message)
            elif isinstance(command, Reply) and isinstance(command.message, KvRefused):
                self._arrive(self._asked.get(command.reply_to, ""), command.message.reason)
        if isinstance(event, TimePassed) and now_us - self._swept_us >= _SWEEP_US:
            self._sweep(now_us)

    def outgoing(self, message: PeerCommand) -> PeerCommand:
        """Return a question to another worker with the context of the move that it is about."""
        if not isinstance(message, ReserveKv) or (departure := self._departures.get(message.sequence)) is None:
            return message
        return message.model_copy(update={"traceparent": departure.span.traceparent})

    def _take(self, command: WorkerCommand, reply_to: str, replies: list[WorkerReply], now_us: int) -> None:
        match command, replies:
            case Submit(), [SubmitAccepted() as reply]:
                self._begin(command.sequence, command.generation, command.traceparent, reply.cached_tokens)
            case Migrate(), [MigrateAccepted()]:
                self._depart(command)
            case ReserveKv(), _ if command.traceparent and command.migration not in self._arrivals:
                self._prepare(command, reply_to, now_us)
            case ReleaseKv(), _:
                self._arrive(command.migration, "released")

    def _prepare(self, command: ReserveKv, reply_to: str, now_us: int) -> None:
        """Begin the span of a move into here; it may be refused yet."""
        attributes: Attributes = {
            "mell.migration": command.migration,
            "mell.sequence": command.sequence,
            "mell.source": command.source,
            "mell.worker": self._worker,
            "mell.mode": command.mode,
        }
        span = self._tracer.start("move in", command.traceparent, attributes, kind="server")
        self._arrivals[command.migration] = _Arrival(span, reply_to, now_us)
        self._asked[reply_to] = command.migration

    def _begin(
        self, sequence: str, generation: int, parent: str, cached_tokens: int, *, over_too: bool = False
    ) -> None:
        """Begin the span of a run, `over_too`: even if it has ended by now; a repeated submission runs already."""
        found = self._core.streams.find(sequence, generation)
        known = self._runs.get(sequence)
        if not parent or found is None or (known is not None and known.generation == generation):
            return
        if not found.live and not over_too:
            return
        self._end(sequence, "superseded")
        attributes: Attributes = {
            "mell.sequence": sequence,
            "mell.generation": generation,
            "mell.worker": self._worker,
            "mell.model": self._core.config.spec.model,
            "mell.prompt_tokens": found.prompt_tokens,
            "mell.cached_tokens": cached_tokens,
            "mell.first_output": found.outputs,
        }
        self._runs[sequence] = _Run(generation, self._tracer.start("generate", parent, attributes))
        if not found.live:
            self._end(sequence)

    def _depart(self, order: Migrate) -> None:
        run = self._runs.get(order.sequence)
        parent = order.traceparent
        if run is not None and trace_of(parent) != trace_of(run.span.traceparent):
            parent = run.span.traceparent  # a scheduler that took over does not know the request's trace
        here = self._core.streams.find(order.sequence, order.generation) is not None
        if not parent or not here or order.sequence in self._departures:
            return  # not traced, or a repeat of the order
        attributes: Attributes = {
            "mell.migration": order.migration,
            "mell.sequence": order.sequence,
            "mell.worker": self._worker,
            "mell.target": order.target,
            "mell.mode": order.mode,
        }
        span = self._tracer.start("move out", parent, attributes, kind="client")
        self._departures[order.sequence] = _Run(order.generation, span)

    def _tell(self, event: object) -> None:
        match event:
            case SequenceFinished():
                self._end(event.sequence, "" if event.reason in ("stop", "length") else event.reason)
            case MigrationFailed():
                if (departure := self._departures.pop(event.sequence, None)) is not None:
                    departure.span.end(event.reason)
            case MigrationCommitted():
                arrival = self._arrive(event.migration, "")
                parent = "" if arrival is None else arrival.traceparent
                # Its first token here may have been its last.
                self._begin(event.sequence, event.generation, parent, 0, over_too=True)

    def _arrive(self, migration: str, error: str) -> Span | None:
        arrival = self._arrivals.pop(migration, None)
        if arrival is None:
            return None
        self._asked.pop(arrival.reply_to, None)
        arrival.span.end(error)
        return arrival.span

    def _end(self, sequence: str, error: str = "") -> None:
        run = self._runs.pop(sequence, None)
        if run is not None:
            found = self._core.streams.find(sequence, run.generation)
            if found is not None:
                run.span.set({"mell.outputs": found.outputs})
            run.span.end(error)
        if (departure := self._departures.pop(sequence, None)) is not None:
            departure.span.end(error)

    def _sweep(self, now_us: int) -> None:
        """End what is here no more without a word: moved away, given up, forgotten."""
        self._swept_us = now_us
        for sequence, here in {**self._departures, **self._runs}.items():
            if self._core.streams.find(sequence, here.generation) is None:
                here.span.set({"mell.moved": sequence in self._departures})
                self._end(sequence)
        for migration, arrival in list(self._arrivals.items()):
            if now_us - arrival.since_us > _LONGEST_ARRIVAL_US:
                self._arrive(migration, "expired")

    @property
    def _worker(self) -> str:
        return self._core.config.spec.worker
