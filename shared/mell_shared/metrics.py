"""Prometheus metrics and `/health` over HTTP, on the service's own event loop: a loop that hangs does not answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from mell_shared.bus import Bus
from mell_shared.process import StartError

_REQUEST_TIMEOUT_S = 5.0
_REQUEST_LIMIT_BYTES = 16_384


class BusCollector(Collector):
    """A bus's counts as metrics."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        stats = self._bus.stats
        yield GaugeMetricFamily("mell_bus_connected", "1 while connected to the broker.", int(self._bus.connected))
        yield CounterMetricFamily("mell_bus_dropped", "Deliveries dropped: the consumer was slow.", stats.dropped)
        yield CounterMetricFamily("mell_bus_reconnections", "Connections made again.", stats.reconnections)
        yield CounterMetricFamily("mell_bus_forbidden", "What the broker did not let this user do.", stats.forbidden)
        errors = CounterMetricFamily("mell_bus_errors", "Errors of the connection.", labels=["error"])
        for name, count in sorted(stats.errors.items()):
            errors.add_metric([name], count)
        yield errors


def new_registry() -> CollectorRegistry:
    """Return a registry of this process alone, with its CPU, memory and Python version in it."""
    registry = CollectorRegistry()
    add_process_metrics(registry)
    return registry


def add_process_metrics(registry: CollectorRegistry) -> None:
    """Add this process's CPU, memory and Python version."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)


@asynccontextmanager
async def serve_metrics(
    registry: CollectorRegistry, healthy: Callable[[], bool], *, host: str, port: int
) -> AsyncIterator[None]:
    """Serve `/metrics` and `/health` on the port while the context lasts; port 0 serves nothing.

    `/health` is 200 while `healthy()` is true, else 503. Raises `StartError` if the port cannot be had.
    """
    if port == 0:
        yield
        return
    async with open_endpoint(registry, healthy, host=host, port=port):
        yield


@asynccontextmanager
async def open_endpoint(
    registry: CollectorRegistry, healthy: Callable[[], bool], *, host: str, port: int
) -> AsyncIterator[int]:
    """Serve as `serve_metrics` does, but on a free port if `port` is 0; yields the port."""
    endpoint = _Endpoint(registry, healthy)
    try:
        server = await asyncio.start_server(endpoint.answer, host, port, limit=_REQUEST_LIMIT_BYTES)
    except OSError as error:
        raise StartError(f"cannot serve metrics on {host}:{port} ({error.strerror}); set MELL_METRICS_PORT") from error
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await endpoint.finish()
        await server.wait_closed()


class _Endpoint:
    """Answers one request a connection; nothing larger is needed and nothing larger can be attacked."""

    def __init__(self, registry: CollectorRegistry, healthy: Callable[[], bool]) -> None:
        self._registry = registry
        self._healthy = healthy
        self._answering: set[asyncio.Task[None]] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request's head, write the response, close."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head.split(b"\r\n", 1)[0]))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # a client that goes away or does not speak HTTP
        finally:
            self._answering.discard(task)
            writer.close()

    async def finish(self) -> None:
        """Cancel what is being answered."""
        tasks = list(self._answering)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _response(self, request_line: bytes) -> bytes:
        method, _, rest = request_line.partition(b" ")
        path = rest.split(b" ")[0].split(b"?")[0]
        status, content_type, body = self._resource(path)
        if method not in (b"GET", b"HEAD"):
            status, content_type, body = HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n"
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {content_type}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else body)

    def _resource(self, path: bytes) -> tuple[HTTPStatus, str, bytes]:
        if path == b"/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == b"/health":
            healthy = self._healthy()
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            body = {"status": "ok" if healthy else "unavailable"}
            return status, "application/json", json.dumps(body).encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b"here are /metrics and /health\n"
