"""Reads the log lines of child processes: pure. Services log JSON; everything else is taken as plain text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_LOUD = {"warning", "error", "critical"}
_LEFT_OUT = {"event", "level", "timestamp", "logger", "service", "exception", "pid", "version"}
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a child; `level` is empty and `event` the whole text if it is not a JSON event."""

    text: str
    event: str
    level: str = ""
    fields: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    def loud(self) -> bool:
        """Whether the user should see it: a warning or worse."""
        return self.level in _LOUD

    def summary(self) -> str:
        """Return the event with its fields, for people, on one line."""
        shown = [f"{name}={value}" for name, value in self.fields.items() if name not in _LEFT_OUT]
        return " ".join([self.event, *shown])


def parse_line(text: str) -> LogLine:
    """Return the event in `text`, whatever it is."""
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("event"), str):
            return LogLine(text, value["event"], str(value.get("level", "")), MappingProxyType(value))
    return LogLine(text, text.strip())


def last_words(lines: tuple[LogLine, ...]) -> str:
    """Return what best says why a process ended: its last error, else its last plain text, else its last line."""
    for wanted in (
        lambda line: line.level in {"error", "critical"},
        lambda line: not line.level and line.event,
        lambda line: bool(line.event),
    ):
        found = [line for line in lines if wanted(line)]
        if found:
            return found[-1].summary().removeprefix("mell: ")
    return "it said nothing"
