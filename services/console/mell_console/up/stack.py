"""A whole stack as child processes: started step by step, supervised, stopped in order."""

import asyncio
import shutil
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mell_console.up.broker import Broker
from mell_console.up.child import Child, ChildSpec
from mell_console.up.logfile import LogFile
from mell_console.up.loglines import LogLine, last_words, parse_line
from mell_console.up.plan import WorkerPlan
from mell_console.up.ports import public_url
from mell_console.up.probe import await_workers
from mell_console.up.screen import Screen
from mell_console.up.service import Notice, Service, ServicePorts
from mell_console.up.settings import UpSettings
from mell_console.up.specs import Launch
from mell_shared.clock import Clock
from mell_shared.models import ModelNotFoundError, locate_model
from mell_shared.nats_bus import NatsBus
from mell_shared.process import StartError
from mell_shared.settings import ServiceSettings

_PULL_STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class StackPlan:
    """What to start: settings, workers, the chosen port, the folder of this run, this process's environment."""

    settings: UpSettings
    workers: tuple[WorkerPlan, ...]
    port: int
    folder: Path
    environment: Mapping[str, str]

    @property
    def first_workers(self) -> tuple[WorkerPlan, ...]:
        """Those that are started at once; the others only when they are needed."""
        return self.workers[: self.settings.least_workers] if self.settings.scales else self.workers

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the frontend."""
        return public_url(self.settings.host, self.port)

    @property
    def admin_key(self) -> str:
        """The frontend's admin key; empty if it has none."""
        return self.environment.get("MELL_ADMIN_KEY", "")

    @property
    def api_key(self) -> str:
        """A bearer key that the frontend takes; empty if it asks for none."""
        return self.environment.get("MELL_API_KEYS", "").strip('[]" ').partition(",")[0].strip('" ')


