"""Buffers as bytes: host memory and device memory behind one small surface, without a copy and without torch."""

from dataclasses import dataclass
from typing import Any


class HostRegion:
    """Contiguous bytes of host memory."""

    __slots__ = ("raw",)

    def __init__(self, raw: memoryview) -> None:
        self.raw = raw

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.raw.nbytes

    def part(self, offset: int, length: int) -> "HostRegion":
        """Return a stretch of this memory."""
        return HostRegion(self.raw[offset : offset + length])


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Bytes of CUDA memory as other libraries see them; keeps the memory's owner alive."""

    pointer: int
    nbytes: int
    owner: Any

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }


class DeviceRegion:
    """Contiguous bytes of CUDA memory, known by their address only."""

    __slots__ = ("raw",)

    def __init__(self, raw: DeviceBytes) -> None:
        self.raw = raw

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.raw.nbytes

    def part(self, offset: int, length: int) -> "DeviceRegion":
        """Return a stretch of this memory."""
        return DeviceRegion(DeviceBytes(self.raw.pointer + offset, length, self.raw.owner))


Region = HostRegion | DeviceRegion


def region_of(buffer: Any, *, writable: bool) -> Region:
    """Return `buffer` as bytes; raises `ValueError` if it is not contiguous, or read-only and to be written."""
    if hasattr(buffer, "__cuda_array_interface__"):
        return _device_region(buffer, writable=writable)
    try:
        view = memoryview(buffer)
    except TypeError:
        raise ValueError(f"{type(buffer).__name__} is neither a buffer nor CUDA memory") from None
    if not view.c_contiguous:
        raise ValueError("a buffer is not contiguous: its bytes would be sent in another order")
    if writable and view.readonly:
        raise ValueError("a buffer to be received into is read-only")
    # An empty view of several dimensions cannot be cast.
    return HostRegion(view.cast("B") if view.nbytes else memoryview(bytearray()))


def _device_region(buffer: Any, *, writable: bool) -> DeviceRegion:
    described = buffer.__cuda_array_interface__
    pointer, readonly = described["data"]
    item_bytes = int(described["typestr"][2:])
    expected, nbytes = [], item_bytes
    for length in reversed(described["shape"]):
        expected.append(nbytes)
        nbytes *= length
    strides = described.get("strides")
    if strides is not None and nbytes and tuple(strides) != tuple(reversed(expected)):
        raise ValueError("CUDA memory is not contiguous: its bytes would be sent in another order")
    if writable and readonly:
        raise ValueError("CUDA memory to be received into is read-only")
    return DeviceRegion(DeviceBytes(pointer or 0, nbytes, buffer))
