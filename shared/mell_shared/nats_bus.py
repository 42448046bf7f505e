"""The bus on NATS; the only module that imports nats-py, and the one that knows where its behaviour must be bent."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport
from nats.errors import (
    Error,
    NoRespondersError,
    SlowConsumerError,
)
from nats.errors import TimeoutError as NatsTimeoutError

from mell_shared.broker_access import BrokerAccess
from mell_shared.bus import (
    BrokerForbidsError,
    BrokerUnreachableError,
    BusClosedError,
    BusError,
    BusStats,
    Delivery,
    Handler,
    NoResponderError,
    PayloadTooLargeError,
    RequestTimeoutError,
)
from mell_shared.deliveries import Consumer, Deliveries
from mell_shared.subjects import check_pattern, check_subject

_PING_INTERVAL_S = 2
_OUTSTANDING_PINGS = 2
_RECONNECT_WAIT_S = 0.25
_FLUSH_TIMEOUT_S = 2.0
_MAX_UNSENT_BYTES = 32 * 2**20
"""Beyond this a publisher waits for the socket; a broker that takes nothing is given up after three pings."""
_MAX_BURST_MESSAGES = 65_536
"""nats-py's own queue, emptied into ours after each read from the socket; ours is the one that bounds."""
_CLOSE_TIMEOUT_S = 2.0
_CANCEL_AGAIN_S = 0.05
_FORBIDDEN = re.compile(r'permissions violation for (subscription|publish) to "([^"]*)"', re.IGNORECASE)


class _Transport(TcpTransport):
    """nats-py's socket, to which writing fails in one way only.

    uvloop's RuntimeError for one that has just closed would end the writer, the reconnection, or the service.
    """

    def write(self, payload: bytes) -> None:
        try:
            super().write(payload)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConnectionResetError(str(error)) from error

    def writelines(self, payload: list[bytes]) -> None:
        try:
            super().writelines(payload)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConnectionResetError(str(error)) from error


