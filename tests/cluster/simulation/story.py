"""What happened in a run, told in lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tests.cluster.simulation.clock import EventQueue

_DULL = ("Ticked", "Tick", "TimePassed")


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened."""

    at_us: int
    process: str
    event: Any
    commands: Any


class Story:
    """Keeps all events with their commands; telling them comes later, if at all."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self.lines: list[Line] = []

    def handled(self, process: str, event: object, commands: object) -> None:
        """A core was told something and wants something."""
        if commands or type(event).__name__ not in _DULL:
            self.lines.append(Line(self._queue.now_us, process, event, commands))

    def happened(self, what: str) -> None:
        """Something happened outside the cores: a fault, a client."""
        self.lines.append(Line(self._queue.now_us, "***", what, ()))

    def tell(self) -> Iterator[str]:
        """Yield a line for each thing that happened."""
        for line in self.lines:
            wanted = ", ".join(map(brief, line.commands))
            yield f"{line.at_us / 1e6:10.4f}  {line.process:8} {brief(line.event)}{' -> ' if wanted else ''}{wanted}"


def brief(value: Any) -> str:
    """Say in few words what an event, a command or a message is about."""
    if isinstance(value, str):
        return value
    inner = [
        getattr(value, name) for name in ("message", "command", "reply", "order", "request") if hasattr(value, name)
    ]
    about = [
        str(getattr(value, name)) for name in ("worker", "frontend", "sequence", "migration") if hasattr(value, name)
    ]
    messages = [_message(part) for part in inner if not isinstance(part, str)]
    return f"{type(value).__name__}({' '.join([*about, *messages, *_extras(value)])})"


def _message(part: Any) -> str:
    if not isinstance(part, BaseModel):
        return f"{getattr(part, 'sequence', '')}"
    fields = part.model_dump(
        exclude={"kind", "sampling", "prompt_ids", "spec", "logprobs", "logprob", "model"}, exclude_defaults=True
    )
    told = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    return f"{type(part).__name__} {told}".strip()


def _extras(value: Any) -> list[str]:
    names = (
        "generation",
        "known",
        "failure",
        "finish_reason",
        "cause",
        "position",
        "token_ids",
        "rows",
        "term",
        "change",
        "reason",
    )
    return [f"{name}={_short(getattr(value, name))}" for name in names if getattr(value, name, None) not in (None, "")]


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "block_table"):
        return "[" + " ".join(f"{row.sequence}:{row.start}+{row.count}" for row in value) + "]"
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(value)})"
