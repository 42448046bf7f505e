"""The real shells of a whole stack in one process and in virtual time: HTTP application, gateway, scheduler, workers.

Only the outermost things are replaced: sockets by ASGI calls, NATS by the bus in memory, the engine's sleep by a timer.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from mell_frontend.app import create_app
from mell_frontend.asgi import App, Message
from mell_frontend.gateway import BusGateway
from mell_frontend.served import load_models
from mell_frontend.service import stream_limits
from mell_frontend.settings import FrontendSettings
from mell_frontend.stream.core import FrontendCore
from mell_gpu_worker.core.events import EngineFailed, StepFinished
from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine_runner import EngineRunner
from mell_gpu_worker.service import WorkerService
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.surroundings import Surroundings
from mell_gpu_worker.worker_config import core_config
from mell_scheduler.candidate import AlwaysLeads
from mell_scheduler.service import SchedulerService
from mell_scheduler.settings import SchedulerSettings
from mell_shared.memory_bus import MemoryBroker
from mell_shared.subjects import Subjects
from mell_shared.testing import VirtualTimeLoop

CHAT = "/v1/chat/completions"


class TimedRunner(EngineRunner):
    """Runs the fake engine's steps on the event loop; each takes its time by the loop's clock."""

    def __init__(self, engine: FakeEngine, step_s: float) -> None:
        self._engine = self._fake = engine
        self._paced = None
        self._step_s = step_s

    async def step(self, rows: Sequence[StepRow]) -> StepFinished | EngineFailed:
        """Run one step."""
        try:
            result = self._fake.execute(rows)
        except EngineError as error:
            return EngineFailed(str(error))
        await asyncio.sleep(self._step_s)
        return StepFinished(result)

    async def grammar_fault(self, text: str) -> str | None:
        """Return why a grammar cannot be used, or None."""
        return self._fake.check_grammar(text)


@dataclass
class Answer:
    """One request's answer as its client has it; times in seconds of the loop."""

    asked_s: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    first_s: float | None = None
    ended_s: float | None = None
    writes: int = 0

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that is one."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


class Client:
    """One connection to the application; `reads` cleared, it takes nothing more, as a client that stopped reading."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.reads = asyncio.Event()
        self.reads.set()
        self.left = asyncio.Event()
        self.answer = Answer(asyncio.get_running_loop().time())

    async def ask(self, body: dict[str, Any] | bytes, path: str = CHAT, **headers: str) -> Answer:
        """Send a request and return its whole answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
        listed = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in headers.items())]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": listed, "scheme": "http"}
        scope |= {"query_string": b"", "raw_path": path.encode(), "http_version": "1.1", "asgi": {"version": "3.0"}}
        await self._app(scope, self._receive, self._send)
        return self.answer

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        now_s = asyncio.get_running_loop().time()
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        self.answer.writes += 1
        self.answer.body += message["body"]
        self.answer.first_s = self.answer.first_s or now_s
        if not message.get("more_body"):
            self.answer.ended_s = now_s
            self.left.set()


@dataclass
class InProcessStack:
    """What runs."""

    app: App
    gateway: BusGateway
    core: FrontendCore
    scheduler: SchedulerService
    workers: list[WorkerService]
    broker: MemoryBroker

    async def ask(self, body: dict[str, Any] | bytes, path: str = CHAT, **headers: str) -> Answer:
        """Send a request and return its whole answer."""
        return await Client(self.app).ask(body, path, **headers)

    @property
    def waiting(self) -> int:
        """How many requests wait at the scheduler."""
        core = self.scheduler._core
        return 0 if core is None else len(core.waiting)


@asynccontextmanager
async def in_process_stack(
    folder: Path,
    *,
    workers: int = 1,
    step_s: float = 0.0,
    frontend: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    worker: dict[str, Any] | None = None,
) -> AsyncIterator[InProcessStack]:
    """Run a stack while the context lasts; the loop must be virtual. The settings given change the defaults."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    broker, subjects, stop = MemoryBroker(seed=1), Subjects(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        scheduling = SchedulerService(
            broker.connect(),
            SchedulerSettings.model_validate(scheduler or {}),
            AlwaysLeads(unix_ms=lambda: 1),
            process="scheduler",
            clock=loop,
        )
        tasks = [group.create_task(scheduling.run(stop))]
        running = [_worker(f"worker-{number}", broker, loop, step_s, worker or {}) for number in range(1, workers + 1)]
        tasks += [group.create_task(each.run(stop)) for each in running]
        settings = FrontendSettings.model_validate({"models": ["fake"], "model_dir": folder, **(frontend or {})})
        core = FrontendCore("frontend", stream_limits(settings))
        gateway = BusGateway(broker.connect(), subjects, core, loop)
        started = asyncio.Event()
        tasks.append(group.create_task(gateway.run(started.set)))
        await started.wait()
        served = load_models(settings.models, settings.model_dir, settings.max_model_len)
        app = create_app(settings, gateway, served, CollectorRegistry())
        while not gateway.ready:  # noqa: ASYNC110 - it depends on others' messages
            await asyncio.sleep(0.05)
        await asyncio.sleep(2.5)  # the scheduler has heard everybody
        yield InProcessStack(app, gateway, core, scheduling, running, broker)
        for task in tasks:
            task.cancel()


def _worker(
    name: str, broker: MemoryBroker, loop: VirtualTimeLoop, step_s: float, changes: dict[str, Any]
) -> WorkerService:
    settings = WorkerSettings.model_validate({"engine": "fake", "model": "fake", **changes})
    engine = make_engine(settings.engine_options)
    assert isinstance(engine, FakeEngine)
    config = core_config(settings, name, engine.spec)
    around = Surroundings(bus=broker.connect(), subjects=Subjects(), clock=loop)
    return WorkerService(config, TimedRunner(engine, step_s), around)
