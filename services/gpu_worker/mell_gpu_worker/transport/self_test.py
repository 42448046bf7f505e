"""Measures what a lane between two workers really carries, at start: some slow paths look healthy otherwise.

(On GPUs, memory of an allocator that UCX cannot map falls silently from hundreds of GB/s to a fraction of one.)
The target offers a probe, made of the same kind of memory as its KV pool, and tells the source its secret; the source
measures. Nobody else can make a worker measure anything.
"""

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mell_gpu_worker.transport.base import SECRET_BYTES, Incoming, Transport

PROBE_BYTES = 8 * 2**20
_LARGE_ROUNDS = 4
_SMALL_ROUNDS = 16
_SMALL_BYTES = 256
_SIZES = (*(_SMALL_BYTES,) * _SMALL_ROUNDS, *(PROBE_BYTES,) * _LARGE_ROUNDS)
SIZE_BYTES = sum(_SIZES)
"""What a probe announces."""

Allocate = Callable[[int], Any]
"""Makes a writable buffer of that many bytes, of the memory to be measured."""


@dataclass(frozen=True, slots=True)
class LaneMeasured:
    """What one lane did, checksums and confirmations included."""

    bytes_per_s: float
    """Of 8 MiB rounds, the median: what a move of some size can count on."""
    latency_s: float
    """From the start of a round of 256 bytes to its confirmation, the median."""


def offer_probe(transport: Transport, secret: bytes, lifetime_s: float, allocate: Allocate = bytearray) -> Incoming:
    """Offer scratch memory to a peer that will measure; close it as any offer, or give it to `serve_probe`."""
    scratch = allocate(PROBE_BYTES)
    return transport.offer(secret, [_first(scratch, size) for size in _SIZES], lifetime_s)


def _first(scratch: Any, size_bytes: int) -> Any:
    return memoryview(scratch)[:size_bytes] if isinstance(scratch, bytearray) else scratch[:size_bytes]


async def serve_probe(incoming: Incoming, timeout_s: float) -> None:
    """Take a probe's rounds until its source has what it wants; raises as `Incoming.receive` otherwise."""
    try:
        async with asyncio.timeout(timeout_s):
            for _ in _SIZES:
                await incoming.receive(timeout_s)
    finally:
        await incoming.close()


async def measure(
    transport: Transport, address: str, secret: bytes, timeout_s: float, allocate: Allocate = bytearray
) -> LaneMeasured:
    """Measure the lane to a peer that has offered a probe under `secret`; raises as `connect` and `send` do."""
    scratch = allocate(PROBE_BYTES)
    outgoing = await transport.connect(address, secret, SIZE_BYTES, timeout_s)
    took_s: dict[int, list[float]] = {_SMALL_BYTES: [], PROBE_BYTES: []}
    try:
        for slot, size_bytes in enumerate(_SIZES):
            begun_s = time.perf_counter()
            await outgoing.send([(slot, _first(scratch, size_bytes))], timeout_s)
            took_s[size_bytes].append(time.perf_counter() - begun_s)
    finally:
        await outgoing.close()
    return LaneMeasured(PROBE_BYTES / statistics.median(took_s[PROBE_BYTES]), statistics.median(took_s[_SMALL_BYTES]))


async def measure_itself(transport: Transport, timeout_s: float, allocate: Allocate = bytearray) -> LaneMeasured:
    """Measure the lane from a transport to itself: both ends share one core here, so others may see up to twice that.

    Raises as `connect` and `send` do: nobody else would reach this data port either.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    probe = offer_probe(transport, secret, timeout_s, allocate)
    serving = asyncio.ensure_future(serve_probe(probe, timeout_s))
    try:
        return await measure(transport, transport.address, secret, timeout_s, allocate)
    finally:
        # Its own end of a failure says no more than the measuring one's.
        await asyncio.gather(serving, return_exceptions=True)
