"""Problems behind the gateway become OpenAI errors with their own status, or events in mid-stream."""

import json
from typing import Any

import httpx
import pytest

from mell_frontend.generation import Delta, GenerationError, Waiting
from tests.frontend.scripted_gateway import ScriptedGateway, deltas

URL = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    "problem",
    [
        ("too_large", 400, "context_length_exceeded"),
        ("refused", 400, "refused"),
        ("unknown_model", 404, "model_not_found"),
        ("queue_full", 429, "queue_full"),
        ("unavailable", 503, "unavailable"),
        ("failed", 500, "generation_failed"),
        ("something new", 500, "generation_failed"),
    ],
)
@pytest.mark.parametrize("ask", [{**ASK, "stream": stream, "n": n} for stream in (False, True) for n in (1, 3)])
async def test_a_problem_before_the_first_token_has_its_status(
    client: httpx.AsyncClient, gateway: ScriptedGateway, problem: tuple[str, int, str], ask: dict[str, Any]
) -> None:
    """Streamed or not, one choice or several, the client sees the status, and every stream is closed."""
    kind, status, code = problem
    error_raised = GenerationError(kind, "What went wrong", retry_after_s=7.2, limit_tokens=99)
    gateway.script = lambda request: [error_raised] if request.sampling.choice == 0 else []
    response = await client.post(URL, json=ask)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"] == "What went wrong (limit: 99 tokens)"
    assert response.headers.get("retry-after") == ("7" if status in (429, 503) else None)
    assert len(gateway.streams) == ask["n"]
    assert all(stream.closed.is_set() for stream in gateway.streams)


async def test_a_problem_in_mid_stream_is_an_event(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """After the first event an error comes as data, and the stream ends without the mark of success."""
    gateway.script = lambda _request: [Waiting(2), Delta([65]), GenerationError("failed", "The engine broke")]
    response = await client.post(URL, json={**ASK, "stream": True})
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    events = [event for event in response.text.split("\n\n") if event.startswith("data: ")]
    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {"message": "The engine broke", "type": "server_error", "param": None, "code": "generation_failed"}
    }
    assert gateway.streams[0].closed.is_set()


@pytest.mark.parametrize("reason", ["error", "cancelled"])
async def test_a_sequence_that_did_not_end_well(
    client: httpx.AsyncClient, gateway: ScriptedGateway, reason: Any
) -> None:
    """An engine that could not go on is a 500, never a short answer."""
    gateway.script = lambda _request: [Delta([65]), Delta([], finish_reason=reason)]
    response = await client.post(URL, json=ASK)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"


async def test_other_requests_go_on(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """One request's problem leaves the next untouched."""
    scripts = iter([[GenerationError("failed", "x")], deltas("fine")])
    gateway.script = lambda _request: next(scripts)
    assert (await client.post(URL, json=ASK)).status_code == 500
    assert (await client.post(URL, json=ASK)).json()["choices"][0]["message"]["content"] == "fine"
