"""What a transport provides below the shared protocol: one connection that carries frames and payloads.

Internal to this package. All methods but `close` may raise `LinkLostError` and nothing else; none has a deadline of
its own, since the protocol above runs each of its phases under one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from mell_gpu_worker.transport.regions import Region


class Link(Protocol):
    """One connection between two workers, used by one task at a time in each direction."""

    @property
    def inbox(self) -> int:
        """The tag under which the peer has to send, told in the greeting; 0 where there are none."""
        ...

    def greeted(self, inbox: int) -> None:
        """Learn the peer's `inbox`."""
        ...

    async def send_frame(self, frame: bytes) -> None:
        """Send one frame behind everything sent so far."""
        ...

    async def receive_frame(self) -> bytes:
        """Return the next frame."""
        ...

    async def post(self, frame: bytes, payloads: Sequence[Region]) -> None:
        """Send a frame and its payloads; may return before they are read, but waits while too many are."""
        ...

    async def posted(self) -> None:
        """Wait until no payload posted is read any more."""
        ...

    async def fill(self, target: Region, landed: Callable[[], None]) -> None:
        """Receive the next payload into `target`, in place, and call `landed` once it is there.

        May return before it has landed, but waits while too many have not.
        """
        ...

    async def filled(self) -> None:
        """Wait until every payload asked for has landed."""
        ...

    def close(self) -> None:
        """Close at once and without the peer; no memory lent is touched afterwards. Safe to repeat."""
        ...
