"""The operators' side of the API: `/admin`. Asks the leading scheduler; decides nothing about the cluster."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mell_frontend.asgi import Receive, Scope, Send
from mell_frontend.errors import ApiError, bad_request
from mell_frontend.event_feed import DEFAULT_LAST, MOST_LAST, EventFeed
from mell_frontend.exchange import Exchange
from mell_frontend.generation import Gateway, GenerationError
from mell_frontend.live import LiveFeed
from mell_frontend.schema import parse
from mell_frontend.schema.base import ApiModel
from mell_shared.clock import Clock
from mell_shared.events.envelope import CloudEvent
from mell_shared.messages.admin import (
    AdminRefused,
    AdminReply,
    AdminRequest,
    DrainReply,
    DrainRequest,
    ExplainRequest,
    Explanation,
    MigrateReply,
    MigrateRequest,
    MovingReply,
    MovingRequest,
    Status,
    StatusRequest,
    UndrainRequest,
)
from mell_shared.messages.live import LiveState

B = TypeVar("B", bound="AdminBody")

_JSON, _EVENT_STREAM = "application/json", "text/event-stream"
_LONGEST_NAME = 200
_RETRY_S = 0.5
_NEW_LEADER_S = 5.0
"""So long an order waits for a scheduler that leads only now: after two of the workers' reports it knows everybody."""
_REFUSALS: dict[str, int] = {
    "invalid": 400,
    "wrong_model": 400,
    "unsupported": 400,
    "unknown_worker": 404,
    "unknown_request": 404,
    "over": 410,
    "unreachable": 503,
    "not_ready": 503,
    "not_leader": 503,
    "overloaded": 503,
}
"""HTTP statuses of the scheduler's refusals; all others are 409: not as things stand."""


class AdminBody(ApiModel):
    """A body of ours alone: a misspelt field of an order must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class NoBody(AdminBody):
    """Nothing needs to be said; a body may be left out."""


class DrainBody(AdminBody):
    """How to drain a worker."""

    deadline_s: float | None = Field(
        None, ge=0, le=1_000_000, description="After this what is left is placed elsewhere; without: never."
    )
    dry_run: bool = Field(False, description="Only show where each sequence would go.")


class MigrateBody(AdminBody):
    """Where and how to move a request's sequences."""

    to: Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_NAME)] = Field(
        description="A worker's id, or a name that only one worker has."
    )
    mode: Literal["kv", "tokens", "hybrid", "auto"] = "auto"
    wait_s: float = Field(30.0, ge=0, le=600, description="How long to wait for the moves to come out.")


