"""The tables of `mell status` and `mell top` for terminals of 80 columns: a line a row, workers by their names."""

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from mell_console.admin.words import kv_use, moving, span
from mell_console.styles import OUTCOME_STYLES, STATE_STYLES
from mell_shared.messages.admin import MoveStatus, Status, WorkerStatus

BELOW, MOVES_BELOW = 120, 170
"""Columns. Where there are fewer, whole ids, and costs of moves beside them, would be cut off or broken up."""
_SHORT = 17


def names(workers: Iterable[WorkerStatus]) -> dict[str, str]:
    """Return what a command takes for each worker: its name where only one has it, else its id."""
    known = list(workers)
    count = Counter(worker.name for worker in known)
    return {worker.worker: worker.name if count[worker.name] == 1 else worker.worker for worker in known}


def workers_table(status: Status) -> Table:
    """Return a row for each worker, by name; its model where there are several."""
    called = names(status.workers)
    several = len({worker.model for worker in status.workers}) > 1
    table = _table("worker", *(["model"] if several else []), "state", "KV blocks", "run", "wait", "moving", "step")
    for worker in sorted(status.workers, key=lambda worker: (worker.name, worker.worker)):
        table.add_row(
            Text(called[worker.worker], overflow="fold"),
            *([Text(worker.model)] if several else []),
            Text(worker.state, STATE_STYLES[worker.state]),
            kv_use(worker),
            str(worker.running),
            str(worker.waiting),
            moving(worker),
            f"{worker.step_us / 1000:.1f} ms" if worker.step_us else "",
        )
    return table


def moves_table(moves: Iterable[MoveStatus], called: Mapping[str, str]) -> Table:
    """Return a row for each move: what it cost is told by `mell explain`, and where there is more room."""
    table = _table("move", "sequence", "from, to", "mode", "reason", "ago")
    for move in moves:
        why = f": {move.why}" if move.why and move.outcome != "committed" else ""
        where = (called.get(worker, worker) for worker in (move.source, move.target))
        table.add_row(
            Text(f"{move.outcome}{why}", OUTCOME_STYLES[move.outcome]),
            _short(move.sequence),
            Text(" > ".join(where)),
            move.mode,
            Text(move.reason),
            span(move.ago_s) if move.outcome != "moving" else "",
        )
    return table


def sequences_table(status: Status) -> Table:
    """Return a row for each sequence, whose id is whole: other commands ask for it."""
    called = names(status.workers)
    table = _table("sequence", "state", "worker", "tokens")
    for row in status.sequences:
        where = [called.get(worker, worker) for worker in (row.worker, row.target) if worker]
        table.add_row(Text(row.sequence, overflow="fold"), row.state, Text(" > ".join(where)), str(row.tokens or ""))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, no_wrap=True)
    return table


def _short(sequence: str) -> str:
    """Return what tells sequences apart, as the dashboard does."""
    name = sequence.removeprefix("chat").removeprefix("cmpl-")
    return name if len(name) <= _SHORT else f"{name[:8]}…{name[-8:]}"
