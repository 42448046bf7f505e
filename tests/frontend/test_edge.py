import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import structlog

from mell_frontend.asgi import App, Message
from mell_frontend.generation import Delta, GenerationError
from tests.frontend.scripted_gateway import ScriptedGateway, deltas, say

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "a secret"}]}


async def test_keys(connect: Callable[..., httpx.AsyncClient]) -> None:
    """With keys set, requests need one of them; probes do not."""
    client = connect(api_keys=["one", "two"])
    for header in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}, {"authorization": "Bearer"}):
        response = await client.get("/v1/models", headers=header)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        assert (await client.get("/v1/models", headers={"authorization": f"bearer {key}"})).status_code == 200
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert (await client.get(path)).status_code == 200
    for path in ("/tokenize", CHAT):
        assert (await client.post(path, json=ASK)).status_code == 401


async def test_without_keys_any_key_will_do(client: httpx.AsyncClient) -> None:
    """Clients that insist on sending a key are served where none is needed."""
    assert (await client.get("/v1/models", headers={"authorization": "Bearer sk-whatever"})).status_code == 200


async def test_request_ids(client: httpx.AsyncClient) -> None:
    """A request id is taken from the client if it is sane, else made, and always returned."""
    response = await client.get("/health", headers={"x-request-id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"
    made = {(await client.get(path)).headers["x-request-id"] for path in ("/health", "/nowhere", "/v1/models")}
    assert len(made) == 3
    for wrong in ("", "x" * 200, "a b"):
        response = await client.get("/health", headers={"x-request-id": wrong})
        assert response.headers["x-request-id"].startswith("req-")


async def test_cross_origin_requests(connect: Callable[..., httpx.AsyncClient]) -> None:
    """Browsers may ask from the origins that are set, preflight without a key; by default from none."""
    client = connect(cors_origins=["https://app.example"], api_keys=["one"])
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = await client.options(CHAT, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    answer = await client.get("/health", headers={"origin": "https://app.example"})
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    answer = await connect().get("/health", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_probes(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """`/health` lives, `/ready` follows the gateway, `/version` names the release."""
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).status_code == 200
    for path in ("/health", "/ready"):
        head = await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert (await client.get("/nowhere")).json()["error"]["message"].count("/ready") == 1
    gateway.ready = False
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    assert set((await client.get("/version")).json()) == {"version"}


async def test_models(connect: Callable[..., httpx.AsyncClient]) -> None:
    """Models are listed and shown one by one, names with slashes too."""
    client = connect(models=["org/name=fake"], max_model_len=99)
    [card] = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["root"], card["max_model_len"]) == ("org/name", "model", "fake", 99)
    assert (await client.get("/v1/models/org/name")).json() == card


async def test_status(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """The cluster's state is passed on as JSON; without a scheduler it is a 503."""
    assert (await client.get("/admin/status")).json()["policy"] == "best_fit"
    gateway.problem = GenerationError("unavailable", "no scheduler answers")
    response = await client.get("/admin/status")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no scheduler answers"


async def test_tokenize(client: httpx.AsyncClient) -> None:
    """Texts and conversations become ids, and ids text again."""
    body = (await client.post("/tokenize", json={"model": "fake", "prompt": "é", "return_token_strs": True})).json()
    assert body == {
        "count": 3,
        "max_model_len": None,
        "tokens": [256, 0xC3, 0xA9],
        "token_strs": ["<bos>", "\ufffd", "\ufffd"],
    }
    body = (await client.post("/tokenize", json={"messages": ASK["messages"], "add_generation_prompt": False})).json()
    assert bytes(body["tokens"]) == b"<|user|>a secret\n"
    assert (await client.post("/detokenize", json={"tokens": [256, 0xC3, 0xA9]})).json() == {"prompt": "é"}
    assert (await client.post("/detokenize", json={"tokens": [300]})).status_code == 400
    assert (await client.post("/tokenize", json={})).status_code == 400
    assert (await client.post("/tokenize", json={"prompt": "x", "messages": ASK["messages"]})).status_code == 400


async def test_the_openapi_document(client: httpx.AsyncClient) -> None:
    """The document describes every body, and its references lead somewhere."""
    text = (await client.get("/openapi.json")).text
    document = json.loads(text)
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "$defs" not in text
    page = (await client.get("/docs")).text
    assert "/v1/chat/completions" in page
    assert "<code>temperature</code>" in page
    assert "://" not in page  # it must not need another host


async def test_one_log_line_per_request(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Each request is logged once, with its figures and without what was said."""
    gateway.script = say("private words", cached=16)
    with structlog.testing.capture_logs() as lines:
        await client.post(CHAT, json={**ASK, "stream": True, "wibble": 1}, headers={"x-request-id": "r1"})
        await client.post(CHAT, json={**ASK, "temperature": 9})
        await client.get("/health")
    served, refused, probe = lines
    assert served["event"] == "request"
    assert served["log_level"] == "info"
    expected = {
        "request_id": "r1",
        "path": CHAT,
        "status": 200,
        "model": "fake",
        "stream": True,
        "choices": 1,
        "prompt_tokens": 30,
        "completion_tokens": 14,
        "cached_tokens": 16,
        "finish_reasons": {"stop": 1},
        "unknown_fields": ["wibble"],
    }
    assert {name: served[name] for name in expected} == expected
    assert served["ttft_ms"] <= served["duration_ms"]
    assert (refused["status"], refused["error"]) == (400, "invalid_value")
    assert probe["log_level"] == "debug"
    assert "private" not in str(lines)
    assert "secret" not in str(lines)


async def test_metrics(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Requests, tokens and reasons are counted under labels that clients cannot invent."""
    gateway.script = say("abc", cached=16)
    await client.post(CHAT, json=ASK)
    await client.get("/nowhere/at/all")
    text = (await client.get("/metrics")).text
    assert f'mell_http_requests_total{{path="{CHAT}",status="200"}} 1.0' in text
    assert 'mell_http_requests_total{path="other",status="404"} 1.0' in text
    assert "mell_prompt_tokens_total 30.0" in text
    assert "mell_cached_prompt_tokens_total 16.0" in text
    assert "mell_completion_tokens_total 4.0" in text
    assert 'mell_choices_total{reason="stop"} 1.0' in text
    assert "mell_time_to_first_token_seconds_count 1.0" in text
    assert "nowhere" not in text
    assert "mell_http_requests_in_flight 1.0" in text


async def test_a_bug_is_a_500_that_tells_nothing(build_app: Callable[..., App], gateway: ScriptedGateway) -> None:
    """A fault of our own is an OpenAI error without its details, and it is not swallowed."""

    def broken(_request: object) -> list[Any]:
        raise ZeroDivisionError("private detail")

    gateway.script = broken
    transport = httpx.ASGITransport(app=build_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://mell") as client:
        response = await client.post(CHAT, json=ASK)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "private" not in response.text


class Connection:
    """An ASGI connection turned by hand: a request with this body, sent in full, then silence until it leaves."""

    def __init__(self, body: bytes, *, complete: bool = True) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._body: list[Message] = [{"type": "http.request", "body": body, "more_body": not complete}]
        headers = [(b"content-type", b"application/json")]
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        self.scope |= {"query_string": b"", "raw_path": CHAT.encode(), "http_version": "1.1", "scheme": "http"}

    async def receive(self) -> Message:
        """Return the body, then the disconnect when it happens."""
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message, waiting while the client does not read."""
        self.sent.append(message)
        await self.reads.wait()

    @property
    def body(self) -> bytes:
        """All that was sent."""
        return b"".join(message.get("body", b"") for message in self.sent)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_at_once(
    build_app: Callable[..., App], gateway: ScriptedGateway, stream: bool, n: int
) -> None:
    """When the client goes, every sequence of its request is closed, and the log says so."""
    gateway.script = lambda _request: [Delta([65])]
    connection = Connection(json.dumps({**ASK, "stream": stream, "n": n}).encode())
    with structlog.testing.capture_logs() as lines:
        async with asyncio.timeout(60):
            serving = asyncio.create_task(build_app()(connection.scope, connection.receive, connection.send))
            while len(gateway.streams) < n or any(made.read == 0 for made in gateway.streams):  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not any(made.closed.is_set() for made in gateway.streams)
            connection.left.set()
            await serving
    assert all(made.closed.is_set() for made in gateway.streams)
    [line] = lines
    assert line["disconnected"] is True
    assert line["status"] == (200 if stream else 499)


async def test_a_client_that_stops_reading_is_given_up(build_app: Callable[..., App], gateway: ScriptedGateway) -> None:
    """A client that leaves a write waiting too long does not hold its sequence for ever."""
    gateway.script = lambda _request: [Delta([65])]
    connection = Connection(json.dumps({**ASK, "stream": True}).encode())
    connection.reads.clear()
    async with asyncio.timeout(60):
        await build_app(write_timeout_s=0.05)(connection.scope, connection.receive, connection.send)
    assert gateway.streams[0].closed.is_set()


async def test_a_response_that_ends_is_no_disconnect(build_app: Callable[..., App], gateway: ScriptedGateway) -> None:
    """The connection's end after a complete answer does not count as a client that left."""
    for n in (1, 3):
        connection = Connection(json.dumps({**ASK, "stream": True, "n": n}).encode())
        gateway.script = lambda _request: deltas("x")

        async def send(message: Message, connection: Connection = connection) -> None:
            await connection.send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                connection.left.set()
                await asyncio.sleep(0)

        with structlog.testing.capture_logs() as lines:
            async with asyncio.timeout(60):
                await build_app()(connection.scope, connection.receive, send)
        assert b"[DONE]" in connection.body
        assert "disconnected" not in lines[0]


async def test_a_body_that_does_not_come_is_not_waited_for(build_app: Callable[..., App]) -> None:
    """A client that does not send its whole body gets a 408."""
    connection = Connection(b'{"model":', complete=False)
    async with asyncio.timeout(60):
        await build_app(read_timeout_s=0.05)(connection.scope, connection.receive, connection.send)
    assert connection.sent[0]["status"] == 408
    assert json.loads(connection.body)["error"]["code"] == "timeout"


async def test_a_client_that_leaves_while_sending_is_no_fault(build_app: Callable[..., App]) -> None:
    """A client that goes in the middle of its body is logged as gone, not as a failure of ours."""
    connection = Connection(b'{"model":', complete=False)
    connection.left.set()
    with structlog.testing.capture_logs() as lines:
        await build_app()(connection.scope, connection.receive, connection.send)
    assert lines[0]["disconnected"] is True
