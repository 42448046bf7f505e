"""`mell events`: what happened, read through a frontend; each event once, and what is missing told."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter
from rich.markup import escape

from mell_console.admin.ask import DONE, AdminError, Frontend, console
from mell_shared.events.envelope import CloudEvent

_EVENT: TypeAdapter[CloudEvent] = TypeAdapter(CloudEvent)
_AGAIN_S = 1.0
_PATIENCE_S = 30.0
"""How long a lost frontend is asked again while events are followed."""
_SHOWN = 160
"""Characters of an event's facts in a line."""


@dataclass(frozen=True, slots=True)
class EventsWish:
    """Which events, and whether to wait for more."""

    last: int
    follow: bool
    pattern: str


class Gaps:
    """Notices what is missing: each source counts its events from 1, without holes."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def before(self, event: CloudEvent) -> int:
        """Return how many events of its source are missing just before this one; the first seen begins the count."""
        last = self._last.get(event.source)
        self._last[event.source] = event.number
        return 0 if last is None else max(0, event.number - last - 1)


def events(frontend: Frontend, wish: EventsWish, *, as_json: bool) -> int:
    """Print events as they come; ends with Ctrl-C, or at the last one if none is waited for."""
    gaps = Gaps()
    out = console()
    try:
        for event in _read(frontend, wish):
            if as_json:
                sys.stdout.write(event.model_dump_json(exclude_none=True) + "\n")
                sys.stdout.flush()
                continue
            missing = gaps.before(event) if wish.pattern == "*" else 0
            if missing:
                out.print(f"[red]{missing} events of {event.source} are missing[/red]", soft_wrap=True)
            out.print(line_of(event), soft_wrap=True)
    except KeyboardInterrupt:
        return DONE
    return DONE


def line_of(event: CloudEvent) -> str:
    """Return an event as one line."""
    process = event.source.rpartition("/")[2]
    about = event.subject or ""
    facts = _facts(f"{name}={_fact(value)}" for name, value in event.data.items() if value not in ("", about))
    clock = event.time.astimezone().strftime("%H:%M:%S.%f")[:-3]
    what = f"[bold]{event.type}[/bold] {escape(about)}"
    return f"{clock} {what} [dim]{escape(facts)} ({process} {event.number})[/dim]"


def _facts(facts: Iterable[str]) -> str:
    """Return as many facts as a line has room for, each whole."""
    line = ""
    for fact in facts:
        if len(line) + len(fact) >= _SHOWN:
            return f"{line} ..."
        line += f" {fact}" if line else fact
    return line


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return f"[{len(value)}]"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read(frontend: Frontend, wish: EventsWish) -> Iterator[CloudEvent]:
    """Yield events; a connection that is lost while following is made again, and goes on where it was."""
    position = ""
    lost_s: float | None = None

    def passed(seen: str) -> None:
        nonlocal position, lost_s
        position, lost_s = seen, None

    while True:
        query = {"follow": str(wish.follow).lower(), "type": wish.pattern}
        query |= {"after": position} if position else {"last": str(wish.last)}
        try:
            yield from frontend.stream(f"events?{urlencode(query)}", _EVENT, passed)
        except AdminError:
            now_s = time.monotonic()
            lost_s = lost_s or now_s
            if not (wish.follow and position) or now_s - lost_s > _PATIENCE_S:
                raise
        if not wish.follow:
            return
        time.sleep(_AGAIN_S)