class _Client(Client):
    """nats-py's client with four repairs.

    Pings keep their place, a dead connection is given up at once, writing to one is an `OSError` on any event loop, and
    where TLS is wanted nothing goes without it.
    """

    tls_wanted = False

    def abort(self) -> None:
        """Drop the socket now; nothing on one that is closed."""
        writer = getattr(self._transport, "_bare_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _select_next_server(self) -> None:
        await super()._select_next_server()
        if isinstance(self._transport, TcpTransport):
            self._transport.__class__ = _Transport  # it is made by name, deep inside

    def forget(self, callback: Callable[[Msg], Any]) -> None:
        """Let a subscription that could not be sent not come to life with the next connection."""
        for number, subscription in tuple(self._subs.items()):
            if subscription._cb is callback:
                del self._subs[number]

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        try:
            # Else it overtakes what waits to be written, and its answer proves nothing of that.
            if self._transport is not None and self._pending:
                self._transport.writelines(self._pending[:])
                self._pending.clear()
                self._pending_data_size = 0
            await super()._send_ping(future)
        except OSError as error:
            await self._process_op_err(error)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Else whoever stands between could leave TLS out of the greeting, and would be sent the password.
        if initial_connection and self.tls_wanted and not info.get("tls_required"):
            raise Error("nats: the broker offers no TLS")
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        # Else the reconnection waits until the dead connection has been emptied, which it never is.
        if self.is_connected:
            self.abort()
        await super()._process_op_err(e)


class NatsBus:
    """A `Bus` on a NATS server; made by `connect`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = _Client()
        self._forbidden: set[str] = set()
        self._deliveries = Deliveries()
        self._closing = False

    @classmethod
    async def connect(
        cls, url: str, *, name: str = "mell", access: BrokerAccess | None = None, timeout_s: float = 5.0
    ) -> Self:
        """Return a connection to the server at `url` (`nats://user:password@host:port`), named `name` there.

        Tries for `timeout_s`, then raises `BrokerUnreachableError` with one line that says what to do. Once connected
        it reconnects for ever.
        """
        _check_address(url)
        access = access or BrokerAccess()
        tls = access.tls_context() if access.wants_tls(url) else None
        nkey = access.nkey_seed()
        bus, opened = cls(url), False
        try:
            own = {"name": name, "tls": tls, "nkeys_seed_str": nkey, "inbox_prefix": access.inbox_prefix}
            await _end_within(asyncio.ensure_future(bus._open(own)), timeout_s)
            opened = True
        except (TimeoutError, Error) as error:
            raise BrokerUnreachableError(_unreachable(url, bus._client.last_error)) from error
        finally:
            if not opened:
                await bus.close()
        return bus

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        return self._client.is_connected and not self._deliveries.ended

    @property
    def max_payload(self) -> int:
        """The largest message the connected server takes, in bytes."""
        return self._client.max_payload

    @property
    def stats(self) -> BusStats:
        """Counts since start."""
        return self._deliveries.stats

    @property
    def client(self) -> Client:
        """The connection itself, for `nats_key_value`, which shares its fate; nobody else."""
        return self._client

    async def watch(self) -> None:
        """Return when the bus is closed; raise what a handler raised, or `BusClosedError`."""
        await self._deliveries.watch()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each time the connection is up again."""
        self._deliveries.on_reconnect(callback)

    async def publish(self, subject: str, data: bytes, reply_to: str = "") -> None:
        """Send and forget; raises as `Bus.publish` does."""
        self._check_sendable(subject, data)
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            await self._client.publish(subject, data, reply_to)
        except (Error, OSError) as error:
            raise BusClosedError(f"the connection to the broker went down: {error}") from error
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError  # nats-py swallows it while it waits for the socket

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Send and wait for one reply; raises as `Bus.request` does."""
        self._check_sendable(subject, data)
        try:
            reply = await self._client.request(subject, data, timeout_s)
        except NatsTimeoutError as error:
            raise RequestTimeoutError(f"no reply on {subject} within {timeout_s} s") from error
        except NoRespondersError as error:
            raise NoResponderError(f"nobody listens on {subject}") from error
        except (Error, OSError) as error:
            raise BusClosedError(f"the connection to the broker went down: {error}") from error
        return reply.data

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_pending: int = 65_536
    ) -> "_Subscription":
        """Deliver `subject` to `handler`; raises as `Bus.subscribe` does."""
        self._check_connected()
        check_pattern(subject)
        consumer = self._deliveries.consume(handler, max_pending)

        async def take(message: Msg) -> None:
            consumer.offer(Delivery(message.subject, message.data, message.reply))

        try:
            inner = await self._client.subscribe(subject, queue, take, pending_msgs_limit=_MAX_BURST_MESSAGES)
        except (Error, OSError) as error:
            consumer.stop()
            self._client.forget(take)
            raise BusClosedError(f"the connection to the broker went down: {error}") from error
        subscription = _Subscription(inner, consumer)
        try:
            await self.flush()
        except BusError:
            await subscription.unsubscribe()  # else a later reconnection would bring it to life
            raise
        if subject.lower() in self._forbidden:
            await subscription.unsubscribe()
            raise BrokerForbidsError(
                f"the broker does not let this user subscribe to {subject}: "
                "give it the permissions of its role (nats.conf), or another user in MELL_NATS_URL (--nats-url)"
            )
        return subscription

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return when the broker has seen all that was sent; raises as `Bus.flush` does."""
        self._check_connected()
        # Not nats-py's own flush: it cancels what the answer would complete, and a late answer then ends its read loop.
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._client._send_ping(answered)
        await asyncio.wait({answered}, timeout=timeout_s)
        if not answered.done():
            self._check_connected()
            raise RequestTimeoutError(f"the broker did not answer within {timeout_s} s")

    async def close(self) -> None:
        """Flush what can be flushed and disconnect; safe to repeat. Raises a handler's failure nobody watched for."""
        self._closing = True
        try:
            if self.connected:
                await self.flush(_CLOSE_TIMEOUT_S)
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._client.close()
        except (TimeoutError, BusError, OSError, Error) as error:
            self._count(error)
        finally:
            self._client.abort()
        await self._deliveries.close()

    async def _open(self, own: dict[str, Any]) -> None:
        self._client.tls_wanted = own["tls"] is not None
        await self._client.connect(
            self._url,
            **own,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            connect_timeout=2,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type] # only ever slept for
            ping_interval=_PING_INTERVAL_S,
            max_outstanding_pings=_OUTSTANDING_PINGS,
            pending_size=_MAX_UNSENT_BYTES,
            flush_timeout=_FLUSH_TIMEOUT_S,
            skip_subject_validation=True,  # `check_subject` is stricter
        )

    async def _on_error(self, error: Exception) -> None:
        # Must not raise: nats-py's read loop would end without a word.
        self._count(error)
        if isinstance(error, SlowConsumerError):
            self.stats.dropped += 1
        if (forbidden := _FORBIDDEN.search(str(error))) is not None:
            self._note_forbidden(*forbidden.groups())

    def _note_forbidden(self, what: str, subject: str) -> None:
        if what.lower() == "subscription":
            self._forbidden.add(subject.lower())  # the client has made small letters of it
        elif self.stats.forbidden == 0:
            structlog.get_logger().warning("broker_forbids", subject=subject)
        self.stats.forbidden += 1

    async def _on_disconnected(self) -> None:
        # nats-py would send what it had accepted but not yet written after the reconnection, however late.
        self._client._pending.clear()
        self._client._pending_data_size = 0

    async def _on_reconnected(self) -> None:
        self._deliveries.reconnected()

    async def _on_closed(self) -> None:
        if not self._closing:
            reason = self._client.last_error
            self._deliveries.fail(BusClosedError(f"the broker shut this client out: {reason}"))

    def _count(self, error: BaseException) -> None:
        name = type(error).__name__
        self.stats.errors[name] = self.stats.errors.get(name, 0) + 1

    def _check_connected(self) -> None:
        if not self.connected:
            raise BusClosedError(f"the connection to the broker at {_without_password(self._url)} is down")

    def _check_sendable(self, subject: str, data: bytes) -> None:
        self._check_connected()
        check_subject(subject)
        if len(data) > self.max_payload:
            raise PayloadTooLargeError(len(data), self.max_payload)


