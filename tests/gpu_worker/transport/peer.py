"""The other worker of a test: does as told, with buffers whose contents everybody can compute."""

import hashlib
from typing import Any

from mell_gpu_worker.transport.base import Incoming, Outgoing, Transport

LONG_S = 60.0


def pattern(slot: int, size_bytes: int) -> bytearray:
    """Return the contents of a slot: no stretch of it equals another of its own or of another slot."""
    return bytearray(hashlib.shake_128(slot.to_bytes(4, "little")).digest(size_bytes))


class Peer:
    """One transport and at most one transfer on each side; commands and answers are JSON objects."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._buffers: list[bytearray] = []
        self._incoming: Incoming | None = None
        self._outgoing: Outgoing | None = None

    async def command(self, given: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; transport errors are the answer's business."""
        match given:
            case {"offer": secret, "sizes": sizes}:
                self._buffers = [bytearray(size) for size in sizes]
                self._incoming = self._transport.offer(bytes.fromhex(secret), self._buffers, LONG_S)
                return {"size_bytes": self._incoming.size_bytes}
            case {"receive": _}:
                assert self._incoming is not None
                return {"slots": list((await self._incoming.receive(LONG_S)).slots)}
            case {"contents": _}:
                return {"right": [data == pattern(slot, len(data)) for slot, data in enumerate(self._buffers)]}
            case {"fill": sizes}:
                self._buffers = [pattern(slot, size) for slot, size in enumerate(sizes)]
                return {"filled": True}
            case {"connect": address, "secret": secret}:
                size_bytes = sum(map(len, self._buffers))
                self._outgoing = await self._transport.connect(address, bytes.fromhex(secret), size_bytes, LONG_S)
                return {"connected": True}
            case {"send": slots}:
                assert self._outgoing is not None
                sent = await self._outgoing.send([(slot, self._buffers[slot]) for slot in slots], LONG_S)
                return {"size_bytes": sent.size_bytes}
        raise AssertionError(given)

    async def close(self) -> None:
        """Close both transfers and the transport."""
        for each in (self._incoming, self._outgoing):
            if each is not None:
                await each.close()
        await self._transport.close()
