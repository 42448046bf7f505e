"""The few ASGI types and messages that are used below the web framework."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """Return a header's first value; names are lower case."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


async def send_json(send: Send, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
    """Send a whole JSON response."""
    data = json.dumps(body, ensure_ascii=False).encode()
    listed = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    listed += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": data})


async def start_event_stream(send: Send) -> None:
    """Begin a response of server-sent events."""
    await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})


async def send_events(send: Send, text: str, *, more: bool = True) -> None:
    """Send events, which are ASCII; the last time with `more` false."""
    await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": more})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has gone (or the response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass
