from typing import Any

import httpx

from tests.frontend.events import choices, chunks
from tests.frontend.scripted_gateway import ScriptedGateway, deltas, say, scored

URL = "/v1/completions"


async def test_whole_answer(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A legacy completion is one body; the prompt gets the vocabulary's special tokens unless told otherwise."""
    body = (await client.post(URL, json={"model": "fake", "prompt": "Once", "max_tokens": 20})).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop"}]
    assert gateway.requests[0].prompt_ids == [256, *b"Once"]
    assert gateway.requests[0].sampling.max_tokens == 20
    await client.post(URL, json={"model": "fake", "prompt": "Once", "add_special_tokens": False})
    assert gateway.requests[1].prompt_ids == list(b"Once")


async def test_streamed_answer(client: httpx.AsyncClient) -> None:
    """A legacy stream is text chunks, a last one with the reason, and the usage if it was asked for."""
    ask = {"model": "fake", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(URL, json=ask)
    assert "".join(choice["text"] for choice in choices(response.text)) == "Hello, world!"
    assert choices(response.text)[-1]["finish_reason"] == "stop"
    assert chunks(response.text)[-1]["usage"]["total_tokens"] == 2 + 14


async def test_prompts_of_every_form(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A prompt is text, ids, or a list of either; choices are numbered prompt by prompt."""
    forms: list[tuple[Any, list[list[int]]]] = [
        ([104, 105], [[104, 105]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([[104], [105, 106]], [[104], [105, 106]]),
    ]
    for prompt, expected in forms:
        gateway.streams.clear()
        gateway.script = lambda request: deltas(f"{bytes(request.prompt_ids[-1:]).decode()}{request.sampling.choice}")
        body = (await client.post(URL, json={"model": "fake", "prompt": prompt, "n": 2})).json()
        assert [request.prompt_ids for request in gateway.requests] == [ids for ids in expected for _ in range(2)]
        last = [bytes(ids[-1:]).decode() for ids in expected]
        assert [choice["text"] for choice in body["choices"]] == [f"{text}{n}" for text in last for n in range(2)]
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_echo(client: httpx.AsyncClient) -> None:
    """With `echo` each text begins with its prompt, streamed or not."""
    ask = {"model": "fake", "prompt": "a ", "echo": True, "n": 2}
    body = (await client.post(URL, json=ask)).json()
    assert [choice["text"] for choice in body["choices"]] == ["a Hello, world!"] * 2
    response = await client.post(URL, json={**ask, "prompt": [[98, 32], [99]], "stream": True})
    texts = ["".join(choice["text"] for choice in choices(response.text, index)) for index in range(4)]
    assert texts == ["b Hello, world!"] * 2 + ["cHello, world!"] * 2


async def test_log_probabilities(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """The legacy form has four columns, the same streamed and not."""
    gateway.script = scored("abc")
    ask = {"model": "fake", "prompt": "x", "logprobs": 2}
    whole = (await client.post(URL, json=ask)).json()["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}],
        "text_offset": [0, 1, 2],
    }
    response = await client.post(URL, json={**ask, "stream": True})
    parts = [choice["logprobs"] for choice in choices(response.text) if choice["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in whole} == whole
    assert gateway.requests[0].sampling.logprobs == 2


async def test_response_format(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A response format binds legacy completions too."""
    await client.post(URL, json={"model": "fake", "prompt": "x", "response_format": {"type": "json_object"}})
    assert gateway.requests[0].sampling.grammar is not None


async def test_stop(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """One stop string may be given as it is."""
    gateway.script = say("a\n\nb", "length")
    body = (await client.post(URL, json={"model": "fake", "prompt": "x", "stop": "\n\n"})).json()
    assert body["choices"][0]["text"] == "a"
