"""The words of vLLM's completions API: what is asked for a sequence, and what its answers say. Pure."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from mell_gpu_worker.core.step import Fetched, SampledToken
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason, Grammar, SamplingParams

MOST_LOGPROBS = 20
_MOST_BIAS = 100.0
_ID_MARK = "token_id:"
_CONNECTOR = "mell"
"""Its part of `kv_transfer_params`."""
_RETRIED = frozenset({408, 425, 429})
_ENDS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


class WrongAnswerError(Exception):
    """A server said what no vLLM server says; the message tells what."""


class RefusedError(Exception):
    """A server will never do what was asked; the message is its reason."""


class Chunk(NamedTuple):
    """What one chunk brings: tokens, perhaps the end, perhaps the news that the server has dropped the request."""

    tokens: list[SampledToken]
    end: FinishReason | None = None
    dropped: str = ""


def completion_request(
    model: str, ids: Sequence[int], prompt_tokens: int, sampling: SamplingParams, max_model_len: int
) -> dict[str, Any]:
    """Return the body that lets a sequence go on after `ids`, prompt and output so far.

    Everything is said, since a server fills what is left out from the model's own generation settings.
    """
    output = ids[prompt_tokens:]
    room = max_model_len - len(ids)
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ids),
        "stream": True,
        "return_token_ids": True,
        "max_tokens": room if sampling.max_tokens is None else min(room, sampling.max_tokens - len(output)),
        "min_tokens": max(0, sampling.min_tokens - len(output)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.temperature > 0:
        body["seed"] = seed_at(sampling, len(output))
    if bias := _bias(sampling, output):
        body["logit_bias"] = bias
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.grammar is not None:
        body["structured_outputs"] = structured_outputs(sampling.grammar)
    return body


def warm_up_request(model: str, ids: Sequence[int], kv_source: str = "") -> dict[str, Any]:
    """Return the body that brings `ids` into the server's prefix cache; its one token is of no use.

    With a `kv_source`, the address of another server's connector, it fetches from there what it can.
    """
    body: dict[str, Any] = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
    if kv_source:
        body["kv_transfer_params"] = {_CONNECTOR: {"from": kv_source}}
    return body


class Connector(NamedTuple):
    """What a server's KV connector (`mell_vllm_connector`) tells of itself."""

    address: str
    block_bytes: int


def connector_request(model: str) -> dict[str, Any]:
    """Return the body that lets a server's connector, if there is one, tell of itself."""
    return {**warm_up_request(model, [0]), "kv_transfer_params": {_CONNECTOR: {}}}


def read_connector(said: dict[str, Any]) -> Connector | None:
    """Return what the answer to `connector_request` tells; None: there is none."""
    told = _of_connector(said)
    address, block_bytes = told.get("address"), told.get("block_bytes")
    if not (isinstance(address, str) and isinstance(block_bytes, int)):
        return None
    return Connector(address, block_bytes)


def read_fetched(said: dict[str, Any]) -> Fetched:
    """Return what a server says that it fetched for a request."""
    told = _of_connector(said)
    figures = [told.get(name) for name in ("fetched_tokens", "fetched_bytes", "fetch_us")]
    return Fetched(*(figure if isinstance(figure, int) and figure >= 0 else 0 for figure in figures))


def _of_connector(said: dict[str, Any]) -> dict[str, Any]:
    parameters = said.get("kv_transfer_params")
    told = parameters.get(_CONNECTOR) if isinstance(parameters, dict) else None
    return told if isinstance(told, dict) else {}


def seed_at(sampling: SamplingParams, outputs: int) -> int:
    """Return the seed for the stretch that begins at this output index.

    A server's random numbers begin anew with each request: the same seed would repeat those of the output's beginning.
    """
    if not outputs and not sampling.choice:
        return sampling.seed
    digest = hashlib.blake2b(f"{sampling.seed} {sampling.choice} {outputs}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _bias(sampling: SamplingParams, output: Sequence[int]) -> dict[str, float]:
    """Return the logit bias, with the penalties for output that the server takes for a part of the prompt."""
    bias: dict[int, float] = dict(sampling.logit_bias)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        for token, count in Counter(output).items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            bias[token] = bias.get(token, 0.0) - penalty
    return {str(token): max(-_MOST_BIAS, min(_MOST_BIAS, value)) for token, value in bias.items()}


def structured_outputs(grammar: Grammar) -> dict[str, Any]:
    """Return a grammar in vLLM's form: a JSON schema as such, anything else as Lark."""
    schema = _schema(grammar.text)
    return {"grammar": grammar.text} if schema is None else {"json": schema}


def _schema(text: str) -> dict[str, Any] | None:
    """Return the JSON schema that is all of a grammar in llguidance's form, or None."""
    try:
        (only,) = json.loads(text)["grammars"]
        schema = only["json_schema"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(schema, dict):
        return None
    return {key: value for key, value in schema.items() if key != "x-guidance"}


def read_chunk(data: bytes | str, vocab_size: int, logprobs: int | None) -> Chunk:
    """Return what a `data:` line's JSON says; raises `WrongAnswerError`, `RefusedError`."""
    try:
        said = json.loads(data)
    except ValueError as error:
        raise WrongAnswerError("a chunk that is no JSON") from error
    if not isinstance(said, dict):
        raise WrongAnswerError("a chunk that is no object")
    if said.get("error"):
        if is_refusal(error_code(said)):
            raise RefusedError(error_text(said))
        return Chunk([], dropped=error_text(said))
    choices = said.get("choices")
    if not choices and said.get("usage"):
        return Chunk([])
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongAnswerError("a chunk without its one choice")
    (choice,) = choices
    ids = _ids(choice.get("token_ids"), vocab_size)
    tokens = [SampledToken(token) for token in ids] if logprobs is None else _with_logprobs(ids, choice, logprobs)
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        return Chunk(tokens, dropped=f"the server ended the request ({reason})")
    return Chunk(tokens, None if reason is None else _ENDS.get(str(reason), "stop"))


def _ids(ids: Any, vocab_size: int) -> list[int]:
    if ids is None:
        return []
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise WrongAnswerError("token ids that are none")
    return ids


def _with_logprobs(ids: list[int], choice: dict[str, Any], most: int) -> list[SampledToken]:
    try:
        told = choice.get("logprobs") or {}
        chosen, tops = told.get("token_logprobs", []), told.get("top_logprobs", [])
        if not len(ids) == len(chosen) == len(tops):
            raise WrongAnswerError("log-probabilities of other tokens than it made")
        rows = zip(ids, chosen, tops, strict=True)
        return [SampledToken(token, _logprobs(logprob, top or {}, most)) for token, logprob, top in rows]
    except (AttributeError, TypeError, ValueError) as error:
        raise WrongAnswerError("log-probabilities that cannot be read") from error


def _logprobs(logprob: float, top: dict[str, float], most: int) -> TokenLogprobs:
    ranked = sorted(top.items(), key=lambda item: -item[1])[:most]
    return TokenLogprobs(
        logprob=float(logprob),
        top_ids=[int(name.removeprefix(_ID_MARK)) for name, _ in ranked],
        top_logprobs=tuple(float(value) for _, value in ranked),
    )


def is_refusal(status: int) -> bool:
    """Whether an HTTP status says that the same request will never be answered."""
    return 400 <= status < 500 and status not in _RETRIED


def error_code(said: dict[str, Any]) -> int:
    """Return the HTTP status in an error's body; 0 if there is none."""
    error = said.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 0


def error_text(said: Any) -> str:
    """Return the words of an error's body, on one line."""
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or "no reason given").split())[:300]
