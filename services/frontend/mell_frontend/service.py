"""The frontend's shell: the bus, the gateway and the HTTP server, brought up in order and taken down in order."""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

import structlog
import uvicorn
from prometheus_client import CollectorRegistry

from mell_frontend.admin_gate import AdminGate
from mell_frontend.app import create_app
from mell_frontend.asgi import App
from mell_frontend.event_feed import EventFeed
from mell_frontend.gateway import BusGateway
from mell_frontend.http_protocol import bounded_protocol
from mell_frontend.key_store import KeyStore
from mell_frontend.keys import KeysFileError
from mell_frontend.peers import Timeouts
from mell_frontend.served import ModelLoadError, ServedModel, load_models
from mell_frontend.settings import FrontendSettings
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream_metrics import GatewayCollector
from mell_frontend.telling import RequestTeller
from mell_shared.bus import Bus
from mell_shared.clock import SystemClock
from mell_shared.events.envelope import source_name
from mell_shared.events.outbox import Outbox, OutboxCollector, nowhere
from mell_shared.metrics import BusCollector, new_registry, serve_metrics
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_event_store import NatsEventStore
from mell_shared.otel import open_tracer
from mell_shared.process import StartError
from mell_shared.subjects import Subjects

_READY_POLL_S = 0.05
_LAST_WORDS_S = 2.0
"""For cancels to reach the workers, and for answers to reach the clients, after the deadline."""


class _HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@dataclass(frozen=True, slots=True)
class _HttpSide:
    """The HTTP server, the socket it is to listen on, and what it serves."""

    server: _HttpServer
    listener: socket.socket
    models: list[str]
    keys: KeyStore
    feed: EventFeed


class _Events:
    """A frontend's side of the events for other systems: tells its own, lets operators read all."""

    def __init__(self, settings: FrontendSettings, bus: NatsBus, frontend: str) -> None:
        on = settings.events == "on"
        store = NatsEventStore(bus, Subjects(settings.subject_prefix)) if on else None
        source = source_name(settings.subject_prefix, "frontend", frontend)
        self._outbox = None if store is None else Outbox(store, source, lambda: self.teller.state())  # noqa: PLW0108 - made below
        self.teller = RequestTeller(nowhere if self._outbox is None else self._outbox.emit)
        self.feed = EventFeed(store, settings.write_timeout_s)

    @asynccontextmanager
    async def running(self, registry: CollectorRegistry) -> AsyncIterator[None]:
        """Write what is told while the context lasts."""
        if self._outbox is None:
            yield
            return
        registry.register(OutboxCollector(self._outbox))
        async with self._outbox.running():
            yield


async def serve(settings: FrontendSettings, frontend: str, stop: asyncio.Event) -> None:
    """Serve until `stop`, then finish what runs. Raises `StartError`, `BrokerUnreachableError`."""
    keys = _read_keys(settings)
    with _listen(settings.host, settings.port) as listener:
        models = await asyncio.to_thread(_load_models, settings)
        tracer = open_tracer(settings.otlp_endpoint, service="frontend", process=frontend)
        bus = await NatsBus.connect(settings.nats_url, name=frontend, access=settings.broker_access("frontend"))
        try:
            core = FrontendCore(frontend, stream_limits(settings))
            timeouts = Timeouts(place_s=settings.place_reply_s, submit_s=settings.submit_reply_s)
            gateway = BusGateway(bus, Subjects(settings.subject_prefix), core, SystemClock(), timeouts, tracer=tracer)
            registry = _registry(bus, gateway)
            events = _Events(settings, bus, frontend)
            app = create_app(
                settings, gateway, models, registry, keys=keys, teller=events.teller, feed=events.feed, tracer=tracer
            )
            names = [model.name for model in models]
            http = _HttpSide(_HttpServer(_http_config(app, settings)), listener, names, keys, events.feed)
            # What libraries and models are made of lives as long as the process: never search it for garbage again.
            gc.collect()
            gc.freeze()
            metrics = partial(serve_metrics, host=settings.metrics_host, port=settings.metrics_port)
            async with metrics(registry, lambda: gateway.ready), events.running(registry):
                await _run(settings, gateway, bus, http, stop)
        finally:
            await bus.close()
            await tracer.close()
    structlog.get_logger().info("stopped")


