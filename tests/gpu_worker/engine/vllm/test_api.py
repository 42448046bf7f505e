"""What is asked of a vLLM server, and how its words are taken."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from mell_gpu_worker.core.step import Fetched
from mell_gpu_worker.engine.vllm.api import (
    Connector,
    RefusedError,
    WrongAnswerError,
    completion_request,
    read_chunk,
    read_connector,
    read_fetched,
    seed_at,
    structured_outputs,
)
from mell_gpu_worker.engine.vllm.metrics import NoMetricsError, read_metrics
from mell_shared.messages.sampling import Grammar, SamplingParams

ALL = SamplingParams(
    max_tokens=50,
    min_tokens=10,
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    logit_bias={5: -100.0, 6: 2.0},
    seed=123,
    ignore_eos=True,
    stop_token_ids=(7, 8),
    logprobs=3,
)


def body(sampling: SamplingParams, output: list[int] | None = None, limit: int = 100) -> dict[str, Any]:
    """The request for a prompt of three tokens and this output."""
    return completion_request("m", [1, 2, 3, *(output or [])], 3, sampling, limit)


def test_every_parameter_is_sent() -> None:
    """None is left to the model's own generation settings."""
    assert body(ALL) == {
        "model": "m",
        "prompt": [1, 2, 3],
        "stream": True,
        "return_token_ids": True,
        "max_tokens": 50,
        "min_tokens": 10,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "stop_token_ids": [7, 8],
        "seed": 123,
        "logit_bias": {"5": -100.0, "6": 2.0},
        "logprobs": 3,
        "return_tokens_as_token_ids": True,
    }
    assert "seed" not in body(SamplingParams(temperature=0, seed=1))
    unlimited = body(SamplingParams(seed=1))
    assert unlimited["max_tokens"] == 97, "up to the context's end"
    assert {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}.items() <= unlimited.items()


def test_a_continuation_asks_for_the_rest() -> None:
    """Limits count what is there; penalties for it come as a bias, since the server takes it for prompt."""
    rest = body(ALL, [9, 9, 6])
    assert rest["prompt"] == [1, 2, 3, 9, 9, 6]
    assert (rest["max_tokens"], rest["min_tokens"]) == (47, 7)
    assert rest["logit_bias"] == {"5": -100.0, "6": 2.0 - 0.75, "9": -1.0}
    assert body(SamplingParams(seed=1, max_tokens=500), [9] * 10, 20)["max_tokens"] == 7
    hard = body(SamplingParams(seed=1, frequency_penalty=2, logit_bias={4: -60}), [4] * 50)
    assert hard["logit_bias"] == {"4": -100.0}, "the most that a server takes"


def test_no_stretch_of_an_output_repeats_anothers_chance() -> None:
    """Choices and continuations get seeds of their own; the first stretch of the first choice has the client's."""
    sampling = SamplingParams(seed=2**63 - 1)
    seeds = {seed_at(sampling.model_copy(update={"choice": c}), n) for c in range(3) for n in range(3)}
    assert len(seeds) == 9
    assert seed_at(sampling, 0) == sampling.seed
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_grammars_in_their_form() -> None:
    """A schema as a schema, without what only llguidance reads; calls of functions as Lark."""
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": " "}}
    assert structured_outputs(Grammar(text=LLMatcher.grammar_from_json_schema(schema))) == {"json": {"type": "object"}}
    lark = LLMatcher.grammar_from_lark('start: "a" %json {"type": "integer"}')
    assert structured_outputs(Grammar(text=lark)) == {"grammar": lark}
    assert body(ALL.model_copy(update={"grammar": Grammar(text=lark)}))["structured_outputs"] == {"grammar": lark}


def chunk(**choice: Any) -> str:
    """A chunk with one choice."""
    return json.dumps({"choices": [{"index": 0, "text": "", **choice}]})


def test_chunks_are_read() -> None:
    """Tokens, ends, the server's own end of a request, news of usage."""
    tokens, end, dropped = read_chunk(chunk(token_ids=[4, 5], finish_reason="stop"), 10, None)
    assert ([t.token_id for t in tokens], end, dropped) == ([4, 5], "stop", "")
    assert read_chunk(chunk(token_ids=[], finish_reason="length"), 10, None).end == "length"
    assert read_chunk(chunk(token_ids=[4], finish_reason="abort"), 10, None).dropped
    assert read_chunk('{"error": {"message": "busy", "code": 500}}', 10, None).dropped == "busy"
    assert read_chunk('{"choices": [], "usage": {"prompt_tokens": 1}}', 10, None) == ([], None, "")
    with pytest.raises(RefusedError, match="out of vocabulary"):
        read_chunk('{"error": {"message": "Token id 9 is out of vocabulary", "code": 400}}', 10, None)


