"""The source's end of a transfer, the same over every link."""

import asyncio
from collections.abc import Awaitable, Sequence

from mell_gpu_worker.transport.base import (
    CorruptedError,
    DeadlineError,
    LinkLostError,
    ProtocolError,
    RefusedError,
    Round,
    Slots,
    TransportError,
    TransportOptions,
)
from mell_gpu_worker.transport.checksum import checksum_of
from mell_gpu_worker.transport.chunks import Piece, cut
from mell_gpu_worker.transport.frames import (
    ACCEPTED,
    CORRUPTED,
    DONE,
    FAILURES,
    MAX_GROUP,
    REFUSALS,
    Answer,
    Chunk,
    Group,
    Hello,
    Verdict,
)
from mell_gpu_worker.transport.link import Link
from mell_gpu_worker.transport.regions import Region, region_of


async def greet(
    opening: Awaitable[Link], secret: bytes, size_bytes: int, options: TransportOptions, timeout_s: float
) -> "LinkOutgoing":
    """Open a link and say hello; return the transfer if it was accepted, else close the link and raise."""
    link: Link | None = None
    try:
        async with asyncio.timeout(timeout_s):
            link = await opening
            await link.send_frame(Hello(secret, size_bytes, link.inbox).encode())
            link.greeted(_accepted(await link.receive_frame()))
    except BaseException as error:
        if link is not None:
            link.close()
        if isinstance(error, TimeoutError):
            raise DeadlineError(f"no answer to the greeting within {timeout_s:g} s") from None
        raise
    return LinkOutgoing(link, options)


def _accepted(frame: bytes) -> int:
    """Return the target's inbox; raises `RefusedError` with the target's reason."""
    verdict = Verdict.decode(frame)
    if verdict.code != ACCEPTED:
        raise RefusedError(REFUSALS[verdict.code])
    return verdict.tag


class LinkOutgoing:
    """`Outgoing` over a link that was accepted."""

    def __init__(self, link: Link, options: TransportOptions) -> None:
        self._link = link
        self._options = options
        self._chunks = 0
        self._sending = False
        self._over: TransportError | None = None

    async def send(self, slots: Slots, timeout_s: float) -> Round:
        """Send one round, as `Outgoing.send`."""
        regions = [(slot, region_of(buffer, writable=False)) for slot, buffer in slots]
        assert not self._sending, "one round at a time"
        if self._over is not None:
            raise self._over
        self._sending = True
        try:
            async with asyncio.timeout(timeout_s):
                return await self._round(regions)
        except TimeoutError:
            error = DeadlineError(f"the round was not confirmed within {timeout_s:g} s")
            self._end(error)
            raise error from None
        except TransportError as error:
            self._end(error)
            raise
        except asyncio.CancelledError:
            self._end(LinkLostError("the transfer was cancelled here"))
            raise
        finally:
            self._sending = False

    async def close(self) -> None:
        """End the transfer."""
        self._end(LinkLostError("the transfer was closed here"))

    def _end(self, error: TransportError) -> None:
        if self._over is None:
            self._over = error
        self._link.close()

    async def _round(self, regions: list[tuple[int, Region]]) -> Round:
        """Send a round while listening: a target that fails says so at once, and that ends the sending."""
        answer = asyncio.ensure_future(self._answer())
        answer.add_done_callback(self._heard)
        try:
            sent = await self._pump(regions)
            await answer
        except LinkLostError:
            # The target's own words about why it closed, if they came, say more.
            if answer.done() and (said := answer.exception()) is not None:
                raise said from None
            raise
        finally:
            if not answer.done():
                answer.cancel()
                self._link.close()
            await asyncio.gather(answer, return_exceptions=True)
        return sent

    def _heard(self, answer: "asyncio.Future[None]") -> None:
        if not answer.cancelled() and answer.exception() is not None:
            self._link.close()

    async def _answer(self) -> None:
        answer = Answer.decode(await self._link.receive_frame())
        if answer.code == DONE:
            return
        raise (CorruptedError if answer.code == CORRUPTED else ProtocolError)(FAILURES[answer.code])

    async def _pump(self, regions: list[tuple[int, Region]]) -> Round:
        unchecked_bytes = 0
        pieces = list(cut(regions, self._options.chunk_bytes))
        # While one group is under way the next one is made.
        size = max(1, min(MAX_GROUP, self._options.chunks_in_flight // 2))
        for begin in range(0, max(len(pieces), 1), size):
            unchecked_bytes += await self._post(pieces[begin : begin + size], last=begin + size >= len(pieces))
        await self._link.posted()
        size_bytes = sum(piece.nbytes for piece in pieces)
        staged_bytes = sum(piece.nbytes for piece in pieces if piece.packed)
        return Round(tuple(slot for slot, _ in regions), size_bytes, unchecked_bytes, staged_bytes)

    async def _post(self, pieces: Sequence[Piece], *, last: bool) -> int:
        """Send the chunks of one group; return how many bytes have no checksum."""
        chunks, payloads = [], []
        for piece in pieces:
            payload = piece.payload()
            chunks.append(Chunk(piece.slot, len(piece.regions), piece.offset, payload.nbytes, checksum_of(payload)))
            payloads.append(payload)
            # A checksum takes a while: others get a turn of the loop.
            await asyncio.sleep(0)
        await self._link.post(Group(self._chunks, chunks, last).encode(), payloads)
        self._chunks += len(chunks)
        return sum(chunk.length for chunk in chunks if chunk.checksum is None)
