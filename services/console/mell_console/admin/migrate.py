"""`mell migrate`, `mell moves`: move one request by hand; plan no moves for a while."""

import sys
from dataclasses import dataclass

from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from mell_console.admin.ask import DONE, FAILED, NOT_YET, Frontend, console, print_json, segment
from mell_console.admin.words import cost
from mell_shared.messages.admin import MigrateReply, MoveResult, MovingReply

_MIGRATE: TypeAdapter[MigrateReply] = TypeAdapter(MigrateReply)
_MOVING: TypeAdapter[MovingReply] = TypeAdapter(MovingReply)
_STYLES = {"committed": "green", "there": "dim", "moving": "yellow", "failed": "red", "refused": "red"}


@dataclass(frozen=True, slots=True)
class MoveWish:
    """Where to, how, and how long to wait for the end."""

    target: str
    mode: str
    wait_s: float


def migrate(frontend: Frontend, request: str, wish: MoveWish, *, as_json: bool) -> int:
    """Move a request's sequences; 1 if one was not moved, 3 if one still moves when the waiting is over."""
    body = {"to": wish.target, "mode": wish.mode, "wait_s": wish.wait_s}
    reply = frontend.post(f"requests/{segment(request)}/migrate", body, _MIGRATE, wish.wait_s)
    if as_json:
        print_json(reply)
    else:
        console().print(moves_table(reply))
    states = {move.state for move in reply.moves}
    if states & {"failed", "refused"}:
        return FAILED
    return NOT_YET if "moving" in states else DONE


def moves_table(reply: MigrateReply) -> Table:
    """Return a row for each sequence."""
    table = Table("sequence", "move", "to", "mode", "took", box=None)
    for result in reply.moves:
        style = _STYLES[result.state]
        move = result.move
        table.add_row(
            escape(result.sequence),
            f"[{style}]{result.state}[/{style}]",
            escape(move.target if move else reply.target),
            move.mode if move else "",
            escape(_told(result)),
        )
    return table


def _told(result: MoveResult) -> str:
    """Return why a sequence was not moved, or what its move took."""
    if result.state in ("failed", "refused", "there"):
        return result.message.removeprefix(f"{result.sequence}: ")
    return cost(result.move) if result.move else ""


def pause(frontend: Frontend, *, paused: bool, as_json: bool) -> int:
    """Pause or resume the planning of moves."""
    reply = frontend.post(f"moves/{'pause' if paused else 'resume'}", {}, _MOVING)
    if as_json:
        print_json(reply)
    else:
        told = "no moves are planned until: mell moves resume" if reply.paused else "moves are planned again"
        sys.stdout.write(f"{told}\n")
        if not reply.kept:
            sys.stdout.write("the broker did not keep this: say it again should the schedulers be restarted\n")
    return DONE
