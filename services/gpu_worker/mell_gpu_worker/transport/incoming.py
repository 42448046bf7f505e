"""The target's end of a transfer, the same over every link: an offer, then whoever names its secret, then rounds."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from mell_gpu_worker.transport.base import (
    CorruptedError,
    DeadlineError,
    LinkLostError,
    ProtocolError,
    Round,
    TransportError,
)
from mell_gpu_worker.transport.checksum import checksum_of
from mell_gpu_worker.transport.chunks import Slots, scatter
from mell_gpu_worker.transport.frames import (
    ACCEPTED,
    CORRUPTED,
    DONE,
    SENSELESS,
    Answer,
    Chunk,
    Group,
    Verdict,
)
from mell_gpu_worker.transport.link import Link
from mell_gpu_worker.transport.regions import HostRegion, Region

MAX_WAITING_ROUNDS = 1024
"""Most finished rounds nobody has asked for yet."""
_FAREWELL_S = 0.5


class LinkIncoming:
    """`Incoming`: waits for a link, then fills the offered buffers from it."""

    def __init__(self, secret: bytes, regions: Sequence[Region], lifetime_s: float, closed: Callable[[], None]) -> None:
        self.secret = secret
        self.task: asyncio.Task[None] | None = None
        """Serves the link that was accepted; owned by the reception."""
        self._slots: Slots | None = Slots(regions)
        self._size_bytes = self._slots.size_bytes
        self._rounds: deque[Round] = deque()
        self._changed = asyncio.Event()
        self._over: TransportError | None = None
        self._link: Link | None = None
        self._closed = closed
        self._round = Tally()
        self._chunks = 0
        lifetime = DeadlineError(f"the offer's lifetime of {lifetime_s:g} s is over")
        self._expiry = asyncio.get_running_loop().call_later(lifetime_s, self.end, lifetime)

    @property
    def size_bytes(self) -> int:
        """All bytes of the offered buffers."""
        return self._size_bytes

    @property
    def connected(self) -> bool:
        """Whether the source has come and was accepted."""
        return self.task is not None

    async def receive(self, timeout_s: float) -> Round:
        """Return the next finished round, as `Incoming.receive`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._rounds:
                    if self._over is not None:
                        raise self._over
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            error = DeadlineError(f"no round was finished within {timeout_s:g} s")
            self.end(error)
            raise error from None
        except asyncio.CancelledError:
            self.end(LinkLostError("the transfer was cancelled here"))
            raise
        return self._rounds.popleft()

    async def close(self) -> None:
        """End the transfer and give the buffers back."""
        self.end(LinkLostError("the transfer was closed here"))
        if self.task is not None:
            await asyncio.wait((self.task,))

    def end(self, error: TransportError) -> None:
        """End the transfer for a reason; buffers are not touched from here on."""
        if self._over is None:
            self._over = error
            self._closed()
        self._expiry.cancel()
        if self._link is not None:
            self._link.close()
        if self.task is not None:
            self.task.cancel()
        self._slots = None
        self._changed.set()

    async def serve(self, link: Link) -> None:
        """Accept `link` and receive rounds from it until it, or the transfer, ends. Run in `task`."""
        self._link = link
        try:
            await link.send_frame(Verdict(ACCEPTED, link.inbox).encode())
            while self._over is None:
                await self._group(link, Group.decode(await link.receive_frame()))
        except (LinkLostError, CorruptedError, ProtocolError) as error:
            await self._refuse(link, error)
        finally:
            link.close()

    async def _refuse(self, link: Link, error: TransportError) -> None:
        """Say why, and let the source hear it before the link goes down; no buffer is lent meanwhile."""
        self._slots, self._over = None, self._over or error
        self._changed.set()
        self._expiry.cancel()
        self._closed()
        if not isinstance(error, LinkLostError):
            code = CORRUPTED if isinstance(error, CorruptedError) else SENSELESS
            await farewell(link, Answer(code).encode())

    async def _group(self, link: Link, group: Group) -> None:
        if group.number != self._chunks:
            raise ProtocolError(f"chunk {group.number} came where {self._chunks} was due")
        self._chunks += len(group.chunks)
        assert self._slots is not None
        # All of a group is judged before memory is taken for any of it.
        for chunk, regions in [(chunk, self._slots.regions_of(chunk)) for chunk in group.chunks]:
            await self._chunk(link, chunk, regions)
        if group.last:
            await self._end_of_round(link)

    async def _chunk(self, link: Link, chunk: Chunk, regions: Sequence[Region]) -> None:
        self._round.count(chunk, packed=len(regions) > 1)
        if len(regions) == 1:
            region = regions[0]
            await link.fill(region, lambda: self._check(chunk, region))
        else:
            staged = HostRegion(memoryview(bytearray(chunk.length)))
            await link.fill(staged, lambda: self._unpack(chunk, staged, regions))

    def _unpack(self, chunk: Chunk, staged: HostRegion, regions: Sequence[Region]) -> None:
        if self._slots is not None:
            scatter(staged.raw, regions)
            self._check(chunk, staged)

    def _check(self, chunk: Chunk, region: Region) -> None:
        found = None if chunk.checksum is None else checksum_of(region)
        if found is None:
            self._round.unchecked_bytes += chunk.length
        elif found != chunk.checksum:
            self._round.corrupted = True

    async def _end_of_round(self, link: Link) -> None:
        await link.filled()
        tally = self._round
        if tally.corrupted:
            raise CorruptedError("a chunk arrived with a wrong checksum")
        assert self._slots is not None
        if len(self._rounds) >= MAX_WAITING_ROUNDS:
            raise ProtocolError(f"{MAX_WAITING_ROUNDS} rounds were sent and none asked for")
        done = Round(self._slots.finish_round(), tally.size_bytes, tally.unchecked_bytes, tally.staged_bytes)
        self._round = Tally()
        await link.send_frame(Answer(DONE).encode())
        self._rounds.append(done)
        self._changed.set()


class Tally:
    """What has been counted in the round under way."""

    __slots__ = ("corrupted", "size_bytes", "staged_bytes", "unchecked_bytes")

    def __init__(self) -> None:
        self.size_bytes = self.staged_bytes = self.unchecked_bytes = 0
        self.corrupted = False

    def count(self, chunk: Chunk, *, packed: bool) -> None:
        """Count a chunk that is about to arrive."""
        self.size_bytes += chunk.length
        self.staged_bytes += chunk.length if packed else 0


async def farewell(link: Link, frame: bytes) -> None:
    """Send a last frame and wait a little for the peer to close, so that what it reads is not lost in a reset."""
    try:
        async with asyncio.timeout(_FAREWELL_S):
            await link.send_frame(frame)
            while True:
                await link.receive_frame()
    except (TimeoutError, LinkLostError):
        return
