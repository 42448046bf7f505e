"""Which workers are alive: silent ones get nothing, lost ones are forgotten, and the gone are remembered a while."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.values import Announce, Command, CoreSettings

_REMEMBER_US = 60_000_000


class Liveness:
    """Judges the ledger's workers by the age of their last report."""

    def __init__(self, ledger: Ledger, settings: CoreSettings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._graves: dict[str, tuple[bool, int, int]] = {}
        """Gone worker -> (left for good, last report number, forgotten at)."""

    def left(self, worker: str) -> bool:
        """Whether a worker said goodbye; ids are never used again, so what still comes from it is late."""
        return self._graves.get(worker, (False, 0, 0))[0]

    def last_number(self, worker: str) -> int:
        """The last report taken from a worker that was lost and is back; -1 if it is new."""
        return self._graves.get(worker, (False, -1, 0))[1]

    def bury(self, worker: str, number: int | None, now_us: int, *, left: bool) -> None:
        """Remember a worker that is gone."""
        self._graves.pop(worker, None)
        self._graves[worker] = (left, -1 if number is None else number, now_us + _REMEMBER_US)

    def pardon(self, now_us: int) -> None:
        """Count everybody's silence from now on."""
        for worker in self._ledger.workers.values():
            worker.heard_us = now_us

    def review(self, now_us: int) -> tuple[list[Command], list[str]]:
        """Silence and forget workers; returns what to tell, and the models whose workers changed."""
        commands: list[Command] = []
        changed: list[str] = []
        for worker in list(self._ledger.workers.values()):
            verdict = self._judge(worker, now_us)
            if verdict is not None:
                commands.append(verdict)
                changed.append(worker.spec.model)
        for gone in [name for name, grave in self._graves.items() if grave[2] <= now_us]:
            del self._graves[gone]
        return commands, changed

    def _judge(self, worker: WorkerRecord, now_us: int) -> Announce | None:
        age_us = now_us - worker.heard_us
        if age_us >= self._settings.worker_lost_us:
            self._ledger.remove(worker, now_us)
            self.bury(worker.worker_id, worker.number, now_us, left=False)
            return Announce(worker.worker_id, "lost", f"no report for {age_us / 1e6:.1f} s")
        if not worker.silent and age_us > self._settings.missed_reports * self._settings.report_interval_us:
            self._ledger.silence(worker)
            return Announce(worker.worker_id, "silent", f"no report for {age_us / 1e6:.1f} s: no placements")
        return None
