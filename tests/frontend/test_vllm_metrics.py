"""What clients get, under vLLM's names."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mell_frontend.generation import GenerationError
from tests.frontend.scripted_gateway import ScriptedGateway, deltas, say

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The samples under vLLM's names, all of the one model, by name and reason."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and not sample.name.endswith(("_bucket", "_created")):
                assert sample.labels["model_name"] == "fake"
                reason = sample.labels.get("finished_reason", "")
                samples[sample.name.removeprefix("vllm:") + (f" {reason}" if reason else "")] = sample.value
    return samples


async def test_an_answer_is_counted_as_vllm_counts_it(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Tokens, times, and a reason for each choice."""
    gateway.script = say("abcd", "length")
    usage = (await client.post("/v1/chat/completions", json=CHAT | {"n": 2})).json()["usage"]
    found = await scrape(client)
    assert usage["completion_tokens"] == 8
    expected = {
        "generation_tokens_total": 8,
        "prompt_tokens_total": usage["prompt_tokens"],
        "request_generation_tokens_sum": 8,
        "request_prompt_tokens_sum": usage["prompt_tokens"],
        "request_success_total length": 2,
        "time_to_first_token_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "request_time_per_output_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 6,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["time_to_first_token_seconds_sum"] <= found["e2e_request_latency_seconds_sum"]


async def test_tokens_that_come_together_share_their_time(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """One observation for each arrival, of the mean."""
    gateway.script = say("abcdefgh", "length", size=4)
    await client.post("/v1/chat/completions", json=CHAT)
    found = await scrape(client)
    assert (found["generation_tokens_total"], found["inter_token_latency_seconds_count"]) == (8, 1)


async def test_what_breaks_off_is_an_error_and_what_never_began_is_nothing(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    """As with vLLM, only what got tokens is in the histograms."""
    gateway.script = lambda _request: [*deltas("Hello")[:3], GenerationError("failed", "broken")]
    await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    gateway.script = lambda _request: [GenerationError("queue_full", "later")]
    await client.post("/v1/chat/completions", json=CHAT)
    found = await scrape(client)
    assert found["request_success_total error"] == 1
    assert found["time_to_first_token_seconds_count"] == 1
