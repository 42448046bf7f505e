"""What comes in over the bus, made into the core's events; what cannot be read is logged, counted and dropped.

A placement request that cannot be read gets no reply: it names no sequence that an answer could be about, and its
sender, which speaks another protocol or is broken, gives up after its own timeout.
"""

from collections.abc import Awaitable, Callable

import structlog
from pydantic import TypeAdapter

from mell_scheduler.core import Event, PlaceRequested
from mell_scheduler.metrics import Tally
from mell_shared.bus import Delivery, InvalidSubjectError
from mell_shared.codec import InvalidMessageError, M, decode
from mell_shared.messages.admin import ADMIN_REQUEST, AdminRequest, MovingRequest
from mell_shared.messages.scheduler import PLACE_REQUEST, SCHEDULER_EVENT, WorkerJoined
from mell_shared.subjects import Subjects, check_subject

_MAX_REQUEST_BYTES = 64 * 1024
"""A placement request holds ids and numbers, never a prompt."""
_MAX_EVENT_BYTES = 8 * 2**20


class Inbox:
    """Handlers for the bus; `put` takes the events, waiting when there are too many."""

    def __init__(self, subjects: Subjects, tally: Tally, put: Callable[[Event], Awaitable[None]]) -> None:
        self._subjects = subjects
        self._tally = tally
        self._put = put
        self._log = structlog.get_logger()

    async def place(self, delivery: Delivery) -> None:
        """A frontend's request for a place."""
        if not delivery.reply_to:
            self._drop(delivery, "no_reply_subject", "a placement request without a reply subject")
            return
        request = self._read(PLACE_REQUEST, delivery, _MAX_REQUEST_BYTES)
        if request is not None:
            await self._put(PlaceRequested(delivery.reply_to, request))

    async def event(self, delivery: Delivery) -> None:
        """News of a worker."""
        event = self._read(SCHEDULER_EVENT, delivery, _MAX_EVENT_BYTES)
        if event is None:
            return
        worker = event.spec.worker if isinstance(event, WorkerJoined) else event.worker
        try:
            check_subject(self._subjects.worker_commands(worker))
        except InvalidSubjectError as error:
            self._drop(delivery, "bad_id", str(error))
            return
        await self._put(event)

    def operator(self, delivery: Delivery) -> AdminRequest | None:
        """What an operator asks; None if it cannot be read, or nobody waits for an answer."""
        if not delivery.reply_to:
            self._drop(delivery, "no_reply_subject", "an operator's request without a reply subject")
            return None
        return self._read(ADMIN_REQUEST, delivery, _MAX_REQUEST_BYTES)

    def _read(self, adapter: TypeAdapter[M], delivery: Delivery, limit_bytes: int) -> M | None:
        size_bytes = len(delivery.data)
        if size_bytes > limit_bytes:
            self._drop(delivery, "oversized", f"{size_bytes} bytes, over the limit of {limit_bytes}")
            return None
        try:
            return decode(adapter, delivery.data)
        except InvalidMessageError as error:
            self._drop(delivery, "malformed", str(error))
            return None

    def _drop(self, delivery: Delivery, fault: str, reason: str) -> None:
        self._tally.dropped[fault] += 1
        self._log.warning("message_dropped", subject=delivery.subject, fault=fault, reason=reason)


def read_pause(delivery: Delivery) -> MovingRequest | None:
    """An operator's pause as a bystander hears it: what is wrong with it is for whoever leads to tell."""
    try:
        request = decode(ADMIN_REQUEST, delivery.data)
    except InvalidMessageError:
        return None
    return request if isinstance(request, MovingRequest) else None
