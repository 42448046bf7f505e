"""One sequence's buffer between the gateway, which fills it, and the one reader, who empties it."""

import asyncio
from collections.abc import Callable

from mell_frontend.generation import Delta, GenerationError, Waiting
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason

_HEARTBEAT_S = 1.0


class BufferedStream:
    """The `SequenceStream` of one sequence; a reader is woken once for all that came since it last looked.

    What a slow reader leaves here is bounded: the core accepts no more than the sequence's output limit.
    """

    __slots__ = (
        "_cached_tokens",
        "_closed",
        "_failure",
        "_finish_reason",
        "_logprobs",
        "_news",
        "_on_close",
        "_placing",
        "_position",
        "_reader",
        "_token_ids",
        "sequence",
        "traceparent",
    )

    def __init__(self, sequence: str, on_close: Callable[[str], None]) -> None:
        self.sequence = sequence
        self.traceparent = ""
        """The span of its request, if it is traced."""
        self._on_close = on_close
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self._cached_tokens = 0
        self._position = 0
        self._placing = True
        self._failure: GenerationError | None = None
        self._closed = False
        self._news = False
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> Waiting | Delta:
        """Return what came since the last call, waiting for it; raises `GenerationError`.

        While the sequence waits for its first tokens, or for the next owner's, that takes a second at most.
        """
        if not self._news:
            await self._wait_for_news()
        self._news = False
        if self._token_ids or self._finish_reason is not None:
            return self._take()
        if self._failure is not None:
            self._news = True  # said again if asked again
            raise self._failure
        return Waiting(self._position)

    def close(self) -> None:
        """Cancel the sequence if it has not ended; safe to repeat, never blocks."""
        if not self._closed:
            self._closed = True
            self._on_close(self.sequence)

    def push(
        self,
        token_ids: list[int],
        logprobs: tuple[TokenLogprobs, ...],
        finish_reason: FinishReason | None,
        cached_tokens: int,
    ) -> None:
        """Add the next tokens; with a finish reason they are the last."""
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._finish_reason = finish_reason
        self._cached_tokens = cached_tokens
        self._placing = False
        self._wake()

    def wait(self, position: int) -> None:
        """Tell the reader that the sequence waits."""
        self._position = position
        self._placing = True
        self._wake()

    def fail(self, failure: GenerationError) -> None:
        """Tell the reader, after the tokens that came before, that no more will come."""
        self._failure = failure
        self._wake()

    def _take(self) -> Delta:
        delta = Delta(self._token_ids, self._logprobs, self._finish_reason, self._cached_tokens)
        self._token_ids = []
        self._logprobs = []
        self._position = 0
        self._news = self._failure is not None
        return delta

    def _wake(self) -> None:
        self._news = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait_for_news(self) -> None:
        assert self._reader is None, "a sequence has one reader"
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        heartbeat = loop.call_later(_HEARTBEAT_S, self._beat) if self._placing else None
        try:
            await self._reader
        finally:
            if heartbeat is not None:
                heartbeat.cancel()
            self._reader = None

    def _beat(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
