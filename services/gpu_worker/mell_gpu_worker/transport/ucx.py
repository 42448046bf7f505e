"""KV over UCX (ucxx): host memory over TCP or RDMA, CUDA memory over whatever UCX finds (NVLink, CUDA IPC, RDMA).

The only module that imports ucxx, and ucxx's low-level one at that, for its own event loop support keeps a core busy
(see `progress`); hence the narrow version range.

UCX matches tagged messages per worker, not per endpoint: so each link has a random 40-bit *inbox*, told to the peer in
the greeting, and the tags below it are that peer's alone; one for frames, one for each payload, straight from and into
the lent memory. Only the first frame, which brings the inbox, travels in the endpoint's stream. (Not all of them: a
stream receive that is pending when its endpoint is closed makes ucxx keep the whole worker for ever.)
"""

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

# Read by UCX when its library is loaded, so they have to be set before the import below.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
os.environ.setdefault("UCX_LOG_FILE", "stderr")

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array
from ucxx.types import Tag

from mell_gpu_worker.transport.addresses import Address
from mell_gpu_worker.transport.base import Incoming, LinkLostError, Outgoing, Tell, TransportOptions
from mell_gpu_worker.transport.frames import FRAME_BYTES
from mell_gpu_worker.transport.outgoing import greet
from mell_gpu_worker.transport.progress import Pending, ProgressDriver
from mell_gpu_worker.transport.reception import Reception
from mell_gpu_worker.transport.regions import Region

_FEATURES = (ucx.Feature.TAG, ucx.Feature.STREAM, ucx.Feature.WAKEUP)
_TAG_BITS = 24
_PAYLOAD_TAGS = 2**_TAG_BITS - 1
_CLOSE_NS = 10**9
_CLOSE_MOVES = 100_000
"""Progress calls within which a closed endpoint's requests are completed; 2 are usual."""


