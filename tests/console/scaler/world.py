"""A cluster for the scaler's core without processes: what it orders is done, late or not at all, and workers die."""

from dataclasses import dataclass, replace

from mell_console.scaler.core import ScalerCore
from mell_console.scaler.values import (
    Command,
    DrainWorker,
    Limits,
    Seen,
    StartWorkers,
    StopWorker,
    Tell,
    UndrainWorker,
    WorkerSeen,
)

SECOND_US = 1_000_000
QUICK = Limits(
    least=1,
    most=4,
    up_us=SECOND_US,
    down_us=5 * SECOND_US,
    cooldown_us=2 * SECOND_US,
    start_us=20 * SECOND_US,
    stop_us=10 * SECOND_US,
)


@dataclass
class Worker:
    """One incarnation in the world."""

    name: str
    worker: str
    draining: bool = False
    held: int = 0
    up: bool = True

    def seen(self) -> WorkerSeen:
        """Return it as a status shows it."""
        if not self.up:
            return WorkerSeen(self.worker, self.name, "host", "silent", self.held)
        state = ("draining" if self.held else "drained") if self.draining else ("active" if self.held else "standby")
        return WorkerSeen(self.worker, self.name, "host", state, self.held)  # type: ignore[arg-type]


class World:
    """One core and its workers. `second` lets a second pass with one status in it."""

    def __init__(self, limits: Limits = QUICK, workers: int = 1) -> None:
        self.core = ScalerCore(limits)
        self.limits = limits
        self.now_us = 0
        self.incarnations = 0
        self.workers: dict[str, Worker] = {}
        """Processes by name, as their supervisor has them."""
        for number in range(1, workers + 1):
            self._begin(f"{limits.name}-{number}")
        self.wanted: int | None = 1
        self.settled = True
        self.deaf = False
        """Orders to drain get lost."""
        self.start_fails = ""
        self.stop_fails = ""
        self.starts_late = False
        """Orders to start are carried out by `carry_out_starts` only."""
        self.orders: list[StartWorkers] = []
        self.log: list[Command] = []

    def _begin(self, name: str) -> None:
        self.incarnations += 1
        self.workers[name] = Worker(name, f"{name}-{self.incarnations:08x}")

    def by_id(self, worker: str) -> Worker | None:
        """Return a worker that is still there."""
        return next((row for row in self.workers.values() if row.worker == worker), None)

    def restart(self, name: str) -> None:
        """It dies and its supervisor starts it again under the same name."""
        self._begin(name)

    def second(self, count: int = 1) -> list[Command]:
        """Let seconds pass; returns what was ordered in them."""
        said: list[Command] = []
        for _ in range(count):
            self.now_us += SECOND_US
            rows = tuple(worker.seen() for worker in self.workers.values())
            seen = Seen(self.wanted, rows if self.settled else rows[:1], self.settled)
            said += self._perform(self.core.observe(seen, self.now_us))
        return said

    def end(self) -> list[Command]:
        """The scaler is stopped."""
        return self._perform(self.core.end(self.now_us))

    def carry_out_starts(self) -> None:
        """Do what was ordered late."""
        orders, self.orders = self.orders, []
        for order in orders:
            self._start(order)

    def _perform(self, commands: list[Command]) -> list[Command]:
        said = list(commands)
        self.log += commands
        for command in commands:
            said += self._do(command)
        return said

    def _do(self, command: Command) -> list[Command]:
        match command:
            case StartWorkers():
                assert command.count <= self.limits.most, "more than there may be"
                if self.starts_late:
                    self.orders.append(command)
                    return []
                return self._start(command)
            case DrainWorker(name) | UndrainWorker(name):
                worker = self.by_id(name)
                if worker is not None and worker.up and not self.deaf:
                    worker.draining = isinstance(command, DrainWorker)
            case StopWorker():
                worker = self.by_id(command.worker)
                # The worker refuses work from the moment it drains on, so that this can only be so still.
                assert worker is not None, "it is gone"
                assert worker.draining, "it may get work at any moment"
                assert not worker.held, "it serves somebody"
                assert command.count >= self.limits.least, "fewer than there may be"
                if not self.stop_fails:
                    del self.workers[worker.name]
                return self._perform(self.core.stop_ended(self.stop_fails, self.now_us))
            case Tell():
                pass
        return []

    def _start(self, order: StartWorkers) -> list[Command]:
        if self.start_fails:
            return self._perform(self.core.start_ended(len(order.names), self.start_fails, self.now_us))
        for name in order.names:
            if name not in self.workers:
                self._begin(name)
        return self._perform(self.core.start_ended(0, "", self.now_us))


def quick(**changes: object) -> Limits:
    """Return the limits of these tests, changed."""
    return replace(QUICK, **changes)  # type: ignore[arg-type]


def starts(commands: list[Command]) -> list[StartWorkers]:
    """Return the orders to start."""
    return [command for command in commands if isinstance(command, StartWorkers)]


def stops(commands: list[Command]) -> list[str]:
    """Return the names of the workers that were told to stop."""
    return [command.name for command in commands if isinstance(command, StopWorker)]


def texts(commands: list[Command]) -> str:
    """Return all that was told."""
    return "\n".join(command.text for command in commands if isinstance(command, Tell))
