"""A state of the feed as a terminal shows it. Pure: a state in, something to print out."""

import re
from collections import Counter
from typing import Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mell_console import narrow
from mell_console.admin.words import hours, moving, saved, saving, size, span
from mell_console.status import MOST_RECENT, moves_table
from mell_console.styles import STATE_STYLES
from mell_shared.messages.admin import SEQUENCE_STATES, MoveStatus, WorkerStatus
from mell_shared.messages.live import LiveState

_HUES = ("blue", "cyan", "magenta", "yellow", "green", "red")
_MARKS = {"running": "█", "placed": "▒", "moving": "▶", "other": "░", "free": "·"}
_STANDINGS: tuple[Literal["active", "draining", "standby", "drained", "silent"], ...] = (
    "active",
    "draining",
    "standby",
    "drained",
    "silent",
)
_LONGEST_BAR = 100
_FIXED_COLUMNS = 60
"""Of a row of the table, without its bar."""
_LONGEST_WORD = 16


def frame(state: LiveState, width: int, height: int | None, trouble: str = "") -> RenderableType:
    """Return all there is to see, in `width` columns and `height` lines (None: as many as it takes)."""
    head = [headline(state), figures(state)]
    if trouble:
        head.insert(0, f"[red]{escape(trouble)}[/red]")
    moves: list[MoveStatus] = [*state.status.moves, *state.status.recent_moves][:MOST_RECENT]
    rows = sorted(enumerate(state.status.workers), key=lambda row: _order(row[1]))
    if height is not None:
        room = max(3, height - sum(_lines(part, width) for part in head) - 5)
        moves = moves[: max(0, min(8, room - min(len(rows), room * 2 // 3) - 2))]
        rows = rows[: room - (len(moves) + 2 if moves else 0)]
    parts: list[RenderableType] = [
        *head,
        "",
        workers_table(state, rows, min(_LONGEST_BAR, max(10, width - _FIXED_COLUMNS))),
    ]
    if len(rows) < len(state.status.workers):
        parts.append(f"and {len(state.status.workers) - len(rows)} more workers")
    if moves:
        called = narrow.names(state.status.workers)
        parts += ["", narrow.moves_table(moves, called) if width < narrow.MOVES_BELOW else moves_table(moves)]
    return Group(*parts)


def headline(state: LiveState) -> str:
    """Return who leads, and the GPUs in use and what they save."""
    status, use = state.status, state.status.gpu_use
    paused = ", moves [yellow]paused[/yellow]" if status.moves_paused else ""
    head = f"[bold]{escape(status.scheduler)}[/bold] ({escape(status.policy)}){paused}"
    if use is None:
        return head
    head += f"  GPUs [bold]{use.used}[/bold] of {use.up} in use, {hours(use.used_gpu_s)}"
    if use.shadow_policy and use.shadow_gpu_s:
        head += f"; {escape(use.shadow_policy)} {use.shadow}, {hours(use.shadow_gpu_s)}: "
        head += f"[{'green' if saving(use) >= 0 else 'yellow'}]{saved(use)}[/]"
    return head


def figures(state: LiveState) -> str:
    """Return in one line how fast it is, who waits, and how full the memory is."""
    told = state.frontend
    waiting = state.rows.state.count(SEQUENCE_STATES.index("waiting"))
    workers = state.status.workers
    used, blocks = sum(w.used_blocks for w in workers), sum(w.kv_blocks for w in workers)
    in_bytes = sum(w.used_blocks * w.block_tokens * w.kv_bytes_per_token for w in workers)
    standings = Counter(worker.state for worker in workers)
    ttft = f"{span(told.ttft_p50_s)}, 99% {span(told.ttft_p99_s)}" if told.first_tokens else "none"
    parts = [
        ", ".join(f"{standings[name]} {name}" for name in _STANDINGS if standings[name]) or "no workers",
        f"tokens/s {told.tokens_per_s:,.0f}",
        f"first token {ttft}",
        f"waiting {waiting}",
        f"preempted {sum(worker.waiting for worker in workers)}",
        f"KV {used / blocks:.0%}" + (f" {size(in_bytes)}" if in_bytes else "") if blocks else "KV none",
    ]
    return "  ".join(parts)


def workers_table(state: LiveState, rows: list[tuple[int, WorkerStatus]], width: int) -> Table:
    """Return a row for each of some workers, with what it holds as a bar of `width` columns."""
    table = Table("worker", "state", "KV", "", "run", "wait", "moving", "step", box=None)
    models = sorted({worker.model for worker in state.status.workers})
    held: dict[int, list[int]] = {}
    for row, position in enumerate(state.rows.worker):
        held.setdefault(position, []).append(row)
    for position, worker in rows:
        style = STATE_STYLES[worker.state]
        table.add_row(
            Text(worker.name, no_wrap=True, overflow="ellipsis"),
            f"[{style}]{worker.state}[/{style}]",
            bar(state, worker, held.get(position, []), _HUES[models.index(worker.model) % len(_HUES)], width),
            f"{worker.used_blocks / worker.kv_blocks:.0%}",
            str(worker.running),
            str(worker.waiting),
            moving(worker),
            f"{worker.step_us / 1000:.1f} ms" if worker.step_us else "",
        )
    return table


def bar(state: LiveState, worker: WorkerStatus, held: list[int], hue: str, width: int) -> Text:
    """Return a worker's KV: each sequence that is wide enough to be seen, what else is used, what is free."""
    blocks = sum(state.rows.blocks[row] for row in held)
    scale = width / max(worker.kv_blocks, blocks)
    text, end = Text(no_wrap=True), 0.0
    for number, row in enumerate(held):
        end += state.rows.blocks[row] * scale
        kind = SEQUENCE_STATES[state.rows.state[row]]
        style = f"{hue} dim" if number % 2 else hue
        text.append(_MARKS[kind] * (round(end) - len(text)), "yellow" if kind == "moving" else style)
    used = round(min(width, worker.used_blocks * scale))
    text.append(_MARKS["other"] * (used - len(text)), "dim")
    return text.append(_MARKS["free"] * (width - len(text)), "dim")


def _lines(markup: str, width: int) -> int:
    """Return how many lines a paragraph takes, or one more: words are not broken up."""
    return -(-Text.from_markup(markup).cell_len // max(1, width - _LONGEST_WORD))


def _order(worker: WorkerStatus) -> tuple[bool, list[tuple[int, str]]]:
    """Those that hold something first; worker-2 before worker-10."""
    name = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", worker.name)]
    return worker.state in ("standby", "drained"), name
