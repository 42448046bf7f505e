"""`ScalerCore`: what is seen in, what to do out. Pure: no clock, no process, no HTTP.

It declares a number of workers, as a replica count does: only wanting more or fewer changes it. A worker that dies is
not replaced by another, since whoever started it starts it again; one that stays away is asked for again under the
same number, which is safe to do twice.
"""

from mell_console.scaler.retiring import Retiring
from mell_console.scaler.retry import Retry
from mell_console.scaler.values import (
    Command,
    Limits,
    Seen,
    StartWorkers,
    StopWorker,
    Tell,
    WorkerSeen,
)

_BLIND_US = 5_000_000
"""After so long without a status nothing is known of what was wanted meanwhile."""


class ScalerCore:
    """Decides for one model. `now_us` must not run backwards."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.count = 0
        """Workers that should be there by what was ordered; at first those that were there."""
        self.wanted = 0
        """Within the limits, as seen last."""
        self._retiring = Retiring(limits)
        self._begun = False
        self._seen_us: int | None = None
        self._high_us: int | None = None
        """Since when more have been wanted than there are."""
        self._low_us: int | None = None
        self._changed_us: int | None = None
        """When a worker was started or stopped last."""
        self._missing_us: int | None = None
        """Since when fewer have been there than were ordered."""
        self._ordered = 0
        """How many a start under way is to add; with `_starting`."""
        self._starting = False
        self._start_retry = Retry()
        self._again = Retry(limits.start_us, 8 * limits.start_us)
        self._told: set[str] = set()
        self._taken_names: set[str] = set()

    # --- what is seen

    def observe(self, seen: Seen, now_us: int) -> list[Command]:
        """Take what the leading scheduler says; return what to do."""
        blind = self._seen_us is None or now_us - self._seen_us > _BLIND_US
        self._seen_us = now_us
        if not seen.settled:
            return []
        if blind:
            self._high_us = self._low_us = None
        self._taken_names = {worker.name for worker in seen.workers}
        here = [worker for worker in seen.workers if worker.state != "silent"]
        if not self._begun:
            self._begun, self.count = True, len(here)
        commands = self._retire(here, now_us)
        taken_out = [worker for worker in here if worker.draining and not self._retiring.knows(worker.worker)]
        commands += self._tell_taken_out(taken_out)
        have = self._have(here)
        self.wanted = self._want(seen, have, len(taken_out))
        self._high_us = self._since(self._high_us, now_us, over=self.wanted > have)
        self._low_us = self._since(self._low_us, now_us, over=self.wanted < have)
        return commands + (self._grow(here, now_us) or self._shrink(here, now_us))

    def _have(self, here: list[WorkerSeen]) -> int:
        """Workers that are there or on their way, without the one that is to go."""
        return max(self.count, self._there(here)) - self._retiring.draining

    def _there(self, here: list[WorkerSeen]) -> int:
        return len(here) - self._retiring.stopping

    def _want(self, seen: Seen, have: int, taken_out: int) -> int:
        limits = self.limits
        # A model that the scheduler has forgotten wants what there is: a reason to start none and to stop none.
        wanted = have if seen.wanted is None else seen.wanted + limits.spare + taken_out
        return min(limits.most, max(limits.least, wanted))

    @staticmethod
    def _since(since_us: int | None, now_us: int, *, over: bool) -> int | None:
        if not over:
            return None
        return now_us if since_us is None else since_us

    def _tell_taken_out(self, workers: list[WorkerSeen]) -> list[Command]:
        told: list[Command] = []
        for worker in workers:
            if worker.worker not in self._told:
                text = f"{worker.worker} is drained by an operator: it counts as taken out (mell undrain {worker.name})"
                told.append(Tell(text))
        self._told = {worker.worker for worker in workers}
        return told

    # --- more

    def _grow(self, here: list[WorkerSeen], now_us: int) -> list[Command]:
        if self._starting:
            return []
        if self._high_us is not None:
            kept = self._retiring.keep(now_us, "more workers are wanted again")
            if kept:
                return kept
            urgent = self.count < self.limits.least
            if (urgent or now_us - self._high_us >= self.limits.up_us) and self._start_retry.due(now_us):
                return self._start(self.wanted - self._have(here), here, now_us, f"{self.wanted} workers are wanted")
        return self._ask_again(here, now_us)

    def _start(self, more: int, here: list[WorkerSeen], now_us: int, why: str) -> list[Command]:
        self._starting, self._ordered = True, more
        self.count = max(self.count, self._there(here)) + more
        self._high_us, self._changed_us, self._missing_us = None, now_us, now_us
        names = self._free_names(more)
        return [Tell(f"{why}: starting {', '.join(names)}"), StartWorkers(self.count, names)]

    def _ask_again(self, here: list[WorkerSeen], now_us: int) -> list[Command]:
        """What was ordered long ago and is not there is ordered again, under the same number."""
        missing = self.count - self._there(here)
        if missing <= 0:
            self._missing_us = None
            self._again.reset()
            return []
        if self._missing_us is None:
            self._missing_us = now_us
        if now_us - self._missing_us < self.limits.start_us or not self._again.due(now_us):
            return []
        self._again.failed(now_us)
        self._starting, self._ordered = True, 0
        names = self._free_names(missing)
        away_s = (now_us - self._missing_us) // 1_000_000
        text = f"{missing} of {self.count} workers not seen for {away_s} s: asking for {', '.join(names)} again"
        return [Tell(text, "error"), StartWorkers(self.count, names)]

    def start_ended(self, failed: int, why: str, now_us: int) -> list[Command]:
        """An order to start is carried out, but for `failed` of its workers."""
        self._starting = False
        self._changed_us = now_us
        if not failed:
            self._start_retry.reset()
            return []
        self.count -= min(failed, self._ordered)
        delay_us = self._start_retry.failed(now_us)
        return [Tell(f"starting failed: {why}; not tried again for {delay_us / 1e6:g} s", "error")]

    def _free_names(self, count: int) -> tuple[str, ...]:
        taken = self._taken_names
        numbers = range(1, len(taken) + count + 1)
        free = [name for name in (f"{self.limits.name}-{number}" for number in numbers) if name not in taken]
        return tuple(free[:count])

    # --- fewer

    def _shrink(self, here: list[WorkerSeen], now_us: int) -> list[Command]:
        if self._low_us is None or now_us - self._low_us < self.limits.down_us:
            return []
        rested = self._changed_us is None or now_us - self._changed_us >= self.limits.cooldown_us
        if not rested or self._starting or len(here) < self.count:
            return []  # where a worker is missing, a count may stop the wrong one
        return self._retiring.begin(here, now_us)

    def _retire(self, here: list[WorkerSeen], now_us: int) -> list[Command]:
        """Go on with the worker that is to go."""
        commands: list[Command] = []
        for command in self._retiring.proceed(here, max(self.count, len(here)) - 1, now_us):
            if isinstance(command, StopWorker):
                self.count = command.count
            commands.append(command)
        if self._retiring.gone:
            self._changed_us = now_us
        elif self._retiring.stayed:
            self.count += 1
        return commands

    def stop_ended(self, why: str, now_us: int) -> list[Command]:
        """An order to stop was carried out, or (`why`) was not."""
        self._changed_us = now_us
        commands = self._retiring.refused(why, now_us) if why else []
        if commands:
            self.count += 1
        return commands

    def end(self, now_us: int) -> list[Command]:
        """The scaler stops: a worker that is only drained yet is put to use again, for nobody else would."""
        return self._retiring.keep(now_us, "the scaler stops")
