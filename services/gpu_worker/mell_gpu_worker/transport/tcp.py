"""KV over plain TCP sockets, for machines without UCX: payloads go from and into the offered memory directly.

asyncio's streams would copy every byte twice more and reach a tenth of the speed. A socket in use by the event loop
must not be closed under it, so `close` shuts it down and the last operation closes it.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from mell_gpu_worker.transport.addresses import Address
from mell_gpu_worker.transport.base import Incoming, LinkLostError, Outgoing, Tell, TransportOptions
from mell_gpu_worker.transport.frames import FRAME_BYTES
from mell_gpu_worker.transport.outgoing import greet
from mell_gpu_worker.transport.reception import Reception
from mell_gpu_worker.transport.regions import HostRegion, Region

_BACKLOG = 64
_ACCEPT_PAUSE_S = 0.1


class TcpLink:
    """One connected socket. Payloads are neither read nor written between two calls."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._in_use = 0
        self._closed = False

    @property
    def inbox(self) -> int:
        """None is needed: a connection has one peer."""
        return 0

    def greeted(self, inbox: int) -> None:
        """Nothing to learn."""

    async def send_frame(self, frame: bytes) -> None:
        """Send one frame."""
        async with self._use():
            await self._loop.sock_sendall(self._sock, frame)

    async def receive_frame(self) -> bytes:
        """Return the next frame."""
        frame = bytearray(FRAME_BYTES)
        await self._fill(memoryview(frame))
        return bytes(frame)

    async def post(self, frame: bytes, payloads: Sequence[Region]) -> None:
        """Hand a frame and its payloads to the kernel, the first two parts in one call if there is room."""
        parts = [memoryview(frame), *map(_host, payloads)]
        async with self._use():
            sent = self._send_now(parts[:2])
            for part in parts:
                if sent < part.nbytes:
                    await self._loop.sock_sendall(self._sock, part[sent:])
                    # Bytes that there is room for are sent without a turn of the loop, as with `fill`.
                    await asyncio.sleep(0)
                sent = max(0, sent - part.nbytes)

    def _send_now(self, parts: Sequence[memoryview]) -> int:
        try:
            return self._sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            return 0

    async def posted(self) -> None:
        """Nothing to wait for: what was posted is the kernel's."""

    async def fill(self, target: Region, landed: Callable[[], None]) -> None:
        """Receive the payload into place."""
        await self._fill(_host(target))
        landed()
        # Bytes that are there are received without a turn of the loop: between chunks others get one.
        await asyncio.sleep(0)

    async def filled(self) -> None:
        """Nothing to wait for: `fill` returns when the payload is there."""

    async def _fill(self, view: memoryview) -> None:
        async with self._use():
            while view.nbytes:
                received = await self._loop.sock_recv_into(self._sock, view)
                if not received or self._closed:
                    raise LinkLostError("the peer closed the connection")
                view = view[received:]

    def close(self) -> None:
        """Close, or have the operation under way end and close."""
        if self._closed:
            return
        self._closed = True
        if self._in_use:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the peer was faster
        else:
            self._sock.close()

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[None]:
        if self._closed:
            raise LinkLostError("the connection is closed")
        self._in_use += 1
        try:
            yield
        except OSError as error:
            raise LinkLostError(f"the connection broke: {error.strerror or error}") from error
        finally:
            self._in_use -= 1
            if self._closed and not self._in_use:
                self._sock.close()


def _host(region: Region) -> memoryview:
    if not isinstance(region, HostRegion):
        raise ValueError("TCP moves host memory only; CUDA memory needs the UCX transport")  # noqa: TRY004
    return region.raw


class TcpTransport:
    """`Transport` over TCP; made by `open`."""

    def __init__(self, options: TransportOptions, tell: Tell, listening: socket.socket) -> None:
        self._options = options
        self._reception = Reception(options, tell)
        self._tell = tell
        self._listening = listening
        self._links: WeakSet[TcpLink] = WeakSet()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    @classmethod
    async def open(cls, options: TransportOptions, tell: Tell) -> "TcpTransport":
        """Listen; raises `OSError` if the address cannot be had."""
        listening = socket.create_server((options.host, options.port), backlog=_BACKLOG)
        listening.setblocking(False)
        return cls(options, tell, listening)

    @property
    def address(self) -> str:
        """`tcp://host:port`."""
        return str(Address("tcp", self._options.host, self._listening.getsockname()[1]))

    @property
    def tasks(self) -> int:
        """Tasks that serve connections."""
        return self._reception.tasks

    def offer(self, secret: bytes, buffers: Sequence[Any], lifetime_s: float) -> Incoming:
        """Announce a transfer, as `Transport.offer`; host memory only."""
        if any(hasattr(buffer, "__cuda_array_interface__") for buffer in buffers):
            raise ValueError("TCP moves host memory only; CUDA memory needs the UCX transport")
        return self._reception.offer(secret, buffers, lifetime_s)

    async def connect(self, address: str, secret: bytes, size_bytes: int, timeout_s: float) -> Outgoing:
        """Connect to an offer, as `Transport.connect`."""
        peer = Address.parse(address, "tcp")
        return await greet(self._open_link(peer), secret, size_bytes, self._options, timeout_s)

    async def close(self) -> None:
        """Stop listening and end every transfer."""
        self._accepting.cancel()
        await asyncio.wait((self._accepting,))
        self._listening.close()
        for link in tuple(self._links):
            link.close()
        await self._reception.close()

    async def _open_link(self, peer: Address) -> TcpLink:
        link = await open_link(peer)
        self._links.add(link)
        return link

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                # A stranger who was gone again, or no file descriptors left: neither ends the listening.
                self._tell("transport_accept_failed", {"reason": str(error)})
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._reception.arrived(TcpLink(sock))


async def open_link(peer: Address) -> TcpLink:
    """Connect a socket; raises `LinkLostError`."""
    loop = asyncio.get_running_loop()
    sock = None
    try:
        found = await loop.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        await loop.sock_connect(sock, where)
        return TcpLink(sock)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):
            raise LinkLostError(f"no connection to {peer}: {error.strerror or error}") from error
        raise
