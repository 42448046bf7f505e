"""`mell top` from the feed to the terminal: a screen that changes, or frames one after the other."""

import sys
import time
from collections.abc import Iterator
from itertools import islice

from rich.console import RenderableType
from rich.live import Live as LiveScreen
from rich.markup import escape

from mell_console.admin.ask import DONE, AdminError, Frontend, console
from mell_console.top.feed import events
from mell_console.top.screen import frame
from mell_shared.messages.live import LiveState, LiveTrouble

_AGAIN_S = 2.0


def top(frontend: Frontend, *, once: bool, as_json: bool) -> int:
    """Show states until Ctrl-C, or one; raises `AdminError` if there is none to show."""
    try:
        if as_json:
            _print_json(frontend, once=once)
        elif once or not sys.stdout.isatty():
            _print_frames(frontend, once=once)
        else:
            _show(frontend)
    except KeyboardInterrupt:
        pass
    return DONE


def _states(frontend: Frontend, *, once: bool) -> Iterator[LiveState]:
    for event in islice(events(frontend), 1 if once else None):
        if isinstance(event, LiveTrouble):
            raise AdminError(event.message)
        yield event


def _print_json(frontend: Frontend, *, once: bool) -> None:
    """Print a line for each state, as it came."""
    for state in _states(frontend, once=once):
        sys.stdout.write(f"{state.model_dump_json()}\n")
        sys.stdout.flush()


def _print_frames(frontend: Frontend, *, once: bool) -> None:
    out = console()
    for number, state in enumerate(_states(frontend, once=once)):
        out.print(*([""] if number else []), frame(state, out.width, None), sep="\n")


def _show(frontend: Frontend) -> None:
    """Draw on the whole terminal; what was there once comes back when it can."""
    out = console()
    state: LiveState | None = None
    with LiveScreen(console=out, screen=True, auto_refresh=False) as screen:
        while True:
            try:
                for event in events(frontend):
                    state, trouble = (state, event.message) if isinstance(event, LiveTrouble) else (event, "")
                    screen.update(_drawn(state, out.width, out.height, trouble), refresh=True)
            except AdminError as error:
                if state is None:
                    raise
                screen.update(_drawn(state, out.width, out.height, str(error)), refresh=True)
                time.sleep(_AGAIN_S)


def _drawn(state: LiveState | None, width: int, height: int, trouble: str) -> RenderableType:
    return f"[red]{escape(trouble)}[/red]" if state is None else frame(state, width, height, trouble)
