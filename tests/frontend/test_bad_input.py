"""Every kind of bad input gets a clear OpenAI error, and nothing reaches the gateway."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from mell_frontend.allowance import Allowances
from mell_frontend.asgi import Message, Receive, Scope, Send
from mell_frontend.edge import Guard
from mell_frontend.errors import ApiError
from mell_frontend.key_store import KeyStore
from mell_frontend.rate_limits import Limits
from mell_frontend.record import RequestRecord
from mell_frontend.settings import FrontendSettings
from mell_shared.clock import SystemClock
from tests.frontend.scripted_gateway import ScriptedGateway

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"
USER = {"role": "user", "content": "hi"}
ASK: dict[str, Any] = {"model": "fake", "messages": [USER]}
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}


def checked(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """Return the error of a response that must be an OpenAI error body with this status."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "fake", "temperature": NaN}',
        b'{"model": "fake", "temperature": Infinity}',
        b'{"model": "fake", "messages": "\\ud800"}',
        b'{"model": ' + b"[" * 10_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "fake"} trailing',
    ],
)
@pytest.mark.parametrize("url", [CHAT, LEGACY, "/tokenize"])
async def test_malformed_json(client: httpx.AsyncClient, url: str, body: bytes) -> None:
    """A body that is no JSON object is a 400."""
    assert checked(await client.post(url, content=body), 400)["code"] == "invalid_json"


CHAT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, AUDIO]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"model": 3}, "model"),
    ({"model": None}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": 2**40}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 3}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
        "response_format",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": 3, "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("change", "param"), CHAT_FAULTS)
async def test_wrong_chat_requests(
    client: httpx.AsyncClient, gateway: ScriptedGateway, change: dict[str, Any], param: str
) -> None:
    """A wrong field is a 400 that names it, streamed or not."""
    for stream in (False, True):
        response = await client.post(CHAT, json={**ASK, "stream": stream, **change})
        assert checked(response, 400, param)["type"] == "invalid_request_error"
    assert gateway.streams == []


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, "messages[0].role: Field required."),
        (
            {"role": "wizard", "content": "x"},
            "messages[0].role: must be one of 'system', 'developer', 'user', 'assistant', 'tool', got 'wizard'.",
        ),
    ],
)
async def test_a_wrong_role_is_told_in_the_users_words(
    client: httpx.AsyncClient, message: dict[str, Any], said: str
) -> None:
    """A message without a role, or with an unknown one, is told what roles there are."""
    response = await client.post(CHAT, json={**ASK, "messages": [message]})
    assert checked(response, 400, "messages[0].role")["message"] == said


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [[1], [2, 300]]}, "prompt[1]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": False}}}, None),
    ],
)
async def test_wrong_legacy_requests(
    client: httpx.AsyncClient, gateway: ScriptedGateway, change: dict[str, Any], param: str | None
) -> None:
    """What is wrong with a legacy request, or not served, is a 400 that names it."""
    param = param or "response_format.json_schema.schema"
    checked(await client.post(LEGACY, json={"model": "fake", "prompt": "x", **change}), 400, param)
    assert gateway.streams == []


