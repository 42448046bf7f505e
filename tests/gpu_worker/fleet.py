"""Several workers on one in-memory bus and one in-memory data plane, with a frontend that streams and orders moves."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import structlog

from mell_gpu_worker.core.events import EngineFailed, StepFinished
from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine.fake import expected_output
from mell_gpu_worker.engine_runner import EngineRunner
from mell_gpu_worker.surroundings import LaneOptions
from mell_gpu_worker.transport.base import TransportOptions
from mell_gpu_worker.transport.memory import MemoryLink, MemoryNetwork, MemoryTransport
from mell_gpu_worker.transport.regions import Region
from mell_shared.memory_bus import MemoryBroker
from mell_shared.messages.worker import SubmitAccepted
from mell_shared.testing import VirtualTimeLoop, run_virtually
from mell_shared.tracing import NO_TRACER

from .core.worlds import submit
from .streaming import RunningWorker, SmallFrontend, running_worker, worker_settings

STEP_US = 5_000
PREFILL_TOKEN_US = 50
PROMPT = bytes(range(97, 123)) * 3
NO_LANES = LaneOptions(probes_per_minute=0)


class PacedRunner(EngineRunner):
    """Steps that take virtual time: as long for each, and longer for each token of prefill."""

    async def step(self, rows: Sequence[StepRow]) -> StepFinished | EngineFailed:
        """Let time pass, then compute."""
        prefill = sum(row.count for row in rows if row.count > 1)
        await asyncio.sleep((self.step_us() + PREFILL_TOKEN_US * prefill) / 1e6)
        return await super().step(rows)

    def step_us(self) -> float:
        """What a step takes without prefill."""
        return STEP_US


class Wires(MemoryNetwork):
    """Links that a test can touch as soon as they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.touch: Callable[[MemoryLink], None] = lambda link: None

    async def open_link(self, address: str) -> MemoryLink:
        """Connect, and let the test have the link first."""
        link = await super().open_link(address)
        self.touch(link)
        return link

    def throttle(self, bytes_per_s: float) -> None:
        """From now on let no link carry more than this."""

        def touch(link: MemoryLink) -> None:
            post = link.post

            async def slowly(frame: bytes, payload: Region) -> None:
                await asyncio.sleep(payload.nbytes / bytes_per_s)
                await post(frame, payload)

            link.post = slowly  # type: ignore[method-assign]

        self.touch = touch

    def at_payload(self, number: int, happen: Callable[[MemoryLink, bytes], bytes]) -> None:
        """From now on let something happen to the payload of that number on each link, counted from 0."""

        def touch(link: MemoryLink) -> None:
            passed = itertools.count()
            link.out.spoil = lambda payload: happen(link, payload) if next(passed) == number else payload

        self.touch = touch


class Fleet:
    """What a scene plays with."""

    def __init__(self, broker: MemoryBroker, frontend: SmallFrontend) -> None:
        self.broker = broker
        self.frontend = frontend
        self.network = Wires()
        self.workers: dict[str, RunningWorker] = {}
        self.transports: dict[str, MemoryTransport] = {}
        self.told: list[str] = []
        """What the data ports told of strangers."""

    @asynccontextmanager
    async def worker(self, name: str, **changes: Any) -> AsyncIterator[RunningWorker]:
        """Run one more worker."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        lanes, runner = changes.pop("lanes", NO_LANES), changes.pop("runner", PacedRunner)
        around = {"lanes": lanes, "tracer": changes.pop("tracer", NO_TRACER)}
        limits = TransportOptions(hello_timeout_s=1.0, **changes.pop("transport", {}))
        transport = self.network.transport(limits, lambda event, fields: self.told.append(event))
        settings = worker_settings(worker_name=name, fake_step_us=0, **changes)
        engine, bus = make_engine(settings.engine_options), self.broker.connect()
        async with running_worker(bus, engine, loop, settings, runner, transport=transport, **around) as worker:
            self.workers[name], self.transports[name] = worker, transport
            yield worker
            self.workers.pop(name, None)
        await bus.close()

    async def start(
        self, sequence: str, worker: str, max_tokens: int = 200, prompt: bytes = PROMPT, **more: Any
    ) -> None:
        """Submit a sequence."""
        message = submit(sequence, prompt, max_tokens=max_tokens, **more)
        for generation in range(1, 100):
            reply = await self.frontend.submit(worker, message.model_copy(update={"generation": generation}))
            if isinstance(reply, SubmitAccepted):
                return
        raise AssertionError(f"{sequence} is never accepted")

    async def ordered(self, sequence: str, target: str, **order: Any) -> None:
        """Order a move whose outcome nobody may hear of; return when it must be over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(40):
                await self.frontend.move(sequence, target, **order)

    async def stream(self, sequence: str, worker: str, max_tokens: int = 200, **more: Any) -> None:
        """Submit a sequence and wait for its first tokens."""
        await self.start(sequence, worker, max_tokens, **more)
        await self.tokens(sequence, 3)

    async def tokens(self, sequence: str, count: int) -> None:
        """Wait until so many have come."""
        await self.frontend.until(lambda: len(self.frontend.streams[sequence].tokens) >= count)

    async def whole(self, *sequences: str, max_tokens: int = 200, **more: Any) -> None:
        """Wait for the ends of sequences, whose text must be what it would have been anywhere."""
        await self.frontend.finished(*sequences)
        wanted = expected_output(PROMPT, submit(max_tokens=max_tokens, **more).sampling, max_tokens)
        for sequence in sequences:
            assert self.frontend.streams[sequence].tokens == wanted

    async def nothing_left(self) -> None:
        """Wait until no worker holds anything: no stream, no block, no link, no task of a transport."""
        async with asyncio.timeout(60):
            while self._held():  # noqa: ASYNC110 - what is waited for sets no event; the time is virtual
                await asyncio.sleep(0.05)
        for worker in self.workers.values():
            worker.service.core.check()

    def _held(self) -> bool:
        services = [worker.service for worker in self.workers.values()]
        held = [len(s.core.streams) + s.core.batcher.pool.used_blocks + s.transfers for s in services]
        return any(held) or any(transport.tasks for transport in self.transports.values())


def play(
    scene: Callable[[Fleet], Awaitable[None]], *names: str, broker: MemoryBroker | None = None, **changes: Any
) -> None:
    """Run a scene with workers of these names, in virtual time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        memory = broker or MemoryBroker(seed=1)
        frontend = SmallFrontend(memory.connect(), clock=loop)
        await frontend.start()
        fleet = Fleet(memory, frontend)
        async with AsyncExitStack() as stack:
            for name in names:
                await stack.enter_async_context(fleet.worker(name, **changes))
            await frontend.worker()
            await scene(fleet)
            for worker in fleet.workers.values():
                if worker.task.done():
                    worker.task.result()
        await frontend.bus.close()

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    try:
        run_virtually(main())
    finally:
        structlog.reset_defaults()
