"""The HTTP API: requests made from its own OpenAPI document, and bodies that are none; never a 500, never a crash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from schemathesis.checks import not_a_server_error

from mell_frontend.app import create_app
from mell_frontend.served import load_models
from mell_frontend.settings import FrontendSettings
from tests.frontend.scripted_gateway import ScriptedGateway
from tests.fuzz.budget import examples
from tests.fuzz.hostile import junk

Count = Callable[[str], None]
SETTINGS = FrontendSettings.model_validate({"models": ["fake"], "model_dir": Path()})
APP = create_app(SETTINGS, ScriptedGateway(), load_models(["fake"], Path(), None), CollectorRegistry())
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)

POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


@schema.parametrize()
@examples(25)
def test_requests_made_from_the_document(case: schemathesis.Case, tried: Count) -> None:
    """What the document allows and what it does not: each is answered, with JSON, and never by a failure of ours."""
    tried(f"OpenAPI {case.path}")
    response = case.call()
    case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


CHAT: dict[str, Any] = {
    "model": "fake",
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "stop": ["x"],
    "logit_bias": {"5": 1.0},
    "stream_options": {"include_usage": True},
    "stream": True,
    "logprobs": True,
    "top_logprobs": 2,
    "n": 2,
    "max_tokens": 5,
    "seed": 1,
    "chat_template_kwargs": {"a": 1},
}
LEGACY = {
    **{name: CHAT[name] for name in ("model", "stop", "n", "max_tokens", "stream")},
    "prompt": ["a", "b"],
    "echo": True,
}
TOKENIZE = {"model": "fake", "messages": CHAT["messages"], "tools": CHAT["tools"], "return_token_strs": True}
DETOKENIZE = {"model": "fake", "tokens": [65, 66, 300]}
WHOLE = dict(zip(POSTS, (CHAT, LEGACY, TOKENIZE, DETOKENIZE), strict=True))


@st.composite
def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """Return a valid body with junk somewhere in it, or something missing."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 4)):
            return {**value, name: draw(spoiled(value[name]))}
        return {key: item for key, item in value.items() if key != name}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(spoiled(value[at])), *value[at + 1 :]]
    return draw(junk.filter(_is_json) | st.just(value))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a path and a body: spoiled, cut, deep, or no JSON at all."""
    path = draw(st.sampled_from(POSTS))
    text = json.dumps(draw(spoiled(WHOLE[path])))
    match draw(st.integers(0, 6)):
        case 0:
            return path, draw(st.binary(max_size=100))
        case 1:
            return path, text[: draw(st.integers(0, len(text)))].encode()
        case 2:
            return path, text.replace('"a"', "[" * draw(st.integers(1, 5000))).encode()
        case 3:
            return path, text.encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-32"])))
    return path, text.encode("utf-8", "surrogatepass")


def test_bodies_that_are_wrong(tried: Count) -> None:
    """Any body gets an answer below 500 in OpenAI's form."""
    import asyncio

    @examples(150)
    @given(requests())
    def check(asked: tuple[str, bytes]) -> None:
        path, body = asked
        tried(f"body {path}")
        response = asyncio.run(answer(path, body))
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()


async def answer(path: str, body: bytes) -> httpx.Response:
    """POST a body to the application."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=APP), base_url="http://mell") as client:
        return await client.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("name", ["authorization", "x-request-id", "content-length", "content-type", "expect"])
def test_headers_that_are_wrong(name: str, tried: Count) -> None:
    """Any value of any header that we read is answered, below 500."""
    import asyncio

    async def ask(value: bytes) -> int:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/tokenize", "raw_path": b"/tokenize", "query_string": b""}
        scope |= {"headers": [(name.encode(), value)], "http_version": "1.1", "scheme": "http"}
        await APP(scope, receive, send)
        return int(sent[0]["status"])

    @examples(40)
    @given(st.binary(max_size=60) | st.sampled_from([b"9" * 5000, b"-1", b"Bearer ", b"Bearer \xff", b"100-continue"]))
    def check(value: bytes) -> None:
        tried("header")
        assert asyncio.run(ask(value)) < 500

    check()
