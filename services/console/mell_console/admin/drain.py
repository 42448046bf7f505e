"""`mell drain`, `mell undrain`: empty a worker, show how, wait for it."""

import sys
import time
from dataclasses import dataclass

from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from mell_console.admin.ask import DONE, FAILED, NOT_YET, AdminError, Frontend, console, print_json, segment
from mell_shared.messages.admin import STATUS, DrainReply, Status, WorkerStatus

_DRAIN: TypeAdapter[DrainReply] = TypeAdapter(DrainReply)
_POLL_S = 0.5
_GRACE_S = 5.0
"""A drain that was ordered shows in the worker's next report."""
_PATIENCE_S = 30.0
"""How long an empty worker is waited for while nobody answers: schedulers and frontends may change meanwhile."""


@dataclass(frozen=True, slots=True)
class DrainWish:
    """What was asked for; `timeout_s` bounds `wait` (None: for ever)."""

    worker: str
    deadline_s: float | None
    dry_run: bool
    wait: bool
    timeout_s: float | None


def drain(frontend: Frontend, wish: DrainWish, *, as_json: bool) -> int:
    """Order a drain, or rehearse one; returns the exit code."""
    body: dict[str, float | bool] = {"dry_run": wish.dry_run}
    if wish.deadline_s is not None:
        body["deadline_s"] = wish.deadline_s
    reply = frontend.post(f"workers/{segment(wish.worker)}/drain", body, _DRAIN)
    if as_json:
        print_json(reply)
    else:
        console().print(headline(reply), soft_wrap=True)
        if reply.sequences:
            console().print(plan_table(reply))
    if wish.dry_run:
        return DONE if all(row.target for row in reply.sequences) else FAILED
    return _wait(frontend, reply.worker, wish.timeout_s) if wish.wait else DONE


def undrain(frontend: Frontend, worker: str, *, as_json: bool) -> int:
    """Let a worker take work again."""
    reply = frontend.post(f"workers/{segment(worker)}/undrain", {}, _DRAIN)
    if as_json:
        print_json(reply)
    else:
        sys.stdout.write(f"{reply.worker} takes work again\n")
    return DONE


def headline(reply: DrainReply) -> str:
    """Return in one line what happens, or would."""
    count = len(reply.sequences)
    if not count:
        return f"{escape(reply.worker)} {'would take' if reply.dry_run else 'takes'} nothing new, and holds nothing"
    what = "would be drained" if reply.dry_run else "takes nothing new and is being emptied"
    end = ""
    if reply.deadline_s is not None:
        end = f"; what is left after {reply.deadline_s:g} s is placed again elsewhere"
    return f"{escape(reply.worker)} {what}: {count} sequence{'' if count == 1 else 's'} to move{end}"


def plan_table(reply: DrainReply) -> Table:
    """Return a row for each sequence: where it would go now, or why nowhere."""
    table = Table("sequence", "KV blocks", "goes to", box=None)
    for row in reply.sequences:
        where = escape(row.target) if row.target else f"[yellow]{escape(row.why)}[/yellow]"
        table.add_row(escape(row.sequence), str(row.blocks), where)
    return table


def _wait(frontend: Frontend, worker: str, timeout_s: float | None) -> int:
    """Return when the worker is empty or gone; says on stderr how many sequences are left when that changes."""
    began_s = time.monotonic()
    told = -1
    while True:
        seen = _look(frontend)
        status = next((row for row in seen.workers if row.worker == worker), None)
        passed_s = time.monotonic() - began_s
        # A new leader knows only those that it has heard from.
        if (status is not None or seen.settled) and _is_empty(status, passed_s):
            sys.stderr.write(f"{worker} is empty\n" if status is not None else f"{worker} has left\n")
            return DONE
        if status is not None and status.sequences != told:
            told = status.sequences
            sys.stderr.write(f"{told} left\n")
        if timeout_s is not None and passed_s >= timeout_s:
            holds = "is not heard of" if told < 0 else f"still holds {told}"
            sys.stderr.write(f"mell: {worker} {holds} after {timeout_s:g} s; it goes on draining\n")
            return NOT_YET
        time.sleep(_POLL_S)


def _look(frontend: Frontend) -> Status:
    """Return a status, asked for until there is one; raises `AdminError` if there is none for too long."""
    began_s = time.monotonic()
    while True:
        try:
            return frontend.get("status", STATUS)
        except AdminError:
            if time.monotonic() - began_s >= _PATIENCE_S:
                raise
        time.sleep(_POLL_S)


def _is_empty(status: WorkerStatus | None, passed_s: float) -> bool:
    """Whether a drained worker is through; raises `AdminError` if it drains no more."""
    if status is None or status.state == "drained":
        return True
    if status.state in ("active", "standby") and passed_s > _GRACE_S:
        raise AdminError(f"{status.worker} drains no more: somebody has undrained it")
    return False
