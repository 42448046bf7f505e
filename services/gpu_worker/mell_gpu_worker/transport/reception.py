"""The door of the data port: open offers, strangers until they name a secret, and the tasks that serve the others."""

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from mell_gpu_worker.transport.base import (
    SECRET_BYTES,
    LinkLostError,
    RefusedError,
    Tell,
    TransportError,
    TransportOptions,
)
from mell_gpu_worker.transport.frames import (
    ACCEPTED,
    OTHER_SIZE,
    OTHER_VERSION,
    OVER_LIMIT,
    REFUSALS,
    TAKEN,
    UNKNOWN_SECRET,
    VERSION,
    Hello,
    Verdict,
)
from mell_gpu_worker.transport.incoming import LinkIncoming, farewell
from mell_gpu_worker.transport.link import Link
from mell_gpu_worker.transport.regions import region_of


class Reception:
    """Matches links that come in with offers that are open; nobody else gets further than one frame."""

    def __init__(self, options: TransportOptions, tell: Tell) -> None:
        self._options = options
        self._tell = tell
        self._offers: list[LinkIncoming] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._closed = False

    @property
    def tasks(self) -> int:
        """Tasks alive: strangers and transfers being served."""
        return len(self._tasks)

    def offer(self, secret: bytes, buffers: Sequence[Any], lifetime_s: float) -> LinkIncoming:
        """Open an offer, as `Transport.offer`."""
        if len(secret) != SECRET_BYTES or self._found(secret) is not None:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes and is used for one offer only")
        regions = [region_of(buffer, writable=True) for buffer in buffers]
        size_bytes = sum(region.nbytes for region in regions)
        if self._closed or len(self._offers) >= self._options.max_offers:
            raise RefusedError(f"{len(self._offers)} offers are open, the limit" if self._offers else "closed")
        if size_bytes > self._options.max_transfer_bytes:
            raise RefusedError(f"{size_bytes} bytes are over the limit of {self._options.max_transfer_bytes}")
        incoming = LinkIncoming(secret, regions, lifetime_s, lambda: self._forget(incoming))
        self._offers.append(incoming)
        return incoming

    def arrived(self, link: Link) -> None:
        """Take a link that came in; close it at once if too many have not yet said who they are."""
        if self._closed or self._strangers >= self._options.max_strangers:
            self._tell("transport_stranger_turned_away", {"strangers": self._strangers})
            link.close()
            return
        self._strangers += 1
        task = asyncio.get_running_loop().create_task(self._receive(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all offers, turn everybody away, and wait until every task is gone."""
        self._closed = True
        for incoming in tuple(self._offers):
            incoming.end(LinkLostError("the transport was closed here"))
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _receive(self, link: Link) -> None:
        try:
            incoming = await self._greet(link)
            if incoming is not None:
                await incoming.serve(link)
        finally:
            link.close()

    async def _greet(self, link: Link) -> LinkIncoming | None:
        """Hear a stranger out and answer; return the offer it may fill."""
        try:
            async with asyncio.timeout(self._options.hello_timeout_s):
                hello = Hello.decode(await link.receive_frame())
                link.greeted(hello.tag)
                code, incoming = self._judge(hello)
                if incoming is None:
                    self._tell("transport_refused", {"reason": REFUSALS[code]})
                    await farewell(link, Verdict(code).encode())
                    return None
                incoming.task = asyncio.current_task()
                return incoming
        except (TimeoutError, TransportError) as error:
            reason = str(error) or f"it named no secret within {self._options.hello_timeout_s:g} s"
            self._tell("transport_stranger_turned_away", {"reason": reason})
            return None
        finally:
            self._strangers -= 1

    def _judge(self, hello: Hello) -> tuple[int, LinkIncoming | None]:
        if hello.version != VERSION:
            return OTHER_VERSION, None
        incoming = self._found(hello.secret)
        if incoming is None:
            return UNKNOWN_SECRET, None
        if hello.size_bytes > self._options.max_transfer_bytes:
            return OVER_LIMIT, None
        if hello.size_bytes != incoming.size_bytes:
            return OTHER_SIZE, None
        if incoming.connected:
            return TAKEN, None
        return ACCEPTED, incoming

    def _found(self, secret: bytes) -> LinkIncoming | None:
        matches = [offer for offer in self._offers if hmac.compare_digest(offer.secret, secret)]
        return matches[0] if matches else None

    def _forget(self, incoming: LinkIncoming) -> None:
        if incoming in self._offers:
            self._offers.remove(incoming)