class UcxLink:
    """One endpoint: frames and payloads as tagged messages, several payloads at once."""

    def __init__(self, endpoint: Any, driver: ProgressDriver, in_flight: int, *, accepted: bool) -> None:
        self._endpoint = endpoint
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._inbox = secrets.randbits(40) << _TAG_BITS
        self._outbox = 0
        self._greeting_due = True
        self._accepted = accepted
        self._posts = self._fills = 0
        self._posting = Flight(in_flight)
        self._filling = Flight(in_flight)
        # UCX tells of a lost peer here; ucxx does not always cancel tagged receives then, but a close does.
        endpoint.set_close_callback(lambda: self._loop.call_soon(self.close))

    @property
    def inbox(self) -> int:
        """The tag under which the peer's frames come; payloads count up from there."""
        return self._inbox

    def greeted(self, inbox: int) -> None:
        """Learn under which tags the peer wants its messages."""
        self._outbox = inbox

    async def send_frame(self, frame: bytes) -> None:
        """Send one frame."""
        if self._is_greeting(sending=True):
            await self._frame("stream_send", memoryview(frame), ())
        else:
            await self._frame("tag_send", memoryview(frame), (self._outbox,))

    async def receive_frame(self) -> bytes:
        """Return the next frame."""
        frame = bytearray(FRAME_BYTES)
        if self._is_greeting(sending=False):
            await self._frame("stream_recv", memoryview(frame), ())
        else:
            await self._frame("tag_recv", memoryview(frame), (self._inbox,))
        return bytes(frame)

    def _is_greeting(self, *, sending: bool) -> bool:
        if sending == self._accepted or not self._greeting_due:
            return False
        self._greeting_due = False
        return True

    async def _frame(self, operation: str, view: memoryview, tags: tuple[int, ...]) -> None:
        future: asyncio.Future[None] = self._loop.create_future()

        def finished(error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(_lost(error))

        self._start(operation, view, finished, *tags)
        await future

    async def post(self, frame: bytes, payloads: Sequence[Region]) -> None:
        """Start to send a frame and its payloads, once the window has room for them all."""
        await self._posting.take_off(len(payloads))
        self._start("tag_send", memoryview(frame), self._posting.noted, self._outbox)
        for payload in payloads:
            self._start("tag_send", payload.raw, self._posting.landed, self._outbox + self._posts % _PAYLOAD_TAGS + 1)
            self._posts += 1

    async def posted(self) -> None:
        """Wait until UCX has let go of all payloads."""
        await self._posting.all_landed()

    async def fill(self, target: Region, landed: Callable[[], None]) -> None:
        """Start to receive the payload into place, once fewer than the window's are under way."""
        await self._filling.take_off(1)

        def finished(error: Exception | None) -> None:
            if error is None and self._endpoint is not None:
                landed()
            self._filling.landed(error)

        self._start("tag_recv", target.raw, finished, self._inbox + self._fills % _PAYLOAD_TAGS + 1)
        self._fills += 1

    async def filled(self) -> None:
        """Wait until every payload has landed."""
        await self._filling.all_landed()

    def _start(self, operation: str, memory: Any, finished: Callable[[Exception | None], None], *tags: int) -> None:
        if self._endpoint is None:
            raise LinkLostError("the connection is closed")
        array = Array(memory)
        assert array.c_contiguous
        try:
            request = getattr(self._endpoint, operation)(array, *map(Tag, tags))
        except ucx.UCXError as error:
            raise _lost(error) from error
        self._driver.submit(Pending(request, array, finished, self))

    def close(self) -> None:
        """Close the endpoint by force, then progress until UCX has let go of every request and its memory."""
        if self._endpoint is None:
            return
        endpoint, self._endpoint = self._endpoint, None
        endpoint.remove_close_callback()
        endpoint.close_blocking(_CLOSE_NS, 1)
        settled = self._driver.settle(self, _CLOSE_MOVES)
        assert settled, "UCX holds on to memory of a closed endpoint"


class Flight:
    """Counts what is under way in one direction, bounds it, and keeps the first error; one task waits at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way = 0
        self._awaited = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def take_off(self, count: int) -> None:
        """Wait for room for `count` and take it; raises what went wrong before."""
        await self._until(max(0, self._limit - count))
        self._under_way += count

    async def all_landed(self) -> None:
        """Wait until nothing is under way; raises what went wrong."""
        await self._until(0)

    def landed(self, error: Exception | None) -> None:
        """Give room back."""
        self._under_way -= 1
        self.noted(error)

    def noted(self, error: Exception | None) -> None:
        """Keep the first error."""
        self._error = self._error or error
        if self._under_way <= self._awaited or self._error is not None:
            self._changed.set()

    async def _until(self, most: int) -> None:
        self._awaited = most
        while self._under_way > most and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise _lost(self._error)


def _lost(error: Exception) -> LinkLostError:
    return LinkLostError(f"UCX: {type(error).__name__}: {error}")


class UcxTransport:
    """`Transport` over UCX; made by `open`.

    UCX has no way to listen on one address only: the data port is open on all interfaces, to whoever knows a secret.
    """

    def __init__(self, options: TransportOptions, tell: Tell, context: Any) -> None:
        self._options = options
        self._reception = Reception(options, tell)
        self._links: WeakSet[UcxLink] = WeakSet()
        self._worker: Any = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self._worker.init_blocking_progress_mode()
        self._driver = ProgressDriver(self._worker, ucx.UCXError)
        self._listener: Any = ucx.UCXListener.create(self._worker, options.port, self._arrived, deliver_endpoint=True)
        self._port = self._listener.port

    @classmethod
    async def open(cls, options: TransportOptions, tell: Tell) -> "UcxTransport":
        """Open a UCX context and listen; raises `OSError` if UCX cannot (no such device, port taken)."""
        try:
            return cls(options, tell, ucx.UCXContext(_configuration(options), _FEATURES))
        except ucx.UCXError as error:
            raise OSError(
                f"UCX cannot listen on port {options.port} of {options.ucx_net_devices or 'any device'}: {error}"
            ) from error

    @property
    def address(self) -> str:
        """`ucx://host:port`."""
        return str(Address("ucx", self._options.host, self._port))

    @property
    def tasks(self) -> int:
        """Tasks that serve connections."""
        return self._reception.tasks

    @property
    def pending(self) -> int:
        """UCX requests under way."""
        return self._driver.pending

    def offer(self, secret: bytes, buffers: Sequence[Any], lifetime_s: float) -> Incoming:
        """Announce a transfer, as `Transport.offer`."""
        return self._reception.offer(secret, buffers, lifetime_s)

    async def connect(self, address: str, secret: bytes, size_bytes: int, timeout_s: float) -> Outgoing:
        """Connect to an offer, as `Transport.connect`."""
        peer = Address.parse(address, "ucx")
        return await greet(self.open_link(peer), secret, size_bytes, self._options, timeout_s)

    async def close(self) -> None:
        """Stop listening, end every transfer, and let go of UCX."""
        if self._worker is None:
            return
        self._listener = None
        await self._reception.close()
        for link in tuple(self._links):
            link.close()
        self._driver.close()
        self._worker = None

    def _arrived(self, endpoint: Any) -> None:
        # Called from within progress, where an endpoint must not be closed.
        link = UcxLink(endpoint, self._driver, self._options.chunks_in_flight, accepted=True)
        asyncio.get_running_loop().call_soon(self._reception.arrived, link)

    async def open_link(self, peer: Address) -> UcxLink:
        """Create an endpoint; raises `LinkLostError` if that fails at once, else the first frame will."""
        if self._worker is None:
            raise LinkLostError("the transport was closed here")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(peer.host, peer.port)
            endpoint = ucx.UCXEndpoint.create(self._worker, found[0][4][0], peer.port, True)
        except (OSError, ucx.UCXError) as error:
            raise LinkLostError(f"no connection to {peer}: {error}") from error
        link = UcxLink(endpoint, self._driver, self._options.chunks_in_flight, accepted=False)
        self._links.add(link)
        return link


def _configuration(options: TransportOptions) -> dict[str, str]:
    """Return UCX's settings for this context; UCX_ variables of the environment win over ours."""
    wanted = {
        "NET_DEVICES": options.ucx_net_devices,
        "TLS": options.ucx_tls,
        # Without it, large messages over TCP take one more copy and half the speed.
        "RNDV_SCHEME": options.ucx_rndv_scheme or ("put_zcopy" if options.ucx_tls == "tcp" else ""),
    }
    return {name: value for name, value in wanted.items() if value and f"UCX_{name}" not in os.environ}
