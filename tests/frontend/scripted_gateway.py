"""A gateway whose streams follow a script, for tests of the HTTP side."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mell_frontend.generation import Delta, GenerationError, SequenceRequest, Waiting
from mell_shared.messages.admin import AdminReply, AdminRequest, Live, LiveRequest, Status
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason

Step = Waiting | Delta | GenerationError
Script = Callable[[SequenceRequest], Sequence[Step]]


def deltas(text: str, finish: FinishReason = "stop", *, size: int = 1, cached: int = 0) -> list[Step]:
    """Return the deltas of the `fake` model saying `text`, `size` bytes a time."""
    data = list(text.encode())
    said = [Delta(data[start : start + size], cached_tokens=cached) for start in range(0, len(data), size)]
    return [*said, Delta([257] if finish == "stop" else [], finish_reason=finish, cached_tokens=cached)]


def say(text: str, finish: FinishReason = "stop", *, size: int = 1, cached: int = 0) -> Script:
    """Return the script that says `text` whatever is asked."""
    return lambda _request: deltas(text, finish, size=size, cached=cached)


def scored(text: str) -> Script:
    """Return the script that says `text` with log-probabilities, the next letter as the alternative."""

    def script(_request: SequenceRequest) -> list[Step]:
        return [
            Delta([byte], [TokenLogprobs(logprob=-0.5, top_ids=[byte, byte + 1], top_logprobs=(-0.5, -1.5))])
            for byte in text.encode()
        ] + [Delta([], finish_reason="length")]

    return script


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
    name: str = "frontend-1"
    stopping: bool = False
    open_streams: int = 0
    tokens_accepted: int = 0
    streams: list[ScriptedStream] = field(default_factory=list)
    problem: GenerationError | None = None
    orders: list[AdminRequest] = field(default_factory=list)
    answers: list[AdminReply | GenerationError] = field(default_factory=list)
    """For the next orders of operators."""

    @property
    def requests(self) -> list[SequenceRequest]:
        """What was asked for, in order."""
        return [stream.request for stream in self.streams]

    def open(self, request: SequenceRequest) -> ScriptedStream:
        """Open a stream."""
        stream = ScriptedStream(request, list(self.script(request)))
        self.streams.append(stream)
        return stream

    async def admin(self, request: AdminRequest) -> AdminReply:
        """Return the next scripted answer, or an empty cluster, or raise the problem."""
        self.orders.append(request)
        if self.problem is not None:
            raise self.problem
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, GenerationError):
                raise answer
            return answer
        empty = Status(scheduler="s", policy="best_fit", uptime_s=1.0, workers=(), queued=0, placed=0, rejected=0)
        return Live(status=empty) if isinstance(request, LiveRequest) else empty
