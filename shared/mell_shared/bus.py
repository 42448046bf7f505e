"""The port to the message broker: what services may ask of NATS, and no more.

Delivery is at most once: a publish or a reply can be lost without an error, and can arrive late. Order holds
within one subject and publisher only. Protocols above repair that (`StreamStatus`, idempotent commands).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol


class BusError(Exception):
    """The bus could not do what was asked; the message says what to do."""


class RequestTimeoutError(BusError):
    """No reply came in time; the receiver may still act on the request."""


class NoResponderError(BusError):
    """Nobody listens on the subject now."""


class BusClosedError(BusError):
    """The connection is down or closed; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived; `reply_to` is empty unless the sender waits for a reply."""

    subject: str
    data: bytes
    reply_to: str = ""


Handler = Callable[[Delivery], Awaitable[None]]
"""Called for one delivery after another, in order, per subscription; must not block on a peer for long."""


class Subscription(Protocol):
    """A standing interest in a subject."""

    async def unsubscribe(self) -> None:
        """Stop deliveries; safe to repeat."""
        ...


@dataclass(slots=True)
class BusStats:
    """Counts since start, for metrics."""

    dropped: int = 0
    """Deliveries dropped because a subscription's queue was full (a slow consumer)."""
    reconnections: int = 0
    errors: dict[str, int] = field(default_factory=dict)


class Bus(Protocol):
    """A connection to the broker. One per process; all methods on the event loop that made it."""

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest message the connected server takes, in bytes."""
        ...

    @property
    def stats(self) -> BusStats:
        """Counts since start."""
        ...

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each time the connection is up again."""
        ...

    async def publish(self, subject: str, data: bytes, reply_to: str = "") -> None:
        """Send and forget. While disconnected the message is dropped, never buffered, and `BusClosedError` raised."""
        ...

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Send and wait for one reply.

        Raises `RequestTimeoutError`, `NoResponderError`, `BusClosedError`.
        """
        ...

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_pending: int = 65_536
    ) -> Subscription:
        """Deliver `subject` to `handler`; on return the broker knows of it. `queue` shares it among members."""
        ...

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return when the broker has seen all that was sent."""
        ...

    async def close(self) -> None:
        """Flush what can be flushed and disconnect; safe to repeat."""
        ...