class _Subscription:
    """A standing interest in a subject."""

    def __init__(self, inner: NatsSubscription, consumer: Consumer) -> None:
        self._inner = inner
        self._consumer = consumer

    async def unsubscribe(self) -> None:
        """Stop deliveries; safe to repeat, also on a closed bus."""
        self._consumer.stop()
        try:
            await self._inner.unsubscribe()
        except (Error, OSError):
            return  # closed or unsubscribed before: nothing is delivered any more


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("nats", "tls") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise BrokerUnreachableError(
            "MELL_NATS_URL (--nats-url) is no address of a message broker; "
            "it looks like nats://127.0.0.1:4222 or nats://user:password@host:4222"
        )


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _unreachable(url: str, reason: BaseException | None) -> str:
    told = str(reason or "no answer").removeprefix("nats: ")
    return (
        f"cannot use the message broker at {_without_password(url)} ({told}); "
        "start nats-server there or set MELL_NATS_URL (--nats-url)"
    )


async def _end_within(opening: "asyncio.Future[None]", timeout_s: float) -> None:
    """Wait for `opening`; past the time, or when cancelled, cancel it until it has ended, and raise `TimeoutError`.

    Once is not enough: nats-py waits by `asyncio.wait_for`, which loses a cancellation that comes just as what it
    waits for is done, and then it would try again for ever.
    """
    try:
        await asyncio.wait({opening}, timeout=timeout_s)
    finally:
        while not opening.done():
            opening.cancel()
            await asyncio.wait({opening}, timeout=_CANCEL_AGAIN_S)
    if opening.cancelled():
        raise TimeoutError
    opening.result()
