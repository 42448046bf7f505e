"""One sequence at a vLLM server: a streamed completion, asked for anew from where it was whenever it breaks off."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from mell_gpu_worker.core.step import SampledToken
from mell_gpu_worker.engine.vllm.api import (
    RefusedError,
    WrongAnswerError,
    completion_request,
    error_text,
    is_refusal,
    read_chunk,
)
from mell_gpu_worker.engine.vllm.server import UNREACHABLE, Server
from mell_shared.messages.sampling import FinishReason, SamplingParams

_ATTEMPTS = 5
"""Answers in a row that may break off before their first token, while the server is there."""
_PAUSES_S = (0.05, 0.2, 0.5, 1.0)


class _BrokenError(Exception):
    """The answer broke off: another one may not."""


@dataclass(slots=True, eq=False)
class Stream:
    """What a sequence got so far and nobody has taken. `ids` grows by what comes, `source` by what was taken."""

    source: Sequence[int]
    """The sequence's own list of ids."""
    prompt_tokens: int
    sampling: SamplingParams
    ids: list[int]
    taken: int
    """Length of `source` that the next token taken belongs behind."""
    fresh: deque[SampledToken] = field(default_factory=deque)
    end: FinishReason | None = None
    """Why nothing follows what is fresh."""
    failure: str = ""
    opened_s: float = 0.0
    token_s: float = 0.0
    """Time of the last token."""
    task: asyncio.Task[None] | None = None
    closed: bool = False

    @property
    def ready(self) -> bool:
        """Whether there is something to be taken."""
        return bool(self.fresh or self.end or self.failure)

    @property
    def heard_s(self) -> float:
        """When something came last, or was to begin."""
        return self.token_s or self.opened_s

    def follows(self, source: Sequence[int]) -> bool:
        """Whether the next token taken belongs behind this list as it is now."""
        return self.source is source and self.taken == len(source)


class Streaming:
    """Runs streams against one server, on one event loop. `told` is called whenever a stream has got something."""

    def __init__(
        self, server: Server, model: str, max_model_len: int, vocab_size: int, told: Callable[[], None]
    ) -> None:
        self._server = server
        self._model = model
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._told = told
        self.token_s = 0.0
        """Mean time between two tokens of a stream; 0: not known."""
        self.heard_s = 0.0
        """When any of them brought a token last."""
        self._bug: BaseException | None = None

    def open(self, stream: Stream) -> None:
        """Begin; to be called on the loop."""
        if not stream.closed:
            stream.task = asyncio.get_running_loop().create_task(self._run(stream))
            stream.task.add_done_callback(self._ended)

    def close(self, stream: Stream) -> None:
        """End, at the server too; to be called on the loop, safe to repeat."""
        stream.closed = True
        if stream.task is not None:
            stream.task.cancel()

    def check(self) -> None:
        """Raise what no stream should ever have raised: a bug, which must not look like a server that is slow."""
        if self._bug is not None:
            raise self._bug

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._bug = self._bug or task.exception()

    async def _run(self, stream: Stream) -> None:
        attempts = in_vain = 0
        while not stream.end:
            before = len(stream.ids)
            in_vain += 1
            try:
                await self._follow(stream)
            except UNREACHABLE as error:
                # Whether the server is gone for good is not decided here.
                attempts = attempts if _absent(error) else attempts + 1
            except _BrokenError:
                attempts += 1
            except RefusedError as error:
                stream.failure = f"refused: {error}"
                break
            except WrongAnswerError as error:
                stream.failure = f"the vLLM server answered with {error}"
                break
            if len(stream.ids) > before:
                attempts = in_vain = 0
            if attempts >= _ATTEMPTS:
                stream.failure = f"the vLLM server broke off {attempts} times before it made a token"
                break
            if not stream.end:
                await asyncio.sleep(_PAUSES_S[min(in_vain, len(_PAUSES_S) - 1)])
        self._told()

    async def _follow(self, stream: Stream) -> None:
        """Read one answer to its end, or raise why there is none."""
        if stream.sampling.grammar is not None and len(stream.ids) > stream.prompt_tokens:
            # The server would begin it anew: after a broken connection, or a preemption, two halves of no whole.
            raise RefusedError("structured output cannot go on after what is there already")
        body = completion_request(self._model, stream.ids, stream.prompt_tokens, stream.sampling, self._max_model_len)
        longest = len(stream.ids) + body["max_tokens"]
        async with self._server.complete(body) as response:
            if response.status != 200:
                raise await _refusal(response)
            async for data in _events(response):
                self._take(stream, data, longest)
                if stream.end:
                    return
        raise _BrokenError

    def _take(self, stream: Stream, data: bytes, longest: int) -> None:
        chunk = read_chunk(data, self._vocab_size, stream.sampling.logprobs)
        if chunk.tokens:
            if len(stream.ids) + len(chunk.tokens) > longest:
                raise WrongAnswerError("more tokens than were asked for")
            self._time(stream, len(chunk.tokens))
            stream.ids += [token.token_id for token in chunk.tokens]
            stream.fresh += chunk.tokens
        stream.end = chunk.end
        if chunk.tokens or chunk.end:
            self._told()
        if chunk.dropped:
            raise _BrokenError

    def _time(self, stream: Stream, tokens: int) -> None:
        self.heard_s = now_s = time.monotonic()
        if stream.token_s:
            each_s = (now_s - stream.token_s) / tokens
            self.token_s += 0.05 * (each_s - self.token_s) if self.token_s else each_s
        stream.token_s = now_s


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the data of each event until `[DONE]` or the answer's end."""
    try:
        async for line in response.content:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data
    except (ValueError, HttpProcessingError) as error:
        raise WrongAnswerError("a line that does not end") from error


def _absent(error: Exception) -> bool:
    """Whether nobody listened, so that nothing was tried."""
    return isinstance(error, aiohttp.ClientConnectorError | TimeoutError)


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    if not is_refusal(response.status):
        return _BrokenError()
    try:
        said = await response.json(content_type=None)
    except ValueError:
        said = None
    return RefusedError(error_text(said))
