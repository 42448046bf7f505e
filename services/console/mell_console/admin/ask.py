"""Asks a frontend's `/admin` API: one URL and one key; whatever goes wrong is one line that says what to do."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console

from mell_console.get import GetError, call_json, read_events

M = TypeVar("M", bound=BaseModel)
E = TypeVar("E")

DONE, FAILED, NOT_YET = 0, 1, 3
"""Exit codes; 2 is a wrong command line."""

_WIDE = 200
_ANSWER_S = 10.0
_SILENCE_S = 20.0
"""A stream of events says something every five seconds, if only that there is nothing new."""


class AdminError(Exception):
    """The command cannot go on; the message is one line."""


@dataclass(frozen=True, slots=True)
class Frontend:
    """Where to ask, and with which key."""

    url: str
    admin_key: str
    answer_s: float = _ANSWER_S
    """How long an answer may take that needs no time."""

    def get(self, path: str, adapter: TypeAdapter[M]) -> M:
        """Return what a path answers; raises `AdminError`."""
        return self._call("GET", path, None, adapter, self.answer_s)

    def post(self, path: str, body: dict[str, Any], adapter: TypeAdapter[M], wait_s: float = 0.0) -> M:
        """Send an order that may take `wait_s`; raises `AdminError`."""
        return self._call("POST", path, body, adapter, self.answer_s + wait_s)

    def stream(
        self, path: str, adapter: TypeAdapter[E], passed: Callable[[str], None] = lambda position: None
    ) -> Iterator[E]:
        """Yield the events at a path, as they come; raises `AdminError`. `passed` is told how far the stream is."""
        try:
            for position, data in read_events(self._url(path), self.admin_key, _SILENCE_S):
                if data.startswith('{"error"'):
                    raise AdminError(json.loads(data)["error"]["message"])
                if position:
                    passed(position)
                if data:
                    yield adapter.validate_json(data)
        except GetError as error:
            raise AdminError(_advice(error)) from error
        except ValidationError as error:
            raise AdminError(self._stranger()) from error

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, adapter: TypeAdapter[M], timeout_s: float
    ) -> M:
        try:
            return adapter.validate_python(call_json(method, self._url(path), self.admin_key, body, timeout_s))
        except GetError as error:
            raise AdminError(_advice(error)) from error
        except ValidationError as error:
            raise AdminError(self._stranger()) from error

    def _url(self, path: str) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/admin/{path}"

    def _stranger(self) -> str:
        return f"{self.url} answers, but not as a Mell frontend does; use --url"


def _advice(error: GetError) -> str:
    if error.status in (401, 403):
        return f"{error.told} (here: --admin-key or MELL_ADMIN_KEY)"
    if error.status is not None and error.status != 404:
        return error.told or str(error)
    if error.told and "There is no /" not in error.told:
        return error.told
    return f"{error}; is the stack up? (mell up, or --url)"


def segment(name: str) -> str:
    """Return a name as one part of a path."""
    return quote(name, safe="")


def command(work: Callable[[], int]) -> int:
    """Run a command; what it cannot do is a line on stderr and exit code 1."""
    try:
        return work()
    except AdminError as error:
        sys.stderr.write(f"mell: {error}\n")
        return FAILED


def console() -> Console:
    """Return where tables go. Where nobody looks at a screen's edge, nothing is cut off."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def print_json(answer: BaseModel) -> None:
    """Print an answer for programs."""
    sys.stdout.write(json.dumps(answer.model_dump(mode="json"), indent=1) + "\n")
