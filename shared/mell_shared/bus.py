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


class BrokerUnreachableError(BusError):
    """No connection could be made at start; the message is one line that says what to do."""


class BrokerForbidsError(BrokerUnreachableError):
    """The broker does not let this user do what its service needs; the message is one line that says what to do."""


class PayloadTooLargeError(BusError):
    """The message is larger than the connected server takes; nothing was sent."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"a message of {size_bytes} bytes is over the broker's limit of {limit_bytes}; raise its max_payload"
        )
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class InvalidSubjectError(BusError):
    """The subject is none (an id in it holds dots, spaces or wildcards); nothing was sent."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived; `reply_to` is empty unless the sender waits for a reply."""

    subject: str
    data: bytes
    reply_to: str = ""


Handler = Callable[[Delivery], Awaitable[None]]
"""Called for one delivery after another, in order, per subscription.

While it waits on a peer its own subscription stands still (others go on) and fills up, so such waits need a timeout,
or a task of the service. It must never request something that its own subscription answers. An exception is a bug:
it ends the bus, and `Bus.watch` raises it.
"""


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
    forbidden: int = 0
    """Publications and subscriptions that the broker did not let this user make."""
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

    async def watch(self) -> None:
        """Return when the bus is closed; run it as a task in the service's TaskGroup.

        Raises the exception of the first handler that failed, or `BusClosedError` when the broker shut this client
        out for good.
        """
        ...

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each time the connection is up again."""
        ...

    async def publish(self, subject: str, data: bytes, reply_to: str = "") -> None:
        """Send and forget. While disconnected the message is dropped, never buffered, and `BusClosedError` raised.

        Raises also `PayloadTooLargeError`, `InvalidSubjectError`.
        """
        ...

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Send and wait for one reply.

        Raises `RequestTimeoutError`, `NoResponderError`, and what `publish` raises.
        """
        ...

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_pending: int = 65_536
    ) -> Subscription:
        """Deliver `subject` (`*` and a final `>` match) to `handler`; on return the broker knows of it.

        `queue` shares it among members. Beyond `max_pending` waiting deliveries new ones are dropped and counted.
        Raises `BusClosedError`, `InvalidSubjectError`, `RequestTimeoutError` if the broker does not confirm it, and
        `BrokerForbidsError` if it does not let us.
        """
        ...

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return when the broker has seen all that was sent. Raises `RequestTimeoutError`, `BusClosedError`."""
        ...

    async def close(self) -> None:
        """Flush what can be flushed and disconnect; safe to repeat. Raises a handler's failure nobody watched for."""
        ...
