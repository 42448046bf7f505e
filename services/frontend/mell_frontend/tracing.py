"""The frontend's spans: one for each request, and one for each question about a sequence to scheduler or worker."""

from collections.abc import Callable
from dataclasses import replace

from mell_frontend.peers import Peers
from mell_frontend.record import RequestRecord
from mell_frontend.stream.commands import AskPlacement, SubmitSequence
from mell_frontend.stream.events import (
    PlaceAnswered,
    PlaceFailed,
    SubmitAnswered,
    SubmitFailed,
    SubmitTooLong,
)
from mell_shared.messages.scheduler import Placed
from mell_shared.messages.worker import SubmitAccepted
from mell_shared.tracing import Attributes, Span, Tracer


class RequestTrace:
    """The span of one HTTP request; goes on the trace that its client names."""

    def __init__(self, tracer: Tracer, record: RequestRecord, clients: str, now_us: int) -> None:
        attributes: Attributes = {
            "http.request.method": record.method,
            "http.route": record.path,
            "gen_ai.request.model": record.model,
            "gen_ai.response.id": record.answer_id,
            "mell.request_id": record.request_id,
            "mell.choices": record.choices,
        }
        name = f"{record.method} {record.path}"
        self._span = tracer.start(name, clients, attributes, kind="server", ago_us=now_us - record.started_us)
        record.traceparent = self._span.traceparent

    def end(self, record: RequestRecord, now_us: int) -> None:
        """The request is over; say what it used, and when its first token came."""
        if record.first_token_us is not None:
            self._span.event("first token", now_us - record.first_token_us)
        self._span.set(
            {
                "http.response.status_code": 499 if record.disconnected else record.status,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "mell.cached_tokens": record.cached_tokens,
                "mell.queued": record.queued,
            }
        )
        self._span.end("client_gone" if record.disconnected else record.error)


class TracedPeers:
    """Asks peers within spans, whose context goes along; `parent_of` tells the traceparent of a sequence."""

    def __init__(self, peers: Peers, tracer: Tracer, parent_of: Callable[[str], str]) -> None:
        self._peers = peers
        self._tracer = tracer
        self._parent_of = parent_of

    async def place(self, command: AskPlacement) -> PlaceAnswered | PlaceFailed:
        """Ask the scheduler where to run a sequence."""
        message = command.message
        span = self._start("ask for a place", message.sequence, message.generation)
        if span is None:
            return await self._peers.place(command)
        traced = message.model_copy(update={"traceparent": span.traceparent})
        outcome = await self._peers.place(replace(command, message=traced))
        if isinstance(outcome, PlaceFailed):
            span.end(outcome.failure)
        else:
            worker = outcome.reply.worker if isinstance(outcome.reply, Placed) else ""
            span.set({"mell.reply": outcome.reply.kind, "mell.worker": worker})
            span.end()
        return outcome

    async def submit(self, command: SubmitSequence) -> SubmitAnswered | SubmitFailed | SubmitTooLong:
        """Ask a worker to run a sequence."""
        message = command.message
        span = self._start("submit", message.sequence, message.generation)
        if span is None:
            return await self._peers.submit(command)
        span.set({"mell.worker": command.worker})
        traced = message.model_copy(update={"traceparent": span.traceparent})
        outcome = await self._peers.submit(replace(command, message=traced))
        accepted = isinstance(outcome, SubmitAnswered) and isinstance(outcome.reply, SubmitAccepted)
        span.end("" if accepted else _why(outcome))
        return outcome

    def _start(self, name: str, sequence: str, generation: int) -> Span | None:
        """Begin a span of a sequence; None if its request is not traced, or is over."""
        parent = self._parent_of(sequence)
        if not parent:
            return None
        attributes: Attributes = {"mell.sequence": sequence, "mell.generation": generation}
        return self._tracer.start(name, parent, attributes, kind="client")


def _why(outcome: SubmitAnswered | SubmitFailed | SubmitTooLong) -> str:
    match outcome:
        case SubmitAnswered():
            return getattr(outcome.reply, "reason", outcome.reply.kind)
        case SubmitFailed():
            return outcome.failure
        case SubmitTooLong():
            return "too_long"
