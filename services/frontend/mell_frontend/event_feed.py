"""`GET /admin/events`: the stream of events as server-sent events, so that who watches needs no broker."""

import asyncio
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastapi import Request, Response

from mell_frontend.asgi import Receive, Scope, Send
from mell_frontend.errors import ApiError, bad_request
from mell_frontend.exchange import Exchange
from mell_frontend.seats import Seats
from mell_frontend.sse import comment, error_event
from mell_shared.events.data import EVENT_DATA
from mell_shared.events.store import EventStore, EventStoreError, StoredEvent

MOST_LAST = 10_000
DEFAULT_LAST = 20
_MOST_READERS = 32
_FULL = f"{_MOST_READERS} read events here already: ask another frontend, or read the stream itself."
_TYPES = tuple(kind.TYPE for kind in EVENT_DATA)
_BATCH = 256
_POLL_S = 0.5
_QUIET_S = 5.0
"""A follower who was told nothing for so long is told how far the stream is: the connection lives."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a reader wants: the `last` events, or all `after` a position; to wait for more; of types like `pattern`."""

    last: int
    after: int | None
    follow: bool
    pattern: str


class EventFeed:
    """Serves readers; each poll of one is a single request to the broker, which keeps nothing for it."""

    def __init__(self, store: EventStore | None, write_timeout_s: float) -> None:
        self._store = store
        self._write_timeout_s = write_timeout_s
        self.seats = Seats(_MOST_READERS, _FULL)
        """Of readers: one is held while `send` runs."""
        self._stopping = False

    def stop(self) -> None:
        """End what is followed, within a poll."""
        self._stopping = True

    async def serve(self, request: Request) -> Response:
        """Answer with events, oldest first; raises `ApiError`."""
        wish = _read_wish(request)
        if self._store is None:
            raise ApiError(503, "This frontend has no events: it runs with MELL_EVENTS=off.", code="events_off")
        try:
            after = max(0, await self._store.last_position() - wish.last) if wish.after is None else wish.after
        except EventStoreError as error:
            raise ApiError(503, f"The events cannot be read: {error}.", code="unavailable") from error
        return _Feed(self, self._store, wish, after)

    async def send(self, store: EventStore, wish: Wish, after: int, exchange: Exchange) -> None:
        """Send one reader's events to their end."""
        try:
            await exchange.start()
            await self._send_all(store, wish, after, exchange)
        except EventStoreError as error:
            fault = ApiError(503, f"The events cannot be read: {error}.", code="unavailable")
            await exchange.events(error_event(fault.body()), last=True)

    async def _send_all(self, store: EventStore, wish: Wish, after: int, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        # From the beginning, so that whoever loses the connection before the first event goes on here all the same.
        text = _position(after) if wish.follow else ""
        told_s = loop.time()
        while True:
            if text or loop.time() - told_s >= _QUIET_S:
                await exchange.events(text or _position(after), last=False)
                told_s = loop.time()
            events = await store.read(after, _BATCH)
            text = "".join(_shown(event) for event in events if fnmatchcase(event.type, wish.pattern))
            if events:
                after = events[-1].position
            elif self._stopping or not wish.follow:
                break
            else:
                await asyncio.sleep(_POLL_S)
        await exchange.events(comment("end"), last=True)

    @property
    def write_timeout_s(self) -> float:
        """How long a reader may leave a write waiting."""
        return self._write_timeout_s


class _Feed(Response):
    """A response that writes itself to the connection."""

    def __init__(self, feed: EventFeed, store: EventStore, wish: Wish, after: int) -> None:
        super().__init__()
        self._feed = feed
        self._store = store
        self._wish = wish
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        exchange = Exchange(receive, send, state["send"], state["record"], self._feed.write_timeout_s)
        with self._feed.seats.taken():
            await exchange.run(self._feed.send(self._store, self._wish, self._after, exchange))


def _position(after: int) -> str:
    """Return an event without data: readers remember where they are, and show nothing."""
    return f"id: {after}\n{comment('nothing new')}"


def _shown(event: StoredEvent) -> str:
    # As JSON in ASCII: see `sse`.
    data = json.dumps(json.loads(event.body))
    return f"id: {event.position}\nevent: {event.type}\ndata: {data}\n\n"


def _read_wish(request: Request) -> Wish:
    query = request.query_params
    follow = query.get("follow", "false").lower()
    if follow not in ("true", "false", "1", "0"):
        raise bad_request("follow: must be true or false.", "follow", "invalid_value")
    pattern = query.get("type", "*")
    if not any(fnmatchcase(kind, pattern) for kind in _TYPES):
        message = (
            f"type: no event has a type like {pattern[:100]!r}. There are: {', '.join(_TYPES)}; worker.* is several."
        )
        raise bad_request(message, "type", "invalid_value")
    after = query.get("after", request.headers.get("last-event-id"))
    return Wish(
        last=_number(query.get("last", str(DEFAULT_LAST)), "last", MOST_LAST),
        after=None if after is None else _number(after, "after", 2**63 - 1),
        follow=follow in ("true", "1"),
        pattern=pattern,
    )


def _number(text: str, name: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise bad_request(f"{name}: must be a number from 0 to {most}.", name, "invalid_value")
    return int(text)
