"""The HTTP application: routes, and the one place where problems become OpenAI error bodies."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from mell_frontend.admin import AdminApi, AdminRoute, admin_paths
from mell_frontend.allowance import Allowance, Allowances
from mell_frontend.answer import Head, StreamedChat, StreamedCompletion, WholeChat, WholeCompletion
from mell_frontend.asgi import App, Receive, Scope, Send
from mell_frontend.dashboard_page import PAGES, dashboard
from mell_frontend.edge import Guard, Recorder
from mell_frontend.errors import ApiError, bad_request, from_generation
from mell_frontend.event_feed import EventFeed
from mell_frontend.exchange import Exchange
from mell_frontend.generation import Gateway, GenerationError
from mell_frontend.key_store import KeyStore
from mell_frontend.live import LiveFeed
from mell_frontend.metrics import FrontendMetrics
from mell_frontend.openapi_page import openapi_page
from mell_frontend.prepare import Job, find_model, prepare_chat, prepare_completion
from mell_frontend.prompt import chat_prompt, check_ids
from mell_frontend.pulse import Pulse
from mell_frontend.rate_limits import Limits
from mell_frontend.record import RequestRecord
from mell_frontend.respond import Responder
from mell_frontend.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
    unknown_fields,
)
from mell_frontend.schema.base import ApiModel
from mell_frontend.served import ServedModel
from mell_frontend.settings import FrontendSettings
from mell_frontend.telling import RequestTeller
from mell_frontend.tracing import RequestTrace
from mell_frontend.vllm_metrics import VllmMetrics
from mell_shared.clock import Clock, SystemClock
from mell_shared.events.outbox import nowhere
from mell_shared.ids import request_id
from mell_shared.tracing import NO_TRACER, Tracer

R = TypeVar("R", bound=ApiModel)
T = TypeVar("T")

_BODIES: dict[str, tuple[type[ApiModel], str]] = {
    "/v1/chat/completions": (ChatCompletionRequest, "Go on with a conversation"),
    "/v1/completions": (CompletionRequest, "Go on with a text (legacy)"),
    "/tokenize": (TokenizeRequest, "Text or messages to token ids"),
    "/detokenize": (DetokenizeRequest, "Token ids to text"),
}
"""What the routes that read their bodies by themselves take, and what they do."""

_LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]

_INLINE_BODY_BYTES = 16_384
"""Larger bodies are read in a thread, so that other streams go on meanwhile."""


def create_app(  # noqa: PLR0913 - what an app is made of
    settings: FrontendSettings,
    gateway: Gateway,
    models: Sequence[ServedModel],
    registry: CollectorRegistry,
    keys: KeyStore | None = None,
    *,
    teller: RequestTeller | None = None,
    feed: EventFeed | None = None,
    tracer: Tracer = NO_TRACER,
) -> App:
    """Return the ASGI application that serves `models` through `gateway`; its metrics go into `registry`.

    Without `keys` those of the settings count, and are never read again; without `teller` and `feed` there are no
    events for other systems.
    """
    clock = SystemClock()
    keys = keys or KeyStore(settings.api_keys, settings.api_keys_file)
    general = Limits(settings.requests_per_minute or None, settings.tokens_per_minute or None)
    as_vllm = VllmMetrics(registry, [model.name for model in models])
    pulse = Pulse()
    responder = Responder(gateway, clock, as_vllm, pulse)
    api = _Api(settings, models, clock, responder, teller=teller or RequestTeller(nowhere), tracer=tracer)
    # Its own page of documentation would load scripts from another host.
    site = FastAPI(title="Mell", version=version("mell"), docs_url=None, redoc_url=None)
    api.add_routes(site)
    _add_probes(site, gateway, registry)
    for path in PAGES:
        site.add_route(path, dashboard, methods=["GET", "HEAD"], include_in_schema=path == "/dashboard")
    live = LiveFeed(gateway, clock, pulse, settings.live_interval_s)
    operations = AdminApi(gateway, clock, feed or EventFeed(None, settings.write_timeout_s), live).routes()
    for operation in operations:
        site.add_route(operation.path, operation.handler, methods=[operation.method])
    _add_error_handlers(site)
    site.openapi = lambda: _openapi(site, operations)  # type: ignore[method-assign]
    app: App = Guard(site, settings, keys, Allowances(keys, general, clock))
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *_LIMIT_HEADERS],
        )
    return Recorder(app, FrontendMetrics(registry, frozenset(_paths(site)), as_vllm), clock)


class _Api:
    """The endpoints that need models or the gateway."""

    def __init__(  # noqa: PLR0913 - what they serve with, and whom they tell
        self,
        settings: FrontendSettings,
        models: Sequence[ServedModel],
        clock: Clock,
        responder: Responder,
        *,
        teller: RequestTeller,
        tracer: Tracer,
    ) -> None:
        self._settings = settings
        self._models = {model.name: model for model in models}
        self._clock = clock
        self._responder = responder
        self._teller = teller
        self._tracer = tracer
        self._created = int(time.time())

    def add_routes(self, site: FastAPI) -> None:
        # Plain routes: the framework's injection of dependencies would take an eighth of a request's whole time.
        site.add_route("/v1/chat/completions", self.chat, methods=["POST"])
        site.add_route("/v1/completions", self.completion, methods=["POST"])
        site.get("/v1/models", summary="The models served")(self.list_models)
        site.get("/v1/models/{name:path}", summary="One model")(self.show_model)
        site.add_route("/tokenize", self.tokenize, methods=["POST"])
        site.add_route("/detokenize", self.detokenize, methods=["POST"])

    async def chat(self, request: Request) -> Response:
        prepare = partial(prepare_chat, models=self._models, settings=self._settings)
        job = await self._read(request, ChatCompletionRequest, prepare)
        head = Head(request_id("chatcmpl"), int(time.time()))
        if job.stream:
            return self._answer(request, job, head, partial(self._responder.stream, job, head, StreamedChat(job, head)))
        return self._answer(request, job, head, partial(self._responder.whole, job, head, WholeChat(job, head)))

    async def completion(self, request: Request) -> Response:
        prepare = partial(prepare_completion, models=self._models, settings=self._settings)
        job = await self._read(request, CompletionRequest, prepare)
        head = Head(request_id("cmpl"), int(time.time()))
        if job.stream:
            return self._answer(
                request, job, head, partial(self._responder.stream, job, head, StreamedCompletion(job, head))
            )
        return self._answer(request, job, head, partial(self._responder.whole, job, head, WholeCompletion(job, head)))

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(model) for model in self._models.values()]}

    async def show_model(self, name: str) -> dict[str, Any]:
        return self._card(find_model(self._models, name))

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse(await self._read(request, TokenizeRequest, self._tokenize))

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse(await self._read(request, DetokenizeRequest, self._detokenize))

    def _answer(
        self, request: Request, job: Job, head: Head, respond: Callable[[Exchange], Coroutine[Any, Any, None]]
    ) -> Response:
        record = _record(request)
        record.answer_id, record.model = head.id, job.model.name
        record.stream, record.choices = job.stream, job.choices
        allowance: Allowance = request.scope["state"]["allowance"]
        allowance.reserve(job.most_tokens)
        self._teller.arrived(record, sum(map(len, job.prompts)))
        clients = request.headers.get("traceparent", "") if self._tracer.on else ""
        trace = RequestTrace(self._tracer, record, clients, self._clock.now_us())

        def ended() -> None:
            allowance.settle(record.used_tokens)
            now_us = self._clock.now_us()
            self._teller.ended(record, now_us)
            trace.end(record, now_us)

        return _Answer(respond, record, ended, self._settings.write_timeout_s)

    async def _read(self, request: Request, model: type[R], then: Callable[[R], T]) -> T:
        """Return what `then` makes of the request's body; raises `ApiError`."""
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                body = await request.body()
        except TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.", code="timeout") from error

        def work() -> tuple[R, T]:
            parsed = parse(model, body)
            return parsed, then(parsed)

        parsed, result = await asyncio.to_thread(work) if len(body) > _INLINE_BODY_BYTES else work()
        record = _record(request)
        record.unknown_fields, record.unknown_count = unknown_fields(parsed)
        return result

    def _card(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mell",
            "root": model.model,
            "max_model_len": model.max_model_len,
        }

    def _tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        model = find_model(self._models, request.model)
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt", "invalid_value")
        if request.messages is not None:
            ids = chat_prompt(
                model,
                request.messages,
                request.tools,
                request.chat_template_kwargs,
                add_generation_prompt=request.add_generation_prompt,
            )
        else:
            ids = model.tokenizer.encode(request.prompt or "", add_special_tokens=request.add_special_tokens)
        texts = None
        if request.return_token_strs:
            texts = [model.tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
        return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": texts}

    def _detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        model = find_model(self._models, request.model)
        check_ids(model, request.tokens, "tokens")
        return {"prompt": model.tokenizer.decode(request.tokens)}


class _Answer(Response):
    """A response that writes itself to the connection, without the framework's layers for streams."""

    def __init__(
        self,
        respond: Callable[[Exchange], Coroutine[Any, Any, None]],
        record: RequestRecord,
        ended: Callable[[], None],
        write_timeout_s: float,
    ) -> None:
        super().__init__()
        self._respond = respond
        self._record = record
        self._ended = ended
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(receive, send, scope["state"]["send"], self._record, self._write_timeout_s)
        try:
            await exchange.run(self._respond(exchange))
        finally:
            self._ended()


def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


def _add_probes(site: FastAPI, gateway: Gateway, registry: CollectorRegistry) -> None:
    # Load balancers like to ask without wanting a body.
    @site.head("/health", include_in_schema=False)
    @site.get("/health", summary="Whether this process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @site.head("/ready", include_in_schema=False)
    @site.get("/ready", summary="Whether requests are taken: a scheduler answers, no stop is under way")
    async def ready() -> Response:
        if gateway.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503)

    @site.get("/version", summary="The release")
    async def show_version() -> dict[str, str]:
        return {"version": version("mell")}

    @site.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(openapi_page(site.openapi()))

    @site.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _paths(site: FastAPI) -> list[str]:
    return [route.path_format for route in site.routes if isinstance(route, Route) and route.include_in_schema]


def _add_error_handlers(site: FastAPI) -> None:
    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        _record(request).error = error.code or error.kind
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    async def on_generation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, GenerationError)
        return await on_api_error(request, from_generation(error))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await on_api_error(request, _routing_error(request, error, _paths(site)))

    async def on_client_gone(request: Request, error: Exception) -> Response:
        _record(request).disconnected = True
        return Response(status_code=499)

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_api_error(request, ApiError(500, "The server failed; the fault is logged.", code="internal"))

    site.add_exception_handler(ApiError, on_api_error)
    site.add_exception_handler(GenerationError, on_generation_error)
    site.add_exception_handler(HTTPException, on_http_error)
    site.add_exception_handler(ClientDisconnect, on_client_gone)
    site.add_exception_handler(Exception, on_bug)