async def test_a_list_that_is_too_short_is_told_in_plain_words(client: httpx.AsyncClient) -> None:
    """A conversation without messages says how many are needed, and nothing of how that was found out."""
    response = await client.post(CHAT, json={**ASK, "messages": []})
    assert checked(response, 400, "messages")["message"] == "messages: List should have at least 1 item, not 0."


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    """A model that is not served is a 404 that names those that are."""
    for url, body in ((CHAT, ASK), (LEGACY, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        error = checked(await client.post(url, json={**body, "model": "gpt-9"}), 404, "model")
        assert error["code"] == "model_not_found"
        assert "gpt-9" in error["message"]
        assert "fake" in error["message"]
    assert checked(await client.get("/v1/models/gpt-9"), 404, "model")["code"] == "model_not_found"


async def test_too_long_for_the_context(connect: Callable[..., httpx.AsyncClient]) -> None:
    """A prompt, or a prompt and its output, over the context is a 400 that says the limit."""
    client = connect(max_model_len=40)
    long = {"model": "fake", "messages": [{"role": "user", "content": "x" * 40}]}
    error = checked(await client.post(CHAT, json=long), 400, "messages")
    assert error["code"] == "context_length_exceeded"
    assert "40 tokens" in error["message"]
    checked(await client.post(CHAT, json={**ASK, "max_completion_tokens": 17}), 400, "max_completion_tokens")
    checked(await client.post(LEGACY, json={"model": "fake", "prompt": "x", "max_tokens": 39}), 400, "max_tokens")
    checked(await client.post(LEGACY, json={"model": "fake", "prompt": ["x", "x" * 40]}), 400, "prompt")
    assert (await client.post(CHAT, json={**ASK, "max_tokens": 16})).status_code == 200


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    """What is not served is a 404 that names what is; a wrong method is a 405 that says the right one."""
    for path in ("/v1/responses", "/v1/embeddings", "/", "/v1/audio/speech", "/v2/chat/completions"):
        error = checked(await client.post(path, json={}), 404)
        assert "/v1/chat/completions" in error["message"]
    response = await client.get(CHAT)
    assert "GET" in checked(response, 405)["message"]
    assert response.headers["allow"] == "POST"


async def test_a_large_body_is_refused(connect: Callable[..., httpx.AsyncClient]) -> None:
    """A body over the limit is a 413, whatever it says of its length; the same connection can go on."""
    client = connect(max_body_bytes=100_000)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 10_000

    for headers in ({}, {"content-length": "500000"}):
        response = await client.post(CHAT, content=body(), headers=headers)
        assert checked(response, 413)["code"] == "body_too_large"
        assert "connection" not in response.headers
    assert (await client.post(CHAT, content=b" " * 100_001)).status_code == 413
    checked(await client.post(CHAT, content=b" " * 100_000), 400)


async def test_a_large_body_is_not_kept() -> None:
    """Of a body over the limit no more than the limit is handed on, and none of it if its length is announced."""
    settings = FrontendSettings(max_body_bytes=50_000)
    handed_on = 0
    chunks = [{"type": "http.request", "body": b"x" * 10_000, "more_body": n < 99} for n in range(100)]

    async def receive() -> Message:
        return chunks.pop(0)

    async def read_all(_scope: Scope, receive: Receive, _send: Send) -> None:
        nonlocal handed_on
        while (message := await receive())["more_body"]:
            handed_on += len(message["body"])

    async def send(message: Message) -> None:
        sent.append(message)

    keys = KeyStore([])
    guard = Guard(read_all, settings, keys, Allowances(keys, Limits(), SystemClock()))
    sent: list[Message] = []
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [],
        "state": {"record": RequestRecord("r", "POST", CHAT, 0)},
    }
    with pytest.raises(ApiError, match="50000 bytes"):
        await guard(scope, receive, send)
    assert (handed_on, chunks) == (50_000, [])
    scope["headers"] = [(b"content-length", b"1000000"), (b"expect", b"100-continue")]
    await guard(scope, receive, send)
    assert handed_on == 50_000
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]


async def test_large_headers_are_refused(connect: Callable[..., httpx.AsyncClient]) -> None:
    """Headers or a query over the limit are a 431."""
    client = connect(max_header_bytes=2000)
    checked(await client.post(CHAT, json=ASK, headers={"x-big": "y" * 2000}), 431)
    checked(await client.get("/v1/models?" + "y" * 2001), 431)
    assert (await client.post(CHAT, json=ASK, headers={"x-big": "y" * 1000})).status_code == 200


async def test_templates_that_refuse(tmp_path_factory: pytest.TempPathFactory, connect: Callable[..., Any]) -> None:
    """A template's own refusal, tools it cannot show, or no template at all are 400s that say so."""
    from tests.frontend import folders

    refusing = "{{ raise_exception('roles must alternate') }}"
    root = tmp_path_factory.mktemp("models")
    folders.save(root / "refusing", folders.byte_level(), template=refusing)
    folders.save(root / "base", folders.byte_level(), template=None)
    folders.save(root / "silent", folders.byte_level(), template="{{ '' }}")
    client = connect(models=["refusing", "base", "silent"], model_dir=root)
    error = checked(await client.post(CHAT, json={**ASK, "model": "silent"}), 400, "messages")
    assert error["code"] == "empty_prompt"
    error = checked(await client.post(CHAT, json={**ASK, "model": "refusing"}), 400, "messages")
    assert "roles must alternate" in error["message"]
    error = checked(await client.post(CHAT, json={**ASK, "model": "refusing", "tools": [TOOL]}), 400, "tools")
    assert error["code"] == "tools_not_supported"
    error = checked(await client.post(CHAT, json={**ASK, "model": "base"}), 400, "messages")
    assert error["code"] == "no_chat_template"
    assert (await client.post(LEGACY, json={"model": "base", "prompt": "x"})).status_code == 200


async def test_errors_do_not_repeat_the_input(client: httpx.AsyncClient) -> None:
    """An error names what is wrong, not what the user wrote."""
    secret = "the-secret-of-the-user"
    for body in (
        {"model": "fake", "messages": secret},
        {**ASK, "temperature": secret},
        {**ASK, "stop": [{"a": secret}]},
    ):
        response = await client.post(CHAT, json=body)
        assert response.status_code == 400
        assert secret not in response.text
    assert secret not in (await client.post(CHAT, content=json.dumps(ASK)[:-1] + secret)).text
