"""KV within one process, for tests: real protocol and real copies, and links that can be cut or stopped at will."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mell_gpu_worker.transport.addresses import Address
from mell_gpu_worker.transport.base import Incoming, LinkLostError, Outgoing, Tell, TransportOptions
from mell_gpu_worker.transport.outgoing import greet
from mell_gpu_worker.transport.reception import Reception
from mell_gpu_worker.transport.regions import HostRegion, Region

_QUEUED = 16


class Way:
    """One direction of a memory link: a bounded queue of frames and copied payloads."""

    def __init__(self) -> None:
        self.spoil: Callable[[bytes], bytes] = lambda payload: payload
        """What happens to payloads on the way; tests put damage here."""
        self._items: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._stopped = False
        self._cut = False

    async def put(self, *items: bytes) -> None:
        """Queue items together, waiting for room."""
        await self._until(lambda: self._cut or len(self._items) < _QUEUED)
        if self._cut:
            raise LinkLostError("the peer closed the connection")
        self._items.extend(items)
        self._changed.set()

    async def get(self) -> bytes:
        """Return the next item; what was queued before a cut is still delivered."""
        await self._until(lambda: not self._stopped and bool(self._items or self._cut))
        if not self._items:
            raise LinkLostError("the peer closed the connection")
        item = self._items.popleft()
        self._changed.set()
        return item

    def cut(self) -> None:
        """End this way for good."""
        self._cut = True
        self._changed.set()

    def stop(self) -> None:
        """Deliver nothing until `go_on`."""
        self._stopped = True

    def go_on(self) -> None:
        """Deliver again."""
        self._stopped = False
        self._changed.set()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._changed.clear()
            await self._changed.wait()


class MemoryLink:
    """One end of a pair of ways."""

    def __init__(self, out: Way, back: Way) -> None:
        self.out = out
        self.back = back
        self._closed = False

    @property
    def inbox(self) -> int:
        """None is needed: a connection has one peer."""
        return 0

    def greeted(self, inbox: int) -> None:
        """Nothing to learn."""

    async def send_frame(self, frame: bytes) -> None:
        """Send one frame."""
        await self.out.put(frame)

    async def receive_frame(self) -> bytes:
        """Return the next frame."""
        frame = await self.back.get()
        if self._closed:
            raise LinkLostError("the connection is closed")
        return frame

    async def post(self, frame: bytes, payloads: Sequence[Region]) -> None:
        """Queue a frame and copies of its payloads."""
        await self.out.put(frame)
        for payload in payloads:
            await self.out.put(self.out.spoil(bytes(_host(payload))))

    async def posted(self) -> None:
        """Nothing to wait for: `post` copies."""

    async def fill(self, target: Region, landed: Callable[[], None]) -> None:
        """Copy the payload into place."""
        payload = await self.receive_frame()
        view = _host(target)
        if len(payload) != view.nbytes:
            self.close()
            raise LinkLostError(f"{len(payload)} bytes came where {view.nbytes} were announced")
        view[:] = payload
        landed()
        await asyncio.sleep(0)

    async def filled(self) -> None:
        """Nothing to wait for: `fill` returns when the payload is there."""

    def close(self) -> None:
        """Cut both ways."""
        self._closed = True
        self.out.cut()
        self.back.cut()


def _host(region: Region) -> memoryview:
    assert isinstance(region, HostRegion)
    return region.raw


class MemoryNetwork:
    """The transports of one test and all links between them."""

    def __init__(self) -> None:
        self.links: list[MemoryLink] = []
        """The connecting ends of all links ever opened."""
        self._transports: dict[str, MemoryTransport] = {}
        self._ports = itertools.count(1)

    def transport(self, options: TransportOptions, tell: Tell) -> "MemoryTransport":
        """Make a transport that others of this network can connect to."""
        address = str(Address("memory", "here", next(self._ports)))
        made = MemoryTransport(self, address, options, tell)
        self._transports[address] = made
        return made

    async def open_link(self, address: str) -> MemoryLink:
        """Connect to a transport; raises `LinkLostError` if there is none."""
        Address.parse(address, "memory")
        target = self._transports.get(address)
        if target is None:
            raise LinkLostError(f"no connection to {address}")
        there, back = Way(), Way()
        link = MemoryLink(there, back)
        self.links.append(link)
        target.reception.arrived(MemoryLink(back, there))
        return link

    def forget(self, address: str) -> None:
        """Let nobody connect to an address any more."""
        self._transports.pop(address, None)


class MemoryTransport:
    """`Transport` within one process."""

    def __init__(self, network: MemoryNetwork, address: str, options: TransportOptions, tell: Tell) -> None:
        self.reception = Reception(options, tell)
        self._network = network
        self._address = address
        self._options = options
        self._links: list[MemoryLink] = []

    @property
    def address(self) -> str:
        """`memory://here:number`."""
        return self._address

    @property
    def tasks(self) -> int:
        """Tasks that serve connections."""
        return self.reception.tasks

    def offer(self, secret: bytes, buffers: Sequence[Any], lifetime_s: float) -> Incoming:
        """Announce a transfer, as `Transport.offer`."""
        return self.reception.offer(secret, buffers, lifetime_s)

    async def connect(self, address: str, secret: bytes, size_bytes: int, timeout_s: float) -> Outgoing:
        """Connect to an offer, as `Transport.connect`."""
        return await greet(self._open_link(address), secret, size_bytes, self._options, timeout_s)

    async def _open_link(self, address: str) -> MemoryLink:
        link = await self._network.open_link(address)
        self._links.append(link)
        return link

    async def close(self) -> None:
        """Leave the network and end every transfer."""
        self._network.forget(self._address)
        for link in self._links:
            link.close()
        await self.reception.close()
