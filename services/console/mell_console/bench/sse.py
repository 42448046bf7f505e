"""Reads a server-sent event stream with as little work as counting needs. Pure."""

import json
import re
from typing import Any

_CONTENT = re.compile(rb'"(?:content|text|reasoning_content|arguments)"\s*:\s*"(?!")')
"""A piece of an answer that is not empty: what a client would show."""
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"([^"]*)"')


class StreamReader:
    """Counts the pieces of one answer; parses JSON only for the usage and for errors.

    `pieces` counts content events, `finish_reason` and `usage` are what the server said, `error` is its
    mid-stream error, `done` whether it closed the stream properly.
    """

    def __init__(self) -> None:
        self.pieces = 0
        self.finish_reason = ""
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.done = False
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """Take bytes as they came; return how many pieces of content they completed."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        before = self.pieces
        for event in events:
            if event.startswith(b"data:"):
                self._take(event)
        return self.pieces - before

    def _take(self, event: bytes) -> None:
        if _CONTENT.search(event):
            self.pieces += 1
        if b'"finish_reason"' in event and (found := _FINISHED.search(event)):
            self.finish_reason = found[1].decode(errors="replace")
        if b'"usage"' in event and _USAGE.search(event):
            usage = _object(event).get("usage")
            self.usage = usage if isinstance(usage, dict) else {}
        elif event[5:].strip() == b"[DONE]":
            self.done = True
        elif b'"error"' in event and b'"choices"' not in event:
            self.error = error_kind(event[5:])


def error_kind(body: bytes) -> str:
    """Return a short name for an OpenAI error body: its code, else its type, else its message's beginning."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or str(error.get("message"))[:60])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "no OpenAI error body"


def _object(event: bytes) -> dict[str, Any]:
    try:
        value = json.loads(event[5:])
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
