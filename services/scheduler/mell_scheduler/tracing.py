"""The scheduler's spans: each placement from the ask to its answer, each move from the order to its end."""

from collections import OrderedDict
from dataclasses import replace

from mell_scheduler.core import Event, MigrationSettled, PlaceRequested, Reply, StartMigration
from mell_shared.messages.scheduler import Placed, PlaceRequest
from mell_shared.tracing import Attributes, Span, Tracer

_MOST_SEQUENCES = 20_000
"""Whose traces are remembered, so that their moves belong to them."""


class SchedulerTraces:
    """Spans of what is asked and under way. What an earlier leader placed has traces of its own."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._asks: dict[str, Span] = {}
        """By the handle of a held request."""
        self._moves: dict[str, Span] = {}
        self._parents: OrderedDict[str, str] = OrderedDict()
        """Sequence -> the traceparent that it was placed with last."""

    def asked(self, event: Event) -> None:
        """Begin the span of a placement; what the broker delivers twice is one ask, and answered once."""
        if self._tracer.on and isinstance(event, PlaceRequested) and event.request.traceparent:
            request = event.request
            if event.handle in self._asks:
                return
            self._remember(request)
            attributes: Attributes = {
                "mell.sequence": request.sequence,
                "mell.generation": request.generation,
                "mell.model": request.model,
                "mell.prompt_tokens": request.prompt_tokens,
                "mell.waited_s": request.waited_s,
            }
            self._asks[event.handle] = self._tracer.start("place", request.traceparent, attributes, kind="server")

    def answered(self, command: Reply) -> None:
        """End it."""
        span = self._asks.pop(command.handle, None)
        if span is not None:
            worker = command.reply.worker if isinstance(command.reply, Placed) else ""
            span.set({"mell.reply": command.reply.kind, "mell.worker": worker})
            span.end("" if command.reply.kind != "rejected" else getattr(command.reply, "reason", ""))

    def ordered(self, command: StartMigration) -> StartMigration:
        """Begin the span of a move; return the order with its context."""
        if not self._tracer.on:
            return command
        order = command.order
        attributes: Attributes = {
            "mell.migration": order.migration,
            "mell.sequence": order.sequence,
            "mell.source": command.source,
            "mell.target": order.target,
            "mell.mode": order.mode,
            "mell.cause": order.reason,
            "mell.blocks": command.blocks,
            "mell.predicted_s": command.predicted_us / 1e6,
        }
        span = self._tracer.start("migrate", self._parents.get(order.sequence, ""), attributes, kind="client")
        self._moves[order.migration] = span
        return replace(command, order=order.model_copy(update={"traceparent": span.traceparent}))

    def settled(self, command: MigrationSettled) -> None:
        """End it."""
        span = self._moves.pop(command.migration, None)
        if span is not None:
            span.set(
                {
                    "mell.outcome": command.outcome,
                    "mell.copied_bytes": command.copied_bytes,
                    "mell.prefilled_tokens": command.prefilled_tokens,
                    "mell.stopped_s": command.stopped_us / 1e6,
                }
            )
            span.end("" if command.outcome == "committed" else command.outcome)

    def ended(self) -> None:
        """This scheduler leads no more: end what is open."""
        for span in [*self._asks.values(), *self._moves.values()]:
            span.end("leadership_lost")
        self._asks.clear()
        self._moves.clear()

    def _remember(self, request: PlaceRequest) -> None:
        self._parents.pop(request.sequence, None)
        self._parents[request.sequence] = request.traceparent
        if len(self._parents) > _MOST_SEQUENCES:
            self._parents.popitem(last=False)
