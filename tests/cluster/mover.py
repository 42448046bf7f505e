"""Listens to workers and orders moves over a real broker, as a scheduler would: for tests that force a move."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mell_shared.bus import Delivery
from mell_shared.codec import decode, encode
from mell_shared.messages.scheduler import (
    SCHEDULER_EVENT,
    MigrationCommitted,
    MigrationFailed,
    WorkerReport,
)
from mell_shared.messages.worker import WORKER_REPLY, Migrate, MigrateAccepted
from mell_shared.nats_bus import NatsBus
from mell_shared.subjects import Subjects

_TERM = 2**62
"""Higher than any scheduler's: its orders are not obeyed any more."""
_PATIENCE_S = 60.0
SUBJECTS = Subjects()


class Mover:
    """Knows what workers report, and moves sequences."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._reports: dict[str, WorkerReport] = {}
        self._outcomes: dict[str, MigrationCommitted | MigrationFailed] = {}
        self._news = asyncio.Event()

    async def hear(self, delivery: Delivery) -> None:
        """Take in what a worker tells."""
        event = decode(SCHEDULER_EVENT, delivery.data)
        if isinstance(event, WorkerReport):
            self._reports[event.worker] = event
        elif isinstance(event, MigrationCommitted | MigrationFailed):
            self._outcomes[event.migration] = event
        self._news.set()

    async def _until(self, condition: Any) -> Any:
        async with asyncio.timeout(_PATIENCE_S):
            while not (found := condition()):
                self._news.clear()
                await self._news.wait()
        return found

    async def holder(self) -> tuple[str, str, int]:
        """Wait for the one sequence that runs; return its worker, its name and its generation."""
        return tuple(await self._until(self._holder))  # type: ignore[return-value]

    def _holder(self) -> tuple[str, str, int] | None:
        held = [
            (r.worker, s, g) for r in self._reports.values() for s, g in zip(r.sequences, r.generations, strict=True)
        ]
        return max(held, key=lambda row: row[2], default=None)

    async def move(self, target: str, **order: Any) -> MigrationCommitted | MigrationFailed:
        """Move the one sequence that runs to the worker of this name; return what became of it."""
        source, sequence, generation = await self.holder()
        (worker,) = await self._until(lambda: [w for w in self._reports if w.startswith(f"{target}-")])
        name = f"forced-{len(self._outcomes)}-{generation}"
        told = {"mode": "kv", "reason": "manual", "term": _TERM} | order
        migrate = Migrate(migration=name, sequence=sequence, generation=generation, target=worker, **told)
        data = await self._bus.request(SUBJECTS.worker_commands(source), encode(migrate), 30.0)
        reply = decode(WORKER_REPLY, data)
        assert isinstance(reply, MigrateAccepted), reply
        outcome: MigrationCommitted | MigrationFailed = await self._until(lambda: self._outcomes.get(name))
        if isinstance(outcome, MigrationCommitted):
            # A report made before the move must not name its holder.
            await self._until(lambda: (self._holder() or ("", "", 0))[2] >= outcome.generation)
        return outcome


@asynccontextmanager
async def mover(url: str) -> AsyncIterator[Mover]:
    """A mover on the broker at `url`."""
    bus = await NatsBus.connect(url, name="mover")
    try:
        made = Mover(bus)
        await bus.subscribe(SUBJECTS.scheduler_events, made.hear)
        yield made
    finally:
        await bus.close()
