"""Cutting a round into chunks at the source, and placing chunks into an offer's slots at the target. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mell_gpu_worker.transport.base import ProtocolError
from mell_gpu_worker.transport.frames import Chunk
from mell_gpu_worker.transport.regions import HostRegion, Region

MAX_CHUNK_BYTES = 16 * 2**20
"""Longest chunk accepted from a peer; bounds what is staged for small slots."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one chunk at the source: a stretch of one slot, or several whole slots to be packed."""

    slot: int
    offset: int
    regions: tuple[Region, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(region.nbytes for region in self.regions)

    @property
    def packed(self) -> bool:
        """Whether the payload is a copy of several slots."""
        return len(self.regions) > 1

    def payload(self) -> Region:
        """Return the bytes to send, in place if they are in one piece."""
        if not self.packed:
            return self.regions[0]
        return HostRegion(memoryview(b"".join(region.raw for region in self.regions if isinstance(region, HostRegion))))


def cut(slots: Sequence[tuple[int, Region]], chunk_bytes: int) -> Iterator[Piece]:
    """Yield the chunks of a round, in order.

    Runs of small slots with consecutive numbers are packed, since each message costs more than copying them. Device
    memory never is, and it is cut as coarsely as a target allows: it has no checksum that needs a shorter reach.
    """
    run: list[tuple[int, Region]] = []
    run_bytes = 0
    for slot, region in slots:
        small = isinstance(region, HostRegion) and region.nbytes < chunk_bytes // 4
        follows = bool(run) and slot == run[-1][0] + 1 and run_bytes + region.nbytes <= chunk_bytes
        if run and not (small and follows):
            yield _packed(run)
            run, run_bytes = [], 0
        if small:
            run.append((slot, region))
            run_bytes += region.nbytes
        else:
            most = chunk_bytes if isinstance(region, HostRegion) else MAX_CHUNK_BYTES
            for offset in range(0, region.nbytes, most) if region.nbytes else (0,):
                yield Piece(slot, offset, (region.part(offset, min(most, region.nbytes - offset)),))
    if run:
        yield _packed(run)


def _packed(run: list[tuple[int, Region]]) -> Piece:
    return Piece(run[0][0], 0, tuple(region for _, region in run))


class Slots:
    """The buffers of one offer and what has arrived in each; each byte is accepted once."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)
        self._received_bytes = [0] * len(regions)
        self._whole = [False] * len(regions)
        self._fresh: list[int] = []

    @property
    def size_bytes(self) -> int:
        """All bytes of all slots."""
        return sum(region.nbytes for region in self._regions)

    def regions_of(self, chunk: Chunk) -> tuple[Region, ...]:
        """Return where a chunk belongs and count it as received.

        Raises `ProtocolError` unless it lies within the offer, continues its slot exactly where it stood, and is no
        longer than `MAX_CHUNK_BYTES`.
        """
        end = chunk.slot + chunk.count
        if not 0 < chunk.count <= len(self._regions) or end > len(self._regions) or chunk.length > MAX_CHUNK_BYTES:
            raise ProtocolError(f"a chunk of {chunk.length} bytes for slots {chunk.slot} to {end} is outside the offer")
        if any(self._whole[chunk.slot : end]):
            raise ProtocolError(f"slot {chunk.slot} came twice")
        return self._run(chunk, end) if chunk.count > 1 else (self._part(chunk),)

    def _part(self, chunk: Chunk) -> Region:
        region = self._regions[chunk.slot]
        begun = self._received_bytes[chunk.slot]
        if chunk.offset != begun or chunk.offset + chunk.length > region.nbytes or (region.nbytes and not chunk.length):
            raise ProtocolError(f"a chunk does not continue slot {chunk.slot} at byte {begun}")
        self._count(chunk.slot, chunk.length)
        return region.part(chunk.offset, chunk.length)

    def _run(self, chunk: Chunk, end: int) -> tuple[Region, ...]:
        regions = self._regions[chunk.slot : end]
        if (
            any(self._received_bytes[chunk.slot : end])
            or chunk.length != sum(region.nbytes for region in regions)
            or not all(isinstance(region, HostRegion) for region in regions)
        ):
            raise ProtocolError(f"a packed chunk does not fit slots {chunk.slot} to {end}")
        for slot, region in enumerate(regions, chunk.slot):
            self._count(slot, region.nbytes)
        return regions

    def _count(self, slot: int, length: int) -> None:
        self._received_bytes[slot] += length
        if self._received_bytes[slot] == self._regions[slot].nbytes:
            self._whole[slot] = True
            self._fresh.append(slot)

    def finish_round(self) -> tuple[int, ...]:
        """Return the slots filled since the last round; raises `ProtocolError` if one is only begun."""
        for slot, (region, received) in enumerate(zip(self._regions, self._received_bytes, strict=True)):
            if 0 < received < region.nbytes:
                raise ProtocolError(f"the round ended in the middle of slot {slot}")
        fresh, self._fresh = tuple(self._fresh), []
        return fresh


def scatter(payload: memoryview, regions: Sequence[Region]) -> None:
    """Copy a packed payload into its slots."""
    offset = 0
    for region in regions:
        assert isinstance(region, HostRegion)
        region.raw[:] = payload[offset : offset + region.nbytes]
        offset += region.nbytes
