"""What every request passes before it reaches a route: its id, its log line, the limits and the keys. Plain ASGI."""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

import structlog

from mell_frontend.asgi import App, Message, Receive, Scope, Send, send_json
from mell_frontend.errors import ApiError
from mell_frontend.metrics import FrontendMetrics
from mell_frontend.record import RequestRecord
from mell_frontend.settings import FrontendSettings
from mell_shared.clock import Clock
from mell_shared.ids import request_id

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"})
"""What asks for no key: probes and descriptions, nothing about requests."""

ADMIN_PATHS = "/admin/"
"""What operators ask: it has a key of its own, which API keys do not replace."""

_FORWARDED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")

_DISCARD_S = 10.0

_log = structlog.get_logger()


class Recorder:
    """Gives every request a record (`scope["state"]["record"]`) and an `x-request-id`; logs and counts it once.

    `scope["state"]["send"]` is the server's own `send`.
    """

    def __init__(self, app: App, metrics: FrontendMetrics, clock: Clock) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = _header(scope, b"x-request-id")
        identity = taken.decode() if taken and _REQUEST_ID.fullmatch(taken) else request_id("req")
        record = RequestRecord(identity, scope["method"], scope["path"], self._clock.now_us())
        state = scope.setdefault("state", {})
        state["record"], state["send"] = record, send

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_noting)
            finally:
                self._finish(record)

    def _finish(self, record: RequestRecord) -> None:
        now_us = self._clock.now_us()
        if record.disconnected:
            record.status = record.status or 499
        self._metrics.observe(record, now_us)
        log = _log.debug if record.path in _QUIET_PATHS else _log.info
        log("request", **record.fields(now_us))


class Guard:
    """Refuses requests that are too large or have no right key, before anything of them is kept."""

    def __init__(self, app: App, settings: FrontendSettings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_header_bytes = settings.max_header_bytes
        self._admin_digest = _digest(settings.admin_key.encode()) if settings.admin_key else None
        self._key_digests = [_digest(key.encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fault = self._fault(scope)
        if fault is None and self._announces_too_much(scope):
            # A client that waits for `100 Continue` has not sent its body, and need not.
            waits = (_header(scope, b"expect") or b"").lower() == b"100-continue"
            fault = self._too_large(read=not waits and await _discard(receive))
        if fault is None:
            await self._app(scope, self._limited(receive), send)
        else:
            scope["state"]["record"].error = fault.code
            await send_json(send, fault.status, fault.body(), fault.headers)

    def _fault(self, scope: Scope) -> ApiError | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes or len(scope.get("query_string", b"")) > self._max_header_bytes:
            return ApiError(
                431, f"The headers are larger than {self._max_header_bytes} bytes.", code="headers_too_large"
            )
        if scope["path"].startswith(ADMIN_PATHS):
            return self._admin_fault(scope)
        if self._key_digests and scope["path"] not in OPEN_PATHS and not _has_key(scope, self._key_digests):
            return _unauthorized("Incorrect or missing API key", "invalid_api_key")
        return None

    def _admin_fault(self, scope: Scope) -> ApiError | None:
        """Operators need their own key; where none is set, whoever is on this machine is one."""
        if self._admin_digest is not None:
            if _has_key(scope, [self._admin_digest]):
                return None
            return _unauthorized("Incorrect or missing admin key (MELL_ADMIN_KEY)", "invalid_admin_key")
        if is_local(scope):
            return None
        message = (
            "This frontend has no admin key, so only this machine itself may ask, and not through a proxy: "
            "start it with MELL_ADMIN_KEY set, and send that key."
        )
        return ApiError(403, message, code="admin_key_not_set")

    def _announces_too_much(self, scope: Scope) -> bool:
        length = _header(scope, b"content-length") or b"0"
        return length.isdigit() and int(length[:20]) > self._max_body_bytes

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large(read=await _discard(receive))
            return message

        return receive_counting

    def _too_large(self, *, read: bool) -> ApiError:
        fault = ApiError(413, f"The body is larger than {self._max_body_bytes} bytes.", code="body_too_large")
        if not read:
            fault.headers["Connection"] = "close"
        return fault


def is_local(scope: Scope) -> bool:
    """Whether a request certainly comes from this machine.

    The peer's address alone does not say so: a proxy here speaks for anybody, and a web page that a browser here
    shows can send requests to this machine, also under a name of its own (DNS rebinding).
    """
    peer = (scope.get("client") or ("",))[0]
    if not _is_loopback(peer) or any(_header(scope, name) is not None for name in _FORWARDED):
        return False
    host, origin = _header(scope, b"host"), _header(scope, b"origin")
    return _names_loopback(b"//" + (host or b"")) and (origin is None or _names_loopback(origin))


def _names_loopback(url: bytes) -> bool:
    try:
        name = urlsplit(url.decode("ascii")).hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _has_key(scope: Scope, digests: Sequence[bytes]) -> bool:
    """Compare with every key, each in constant time, whichever is right."""
    scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
    digest = _digest(key.strip())
    right = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == b"bearer" and any(right)


def _unauthorized(what: str, code: str) -> ApiError:
    fault = ApiError(401, f"{what}: send it as `Authorization: Bearer KEY`.", code=code)
    fault.headers["WWW-Authenticate"] = "Bearer"
    return fault


async def _discard(receive: Receive) -> bool:
    """Read the rest of a body and forget it; return whether it came to its end in time.

    Closing a connection that still sends would reset it, and the client would never see the answer.
    """
    try:
        async with asyncio.timeout(_DISCARD_S):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body"):
                    return True
    except TimeoutError:
        return False
    return False


def _header(scope: Scope, name: bytes) -> bytes | None:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
