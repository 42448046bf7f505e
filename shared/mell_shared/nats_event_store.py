"""The stream of events on JetStream; beside `nats_bus` and `nats_key_value` the only user of nats-py."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, Header, PubAck, StorageType, StreamConfig
from nats.js.errors import NoStreamResponseError, NotFoundError, ServiceUnavailableError

from mell_shared.events.envelope import CONTENT_TYPE
from mell_shared.events.store import EventRecord, EventStoreError, EventTooLargeError, Retention, StoredEvent
from mell_shared.nats_bus import NatsBus
from mell_shared.subjects import Subjects, event_stream

_ASK_TIMEOUT_S = 5.0
_MAX_READ_BYTES = 4 * 2**20
_HEADER_BYTES = 1024
"""At most, of an event's message."""
_SEQUENCE, _SUBJECT, _STATUS = "Nats-Sequence", "Nats-Subject", "Status"


class NatsEventStore:
    """An `EventStore` over the connection of a `NatsBus`.

    With `retention` it makes the stream, or changes an older one's; without, it uses what another made.
    """

    def __init__(self, bus: NatsBus, subjects: Subjects, retention: Retention | None = None) -> None:
        self._bus = bus
        self._subjects = subjects
        self._retention = retention
        self._context: JetStreamContext | None = None
        self._made = False

    async def append(self, records: Sequence[EventRecord]) -> int:
        """Write in order; return how many of the first are surely written."""
        self._check_connected()
        if self._retention is not None and not self._made:
            await self._make(self._retention)
        if not records:
            return 0
        if not self._fits(records[0]):
            size, most = len(records[0].body), self._bus.max_payload
            raise EventTooLargeError(f"{size} bytes are more than a message to this broker may have, {most}")
        acks = await self._publish(records)
        if acks:
            await asyncio.wait(acks, timeout=_ASK_TIMEOUT_S)
        written = 0
        for ack in acks:
            if not ack.done() or ack.exception() is not None:
                break
            written += 1
        self._close(acks, written)
        return written

    def _fits(self, record: EventRecord) -> bool:
        return len(record.body) + _HEADER_BYTES <= self._bus.max_payload

    async def _publish(self, records: Sequence[EventRecord]) -> list[asyncio.Future[PubAck]]:
        """Send what goes over one and the same connection: on it nothing is lost but from some point on."""
        acks: list[asyncio.Future[PubAck]] = []
        connection = self._bus.stats.reconnections
        for record in records:
            if not self._bus.connected or self._bus.stats.reconnections != connection or not self._fits(record):
                break
            headers = {Header.MSG_ID.value: record.message_id, "content-type": CONTENT_TYPE}
            subject = self._subjects.event(record.type)
            try:
                acks.append(await self._jetstream.publish_async(subject, record.body, headers=headers))
            except Error:
                break
        return acks

    def _close(self, acks: list[asyncio.Future[PubAck]], written: int) -> None:
        """Look at what went wrong, once; raises `EventStoreError` if nothing was written."""
        faults = [ack.exception() for ack in acks[written:] if ack.done()]
        for ack in acks[written:]:
            ack.cancel()
        if faults and isinstance(faults[0], Error):
            self._made = False  # the stream may have been deleted: it is made again
        if not written:
            raise EventStoreError(_told(next(iter(faults), None)))

    async def read(self, after: int, limit: int) -> list[StoredEvent]:
        """Return what follows `after`."""
        wish = {"seq": after + 1, "next_by_subj": self._subjects.event(">"), "batch": limit}
        messages = await self._get({**wish, "max_bytes": _MAX_READ_BYTES}, limit)
        return [self._stored(message) for message in messages]

    async def last_position(self) -> int:
        """Return the position of the last event."""
        messages = await self._get({"last_by_subj": self._subjects.event(">")}, 1)
        return int((messages[0].headers or {})[_SEQUENCE]) if messages else 0

    async def _get(self, wish: dict[str, Any], limit: int) -> list[Msg]:
        """Ask for messages directly: the server keeps nothing for a reader, and a reader can delete nothing."""
        self._check_connected()
        client = self._bus.client
        inbox = client.new_inbox()
        try:
            subscription = await client.subscribe(inbox)
            try:
                subject = f"$JS.API.DIRECT.GET.{event_stream(self._subjects.prefix)}"
                await client.publish(subject, json.dumps(wish).encode(), reply=inbox)
                return await self._collect(subscription.next_msg, limit)
            finally:
                await subscription.unsubscribe()
        except (Error, TimeoutError) as error:
            raise EventStoreError(_told(error)) from error

    async def _collect(self, next_message: Any, limit: int) -> list[Msg]:
        messages: list[Msg] = []
        while len(messages) < limit:
            message: Msg = await next_message(timeout=_ASK_TIMEOUT_S)
            status = (message.headers or {}).get(_STATUS, "")
            if status == "503":
                raise NoRespondersError
            if status:
                if status not in ("204", "404"):
                    raise EventStoreError(f"the stream answers {status}: {(message.headers or {}).get('Description')}")
                break
            messages.append(message)
        return messages

    def _stored(self, message: Msg) -> StoredEvent:
        headers = message.headers or {}
        kind = headers[_SUBJECT].removeprefix(self._subjects.event(""))
        return StoredEvent(int(headers[_SEQUENCE]), kind, message.data)

    async def _make(self, retention: Retention) -> None:
        config = StreamConfig(
            name=event_stream(self._subjects.prefix),
            description="Mell's events for other systems: CloudEvents 1.0",
            subjects=[self._subjects.event(">")],
            max_age=retention.max_age_s,
            max_bytes=retention.max_bytes,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            allow_direct=True,
            duplicate_window=min(120.0, retention.max_age_s),
        )
        try:
            try:
                await self._jetstream.update_stream(config)
            except NotFoundError:
                await self._jetstream.add_stream(config)
        except (Error, TimeoutError) as error:
            raise EventStoreError(_told(error)) from error
        self._made = True

    @property
    def _jetstream(self) -> JetStreamContext:
        if self._context is None:
            self._context = JetStreamContext(self._bus.client, timeout=_ASK_TIMEOUT_S)
        return self._context

    def _check_connected(self) -> None:
        if not self._bus.connected:
            raise EventStoreError("the connection to the broker is down")


def _told(error: BaseException | None) -> str:
    match error:
        case ServiceUnavailableError() | NoRespondersError() | NoStreamResponseError():
            return "the broker has no such stream, or no JetStream: start nats-server with -js, or set MELL_EVENTS=off"
        case TimeoutError() | None:
            return "no answer from the stream in time"
    return str(error) or type(error).__name__
