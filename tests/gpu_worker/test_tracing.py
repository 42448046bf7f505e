"""A worker's spans in virtual time: which there are, what ends them, and that none is left open."""

import asyncio
from collections import Counter

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mell_shared.memory_bus import Faults, MemoryBroker
from mell_shared.otel import OtelTracer
from mell_shared.tracing import trace_of
from tests.gpu_worker.fleet import Fleet, play
from tests.shared.test_tracing import CLIENTS


class Spans:
    """Spans of all workers, in memory; those begun are counted too."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.begun: Counter[str] = Counter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(provider)
        start = self.tracer.start

        def counting(name: str, *arguments: object, **named: object) -> object:
            self.begun[name] += 1
            return start(name, *arguments, **named)  # type: ignore[arg-type]

        self.tracer.start = counting  # type: ignore[method-assign,assignment]

    def ended(self, name: str = "") -> list[ReadableSpan]:
        """Those that are over."""
        return [span for span in self._exporter.get_finished_spans() if name in ("", span.name)]

    def check(self) -> None:
        """All are over, and of the client's trace."""
        assert Counter(span.name for span in self.ended()) == self.begun
        assert {f"{span.context.trace_id:032x}" for span in self.ended()} <= {trace_of(CLIENTS)}


@pytest.fixture
def spans() -> Spans:
    """Where spans go."""
    return Spans()


def test_a_run_is_a_span_with_what_it_made(spans: Spans) -> None:
    """From the submission to the end."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", 50, traceparent=CLIENTS)
        await fleet.whole("a", max_tokens=50)
        await fleet.nothing_left()

    play(scene, "w1", tracer=spans.tracer)
    spans.check()
    (span,) = spans.ended("generate")
    assert (span.attributes or {})["mell.outputs"] == 50
    assert span.status.is_ok


def test_a_move_is_told_at_both_ends_and_the_run_goes_on_elsewhere(spans: Spans) -> None:
    """The target's spans are children of the source's."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", traceparent=CLIENTS)
        await fleet.frontend.move("a", "w2")
        await fleet.whole("a")
        await fleet.nothing_left()
        await asyncio.sleep(1)

    play(scene, "w1", "w2", tracer=spans.tracer)
    spans.check()
    assert spans.begun == {"generate": 2, "move out": 1, "move in": 1}
    (departure,), (arrival,) = spans.ended("move out"), spans.ended("move in")
    assert arrival.parent is not None
    assert arrival.parent.span_id == departure.context.span_id
    first, second = spans.ended("generate")
    assert (first.attributes or {})["mell.moved"] is True
    assert second.parent is not None
    assert second.parent.span_id == arrival.context.span_id


def test_a_move_that_fails_is_an_error_at_both_ends_and_the_run_goes_on(spans: Spans) -> None:
    """One run, where it was."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", traceparent=CLIENTS)
        fleet.network.at_payload(0, lambda link, payload: b"\0" * len(payload))
        await fleet.frontend.move("a", "w2")
        await fleet.whole("a")
        await fleet.nothing_left()
        await asyncio.sleep(61)

    play(scene, "w1", "w2", tracer=spans.tracer)
    spans.check()
    assert [span.status.description for span in spans.ended("move out")] == ["corrupt"]
    assert not any(span.status.is_ok for span in spans.ended("move in"))
    (run,) = spans.ended("generate")
    assert run.status.is_ok


def test_what_nobody_traces_makes_no_span(spans: Spans) -> None:
    """Also when it moves."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1")
        await fleet.frontend.move("a", "w2")
        await fleet.whole("a")

    play(scene, "w1", "w2", tracer=spans.tracer)
    assert spans.begun == {}


@pytest.mark.parametrize("seed", range(3))
def test_no_span_is_left_open_whatever_the_bus_does(spans: Spans, seed: int) -> None:
    """Messages are lost, repeated and late; a minute after the last one all spans are over."""
    broker = MemoryBroker(seed=seed, faults=Faults(loss=0.1, duplicate=0.1, max_delay_us=20_000))

    async def scene(fleet: Fleet) -> None:
        for number in range(4):
            await fleet.stream(f"s{number}", "w1", seed=number, max_tokens=180, traceparent=CLIENTS)
        await asyncio.gather(*(fleet.ordered(f"s{number}", "w2") for number in range(4)))
        for number in range(4):
            await fleet.whole(f"s{number}", seed=number, max_tokens=180)
        await fleet.nothing_left()
        await asyncio.sleep(61)

    play(scene, "w1", "w2", broker=broker, kv_blocks=160, tracer=spans.tracer)
    spans.check()
    assert spans.begun["generate"] >= 4