def _routing_error(request: Request, error: HTTPException, paths: Sequence[str]) -> ApiError:
    path = request.scope["path"][:200]
    if error.status_code == 405:
        fault = ApiError(405, f"{request.method[:20]} is not allowed on {path}.", code="method_not_allowed")
        fault.headers.update(error.headers or {})
        return fault
    if error.status_code == 404:
        return ApiError(404, f"There is no {path} here. There are: {', '.join(paths)}.", code="not_found")
    return ApiError(error.status_code, str(error.detail))


def _openapi(site: FastAPI, operations: tuple[AdminRoute, ...]) -> dict[str, Any]:
    """Return the OpenAPI document, with the bodies that the routes read by themselves."""
    if site.openapi_schema is None:
        document = get_openapi(title=site.title, version=site.version, routes=site.routes)
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        components["securitySchemes"] = {"admin_key": {"type": "http", "scheme": "bearer"}}
        for path, (model, does) in _BODIES.items():
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{model.__name__}"}
            body = {"required": True, "content": {"application/json": {"schema": reference}}}
            answers = {"200": {"description": "The answer"}, "4XX": {"description": "What is wrong with the request"}}
            document["paths"][path] = {"post": {"summary": does, "requestBody": body, "responses": answers}}
        document["paths"] |= admin_paths(operations, schemas)
        site.openapi_schema = document
    return site.openapi_schema
