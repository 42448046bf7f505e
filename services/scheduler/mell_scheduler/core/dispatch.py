"""Who of those that wait is placed next.

The rule: a model's requests are tried in order (priority, time waited), and only one that somebody asks for right
now is placed. The first that is not placed *claims* a worker: nothing behind it is placed there until the claimant
is placed or gone. So later requests may use room elsewhere if they are smaller than all that wait before them, and
none can starve one before it.
"""

from mell_scheduler.core.admission import unfit_workers
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import ModelRecord
from mell_scheduler.core.values import Command, CoreSettings
from mell_scheduler.core.waiting import Waiting, WaitingQueue
from mell_shared.messages.scheduler import Placed


class Dispatcher:
    """Serves the queue from the ledger's room, and keeps the claims."""

    def __init__(self, ledger: Ledger, waiting: WaitingQueue, settings: CoreSettings) -> None:
        self._ledger = ledger
        self._waiting = waiting
        self._settings = settings
        self._claims: dict[str, tuple[str, str]] = {}
        """Model -> the first waiting sequence, and the worker kept for it."""

    def serve(self, name: str, now_us: int) -> list[Command]:
        """Place what now finds room of a model's first waiting requests; the first that does not claims a worker."""
        model = self._ledger.models.get(name)
        if model is None or not model.workers:
            self._claims.pop(name, None)
            return []
        commands: list[Command] = []
        claimed: str | None = None
        unplaced_tokens: int | None = None
        """The smallest that found no room or is not asked for now: none as large is placed behind it."""
        for entry in self._waiting.first(name, self._settings.overtake_window):
            tokens = self._ledger.predicted_tokens(entry.request)
            worker = None
            if unplaced_tokens is None or tokens < unplaced_tokens:
                unfit = unfit_workers(entry.request, model)
                if entry.handle is not None:
                    worker = self._place(entry, now_us, {*model.closed, *unfit, claimed or ""})
                if entry.handle is None or (worker is None and not unfit):
                    unplaced_tokens = tokens
            if worker is not None:
                commands.append(entry.answer(Placed(worker=worker)))
                self._waiting.placed(entry, now_us)
            elif claimed is None:
                claimed = self._claim(entry, model)
        if claimed is None:
            self._claims.pop(name, None)
        return commands

    def _place(self, entry: Waiting, now_us: int, barred: set[str]) -> str | None:
        """The worker for a request that is asked for now; None if there is no room."""
        request = entry.request
        record = self._ledger.sequences.get(request.sequence)
        runs = record is not None and record.generation >= request.generation
        if record is not None and runs and record.worker.worker_id not in request.excluded:
            return record.worker.worker_id  # a report says so: an earlier leader placed it
        worker = self._ledger.place(request, barred, now_us + self._settings.submit_timeout_us)
        return None if worker is None else worker.worker_id

    def _claim(self, entry: Waiting, model: ModelRecord) -> str:
        """The worker kept for the first in line, "" if none could take it. Kept until it is of no use any more.

        Chosen once, as the one with the most free blocks: a claim that wandered with every report would let each
        worker fill up again in its turn.
        """
        unfit = unfit_workers(entry.request, model)
        sequence = entry.request.sequence
        claimant, kept = self._claims.get(model.name, ("", ""))
        if claimant == sequence and kept not in unfit and kept in model.workers and model.workers[kept].usable:
            return kept
        usable = [worker for name, worker in model.workers.items() if name not in unfit and worker.usable]
        if not usable:
            self._claims.pop(model.name, None)
            return ""
        best = max(usable, key=self._ledger.free_blocks)
        self._claims[model.name] = (sequence, best.worker_id)
        return best.worker_id

    def check(self) -> None:
        """Assert that every claim is of one who waits, on a worker it may get. For tests."""
        for name, (sequence, worker) in self._claims.items():
            entry = self._waiting.get(sequence)
            assert entry is not None, "a claim outlived its claimant"
            assert entry.request.model == name
            assert self._ledger.models[name].workers[worker].usable, "a claim on a worker that takes nothing"
