"""`mell status`: what the scheduler knows, asked through a frontend."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from mell_console import narrow
from mell_console.admin.ask import DONE, Frontend, console, print_json
from mell_console.admin.words import cost, hours, kv_use, moving, saved, span
from mell_console.styles import OUTCOME_STYLES, STATE_STYLES
from mell_shared.messages.admin import STATUS, GpuUse, MoveStatus, Status

MOST_RECENT = 20
"""Moves shown that are over."""


def run(frontend: Frontend, *, requests: bool, as_json: bool) -> int:
    """Print the status of the stack; with `requests` each sequence too."""
    status = frontend.get(f"status?sequences={'true' if requests else 'false'}", STATUS)
    if as_json:
        print_json(status)
        return DONE
    out = console()
    out.print(headline(status), soft_wrap=True)
    out.print(models_line(status), soft_wrap=True)
    if status.gpu_use is not None:
        out.print(gpus_line(status.gpu_use), soft_wrap=True)
    tight, tight_moves = out.width < narrow.BELOW, out.width < narrow.MOVES_BELOW
    out.print(narrow.workers_table(status) if tight else workers_table(status))
    if moves := [*status.moves, *status.recent_moves[:MOST_RECENT]]:
        called = narrow.names(status.workers)
        out.print("", narrow.moves_table(moves, called) if tight_moves else moves_table(moves), sep="\n")
    if requests:
        out.print("", narrow.sequences_table(status) if tight else sequences_table(status), sep="\n")
        if status.sequences_left_out:
            out.print(f"and {status.sequences_left_out} more")
    return DONE


def headline(status: Status) -> str:
    """Return the cluster in one line."""
    counts = f"{status.placed} placed, {status.queued} queued, {status.rejected} rejected"
    return escape(f"{status.scheduler} ({status.policy}) up {status.uptime_s:,.0f} s: {counts}")


def models_line(status: Status) -> str:
    """Return in one line how moves go, and how many workers each model should have."""
    moves = f"moves: {status.migrating} under way, {status.migrated} made, {status.migrations_failed} failed"
    if status.failures:
        moves += f" ({', '.join(escape(f'{failure.reason} {failure.count}') for failure in status.failures)})"
    if status.moves_paused:
        moves += ", [yellow]paused[/yellow]"
    wanted = "".join(f"; {escape(model.model)} wants {model.gpus_wanted} GPUs" for model in status.models)
    return f"{moves}{wanted}"


def gpus_line(use: GpuUse) -> str:
    """Return in one line the GPU-hours used, and what another policy would have used."""
    line = f"GPUs: {use.used} of {use.up} in use, {hours(use.used_gpu_s)} used in {span(use.since_s)}"
    if not use.shadow_policy or not use.shadow_gpu_s:
        return line
    return f"{line}; {use.shadow_policy}: {use.shadow} and {hours(use.shadow_gpu_s)}, {saved(use)}"


def workers_table(status: Status) -> Table:
    """Return a row for each worker, by name."""
    table = Table("worker", "model", "on", "state", "KV blocks", "run", "wait", "moving", "step", "heard", box=None)
    for worker in sorted(status.workers, key=lambda worker: (worker.name, worker.worker)):
        style = STATE_STYLES[worker.state]
        table.add_row(
            escape(worker.worker),
            escape(worker.model),
            escape(f"{worker.host} {worker.device}"),
            f"[{style}]{worker.state}[/{style}]",
            kv_use(worker),
            str(worker.running),
            str(worker.waiting),
            moving(worker),
            f"{worker.step_us / 1000:.1f} ms" if worker.step_us else "",
            f"{worker.report_age_s:.1f} s",
        )
    return table


def moves_table(moves: Iterable[MoveStatus]) -> Table:
    """Return a row for each move, those under way first."""
    table = Table("move", "sequence", "from", "to", "mode", "reason", "cost", "ago", box=None)
    for move in moves:
        style = OUTCOME_STYLES[move.outcome]
        why = f": {escape(move.why)}" if move.why and move.outcome != "committed" else ""
        ago = span(move.ago_s) if move.outcome != "moving" else ""
        table.add_row(
            f"[{style}]{move.outcome}[/{style}]{why}",
            escape(move.sequence),
            escape(move.source),
            escape(move.target),
            move.mode,
            escape(move.reason),
            cost(move),
            ago,
        )
    return table


def sequences_table(status: Status) -> Table:
    """Return a row for each sequence."""
    table = Table("sequence", "request id", "state", "worker", "tokens", "KV blocks", "moves", box=None)
    for row in status.sequences:
        where = f"{row.worker} -> {row.target}" if row.target else row.worker
        tokens, blocks = str(row.tokens or ""), str(row.blocks or "")
        names = map(escape, (row.sequence, row.request_id, row.state, where))
        table.add_row(*names, tokens, blocks, str(row.moves))
    return table
