import json
from collections.abc import Callable
from typing import Any

import httpx

from mell_frontend.generation import Waiting
from tests.frontend.events import choices, chunks, content
from tests.frontend.scripted_gateway import ScriptedGateway, deltas, say, scored

URL = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


async def test_whole_answer(client: httpx.AsyncClient) -> None:
    """Without streaming, the answer is one OpenAI body."""
    response = await client.post(URL, json=ASK)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    message = {"role": "assistant", "content": "Hello, world!", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 24,
        "completion_tokens": 14,
        "total_tokens": 38,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_streamed_answer(client: httpx.AsyncClient) -> None:
    """A stream begins with the role, goes on with text, ends with the reason, the usage if asked, and the mark."""
    response = await client.post(URL, json={**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = choices(response.text)
    assert found[0]["delta"] == {"role": "assistant", "content": ""}
    assert content(response.text) == "Hello, world!"
    assert (found[-1]["delta"], found[-1]["finish_reason"]) == ({}, "stop")
    assert all("usage" not in chunk for chunk in chunks(response.text))
    response = await client.post(URL, json={**ASK, "stream": True, "stream_options": {"include_usage": True}})
    *others, last = chunks(response.text)
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 14
    assert len({chunk["id"] for chunk in [*others, last]}) == 1


async def test_one_write_holds_all_that_is_ready(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Tokens that came together are one chunk."""
    gateway.script = say("Hello, world!", size=5)
    response = await client.post(URL, json={**ASK, "stream": True})
    texts = [choice["delta"].get("content") for choice in choices(response.text)]
    assert texts == ["", "Hello", ", wor", "ld!", None]


async def test_several_choices(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Each choice is a sequence with its own number and text; the prompt counts once."""
    gateway.script = lambda request: deltas("abc"[request.sampling.choice] * 3, cached=16 + request.sampling.choice)
    body = (await client.post(URL, json={**ASK, "n": 3, "seed": 7})).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["aaa", "bbb", "ccc"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 24
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert [request.sampling.seed for request in gateway.requests] == [7, 7, 7]
    assert len({request.sequence for request in gateway.requests}) == 3
    response = await client.post(URL, json={**ASK, "n": 3, "stream": True})
    assert [content(response.text, index) for index in range(3)] == ["aaa", "bbb", "ccc"]
    assert all(stream.closed.is_set() for stream in gateway.streams)


async def test_parameters_reach_the_worker(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Every sampling parameter is passed on as it was given."""
    given: dict[str, Any] = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": 42,
        "ignore_eos": True,
    }
    more = {"max_completion_tokens": 9, "max_tokens": 5, "logit_bias": {"65": -100}, "stop_token_ids": [10]}
    await client.post(URL, json={**ASK, **given, **more, "priority": 3})
    [request] = gateway.requests
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.max_tokens, sampling.logit_bias, sampling.stop_token_ids) == (9, {65: -100.0}, (10,))
    assert (sampling.logprobs, sampling.grammar, request.priority, request.model) == (None, None, 3, "fake")


async def test_defaults(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """What is not given, or null, is OpenAI's default; a missing seed is drawn anew each time."""
    await client.post(URL, json=ASK)
    await client.post(
        URL, json={**ASK, "temperature": None, "max_tokens": None, "stop": None, "tools": None, "n": None}
    )
    first, second = (request.sampling for request in gateway.requests)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (None, 1.0, 1.0, 0)
    assert first.seed != second.seed
    assert first.model_copy(update={"seed": 0}) == second.model_copy(update={"seed": 0})


async def test_seeds_and_top_k_have_several_spellings(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A negative seed is a seed too, and `top_k` -1 means off."""
    assert (await client.post(URL, json={**ASK, "seed": -1, "top_k": -1})).status_code == 200
    assert (gateway.requests[0].sampling.seed, gateway.requests[0].sampling.top_k) == (2**63 - 1, 0)


async def test_harmless_fields_are_accepted(client: httpx.AsyncClient) -> None:
    """Fields that OpenAI's clients send, and unknown ones, do not get in the way; unknown ones are counted."""
    harmless = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "modalities": ["text"],
    }
    assert (await client.post(URL, json={**ASK, **harmless})).status_code == 200
    assert "mell_unknown_request_fields_total 0.0" in (await client.get("/metrics")).text
    assert (await client.post(URL, json={**ASK, "wibble": 1, "wobble": None, "wubble": ["text"]})).status_code == 200
    assert "mell_unknown_request_fields_total 2.0" in (await client.get("/metrics")).text


async def test_stop_strings_end_the_text_and_the_sequence(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A stop string across tokens is not shown, and its sequence is closed at once."""
    for stream in (False, True):
        gateway.script = say("one two three", "length", size=2)
        response = await client.post(URL, json={**ASK, "stop": ["xyz", "o thr"], "stream": stream})
        if stream:
            assert content(response.text) == "one tw"
            assert choices(response.text)[-1]["finish_reason"] == "stop"
        else:
            [choice] = response.json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("one tw", "stop")
            assert response.json()["usage"]["completion_tokens"] == 11
        assert gateway.streams[-1].closed.is_set()
        assert gateway.streams[-1].read == 6


async def test_a_stopped_choice_does_not_end_the_others(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """One of several choices stops early; the others go on to their end."""
    gateway.script = lambda request: deltas("aXbbbb" if request.sampling.choice == 0 else "aaaaaaaa", "length")
    body = (await client.post(URL, json={**ASK, "n": 2, "stop": "X"})).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "aaaaaaaa"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]


async def test_characters_are_never_split(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """With a token per byte, every chunk holds whole characters."""
    gateway.script = say("héllo 你好 👍🏽")
    response = await client.post(URL, json={**ASK, "stream": True})
    texts = [choice["delta"].get("content") or "" for choice in choices(response.text)]
    assert "".join(texts) == "héllo 你好 👍🏽"
    assert not any("\ufffd" in text for text in texts)


async def test_log_probabilities(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Log-probabilities come with text, bytes and as many alternatives as were asked for, streamed or not."""
    gateway.script = scored("hi")
    body = (await client.post(URL, json={**ASK, "logprobs": True, "top_logprobs": 2})).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["h", "i"]
    assert entries[0]["top_logprobs"] == [
        {"token": "h", "logprob": -0.5, "bytes": [104]},
        {"token": "i", "logprob": -1.5, "bytes": [105]},
    ]
    assert gateway.requests[-1].sampling.logprobs == 2
    response = await client.post(URL, json={**ASK, "logprobs": True, "stream": True})
    streamed = [entry for choice in choices(response.text) for entry in (choice["logprobs"] or {}).get("content", [])]
    assert streamed == entries
    assert gateway.requests[-1].sampling.logprobs == 0


async def test_waiting_is_shown_as_comments(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """While a sequence waits for a place, a stream carries comments; clients ignore them."""
    gateway.script = lambda _request: [Waiting(3), Waiting(1), *deltas("ok")]
    response = await client.post(URL, json={**ASK, "stream": True})
    assert ": queued 3\n\n: queued 1\n\n" in response.text
    assert content(response.text) == "ok"
    assert (await client.post(URL, json=ASK)).json()["choices"][0]["message"]["content"] == "ok"


async def test_every_role_and_text_parts(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A conversation of all roles, with text parts and earlier calls, reaches the model through its template."""
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "CET"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
        {"role": "user", "content": "Thanks", "name": "ann"},
    ]
    assert (await client.post(URL, json={"model": "fake", "messages": messages})).status_code == 200
    prompt = bytes(gateway.requests[0].prompt_ids).decode()
    assert prompt == (
        "<|system|>Be brief.\n<|user|>What\ntime?\n"
        '<|assistant|><tool_call>{"name": "time", "arguments": {"zone": "CET"}}</tool_call>\n'
        "<|tool|>noon\n<|user|>Thanks\n<|assistant|>"
    )


async def test_template_arguments(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Template arguments reach the template; the generation prompt can be left out."""
    ask = {**ASK, "add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": False}}
    assert (await client.post(URL, json=ask)).status_code == 200
    assert bytes(gateway.requests[0].prompt_ids) == b"<|user|>hi\n"


async def test_calls_of_tools(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Tools reach the template, and calls come back as calls, streamed or not."""
    gateway.script = say(f"Let me see.\n{CALL}\n{CALL}")
    body = (await client.post(URL, json={**ASK, "tools": TOOLS})).json()
    assert '"name": "weather"' in bytes(gateway.requests[0].prompt_ids).decode()
    assert gateway.requests[0].sampling.grammar is None
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Köln"}] * 2
    assert len({call["id"] for call in calls}) == 2
    response = await client.post(URL, json={**ASK, "tools": TOOLS, "stream": True})
    streamed = [call for choice in choices(response.text) for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in streamed] == [0, 1]
    assert [call["function"] for call in streamed] == [call["function"] for call in calls]
    assert content(response.text) == "Let me see."
    assert choices(response.text)[-1]["finish_reason"] == "tool_calls"


async def test_tool_choice(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """`none` hides the tools; `required` and a name bind the output to calls; `auto` leaves it free."""
    gateway.script = say(CALL)
    named = {"type": "function", "function": {"name": "time"}}
    contents = {}
    for word, choice in {"none": "none", "auto": "auto", "required": "required", "named": named}.items():
        response = await client.post(URL, json={**ASK, "tools": TOOLS, "tool_choice": choice})
        contents[word] = response.json()["choices"][0]["message"]["content"]
    hidden, auto, required, only = gateway.requests
    assert b"weather" not in bytes(hidden.prompt_ids)
    assert contents == {"none": CALL, "auto": None, "required": None, "named": None}
    assert hidden.sampling.grammar is None
    assert auto.sampling.grammar is None
    assert required.sampling.grammar is not None
    assert only.sampling.grammar is not None
    assert "weather" in required.sampling.grammar.text
    assert "weather" not in only.sampling.grammar.text


async def test_response_formats_bind_the_output(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """JSON formats become a grammar for the worker; with tools left open, either is allowed."""
    schema = {"type": "object", "properties": {"marker": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    await client.post(URL, json={**ASK, "response_format": form})
    await client.post(URL, json={**ASK, "response_format": {"type": "json_object"}})
    await client.post(URL, json={**ASK, "response_format": form, "tools": TOOLS})
    await client.post(URL, json={**ASK, "response_format": form, "tools": TOOLS, "tool_choice": "required"})
    texts = [request.sampling.grammar.text for request in gateway.requests if request.sampling.grammar]
    assert ["marker" in text for text in texts] == [True, False, True, False]
    assert ["weather" in text for text in texts] == [False, False, True, True]


async def test_a_large_request_is_read_in_a_thread(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A request too large to be read between two tokens of others is served the same."""
    ask = {"model": "fake", "messages": [{"role": "user", "content": "x" * 100_000}]}
    assert (await client.post(URL, json=ask)).status_code == 200
    assert len(gateway.requests[0].prompt_ids) > 100_000


async def test_the_served_name_is_what_clients_see(
    connect: Callable[..., httpx.AsyncClient], gateway: ScriptedGateway
) -> None:
    """A model served under another name answers to that name only, and its workers know it by that too."""
    client = connect(models=["gpt=fake"])
    assert (await client.post(URL, json={**ASK, "model": "gpt"})).json()["model"] == "gpt"
    assert gateway.requests[0].model == "gpt"
    assert (await client.post(URL, json=ASK)).status_code == 404
