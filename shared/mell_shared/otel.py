"""Tracing by OpenTelemetry, sent to a collector by OTLP over HTTP; the only module that imports its packages."""

import asyncio
import os
import time
from typing import Any

from mell_shared.process import StartError
from mell_shared.tracing import Attributes, Kind, NoTracer, Span, Tracer

_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TIMEOUT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_EXPORT_TIMEOUT_S = 2.0
"""Unless those variables say another: a process that ends waits as long for a collector that does not answer."""


def open_tracer(endpoint: str, *, service: str, process: str) -> Tracer:
    """Return what traces to the collector at `endpoint`, else to where OpenTelemetry's own variables say, else nowhere.

    Raises `StartError` if that is wanted and the packages are not installed. Sampling, headers and
    timeouts are those of OpenTelemetry's variables (`OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, ...).
    """
    if not endpoint and not any(os.environ.get(name) for name in _ENDPOINT_VARIABLES):
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise StartError(
            f"spans are wanted (MELL_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT), but {error.name} is not installed: "
            "pip install 'mell[otel]'"
        ) from error
    url = f"{endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces" if endpoint else None
    named = {"service.name": f"mell-{service}", "service.instance.id": process}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    timeout_s = None if any(os.environ.get(name) for name in _TIMEOUT_VARIABLES) else _EXPORT_TIMEOUT_S
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=timeout_s)))
    return OtelTracer(provider)


class OtelTracer:
    """A `Tracer` over a `TracerProvider`; spans wait in its bounded queue for a thread that sends them."""

    on = True

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import SpanKind, propagation  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self._tracer = provider.get_tracer("mell")
        self._propagator = TraceContextTextMapPropagator()
        self._in_context = propagation.set_span_in_context
        self._kinds = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}

    def start(
        self,
        name: str,
        parent: str = "",
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        ago_us: int = 0,
    ) -> Span:
        """Begin a span."""
        from opentelemetry.context import Context  # noqa: PLC0415

        context = self._propagator.extract({"traceparent": parent}, Context())
        began_ns = time.time_ns() - 1_000 * ago_us
        span = self._tracer.start_span(name, context, self._kinds[kind], dict(attributes or {}), start_time=began_ns)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._in_context(span))
        return _OtelSpan(span, carrier.get("traceparent", ""))

    async def close(self) -> None:
        """Send what is left."""
        await asyncio.to_thread(self._provider.shutdown)


class _OtelSpan:
    """A span of OpenTelemetry's."""

    def __init__(self, span: Any, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""
        self._span.set_attributes(attributes)

    def event(self, name: str, ago_us: int = 0) -> None:
        """Say that something happened."""
        self._span.add_event(name, timestamp=time.time_ns() - 1_000 * ago_us)

    def end(self, error: str = "") -> None:
        """It is over."""
        if not self._span.is_recording():
            return
        if error:
            from opentelemetry.trace import StatusCode  # noqa: PLC0415

            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()
