"""Tracing off, by OpenTelemetry in memory, and sent to a collector over HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mell_shared.otel import OtelTracer, open_tracer
from mell_shared.process import StartError
from mell_shared.tracing import NoTracer, trace_of

CLIENTS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CLIENTS[:-1] + "0"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where spans end up."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> OtelTracer:
    """A tracer into memory."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracer(provider)


def test_off_is_nothing() -> None:
    """No span, no traceparent, no cost; what is said is forgotten."""
    tracer = NoTracer()
    span = tracer.start("work", CLIENTS, {"a": 1}, kind="server")
    span.set({"b": 2})
    span.event("first")
    span.end("failed")
    assert (tracer.on, span.traceparent) == (False, "")


def test_a_trace_goes_on_by_its_traceparent(tracer: OtelTracer, exporter: InMemorySpanExporter) -> None:
    """A child of the client's span, a child of that elsewhere; attributes, events, errors and times are kept."""
    outer = tracer.start("outer", CLIENTS, {"a": 1}, kind="server", ago_us=5_000_000)
    inner = tracer.start("inner", outer.traceparent)
    inner.event("first token", ago_us=1_000)
    inner.set({"b": "x"})
    inner.end("timeout")
    inner.end()
    outer.end()
    inside, outside = exporter.get_finished_spans()
    assert trace_of(outer.traceparent) == trace_of(inner.traceparent) == trace_of(CLIENTS)
    assert f"{outside.parent.span_id:016x}" == CLIENTS.split("-")[2]  # type: ignore[union-attr]
    assert inside.parent.span_id == outside.context.span_id  # type: ignore[union-attr]
    assert (dict(inside.attributes or {}), dict(outside.attributes or {})) == ({"b": "x"}, {"a": 1})
    assert [event.name for event in inside.events] == ["first token"]
    assert (inside.status.is_ok, inside.status.description) == (False, "timeout")
    assert outside.end_time is not None
    assert outside.start_time is not None
    assert outside.end_time - outside.start_time >= 5_000_000_000


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", CLIENTS + "-x" * 3])
def test_what_is_no_traceparent_begins_a_trace(tracer: OtelTracer, exporter: InMemorySpanExporter, parent: str) -> None:
    """A client may send anything."""
    tracer.start("work", parent).end()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_what_its_client_does_not_sample_is_passed_on_unsampled(
    tracer: OtelTracer, exporter: InMemorySpanExporter
) -> None:
    """The trace goes through, and nothing of it is sent."""
    outer = tracer.start("outer", UNSAMPLED)
    inner = tracer.start("inner", outer.traceparent)
    inner.end()
    outer.end()
    assert inner.traceparent.endswith("-00")
    assert trace_of(inner.traceparent) == trace_of(UNSAMPLED)
    assert exporter.get_finished_spans() == ()


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    raise AssertionError("not compressed unless asked")
                collector.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Where spans are sent."""
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[tuple[str, Any]]:
        """Every span, with the name of its service."""
        return [
            (attribute.value.string_value, span)
            for _, request in self.requests
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector."""
    with Collector() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A running collector."""
    with collecting() as server:
        yield server


@pytest.mark.parametrize("by_variable", [False, True])
async def test_spans_reach_a_collector(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, *, by_variable: bool
) -> None:
    """Named by our setting, or by OpenTelemetry's own variable; what is left is sent at the end."""
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    tracer = open_tracer("" if by_variable else collector.url, service="frontend", process="frontend-1")
    tracer.start("work").end()
    await tracer.close()
    ((path, _),) = collector.requests
    assert path == "/v1/traces"
    assert [(service, span.name) for service, span in collector.spans()] == [("mell-frontend", "work")]


async def test_a_collector_that_is_away_stops_nobody() -> None:
    """Spans are lost; starting, working and stopping are not held up for long."""
    tracer = open_tracer("http://127.0.0.1:9", service="worker", process="w")
    tracer.start("work").end()
    async with asyncio.timeout(30):
        await tracer.close()


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert not open_tracer("", service="frontend", process="f").on


def test_a_missing_package_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartError, match=r"mell\[otel\]"):
        open_tracer("http://127.0.0.1:4318", service="frontend", process="f")
