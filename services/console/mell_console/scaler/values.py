"""What the scaler sees, may do, and does: frozen values. Times are integer microseconds of one monotonic clock."""

from dataclasses import dataclass
from typing import Literal

from mell_shared.messages.admin import Status

Order = Literal["any", "last"]
"""Which worker is stopped: `any` that is empty, or always the `last` by the number in its name, emptied if need be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there may be, and how quickly that changes."""

    least: int
    most: int
    spare: int = 0
    """Workers kept beyond those wanted, for arrivals to come."""
    up_us: int = 1_000_000
    """More are started once more have been wanted for so long without a break."""
    down_us: int = 60_000_000
    """One is stopped once fewer have been wanted for so long without a break."""
    cooldown_us: int = 10_000_000
    """Nothing is stopped for so long after a worker was started or stopped."""
    start_us: int = 300_000_000
    """A worker that was started and is not there after this is asked for again."""
    stop_us: int = 60_000_000
    """A worker that was stopped and is still there after this is put to use again."""
    order: Order = "any"
    name: str = "worker"
    """New workers are called `<name>-<number>`, by the lowest number that is free."""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker as the scheduler sees it; `held` counts its sequences and the moves to and from it."""

    worker: str
    name: str
    host: str
    state: Literal["active", "draining", "drained", "standby", "silent"]
    held: int

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""
        return self.state in ("draining", "drained")


@dataclass(frozen=True, slots=True)
class Seen:
    """One model's workers, and how many the scheduler wants; None: it does not know the model (any more)."""

    wanted: int | None
    workers: tuple[WorkerSeen, ...]
    settled: bool = True
    """False: a new leader that may not know everybody yet."""


def seen_of(status: Status, model: str) -> Seen:
    """Return what a status says of one model; the empty name is the only one that there is, else `ValueError`."""
    names = sorted({row.model for row in status.models} | {row.model for row in status.workers})
    if not model and len(names) > 1:
        raise ValueError(f"{', '.join(names)} are served: name the one to scale with --scale-model")
    model = model or "".join(names)
    rows = [row for row in status.workers if row.model == model]
    return Seen(
        wanted=next((row.gpus_wanted for row in status.models if row.model == model), None),
        workers=tuple(
            WorkerSeen(row.worker, row.name, row.host, row.state, row.sequences + row.coming + row.leaving)
            for row in rows
        ),
        settled=status.settled,
    )


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """Bring it to `count` workers by starting those of these names; ends with `start_ended`. Safe to repeat."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Ask a worker, by its id, to take nothing new. Safe to repeat."""

    worker: str


@dataclass(frozen=True, slots=True)
class UndrainWorker:
    """Let a worker take work again. Safe to repeat."""

    worker: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Stop a worker that is drained and empty, which leaves `count`; ends with `stop_ended`."""

    worker: str
    name: str
    host: str
    count: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Say something to the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


Command = StartWorkers | DrainWorker | UndrainWorker | StopWorker | Tell
