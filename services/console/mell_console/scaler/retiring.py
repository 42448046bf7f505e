"""The one worker that is to go: drained first, stopped only when the scheduler says that it is drained and empty.

A worker takes no order to drain back by itself, so whoever is drained here and stays is told so until it shows.
"""

import re
from dataclasses import dataclass

from mell_console.scaler.retry import Retry
from mell_console.scaler.values import Command, DrainWorker, Limits, StopWorker, Tell, UndrainWorker, WorkerSeen

_REPEAT_US = 2_000_000
"""An order that does not show yet is repeated after this."""


@dataclass(slots=True)
class _Goer:
    """The worker under way: `stop_us` is when it was told to stop."""

    worker: str
    ordered_us: int
    stop_us: int | None = None


class Retiring:
    """Empty, draining or stopping."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._goer: _Goer | None = None
        self._staying: dict[str, int] = {}
        """Drained here and to be used again -> when they were told last."""
        self._retry = Retry()
        self.gone = False
        """The last `proceed` saw the end of a stop."""
        self.stayed = False
        """The last `proceed` saw that a stop did not work."""

    @property
    def draining(self) -> bool:
        """Whether one is being emptied, which may be taken back."""
        return self._goer is not None and self._goer.stop_us is None

    @property
    def stopping(self) -> bool:
        """Whether one has been told to stop and is still there."""
        return self._goer is not None and self._goer.stop_us is not None

    def knows(self, worker: str) -> bool:
        """Whether it was drained from here."""
        return worker in self._staying or (self._goer is not None and self._goer.worker == worker)

    def begin(self, here: list[WorkerSeen], now_us: int) -> list[Command]:
        """Choose a worker to go, if none is going and there is one; drain it."""
        choice = self._choice(here)
        if self._goer is not None or choice is None or not self._retry.due(now_us):
            return []
        self._goer = _Goer(choice.worker, now_us)
        return [Tell(f"fewer workers are wanted: draining {choice.worker}"), DrainWorker(choice.worker)]

    def _choice(self, here: list[WorkerSeen]) -> WorkerSeen | None:
        by_number = sorted(here, key=lambda worker: (_number(worker.name), worker.name, worker.worker))
        if self._limits.order == "last":
            last = by_number[-1] if by_number else None
            return last if last is not None and not last.draining else None
        return next((worker for worker in reversed(by_number) if worker.state == "standby"), None)

    def proceed(self, here: list[WorkerSeen], count: int, now_us: int) -> list[Command]:
        """Go on by what is seen; `count` workers are left after a stop."""
        self.gone = self.stayed = False
        by_id = {worker.worker: worker for worker in here}
        commands = self._call_back(by_id, now_us)
        goer = self._goer
        if goer is None:
            return commands
        worker = by_id.get(goer.worker)
        if worker is None:
            # Silent or gone. Only who was told to stop is done with; for another it is an accident.
            self.gone = goer.stop_us is not None
            self._goer = None
            self._retry.reset()
            return commands
        if goer.stop_us is not None:
            return commands + self._await_end(goer, now_us)
        return commands + self._await_empty(goer, worker, count, now_us)

    def _await_empty(self, goer: _Goer, worker: WorkerSeen, count: int, now_us: int) -> list[Command]:
        if worker.state == "drained" and not worker.held:
            goer.stop_us = now_us
            text = f"{worker.worker} is drained and empty: stopping it, {count} are left"
            return [Tell(text), StopWorker(worker.worker, worker.name, worker.host, count)]
        if worker.draining:
            # It got work just before it heard: somebody else will be empty sooner.
            return self.keep(now_us, "it got work in between") if self._limits.order == "any" else []
        if now_us - goer.ordered_us < _REPEAT_US:
            return []
        goer.ordered_us = now_us
        return [DrainWorker(goer.worker)]

    def _await_end(self, goer: _Goer, now_us: int) -> list[Command]:
        assert goer.stop_us is not None, "it was told to stop"
        if now_us - goer.stop_us < self._limits.stop_us:
            return []
        self.stayed = True
        return self.refused(f"it is still there after {self._limits.stop_us // 1_000_000} s", now_us)

    def refused(self, why: str, now_us: int) -> list[Command]:
        """The stop did not work: the worker is used again; nothing if none is being stopped."""
        if not self.stopping or self._goer is None:
            return []
        delay_us = self._retry.failed(now_us)
        worker, self._goer = self._goer.worker, None
        self._staying[worker] = now_us
        text = f"stopping {worker} failed: {why}; not tried again for {delay_us / 1e6:g} s"
        return [Tell(text, "error"), UndrainWorker(worker)]

    def keep(self, now_us: int, why: str) -> list[Command]:
        """Use the worker again that is being drained; nothing if none is, or it was told to stop already."""
        if not self.draining or self._goer is None:
            return []
        worker, self._goer = self._goer.worker, None
        self._staying[worker] = now_us
        return [Tell(f"{worker} stays: {why}"), UndrainWorker(worker)]

    def _call_back(self, by_id: dict[str, WorkerSeen], now_us: int) -> list[Command]:
        """Repeat to those who stay that they do, until it shows."""
        commands: list[Command] = []
        for worker, told_us in list(self._staying.items()):
            seen = by_id.get(worker)
            late = now_us - told_us >= _REPEAT_US
            if seen is None or (late and not seen.draining):
                del self._staying[worker]
            elif late:
                self._staying[worker] = now_us
                commands.append(UndrainWorker(worker))
        return commands


def _number(name: str) -> int:
    """The number that a name ends with; -1 if it does not."""
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else -1
