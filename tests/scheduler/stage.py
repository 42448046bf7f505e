"""Scheduler services on a bus in memory and in virtual time, with scripted workers and frontends around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mell_scheduler.candidate import AlwaysLeads, Candidate
from mell_scheduler.lease import Lease, LeaseSettings
from mell_scheduler.service import SchedulerService
from mell_scheduler.settings import SchedulerSettings
from mell_shared.bus import Bus, BusClosedError, Delivery
from mell_shared.clock import Clock
from mell_shared.codec import decode, encode
from mell_shared.memory_bus import MemoryBroker, MemoryBus
from mell_shared.memory_key_value import MemoryBucket, MemoryKeyValue
from mell_shared.messages.admin import STATUS, Status, StatusRequest
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import PLACE_REPLY, PlaceReply, PlaceRequest, WorkerJoined
from mell_shared.subjects import Subjects
from tests.scheduler.script import Row, worker_report, worker_spec

SUBJECTS = Subjects()
REPORT_S = 1.0


class LoopClock:
    """The running loop's time as a clock, virtual where the loop is."""

    def now_us(self) -> int:
        """Return the time in integer microseconds."""
        return round(asyncio.get_running_loop().time() * 1_000_000)


class ScriptedWorker:
    """Announces itself when asked, and reports every second what it was told to hold."""

    def __init__(self, bus: Bus, name: str, subjects: Subjects, **spec: object) -> None:
        self.bus = bus
        self.subjects = subjects
        self.spec = worker_spec(name, **spec)
        self.rows: list[Row] = []
        self.draining = False
        self.number = 0

    async def run(self) -> None:
        """Live until cancelled."""
        await self.bus.subscribe(self.subjects.all_workers, self.announce)
        await self.bus.subscribe(self.subjects.worker_commands(self.spec.worker), self.announce)
        while True:
            await self.report()
            await asyncio.sleep(REPORT_S)

    async def announce(self, delivery: Delivery) -> None:
        """Answer `Report`: what it is, and what it holds."""
        await self.tell(WorkerJoined(spec=self.spec))
        await self.report()

    async def report(self) -> None:
        """Send the next report."""
        self.number += 1
        await self.tell(worker_report(self.spec, self.number, *self.rows, draining=self.draining))

    async def tell(self, event: Message) -> None:
        """Publish an event to the schedulers; while the bus is down it is lost."""
        with contextlib.suppress(BusClosedError):
            await self.bus.publish(self.subjects.scheduler_events, encode(event))


async def place(bus: Bus, request: PlaceRequest, subjects: Subjects = SUBJECTS) -> PlaceReply:
    """Ask for a place as a frontend does."""
    return decode(PLACE_REPLY, await bus.request(subjects.place, encode(request), 2.0))


async def status(bus: Bus, subjects: Subjects = SUBJECTS) -> Status:
    """Ask for the cluster's state."""
    return decode(STATUS, await bus.request(subjects.admin("status"), encode(StatusRequest()), 30.0))


class Stage:
    """A broker, a bucket, and what runs on them; all is stopped at the end."""

    def __init__(self, broker: MemoryBroker, group: asyncio.TaskGroup) -> None:
        self.broker = broker
        self.group = group
        self.clock: Clock = LoopClock()
        self.bucket = MemoryBucket(self.clock, LeaseSettings().ttl_us)
        self.kept = MemoryBucket(self.clock, 1 << 60)
        self.tasks: list[asyncio.Task[None]] = []

    def bus(self) -> MemoryBus:
        """A new connection."""
        return self.broker.connect()

    def worker(self, name: str, **spec: object) -> ScriptedWorker:
        """A running worker."""
        worker = ScriptedWorker(self.bus(), name, SUBJECTS, **spec)
        self.tasks.append(self.group.create_task(worker.run()))
        return worker

    def scheduler(self, name: str = "s1", *, lease: bool = False, **settings: object) -> "StagedScheduler":
        """A running scheduler."""
        staged = StagedScheduler(self, name, lease=lease, **settings)
        self.tasks.append(staged.task)
        return staged


class StagedScheduler:
    """One service with its own connection, store access and stop event."""

    def __init__(self, stage: Stage, name: str, *, lease: bool, **settings: object) -> None:
        self.bus = stage.bus()
        self.store, self.kept = MemoryKeyValue(stage.bucket), MemoryKeyValue(stage.kept)
        contest: AlwaysLeads | Candidate = AlwaysLeads(unix_ms=lambda: 1)
        if lease:
            contest = Candidate(
                Lease(name, LeaseSettings()), self.store, stage.clock, unix_ms=lambda: 1, jitter=lambda: 1.0
            )
        contest.kept = self.kept
        self.contest = contest
        self.stop = asyncio.Event()
        self.service = SchedulerService(
            self.bus, SchedulerSettings.model_validate(settings), contest, process=name, clock=stage.clock
        )
        self.task = stage.group.create_task(self.service.run(self.stop))

    def metric(self, name: str, **labels: str) -> float | None:
        """A metric's value now."""
        return self.service.registry.get_sample_value(name, labels)


@asynccontextmanager
async def staged(**broker: object) -> AsyncIterator[Stage]:
    """An empty stage; what still runs on it in the end is cancelled."""
    async with asyncio.TaskGroup() as group:
        stage = Stage(MemoryBroker(**broker), group)  # type: ignore[arg-type]
        yield stage
        for task in stage.tasks:
            task.cancel()


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return when something holds; virtual time is cheap."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)
