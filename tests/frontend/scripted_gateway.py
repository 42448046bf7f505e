"""A gateway whose streams follow a script, for tests of the HTTP side."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mell_frontend.generation import Delta, GenerationError, SequenceRequest, Waiting
from mell_shared.messages.admin import Status
from mell_shared.messages.sampling import FinishReason

Step = Waiting | Delta | GenerationError
Script = Callable[[SequenceRequest], Sequence[Step]]


def text_deltas(text: str, finish: FinishReason = "stop", *, size: int = 1, cached: int = 0) -> list[Step]:
    """Return the deltas of the `fake` model saying `text`, `size` bytes a time."""
    data = list(text.encode())
    deltas = [Delta(data[start : start + size], cached_tokens=cached) for start in range(0, len(data), size)]
    return [*deltas, Delta([257] if finish == "stop" else [], finish_reason=finish, cached_tokens=cached)]


def say(text: str, **options: object) -> Script:
    """Return the script that says `text` whatever is asked."""
    return lambda _request: text_deltas(text, **options)  # type: ignore[arg-type]


@dataclass
class ScriptedStream:
    """Plays its steps; after the last one it waits for ever."""

    request: SequenceRequest
    steps: list[Step]
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    read: int = 0

    async def next(self) -> Waiting | Delta:
        """Return the next step, or raise it."""
        await asyncio.sleep(0)
        if self.read == len(self.steps):
            await asyncio.Event().wait()
        step = self.steps[self.read]
        self.read += 1
        if isinstance(step, GenerationError):
            raise step
        return step

    def close(self) -> None:
        """Note that the stream was closed."""
        self.closed.set()


@dataclass
class ScriptedGateway:
    """Opens streams that follow `script`, and remembers them."""

    script: Script = field(default_factory=lambda: say("Hello, world!"))
    ready: bool = True
    streams: list[ScriptedStream] = field(default_factory=list)
    problem: GenerationError | None = None

    def open(self, request: SequenceRequest) -> ScriptedStream:
        """Open a stream."""
        stream = ScriptedStream(request, list(self.script(request)))
        self.streams.append(stream)
        return stream

    async def status(self) -> Status:
        """Return an empty cluster, or raise the problem."""
        if self.problem is not None:
            raise self.problem
        return Status(scheduler="s", policy="best_fit", uptime_s=1.0, workers=(), queued=0, placed=0, rejected=0)
