"""The port of the KV transport: who offers, who connects, who frees what, and when waiting ends.

A transfer goes one way, from a source to a target, over a connection of its own, in rounds:

1. The target calls `Transport.offer` with a secret and the buffers to be filled, and tells both (the secret, and how
   many buffers of which sizes) to the source by other means, with its `Transport.address`. A buffer's index in the
   offer is its *slot*. Nobody who cannot name the secret and the exact size gets a byte accepted.
2. The source calls `Transport.connect` and then `Outgoing.send` for each round; a round is any set of slots, each slot
   sent once in a transfer, not all of them need be sent.
3. `send` returns when the target has every byte of the round in place and its checksums were right; the target gets
   the same news from `Incoming.receive`.
4. Both close. Closing is all it takes to abort, at any time, on either side.

Lending. The target's buffers are lent to the transport from `offer` until `Incoming.close` has returned; the source's
buffers during `send`. Afterwards the transport neither reads nor writes them, however the peer behaves. Nobody but the
owner of a buffer ever frees it, and the transport allocates nothing in proportion to what a peer announces.

Waiting. Everything that waits for a peer takes a deadline and raises `DeadlineError` past it: a stopped peer looks
like a slow one, and nothing else would end the wait. A transfer that failed, timed out or was cancelled in the middle
of `send` or `receive` is over: the connection is closed and cannot be used again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SECRET_BYTES = 32
"""Length of an offer's secret; from `secrets.token_bytes`, used for one offer only."""

Slots = Sequence[tuple[int, Any]]
"""What one round carries: (slot, buffer) pairs. A buffer is contiguous and speaks the buffer protocol or
`__cuda_array_interface__`; one to be written into is writable."""


class TransportError(Exception):
    """A transfer ended, or never began; the message says why in words fit for a log."""


class RefusedError(TransportError):
    """The target does not accept the transfer: unknown secret, other size, too many, too large."""


class LinkLostError(TransportError):
    """The peer closed, died, or cannot be reached."""


class DeadlineError(TransportError):
    """The peer did not do its part in time; it may be stopped, or the link may be slow."""


class CorruptedError(TransportError):
    """A chunk's checksum was wrong where it arrived."""


class ProtocolError(TransportError):
    """The peer sent what no peer of this version sends; it is not to be trusted with this transfer."""


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What a worker's settings say about its transport."""

    kind: str = "auto"
    """`ucx`, `tcp`, or `auto`: UCX where it is installed, else TCP. All workers of a cluster need the same."""
    host: str = "127.0.0.1"
    """Address under which peers reach this worker; TCP listens on it alone, UCX on all interfaces."""
    port: int = 0
    """Data port; 0 takes a free one."""
    max_transfer_bytes: int = 64 * 2**30
    """Largest offer, and largest size a peer may announce."""
    max_offers: int = 64
    """Most offers open at once, connected or not."""
    max_strangers: int = 16
    """Most connections that have not named a secret yet; more are closed at once."""
    hello_timeout_s: float = 2.0
    """A connection that has not named a secret by then is closed."""
    chunk_bytes: int = 2**20
    """Most bytes under one checksum; buffers smaller than a quarter of it travel packed together."""
    chunks_in_flight: int = 32
    """Most chunks of one transfer on their way at once."""
    ucx_net_devices: str = ""
    """Interfaces UCX may use, as in `UCX_NET_DEVICES`; empty: UCX's choice."""
    ucx_tls: str = ""
    """Transports UCX may use, as in `UCX_TLS`; empty: UCX's choice."""
    ucx_rndv_scheme: str = ""
    """How UCX moves large messages, as in `UCX_RNDV_SCHEME`; empty: its choice."""


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round, in place and checked: what the target got, or the source got confirmed."""

    slots: tuple[int, ...]
    size_bytes: int
    unchecked_bytes: int = 0
    """Bytes without a checksum of ours: device memory, which only the link itself checks."""
    staged_bytes: int = 0
    """Bytes that were copied once at this end, because their buffers are small."""


class Incoming(Protocol):
    """The target's end of a transfer, from its offer on."""

    @property
    def size_bytes(self) -> int:
        """All bytes of the offered buffers: what the source has to announce."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the source has come and was accepted (true also after it has left)."""
        ...

    async def receive(self, timeout_s: float) -> Round:
        """Return the next finished round, in the order in which they were sent.

        Rounds arrive whether anybody waits here or not. Raises `DeadlineError` when none is finished in time or the
        offer's lifetime is over, `LinkLostError` when the source has left, `CorruptedError`, `ProtocolError`; the
        transfer is over then.
        """
        ...

    async def close(self) -> None:
        """End the transfer and give the buffers back; does not wait for the peer, safe to repeat."""
        ...


class Outgoing(Protocol):
    """The source's end of a transfer that was accepted."""

    async def send(self, slots: Slots, timeout_s: float) -> Round:
        """Send one round; return when all of it is confirmed. One call at a time.

        Raises `ValueError` for a buffer that cannot be sent (nothing was sent, the transfer goes on), and as
        `Incoming.receive` does for what a peer or link does; then, and when cancelled, the transfer is over.
        """
        ...

    async def close(self) -> None:
        """End the transfer; does not wait for the peer, safe to repeat."""
        ...


class Transport(Protocol):
    """One worker's place in the data plane: a listening address, offers, connections. Made and used in one loop."""

    @property
    def address(self) -> str:
        """Where peers connect to, as a URL whose scheme names the transport."""
        ...

    def offer(self, secret: bytes, buffers: Sequence[Any], lifetime_s: float) -> Incoming:
        """Announce a transfer: whoever names `secret` may fill `buffers` within `lifetime_s` seconds.

        Never waits. Raises `ValueError` for a secret of other length or in use and for buffers that cannot be
        written (read-only, not contiguous), `RefusedError` when the limits on offers and sizes are reached.
        """
        ...

    async def connect(self, address: str, secret: bytes, size_bytes: int, timeout_s: float) -> Outgoing:
        """Connect to an offer of `size_bytes` at `address`.

        Raises `RefusedError` with the target's reason, `LinkLostError`, `DeadlineError`, `ProtocolError`.
        """
        ...

    async def close(self) -> None:
        """Close everything this transport has: listener, offers, connections; safe to repeat."""
        ...


Tell = Callable[[str, dict[str, Any]], None]
"""How a transport tells its owner what happened at the door: an event name and its fields, for the log."""