class Stack:
    """Broker, scheduler, workers, frontend. `start` and `stop` are called once each, on the main thread."""

    def __init__(self, plan: StackPlan, screen: Screen, clock: Clock) -> None:
        self._plan = plan
        self._screen = screen
        self._clock = clock
        self._broker: Broker | None = None
        self._tiers: dict[str, list[Service]] = {"frontend": [], "workers": [], "scheduler": []}
        self._tasks: set[asyncio.Task[None]] = set()
        self._launch: Launch | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start everything and return when a request would be answered; raises `StartError`."""
        deadline_s = time.monotonic() + self._plan.settings.ready_s
        launch = self._launch = Launch(
            self._plan.settings, sys.executable, self._plan.environment, await self._find_broker(), self._plan.port
        )
        first = self._plan.first_workers
        scheduler = self._service(launch.scheduler(), "scheduler")
        scheduler_ready = asyncio.create_task(self._await_ready(scheduler, "scheduler", deadline_s))
        try:
            await self._pull_models(launch)
            # The frontend and the workers start side by side: both load much before they can talk.
            specs = [launch.worker(part, number) for number, part in enumerate(first, start=1)]
            others = [self._service(spec, "workers") for spec in specs]
            others.append(self._service(launch.frontend(self._plan.workers), "frontend"))
            await _all([scheduler_ready, *(self._ready_task(service, deadline_s) for service in others)])
        finally:
            scheduler_ready.cancel()
        await await_workers(self._plan.url, self._plan.admin_key, len(first), deadline_s)

    def worker_names(self) -> list[str]:
        """The workers that are there or being started, by name."""
        return [service.name for service in self._tiers["workers"]]

    async def start_worker(self, name: str) -> None:
        """Start one more of the plan's workers and return when it is ready; raises `StartError`."""
        assert self._launch is not None, "the stack has started"
        await asyncio.gather(*self._leaving)  # a name and a port are free only then
        number = next(number for number, part in enumerate(self._plan.workers, start=1) if part.name == name)
        spec = self._launch.worker(self._plan.workers[number - 1], number)
        try:
            service = self._service(spec, "workers")
        except OSError as error:
            raise StartError(f"{name}: cannot write {error.filename}: {error.strerror}") from error
        try:
            await self._await_ready(service, name, time.monotonic() + self._plan.settings.ready_s)
        except StartError:
            await self.stop_worker(name)
            raise

    async def stop_worker(self, name: str) -> None:
        """Stop one worker for good; one that is not there is stopped already."""
        for service in [service for service in self._tiers["workers"] if service.name == name]:
            self._tiers["workers"].remove(service)
            leaving = asyncio.create_task(service.stop(self._plan.settings.stop_s))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)  # it goes on to its end though nobody waits for it any more

    async def stop(self) -> None:
        """Stop frontend, workers, scheduler, broker, in this order; each is killed after its deadline."""
        for tier in self._tiers.values():
            await asyncio.gather(*(service.stop(self._plan.settings.stop_s) for service in tier))
        await asyncio.gather(*self._leaving)
        if self._broker is not None:
            self._broker.stop()
        await asyncio.gather(*self._tasks)

    def kill(self) -> None:
        """End every child at once; `stop` then has nothing to wait for."""
        for tier in self._tiers.values():
            for service in tier:
                service.kill()

    async def _find_broker(self) -> str:
        outside = self._plan.settings.nats_url
        self._screen.begin("broker")
        if outside:
            # With the files that the services will be given, in the same variables.
            access = ServiceSettings().broker_access("")
            bus = await NatsBus.connect(outside, name="mell up", access=access)
            await bus.close()
            self._screen.end("broker", "outside NATS answers")
            return outside
        folder = self._plan.folder / "nats"
        shutil.rmtree(folder, ignore_errors=True)  # a named log folder may hold an earlier run's streams
        self._broker = Broker(folder, self._notify, self._clock)
        self._broker.start()
        self._run_beside(self._broker.run())
        self._screen.end("broker", "NATS with JetStream on loopback")
        return self._broker.url

    async def _pull_models(self, launch: Launch) -> None:
        if self._plan.settings.engine == "fake":
            return
        for model in dict.fromkeys(part.model for part in self._plan.workers):
            step = f"model {model}"
            self._screen.begin(step)
            try:
                folder = locate_model(model, self._plan.settings.model_dir)
            except ModelNotFoundError:
                await self._pull(launch.pull(model), step)
                folder = locate_model(model, self._plan.settings.model_dir)
            self._screen.end(step, str(folder))

    async def _pull(self, spec: ChildSpec, step: str) -> None:
        lines: list[LogLine] = []

        def heard(text: str) -> None:
            line = parse_line(text)
            if line.event == "progress":
                fraction = line.fields.get("fraction")
                done = "" if fraction is None else f" {fraction:.0%}"
                self._screen.update(step, f"{line.fields.get('text')}{done}")
            else:
                lines.append(line)

        child = await Child.start(spec, heard)
        try:
            code = await child.wait()
        finally:
            await child.stop(_PULL_STOP_S)
        if code:
            raise StartError(last_words(tuple(lines)))

    def _service(self, spec: ChildSpec, tier: str) -> Service:
        log = LogFile(self._plan.folder / f"{spec.name}.log")
        service = Service(spec, ServicePorts(log, self._notify, self._clock))
        self._tiers[tier].append(service)
        self._run_beside(_supervised(service, log))
        self._screen.begin(spec.name)
        return service

    def _run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or task.exception() is None:  # what failed is told at the end
            self._tasks.discard(task)

    def _ready_task(self, service: Service, deadline_s: float) -> "asyncio.Task[None]":
        return asyncio.create_task(self._await_ready(service, service.name, deadline_s))

    async def _await_ready(self, service: Service, step: str, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                fields = await service.ready()
        except TimeoutError as error:
            raise StartError(
                f"{service.name} is not ready after {self._plan.settings.ready_s:g} s: see "
                f"{self._plan.folder / service.name}.log, or raise --ready-s"
            ) from error
        self._screen.end(step, describe_ready(fields))

    def _notify(self, notice: Notice) -> None:
        self._screen.say(f"{notice.service}: {notice.text}", notice.level)


async def _supervised(service: Service, log: LogFile) -> None:
    """Run a service to its end; workers come and go, and their logs are not to stay open."""
    try:
        await service.run()
    finally:
        log.close()


def describe_ready(fields: Mapping[str, Any]) -> str:
    """Return what a `ready` event says of its service, for people."""
    shown = ("model", "models", "engine", "device", "policy", "url")
    values = [fields[name] for name in shown if fields.get(name)]
    parts = [", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
    if fields.get("kv_blocks"):
        parts.append(f"{fields['kv_blocks']} KV blocks")
    return ", ".join(parts) or "ready"


async def _all(tasks: "list[asyncio.Task[None]]") -> None:
    """Wait for all; at the first failure cancel the others and raise it."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
