"""What every request passes before it reaches a route: its id, its log line, the limits and the keys. Plain ASGI."""

import asyncio
import re

import structlog

from mell_frontend.admin_gate import ADMIN_PATHS, AdminGate
from mell_frontend.allowance import Allowance, Allowances
from mell_frontend.asgi import App, Message, Receive, Scope, Send, header_of, send_json
from mell_frontend.dashboard_page import PAGES
from mell_frontend.errors import ApiError
from mell_frontend.key_store import KeyStore
from mell_frontend.keys import ApiKey
from mell_frontend.metrics import FrontendMetrics
from mell_frontend.record import RequestRecord
from mell_frontend.settings import FrontendSettings
from mell_shared.clock import Clock
from mell_shared.ids import request_id

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json", *PAGES})
"""What asks for no key: probes, descriptions, the dashboard before it has any data; nothing about requests."""

_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics", *PAGES})
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
        taken = header_of(scope, b"x-request-id")
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
    """Refuses requests that are too large, have no right key or come too often, before anything of them is kept.

    What passes has its key's allowance in `scope["state"]["allowance"]`.
    """

    def __init__(self, app: App, settings: FrontendSettings, keys: KeyStore, allowances: Allowances) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_header_bytes = settings.max_header_bytes
        self._keys = keys
        self._admin_gate = AdminGate(settings.admin_key)
        self._allowances = allowances

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            allowance = self._allowances.of(self._key(scope))
        except ApiError as fault:
            await _refuse(scope, send, fault)
        else:
            await self._limit(allowance, scope, receive, send)

    async def _limit(self, allowance: Allowance, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that may ask, or say that it asks for too much."""
        counted = _is_counted(scope)
        send = _telling(allowance, send) if counted else send
        try:
            if counted:
                allowance.admit()
            if self._announces_too_much(scope):
                # A client that waits for `100 Continue` has not sent its body, and need not.
                waits = (header_of(scope, b"expect") or b"").lower() == b"100-continue"
                raise self._too_large(read=not waits and await _discard(receive))
        except ApiError as fault:
            await _refuse(scope, send, fault)
        else:
            scope["state"]["allowance"] = allowance
            await self._app(scope, self._limited(receive), send)

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes or len(scope.get("query_string", b"")) > self._max_header_bytes:
            message = f"The headers are larger than {self._max_header_bytes} bytes."
            raise ApiError(431, message, code="headers_too_large")

    def _key(self, scope: Scope) -> ApiKey | None:
        """Return the key that the request presents, None if none is needed; raises `ApiError` (401)."""
        if scope["path"].startswith(ADMIN_PATHS):
            self._admin_gate.check(scope)
            return None
        ring = self._keys.ring
        if ring is None or scope["path"] in OPEN_PATHS:
            return None
        key = ring.find(header_of(scope, b"authorization"))
        if key is None:
            message = "Incorrect or missing API key: send it as `Authorization: Bearer KEY`."
            fault = ApiError(401, message, code="invalid_api_key")
            fault.headers["WWW-Authenticate"] = "Bearer"
            raise fault
        scope["state"]["record"].key = key.name
        return key

    def _announces_too_much(self, scope: Scope) -> bool:
        length = header_of(scope, b"content-length") or b"0"
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


def _is_counted(scope: Scope) -> bool:
    """Whether a request counts against its key's limits: whatever makes the server compute, not what operators do."""
    return scope["method"] == "POST" and not scope["path"].startswith(ADMIN_PATHS)


def _telling(allowance: Allowance, send: Send) -> Send:
    """Return a `send` that tells what is left, as it is when the answer begins."""

    async def send_telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *allowance.headers()]
        await send(message)

    return send_telling


async def _refuse(scope: Scope, send: Send, fault: ApiError) -> None:
    scope["state"]["record"].error = fault.code or fault.kind
    await send_json(send, fault.status, fault.body(), fault.headers)


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
