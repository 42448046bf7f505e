"""The scheduler's spans, by hand: what ends them, and whose trace a move is in."""

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mell_scheduler.core import MigrationSettled, PlaceRequested, Reply, StartMigration
from mell_scheduler.tracing import SchedulerTraces
from mell_shared.messages.scheduler import Rejected
from mell_shared.messages.worker import Migrate
from mell_shared.otel import OtelTracer
from mell_shared.tracing import NO_TRACER, trace_of
from tests.scheduler.script import place_request, placed
from tests.shared.test_tracing import CLIENTS

ORDER = Migrate(
    migration="7-1", sequence="s", generation=1, target="b", mode="kv", reason="drain", term=7, planned_tokens=32
)
MOVE = StartMigration("a", ORDER, 2, 1_000)
FAILED = MigrationSettled("7-1", "s", "a", "b", "failed", "no_room")


class Traced:
    """Spans into memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.traces = SchedulerTraces(OtelTracer(provider))

    def ask(self, handle: str = "h", traceparent: str = CLIENTS) -> None:
        """A frontend asks for a place."""
        self.traces.asked(PlaceRequested(handle, place_request("s", traceparent=traceparent)))

    def ended(self) -> list[ReadableSpan]:
        """The spans that are over."""
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def traced() -> Traced:
    """Spans into memory."""
    return Traced()


def test_a_placement_lasts_until_its_answer(traced: Traced) -> None:
    """In the trace that the ask brought; a refusal is an error."""
    traced.ask("h1")
    traced.ask("h2")
    assert traced.ended() == []
    traced.traces.answered(Reply("h1", "s", placed("w")))
    traced.traces.answered(Reply("h2", "s", Rejected(reason="queue_full", message="")))
    first, second = traced.ended()
    assert f"{first.context.trace_id:032x}" == trace_of(CLIENTS)
    assert (first.attributes or {})["mell.worker"] == "w"
    assert first.status.is_ok
    assert (second.status.is_ok, second.status.description) == (False, "queue_full")


def test_an_ask_that_is_delivered_twice_is_one_span(traced: Traced) -> None:
    """A second one would never end."""
    traced.ask()
    traced.ask()
    traced.traces.answered(Reply("h", "s", placed("w")))
    traced.traces.ended()
    assert [span.status.is_ok for span in traced.ended()] == [True]


def test_a_move_is_in_the_trace_of_its_sequence_and_its_order_takes_that_along(traced: Traced) -> None:
    """Until it is settled; a move that failed is an error."""
    traced.ask()
    order = traced.traces.ordered(MOVE).order
    assert trace_of(order.traceparent) == trace_of(CLIENTS)
    assert order.model_copy(update={"traceparent": ""}) == ORDER
    traced.traces.settled(FAILED)
    traced.traces.settled(FAILED)
    (span,) = traced.ended()
    assert f"{span.context.span_id:016x}" == order.traceparent.split("-")[2]
    assert (span.status.is_ok, span.status.description) == (False, "failed")


def test_a_move_of_an_unknown_sequence_is_a_trace_of_its_own(traced: Traced) -> None:
    """An earlier leader placed it."""
    order = traced.traces.ordered(MOVE).order
    assert trace_of(order.traceparent) not in {"", trace_of(CLIENTS)}


def test_what_is_open_ends_with_leadership(traced: Traced) -> None:
    """Its answer would come from another."""
    traced.ask()
    traced.traces.ordered(MOVE)
    traced.traces.ended()
    assert {span.status.description for span in traced.ended()} == {"leadership_lost"}


def test_what_nobody_traces_makes_no_span(traced: Traced) -> None:
    """Asks without a context; anything, where tracing is off."""
    traced.ask(traceparent="")
    traced.traces.answered(Reply("h", "s", placed("w")))
    assert traced.ended() == []
    assert SchedulerTraces(NO_TRACER).ordered(MOVE) is MOVE
