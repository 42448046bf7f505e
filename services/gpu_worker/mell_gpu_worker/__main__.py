"""`python -m mell_gpu_worker`: builds everything and hands it down."""

import asyncio
import gc
import os
import sys
from dataclasses import dataclass
from functools import partial

import structlog

from mell_gpu_worker.data_port import open_data_port, try_data_port
from mell_gpu_worker.engine.base import Engine, EngineError
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine_runner import EngineRunner, EngineThread, engine_thread_hangs
from mell_gpu_worker.metrics import DataCounts
from mell_gpu_worker.prefill_profile import Profile, ProfileLimits, profile_prefill
from mell_gpu_worker.service import WorkerService
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.surroundings import LaneOptions, Surroundings
from mell_gpu_worker.transport.base import Transport
from mell_gpu_worker.worker_config import Measured, core_config, modes_of, needs_data_port
from mell_shared.bus import Bus
from mell_shared.clock import SystemClock
from mell_shared.ids import process_id
from mell_shared.log import configure_logging
from mell_shared.metrics import BusCollector, new_registry, serve_metrics
from mell_shared.models import ModelNotFoundError
from mell_shared.nats_bus import NatsBus
from mell_shared.otel import open_tracer
from mell_shared.process import ServiceError, StartError, run_service
from mell_shared.subjects import Subjects
from mell_shared.tracing import Tracer


def main(arguments: list[str]) -> None:
    """Run a worker with these flags until it is told to stop."""
    settings = WorkerSettings.from_command_line(arguments)
    worker = process_id(settings.worker_name)
    configure_logging(settings.log_level, settings.log_format, service="gpu_worker", process=worker)
    try:
        run_service(partial(serve, settings, worker))
    except SystemExit as leaving:
        _leave_if_engine_hangs(leaving.code)
        raise
    _leave_if_engine_hangs(0)


def _leave_if_engine_hangs(code: object) -> None:
    """End the process at once if weights are still loading, or a step never ended.

    Native code in a daemon thread may abort the process when the interpreter ends under it.
    """
    if engine_thread_hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


async def serve(settings: WorkerSettings, worker: str, stop: asyncio.Event) -> None:
    """Connect, build the engine, serve until `stop`. Raises `StartError`, `BrokerUnreachableError`, `ServiceError`."""
    tracer = open_tracer(settings.otlp_endpoint, service="gpu-worker", process=worker)
    thread = EngineThread()
    bus = await NatsBus.connect(settings.nats_url, name=worker, access=settings.broker_access("worker"))
    try:
        engine = await _load_engine(settings, thread, stop)
        if engine is not None:
            # What libraries made while loading lives as long as the process: never look through it for garbage again.
            gc.collect()
            gc.freeze()
            await _serve_engine(settings, worker, _Parts(bus, engine, thread, tracer), stop)
            engine.close()
    finally:
        thread.close()
        await bus.close()
        await tracer.close()


async def _load_engine(settings: WorkerSettings, thread: EngineThread, stop: asyncio.Event) -> Engine | None:
    """Return the engine, or None if `stop` came while it was loading."""
    loading = asyncio.ensure_future(thread.run(partial(make_engine, settings.engine_options)))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        loading.cancel()
        return None
    try:
        return loading.result()
    except (EngineError, ModelNotFoundError) as error:
        raise StartError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a worker is made of, once its engine is loaded."""

    bus: Bus
    engine: Engine
    thread: EngineThread
    tracer: Tracer


async def _serve_engine(settings: WorkerSettings, worker: str, parts: _Parts, stop: asyncio.Event) -> None:
    engine, counts = parts.engine, DataCounts()
    modes = modes_of(settings, engine.spec)
    # On a GPU without UCX; or with an engine whose memory cannot be seen, if they were asked for by name.
    asked = settings.migration_modes if "migration_modes" in settings.model_fields_set else engine.spec.migration_modes
    if left_out := sorted((set(asked) & set(settings.migration_modes)) - set(modes)):
        structlog.get_logger().warning("migration_modes_left_out", modes=left_out, transport=settings.transport)
    transport = await open_data_port(settings, engine, counts) if needs_data_port(engine.spec, modes) else None
    try:
        measured = await _measure(settings, parts, transport)
        config = core_config(settings, worker, engine.spec, measured)
        around = Surroundings(
            bus=parts.bus,
            subjects=Subjects(settings.subject_prefix),
            clock=SystemClock(),
            transport=transport,
            data_counts=counts,
            lanes=LaneOptions(settings.lane_probes, slow_bytes_per_s=settings.slow_lane(engine.spec.device)),
            tracer=parts.tracer,
        )
        service = WorkerService(config, EngineRunner(engine, parts.thread, settings.step_timeout_s), around)
        await _serve(settings, service, parts.bus, stop)
    finally:
        if transport is not None:
            await transport.close()


async def _measure(settings: WorkerSettings, parts: _Parts, transport: Transport | None) -> Measured:
    """Measure what a scheduler plans moves with; nothing where nothing moves."""
    link_bytes_per_s = settings.link_bytes_per_s
    if transport is not None:
        lane = await try_data_port(transport, parts.engine, settings.slow_lane(parts.engine.spec.device))
        link_bytes_per_s = link_bytes_per_s or round(lane.bytes_per_s)
    limits = ProfileLimits(
        settings.profile_s, settings.profile_stretch, settings.max_sequences, settings.max_step_tokens
    )
    profile: Profile = ()
    if settings.profile_s and settings.migration_modes and not parts.engine.spec.can.own_pace:
        try:
            profile = await parts.thread.run(partial(profile_prefill, parts.engine, limits, SystemClock()))
        except EngineError as error:
            raise StartError(str(error)) from error
        structlog.get_logger().info("prefill_profile", tokens_per_s=dict(profile))
    return Measured(link_bytes_per_s, profile)


async def _serve(settings: WorkerSettings, service: WorkerService, bus: Bus, stop: asyncio.Event) -> None:
    registry = new_registry()
    registry.register(service.collector())
    registry.register(BusCollector(bus))
    async with serve_metrics(registry, lambda: bus.connected, host=settings.metrics_host, port=settings.metrics_port):
        await service.run(stop)
    if service.failure:
        raise ServiceError(f"the engine failed: {service.failure}")


if __name__ == "__main__":
    main(sys.argv[1:])
