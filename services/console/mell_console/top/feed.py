"""Reads `/admin/live` of a frontend: one state or trouble after the other; what ends it is one line."""

from collections.abc import Iterator

from pydantic import ValidationError

from mell_console.admin.ask import AdminError, Frontend, advice
from mell_console.get import GetError, read_lines
from mell_shared.messages.live import LIVE_STATE, LIVE_TROUBLE, LiveState, LiveTrouble

_SILENCE_S = 30.0
"""A feed that says nothing for this long has been lost."""


def events(frontend: Frontend) -> Iterator[LiveState | LiveTrouble]:
    """Yield what the feed tells until it ends; raises `AdminError`, in any case at its end."""
    kind = ""
    try:
        for line in read_lines(frontend.address("live"), frontend.admin_key, _SILENCE_S):
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                adapter = LIVE_STATE if kind == "state" else LIVE_TROUBLE
                yield adapter.validate_json(line.removeprefix("data: "))
    except GetError as error:
        raise AdminError(advice(error)) from error
    except ValidationError as error:
        raise AdminError(f"{frontend.url} answers, but not as a Mell frontend does; use --url") from error
    raise AdminError(f"{frontend.url} has ended the feed")