def test_log_probabilities_are_read() -> None:
    """The alternatives by rank, as many as were asked for: a server adds the chosen one to them."""
    told = {"token_logprobs": [-2.0], "top_logprobs": [{"token_id:3": -2.0, "token_id:1": -0.5, "token_id:2": -1.0}]}
    ((token,), _, _) = read_chunk(chunk(token_ids=[3], logprobs=told), 10, 2)
    assert token.logprobs is not None
    assert (token.logprobs.logprob, token.logprobs.top_ids) == (-2.0, [1, 2])


@pytest.mark.parametrize(
    "data",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"choices": {}}',
        '{"choices": [1]}',
        '{"choices": [{}, {}]}',
        chunk(token_ids=["4"]),
        chunk(token_ids=[-1]),
        chunk(token_ids=[10]),
        chunk(token_ids=[True]),
        chunk(token_ids=5),
        chunk(token_ids=[4]),
        chunk(token_ids=[4], logprobs={"token_logprobs": [None], "top_logprobs": [None]}),
        chunk(token_ids=[4], logprobs={"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}),
        chunk(token_ids=[4], logprobs=7),
    ],
)
def test_what_no_server_says_is_told_apart(data: str) -> None:
    """Never taken for tokens; without log-probabilities that were asked for, either."""
    with pytest.raises(WrongAnswerError):
        read_chunk(data, 10, 1)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "token_ids", "finish_reason", "logprobs", "error", "code", "top_logprobs"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(_JSON, st.sampled_from([None, 2]))
def test_rubbish_raises_nothing_else(said: object, logprobs: int | None) -> None:
    """Whatever a server says is a chunk, a refusal or a wrong answer."""
    try:
        read = read_chunk(json.dumps(said), 256, logprobs)
    except (WrongAnswerError, RefusedError):
        return
    assert all(0 <= token.token_id < 256 for token in read.tokens)


METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="101"} 1.0
vllm:cache_config_info{block_size="16",engine="1",kv_cache_size_tokens="816",num_gpu_blocks="101"} 1.0
"""


def test_metrics_are_read() -> None:
    """All engines together; one block of each is none; a model whose layers differ has fewer than it seems."""
    state = read_metrics(METRICS)
    assert (state.blocks, state.block_tokens, state.prefix_cache) == (100 + 50, 16, True)
    assert (state.used_blocks, state.waiting) == (50 + 12, 3)


@pytest.mark.parametrize("text", ["", METRICS.replace("num_gpu_blocks", "blocks"), METRICS.replace('"16"', '"None"')])
def test_metrics_that_lack_something(text: str) -> None:
    """The message names it."""
    with pytest.raises(NoMetricsError, match="cache_config_info"):
        read_metrics(text)


KV = {"address": "tcp://10.0.0.5:5601", "layout": "0123", "block_tokens": 16, "block_bytes": 1024}


def test_what_a_connector_says_is_read() -> None:
    """Of itself, and of a request for which it fetched."""
    assert read_connector({"kv_transfer_params": {"mell": KV}}) == Connector("tcp://10.0.0.5:5601", 1024)
    fetched = {"fetched_tokens": 32, "fetched_bytes": 2048, "fetch_us": 7}
    assert read_fetched({"kv_transfer_params": {"mell": KV | fetched}}) == Fetched(32, 2048, 7)


@given(
    st.dictionaries(st.sampled_from(["kv_transfer_params", "mell"]), st.none() | st.integers() | st.text())
    | st.fixed_dictionaries(
        {
            "kv_transfer_params": st.fixed_dictionaries(
                {"mell": st.dictionaries(st.sampled_from([*KV]), st.none() | st.text())}
            )
        }
    )
)
def test_a_server_without_such_a_connector_says_nothing_of_it(said: dict[str, Any]) -> None:
    """Or something else: it is taken for one without."""
    assert read_connector(said) is None
    assert read_fetched(said) == Fetched()
