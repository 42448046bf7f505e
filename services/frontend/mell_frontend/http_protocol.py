"""Uvicorn's HTTP parser with what it lacks: a bound on a request's head, in bytes and time, and OpenAI error bodies."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mell_frontend.errors import ApiError


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A head over the bounds is refused and the connection closed, before memory is spent on it."""

    max_head_bytes: int
    """Coarse: what arrived before the head was complete. The exact limit on headers is the edge's."""
    head_timeout_s: float
    max_connections: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request's head."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            fault = ApiError(503, "Too many connections are open; come back later.", code="unavailable")
            fault.headers["retry-after"] = "1"
            self._refuse(fault)
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._head_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse a head that has grown too large."""
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self._refuse(ApiError(431, "The request's headers are too large.", code="headers_too_large"))

    def on_message_begin(self) -> None:
        """Begin to count a head."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Serve the request."""
        self._head_complete()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _expect_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse_late)

    def _head_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_late(self) -> None:
        self._refuse(ApiError(408, "The request's headers did not arrive in time.", code="timeout"))

    def _refuse(self, fault: ApiError) -> None:
        self._head_complete()
        if self.cycle is not None and not self.cycle.response_complete:
            # It would land in the middle of the answer to the request before.
            self.transport.close()
        if self.transport.is_closing():
            return
        body = json.dumps(fault.body()).encode()
        lines = [f"HTTP/1.1 {fault.status} {HTTPStatus(fault.status).phrase}", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in fault.headers.items()]
        head = "\r\n".join([*lines, "", ""])
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_protocol(head_bytes: int, timeout_s: float, connections: int) -> type[BoundedHttpProtocol]:
    """Return the protocol with these bounds, for uvicorn's `http` setting."""

    class _Protocol(BoundedHttpProtocol):
        max_head_bytes = head_bytes
        head_timeout_s = timeout_s
        max_connections = connections

    return _Protocol
