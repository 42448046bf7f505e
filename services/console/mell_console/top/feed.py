"""Reads `/admin/live` of a frontend: one state or trouble after the other; what ends it is one line."""

from collections.abc import Iterator

from pydantic import TypeAdapter

from mell_console.admin.ask import AdminError, Frontend
from mell_shared.messages.live import LiveState, LiveTrouble

_EVENT: TypeAdapter[LiveState | LiveTrouble] = TypeAdapter(LiveState | LiveTrouble)


def events(frontend: Frontend) -> Iterator[LiveState | LiveTrouble]:
    """Yield what the feed tells until it ends; raises `AdminError`, in any case at its end."""
    yield from frontend.stream("live", _EVENT)
    raise AdminError(f"{frontend.url} has ended the feed")
