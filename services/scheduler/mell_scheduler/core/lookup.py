"""Finds what operators name: workers by id or unique name, sequences by the names that users see."""

from mell_scheduler.core.history import goes_by
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.waiting import WaitingQueue
from mell_shared.messages.admin import AdminRefused

_MOST_NAMED = 8


def find_worker(ledger: Ledger, name: str) -> WorkerRecord | AdminRefused:
    """The worker with this id, else the only one of this name; of those with the name, silent ones count last."""
    worker = ledger.workers.get(name)
    if worker is not None:
        return worker
    named = [worker for worker in ledger.workers.values() if worker.spec.name == name]
    heard = [worker for worker in named if not worker.silent]
    candidates = heard or named
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        ids = _listed([worker.worker_id for worker in candidates])
        return AdminRefused(reason="ambiguous", message=f"{len(candidates)} workers are called {name!r}: {ids}")
    known = _listed([worker.worker_id for worker in ledger.workers.values()])
    return AdminRefused(reason="unknown_worker", message=f"there is no worker {name!r}; there are: {known or 'none'}")


def find_sequences(ledger: Ledger, waiting: WaitingQueue, name: str) -> list[str]:
    """The sequences that are or were known and go by a name, in order; a client's name may stand for several."""
    names = dict.fromkeys(ledger.history.named(name))
    # Where nothing is remembered, and for those that were never placed.
    names |= dict.fromkeys(sequence for sequence in ledger.sequences if goes_by(sequence, name))
    for entry in waiting.everybody():
        if goes_by(entry.request.sequence, name) or entry.request.request_id == name:
            names[entry.request.sequence] = None
    return list(names)


def several_requests(sequences: list[str]) -> list[str]:
    """The requests that sequences are of, where they are of more than one (`request.prompt.choice`)."""
    requests = list(dict.fromkeys(sequence.rsplit(".", 2)[0] for sequence in sequences))
    return requests if len(requests) > 1 else []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
