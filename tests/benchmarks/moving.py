"""Real workers and a broker; their frontend and scheduler is the benchmark, which submits, moves, takes the times."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mell_shared.codec import encode
from mell_shared.messages.scheduler import MigrationCommitted, WorkerJoined
from mell_shared.messages.worker import Cancel, SubmitAccepted
from mell_shared.nats_bus import NatsBus
from tests.cluster.stack import Service, Stack
from tests.gpu_worker.core.worlds import submit
from tests.gpu_worker.streaming import SUBJECTS, SmallFrontend

LOADING_S = 120.0
FAKE = ("--engine", "fake", "--no-prefix-cache", "--max-model-len", "16384", "--lane-probes", "0", "--profile-s", "0")


class Movers:
    """Two workers, and the frontend of whatever runs on them."""

    def __init__(self, frontend: SmallFrontend, services: list[Service], names: list[str]) -> None:
        self.frontend = frontend
        self.services = services
        self.names = names

    async def start(self, sequence: str, worker: int, prompt_tokens: int, **more: Any) -> None:
        """Run a sequence that does not end unless `more` says so, and wait for its first tokens."""
        prompt = [65 + position % 26 for position in range(prompt_tokens)]
        message = submit(sequence, prompt, **{"max_tokens": 16_000, **more})
        reply = await self.frontend.submit(self.names[worker], message)
        assert isinstance(reply, SubmitAccepted), reply
        await self.frontend.until(lambda: len(self.frontend.streams[sequence].tokens) >= 3)

    async def move(self, sequence: str, **order: Any) -> MigrationCommitted:
        """Move a sequence to the other worker."""
        stream = self.frontend.streams[sequence]
        target = next(name for name in self.names if name != stream.owner)
        moved = await self.frontend.move(sequence, target, **order)
        assert isinstance(moved, MigrationCommitted), moved
        return moved

    async def end(self, sequence: str) -> None:
        """Cancel a sequence."""
        stream = self.frontend.streams[sequence]
        await self.frontend.command(stream.owner, Cancel(sequence=sequence, generation=stream.generation))
        del self.frontend.streams[sequence]

    def gap_us(self, sequence: str, count: int) -> int:
        """The time between token `count` - 1 and token `count` as they came."""
        arrived = self.frontend.streams[sequence].arrived_us
        return arrived[count] - arrived[count - 1]

    async def round_trip_us(self, rounds: int = 50) -> float:
        """A request to a worker and its answer, the median."""
        took = []
        subject = SUBJECTS.worker_commands(self.names[0])
        for _ in range(rounds):
            begun_s = time.perf_counter()
            await self.frontend.bus.request(subject, encode(Cancel(sequence="nothing", generation=1)), 5.0)
            took.append((time.perf_counter() - begun_s) * 1e6)
        return statistics.median(took)


@asynccontextmanager
async def movers(folder: Path, *flags: str, workers: int = 2) -> AsyncIterator[Movers]:
    """Start a broker and workers."""
    with Stack(folder, settings={"MELL_LOG_FORMAT": "json", "MELL_SUBJECT_PREFIX": SUBJECTS.prefix}) as stack:
        bus = await NatsBus.connect(stack.broker.url, name="benchmark")
        frontend = SmallFrontend(bus)
        await frontend.start()
        services = [stack.start("mell_gpu_worker", "--worker-name", f"w{n}", *flags) for n in range(workers)]
        for service in services:
            await asyncio.to_thread(service.ready, LOADING_S)

        def joined() -> list[str]:
            return sorted({e.spec.worker for e in frontend.events if isinstance(e, WorkerJoined)})

        await frontend.until(lambda: len(joined()) == workers)
        yield Movers(frontend, services, joined())
        await bus.close()