def stream_limits(settings: FrontendSettings) -> StreamLimits:
    """Return the core's limits; an owner is suspected when it has been silent for two fifths of what loses it."""
    silence_us = round(settings.worker_silence_s * 1e6)
    return StreamLimits(
        place_deadline_us=round(settings.place_deadline_s * 1e6),
        worker_suspect_us=silence_us * 2 // 5,
        worker_silence_us=silence_us,
        broker_lost_us=round(settings.broker_lost_s * 1e6),
        max_sequences=settings.max_open_sequences,
    )


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens, so that a taken port is known before anything else is done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port or MELL_PORT"
        ) from error
    with listener:
        yield listener


def _read_keys(settings: FrontendSettings) -> KeyStore:
    try:
        AdminGate(settings.admin_key)
        return KeyStore(settings.api_keys, settings.api_keys_file)
    except KeysFileError as error:
        raise StartError(f"{error}; see --admin-key, --api-keys and --api-keys-file") from error


def _load_models(settings: FrontendSettings) -> list[ServedModel]:
    try:
        return load_models(settings.models, settings.model_dir, settings.max_model_len)
    except ModelLoadError as error:
        raise StartError(str(error)) from error


async def _run(settings: FrontendSettings, gateway: BusGateway, bus: Bus, http: _HttpSide, stop: asyncio.Event) -> None:
    """Run gateway and HTTP server until `stop`; then let the streams end, the answers leave, the cancels arrive."""
    async with asyncio.TaskGroup() as group:
        started = asyncio.Event()
        watching = group.create_task(bus.watch())
        running = group.create_task(gateway.run(started.set))
        await started.wait()
        serving = group.create_task(http.server.serve(sockets=[http.listener]))
        announcing = group.create_task(_announce(gateway, http))
        looking = group.create_task(http.keys.watch())
        await stop.wait()
        announcing.cancel()
        looking.cancel()
        await _finish(gateway, settings.stop_deadline_s)
        http.feed.stop()
        http.server.should_exit = True
        await serving
        gateway.stop()
        await running
        watching.cancel()


def _registry(bus: Bus, gateway: BusGateway) -> CollectorRegistry:
    registry = new_registry()
    registry.register(BusCollector(bus))
    registry.register(GatewayCollector(gateway))
    return registry


def _http_config(app: App, settings: FrontendSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        # Twice the headers: the request line and what came along with the head count too.
        http=bounded_protocol(2 * settings.max_header_bytes, settings.read_timeout_s, settings.max_connections),
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=round(_LAST_WORDS_S),
    )


async def _announce(gateway: BusGateway, http: _HttpSide) -> None:
    """Log where we listen, and once that is so, that requests can be served."""
    host, port = http.listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log = structlog.get_logger()
    log.info("listening", url=url)
    while not gateway.ready:  # noqa: ASYNC110 - it depends on time and on others, no one place could set an event
        await asyncio.sleep(_READY_POLL_S)
    log.info("ready", url=url, models=http.models)


async def _finish(gateway: BusGateway, deadline_s: float) -> None:
    """Let the streams end, up to the deadline; then end them."""
    gateway.drain()
    structlog.get_logger().info("stopping", streams=gateway.open_streams)
    if not await _emptied(gateway, deadline_s):
        structlog.get_logger().warning("streams_cut", streams=gateway.open_streams)
        gateway.give_up()
        await _emptied(gateway, _LAST_WORDS_S)


async def _emptied(gateway: BusGateway, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await gateway.emptied()
    except TimeoutError:
        return False
    return True
