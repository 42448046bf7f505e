"""`python -m mell_scheduler`: builds one scheduler from its settings and runs it until it is told to stop."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import structlog

from mell_scheduler.candidate import AlwaysLeads, Candidate
from mell_scheduler.lease import Lease, LeaseSettings
from mell_scheduler.service import Contest, SchedulerService
from mell_scheduler.settings import SchedulerSettings
from mell_shared.clock import Clock, SystemClock
from mell_shared.events.data import SchedulerState
from mell_shared.events.envelope import source_name
from mell_shared.events.outbox import Outbox, OutboxCollector, nowhere
from mell_shared.events.store import Retention
from mell_shared.ids import process_id
from mell_shared.log import configure_logging
from mell_shared.metrics import BusCollector, add_process_metrics, serve_metrics
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_event_store import NatsEventStore
from mell_shared.nats_key_value import NatsKeyValue
from mell_shared.otel import open_tracer
from mell_shared.process import run_service
from mell_shared.subjects import Subjects


def main(arguments: list[str]) -> None:
    """Run the service that `arguments` describe; returns after a clean stop."""
    settings = SchedulerSettings.from_command_line(arguments)
    process = process_id(settings.scheduler_name)
    configure_logging(settings.log_level, settings.log_format, service="scheduler", process=process)
    run_service(lambda stop: serve(settings, process, stop))


async def serve(settings: SchedulerSettings, process: str, stop: asyncio.Event) -> None:
    """Connect, run and disconnect one scheduler; returns when `stop` is set and all is cleaned up."""
    tracer = open_tracer(settings.otlp_endpoint, service="scheduler", process=process)
    bus = await NatsBus.connect(settings.nats_url, name=process, access=settings.broker_access("scheduler"))
    try:
        clock = SystemClock()
        contest = build_contest(settings, process, bus, clock)
        outbox = build_outbox(settings, process, bus, lambda: service.herald.state())  # noqa: PLW0108 - made below
        emit = nowhere if outbox is None else outbox.emit
        service = SchedulerService(bus, settings, contest, process=process, clock=clock, emit=emit, tracer=tracer)
        add_process_metrics(service.registry)
        service.registry.register(BusCollector(bus))
        async with AsyncExitStack() as stack:
            endpoint = partial(serve_metrics, host=settings.metrics_host, port=settings.metrics_port)
            await stack.enter_async_context(endpoint(service.registry, lambda: service.healthy))
            if outbox is not None:
                service.registry.register(OutboxCollector(outbox))
                await stack.enter_async_context(outbox.running())
            await service.run(stop)
    finally:
        await bus.close()
        await tracer.close()
    structlog.get_logger().info("stopped")


def build_outbox(
    settings: SchedulerSettings, process: str, bus: NatsBus, snapshot: Callable[[], SchedulerState | None]
) -> Outbox | None:
    """Return what writes the events for other systems, None if they are off."""
    if settings.events == "off":
        return None
    retention = Retention(settings.events_max_age_h * 3600, settings.events_max_mb * 10**6)
    store = NatsEventStore(bus, Subjects(settings.subject_prefix), retention)
    return Outbox(store, source_name(settings.subject_prefix, "scheduler", process), snapshot)


def build_contest(settings: SchedulerSettings, process: str, bus: NatsBus, clock: Clock) -> Contest:
    """Return how the scheduler comes to lead."""
    if settings.lease == "off":
        return AlwaysLeads()
    lease = LeaseSettings()
    store = NatsKeyValue(bus, f"{settings.subject_prefix}-scheduler", lease.ttl_us / 1_000_000)
    candidate = Candidate(Lease(process, lease), store, clock)
    candidate.kept = NatsKeyValue(bus, f"{settings.subject_prefix}-settings", 0)
    return candidate


if __name__ == "__main__":
    main(sys.argv[1:])
