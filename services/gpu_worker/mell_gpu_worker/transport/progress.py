"""Drives a UCX worker from the event loop: sleeps while nothing happens, moves data as soon as something does.

UCX moves nothing by itself: somebody has to call its progress function, and `Request.wait` of ucxx does so in a
circle, a whole core even when idle. But a UCX worker has a file descriptor for epoll that becomes readable when there
is something to do, provided the worker was *armed* after the last progress, and arming fails while events are still
unseen. So: progress until nothing moves, complete the futures of finished requests, arm; if that fails, once more.

Posting a request may need progress too, so each post runs the driver at the next turn of the loop. A slow tick does
as well, as a net under events that a network driver fails to signal.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

_TICK_S = 0.5
_MAX_MOVES = 64
"""Moves in one turn of the loop; others want it too."""
_MAX_TOLD = 8
"""Requests told of in one turn: each may mean a checksum."""


class UcxWorker(Protocol):
    """What of ucxx's worker is used here."""

    @property
    def epoll_file_descriptor(self) -> int:
        """Readable when an armed worker has something to do."""
        ...

    def progress_once(self) -> bool:
        """Move data; whether anything moved."""
        ...

    def cancel_inflight_requests(self) -> int:
        """Cancel the requests of endpoints that have failed; others go on."""
        ...

    def arm(self) -> bool:
        """Ask for an event; False if there is something to do already."""
        ...


class UcxRequest(Protocol):
    """What of ucxx's requests is used here."""

    @property
    def completed(self) -> bool:
        """Whether UCX is done with the request and its memory."""
        ...

    def check_error(self) -> None:
        """Raise what a completed request failed with."""
        ...


@dataclass(slots=True, eq=False)
class Pending:
    """A request under way; holds on to its memory until UCX lets go of it, whatever happens to the future."""

    request: UcxRequest
    memory: Any
    finished: Callable[[Exception | None], None]
    """Called once, with the request's error if it failed, from a later turn of the loop."""
    owner: object
    """Whose requests `settle` settles together."""


class ProgressDriver:
    """Progress, arming and completion of one UCX worker in one event loop."""

    def __init__(self, worker: UcxWorker, request_error: type[Exception], tick_s: float = _TICK_S) -> None:
        self._worker = worker
        self._request_error = request_error
        self._tick_s = tick_s
        self._loop = asyncio.get_running_loop()
        self._pending: list[Pending] = []
        self._scheduled = False
        self._closed = False
        self._descriptor = worker.epoll_file_descriptor
        self._loop.add_reader(self._descriptor, self._drive)
        self._tick = self._loop.call_later(self._tick_s, self._on_tick)
        self.wake()

    @property
    def pending(self) -> int:
        """Requests under way."""
        return len(self._pending)

    def submit(self, pending: Pending) -> None:
        """Watch a request."""
        self._pending.append(pending)
        self.wake()

    def wake(self) -> None:
        """Drive at the next turn of the loop."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_drive)

    def settle(self, owner: object, moves: int) -> bool:
        """Progress here and now until all requests of `owner` are completed; whether they were within `moves`."""
        requests = [pending.request for pending in self._pending if pending.owner is owner]
        # An endpoint that failed has its requests on a list of those to be cancelled, which nobody else works off.
        self._worker.cancel_inflight_requests()
        for _ in range(moves):
            if all(request.completed for request in requests):
                break
            self._worker.progress_once()
        self.wake()
        return all(request.completed for request in requests)

    def close(self) -> None:
        """Stop driving and let go of the worker; every request must have been settled."""
        self._closed = True
        self._tick.cancel()
        self._loop.remove_reader(self._descriptor)
        self._complete(len(self._pending))
        del self._worker

    def _on_tick(self) -> None:
        self._tick = self._loop.call_later(self._tick_s, self._on_tick)
        self._drive()

    def _scheduled_drive(self) -> None:
        self._scheduled = False
        if not self._closed:
            self._drive()

    def _drive(self) -> None:
        for _ in range(_MAX_MOVES):
            if not self._worker.progress_once():
                break
        else:
            self.wake()
        self._complete(_MAX_TOLD)
        if not self._scheduled and not self._worker.arm():
            self.wake()

    def _complete(self, most: int) -> None:
        done: list[Pending] = []
        waiting: list[Pending] = []
        for pending in self._pending:
            (done if len(done) < most and pending.request.completed else waiting).append(pending)
        self._pending = waiting
        for pending in done:
            pending.finished(self._error(pending.request))
        if len(done) == most:
            self.wake()

    def _error(self, request: UcxRequest) -> Exception | None:
        try:
            request.check_error()
        except self._request_error as error:
            return error
        return None