@dataclass(frozen=True, slots=True)
class AdminRoute:
    """One operation: where it is, what it takes and gives; the routes and their description are made from it."""

    method: Literal["GET", "POST"]
    path: str
    handler: Callable[[Request], Coroutine[Any, Any, Response]]
    summary: str
    reply: type[BaseModel]
    body: type[AdminBody] | None = None
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Names and schemas of its query parameters."""
    streams: bool = False
    """Whether it answers with server-sent events, each a `reply`."""


_STATUS_QUERY = (("sequences", {"type": "boolean", "default": False}),)
_EVENTS_QUERY = (
    ("last", {"type": "integer", "minimum": 0, "maximum": MOST_LAST, "default": DEFAULT_LAST}),
    ("after", {"type": "integer", "minimum": 0}),
    ("follow", {"type": "boolean", "default": False}),
    ("type", {"type": "string", "default": "*"}),
)


class AdminApi:
    """The operations of `/admin`."""

    def __init__(self, gateway: Gateway, clock: Clock, feed: EventFeed, live: LiveFeed) -> None:
        self._gateway = gateway
        self._clock = clock
        self._feed = feed
        self._live = live

    def routes(self) -> tuple[AdminRoute, ...]:
        """Every operation."""
        worker, request = "/admin/workers/{worker}", "/admin/requests/{request:path}"
        return (
            AdminRoute(
                "GET", "/admin/status", self.status, "The cluster as the scheduler sees it", Status, query=_STATUS_QUERY
            ),
            AdminRoute("GET", "/admin/live", self.live, "The same from second to second", LiveState, streams=True),
            AdminRoute(
                "POST", f"{worker}/drain", self.drain, "Empty a worker and keep it empty", DrainReply, DrainBody
            ),
            AdminRoute("POST", f"{worker}/undrain", self.undrain, "Let a worker take work again", DrainReply, NoBody),
            AdminRoute("POST", f"{request}/migrate", self.migrate, "Move a running request", MigrateReply, MigrateBody),
            AdminRoute("GET", request, self.explain, "What became of a request, and why", Explanation),
            AdminRoute("POST", "/admin/moves/pause", self.pause, "Plan no more moves", MovingReply, NoBody),
            AdminRoute("POST", "/admin/moves/resume", self.resume, "Plan moves again", MovingReply, NoBody),
            AdminRoute(
                "GET", "/admin/events", self._feed.serve, "What happened", CloudEvent, query=_EVENTS_QUERY, streams=True
            ),
        )

    async def status(self, request: Request) -> Response:
        """Workers, moves, counts; with `?sequences=true` every sequence too."""
        asked = request.query_params.get("sequences", "false").lower()
        if asked not in ("true", "false", "1", "0"):
            raise bad_request("sequences: must be true or false.", "sequences", "invalid_value")
        return await self._ask(StatusRequest(sequences=asked in ("true", "1")))

    async def live(self, request: Request) -> Response:
        """Events `state` with all there is to see, and `trouble` while there is no state to be had."""
        return _Watching(self._live, self._feed.write_timeout_s)

    async def drain(self, request: Request) -> Response:
        """See `routes`."""
        body = await _read(request, DrainBody)
        worker = _name(request, "worker")
        return await self._ask(DrainRequest(worker=worker, deadline_s=body.deadline_s, dry_run=body.dry_run))

    async def undrain(self, request: Request) -> Response:
        """See `routes`."""
        await _read(request, NoBody)
        return await self._ask(UndrainRequest(worker=_name(request, "worker")))

    async def explain(self, request: Request) -> Response:
        """See `routes`."""
        return await self._ask(ExplainRequest(request=_name(request, "request")))

    async def pause(self, request: Request) -> Response:
        """See `routes`."""
        await _read(request, NoBody)
        return await self._ask(MovingRequest(paused=True))

    async def resume(self, request: Request) -> Response:
        """See `routes`."""
        await _read(request, NoBody)
        return await self._ask(MovingRequest(paused=False))

    async def migrate(self, request: Request) -> Response:
        """Order the moves, and ask how they stand until all have come out or the time is over: then 202."""
        body = await _read(request, MigrateBody)
        order = MigrateRequest(
            ask=secrets.token_hex(8), request=_name(request, "request"), target=body.to, mode=body.mode
        )
        deadline_us = self._clock.now_us() + round(body.wait_s * 1e6)
        reply, silence = await self._first(order)
        while (reply is None or _moving(reply)) and self._clock.now_us() < deadline_us:
            reply = await self._again(order, reply)
        if reply is None:
            assert silence is not None
            raise silence
        return JSONResponse(reply.model_dump(mode="json"), status_code=202 if _moving(reply) else 200)

    async def _first(self, order: MigrateRequest) -> tuple[AdminReply | None, GenerationError | None]:
        """Order the moves; no answer, and why, if a scheduler may have begun them and gone before it said so."""
        try:
            return await self._told(order), None
        except GenerationError as error:
            if not error.in_doubt:
                raise
            return None, error

    async def _again(self, order: MigrateRequest, last: AdminReply | None) -> AdminReply | None:
        """Ask how it stands; while no scheduler answers, or one that leads only now, it stands as it was told last."""
        try:
            return _accepted(await self._gateway.admin(order))
        except GenerationError:
            pass
        except ApiError as error:
            if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
        await asyncio.sleep(_RETRY_S)
        return last

    async def _ask(self, order: AdminRequest) -> Response:
        return JSONResponse((await self._told(order)).model_dump(mode="json"))

    async def _told(self, order: AdminRequest) -> AdminReply:
        """Return the scheduler's answer, which one that leads only now may not have yet. Raises if it refuses."""
        deadline_us = self._clock.now_us() + round(_NEW_LEADER_S * 1e6)
        reply = await self._gateway.admin(order)
        while isinstance(reply, AdminRefused) and reply.reason == "not_ready" and self._clock.now_us() < deadline_us:
            await asyncio.sleep(_RETRY_S)
            reply = await self._gateway.admin(order)
        return _accepted(reply)


class _Watching(Response):
    """Events for one watcher, until it leaves or reads no more."""

    def __init__(self, feed: LiveFeed, write_timeout_s: float) -> None:
        super().__init__()
        self._feed = feed
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        exchange = Exchange(receive, send, state["send"], state["record"], self._write_timeout_s)
        with self._feed.seats.taken():
            await exchange.run(self._feed.watch(exchange))


def _moving(reply: AdminReply) -> bool:
    return isinstance(reply, MigrateReply) and any(move.state == "moving" for move in reply.moves)


def _accepted(reply: AdminReply) -> AdminReply:
    """Return the scheduler's answer; raises `ApiError` if it refuses."""
    if not isinstance(reply, AdminRefused):
        return reply
    error = ApiError(_REFUSALS.get(reply.reason, 409), reply.message, code=reply.reason)
    if error.status == 503:
        error.headers["Retry-After"] = "1"
    raise error


def _name(request: Request, parameter: str) -> str:
    name: str = request.path_params[parameter]
    if not 0 < len(name) <= _LONGEST_NAME:
        raise bad_request(f"{parameter}: a name has 1 to {_LONGEST_NAME} characters.", parameter, "invalid_value")
    return name


async def _read(request: Request, model: type[B]) -> B:
    """Return the body, all defaults if there is none; raises `ApiError`."""
    return parse(model, await request.body() or b"{}")


def admin_paths(routes: tuple[AdminRoute, ...], schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the operations as OpenAPI paths; the models they name are added to `schemas`."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path", "")
        operation: dict[str, Any] = {
            "summary": route.summary,
            "tags": ["admin"],
            "security": [{"admin_key": []}],
            "parameters": _parameters(path, route),
            "responses": {
                "200": {
                    "description": "Done",
                    "content": _content(route.reply, schemas, _EVENT_STREAM if route.streams else _JSON),
                },
                "4XX": {"description": "Not done, and why"},
                "503": {"description": "No scheduler answers, or not yet: ask again"},
            },
        }
        if route.body is not None:
            operation["requestBody"] = {"required": False, "content": _content(route.body, schemas, _JSON)}
        paths.setdefault(path, {})[route.method.lower()] = operation
    return paths


def _parameters(path: str, route: AdminRoute) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return found + [{"name": name, "in": "query", "schema": schema} for name, schema in route.query]


def _content(model: type[BaseModel], schemas: dict[str, Any], media_type: str) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
