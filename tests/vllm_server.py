"""A stand-in for a vLLM server: its API over real sockets, text made up from the ids, and faults on demand.

`python -m tests.vllm_server --port N` runs it as a process of its own, to be killed.
"""

import argparse
import asyncio
import hashlib
import json
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from aiohttp import web
from llguidance import LLMatcher

from mell_gpu_worker.engine.fake import ALPHABET
from mell_gpu_worker.engine.fake_grammar import ByteGrammars
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL, FAKE_VOCAB_SIZE

_PATIENCE_S = 60.0
_FORCED, _BANNED = 50.0, -50.0


def next_token(ids: Sequence[int], seed: int = 0) -> int:
    """Return the letter that follows these ids: it depends on every one of them."""
    digest = hashlib.blake2b(array("Q", ids).tobytes() + seed.to_bytes(8, "little"), digest_size=1).digest()
    return ALPHABET[digest[0] & 63]


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """Return the first `count` greedy tokens after a prompt."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


@dataclass
class Knobs:
    """What the server is, and what goes wrong there; may be turned while it runs."""

    model: str = FAKE_MODEL
    version: str = "0.32.0"
    max_model_len: int = 4096
    blocks: int = 257
    block_tokens: int = 16
    prefix_cache: bool = True
    key: str = ""
    token_s: float = 0.0
    """Between tokens."""
    chunk_tokens: int = 1
    other_blocks: int = 0
    """Held by requests of others."""
    waiting: int = 0
    health: int = 200
    gives_ids: bool = True
    """Off: as releases before 0.10.2."""
    gives_logprobs: bool = True
    tells_metrics: bool = True
    status: int = 200
    """Of completions."""
    cut_after: int = -1
    """Close the connection after so many tokens; -1: never."""
    end_after: int = -1
    """Say after so many tokens that the request was aborted; -1: never."""
    says: str = ""
    """Sent instead of a first chunk."""
    kv_address: str = ""
    """Where its connector gives KV; empty: it has none."""
    kv_refused: bool = False
    """Nothing can be fetched."""
    mute: bool = False
    """Tokens are made by nobody."""


@dataclass
class Seen:
    """What has been asked."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    left: int = 0
    """Clients that closed their connection before the end."""


class FakeVllm:
    """The server, on a thread of its own while the context lasts."""

    def __init__(self, port: int = 0, **knobs: Any) -> None:
        self.knobs = Knobs(**knobs)
        self.seen = Seen()
        self.port = port
        self._lengths: dict[int, int] = {}
        self._grammars = ByteGrammars()
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def used_blocks(self) -> int:
        """All that is held, by others too."""
        lengths = list(self._lengths.values())
        return self.knobs.other_blocks + sum(-(-length // self.knobs.block_tokens) for length in lengths)

    def __enter__(self) -> "FakeVllm":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(_PATIENCE_S)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stop(self) -> None:
        """Close the port and every connection, as the end of the process does."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_PATIENCE_S)

    def restart(self) -> None:
        """Listen again, on the same port; nothing of before is known."""
        asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(_PATIENCE_S)

    def until(self, condition: Any) -> None:
        """Wait until `condition()` holds of what was seen."""
        with self._news:
            assert self._news.wait_for(condition, _PATIENCE_S), "never seen"

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/knobs", self._turn)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _turn(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            setattr(self.knobs, name, value)
        return web.json_response({"running": self.seen.running, "left": self.seen.left, "bodies": self.seen.bodies})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.knobs.health)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.knobs.version})

    async def _models(self, request: web.Request) -> web.Response:
        if self.knobs.key and request.headers.get("Authorization") != f"Bearer {self.knobs.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        names = self.knobs.model.split(",")
        cards = [{"id": name, "object": "model", "max_model_len": self.knobs.max_model_len} for name in names]
        return web.json_response({"object": "list", "data": cards})

    async def _metrics(self, request: web.Request) -> web.Response:
        knobs = self.knobs
        labels = f'engine="0",model_name="{knobs.model}"'
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{labels}}} {float(len(self._lengths))}",
            f"vllm:num_requests_waiting{{{labels}}} {float(knobs.waiting)}",
            f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} {float(knobs.waiting)}',
            f"vllm:kv_cache_usage_perc{{{labels}}} {self.used_blocks / (knobs.blocks - 1)}",
            f'vllm:cache_config_info{{block_size="{knobs.block_tokens}",enable_prefix_caching="{knobs.prefix_cache}",'
            f'engine="0",kv_cache_size_tokens="None",num_gpu_blocks="{knobs.blocks}"}} 1.0',
        ]
        return web.Response(text="\n".join(lines if knobs.tells_metrics else lines[:1]) + "\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        knobs = self.knobs
        refusal = self._refusal(body)
        if refusal or knobs.status != 200:
            status, text = refusal or (knobs.status, "it is not well")
            return web.json_response({"error": {"message": text, "code": status}}, status=status)
        self.seen.bodies.append(body)
        number = id(body)
        self._lengths[number] = len(body["prompt"])
        self.seen.running += 1
        self._tell()
        try:
            return await self._answer(request, body, number)
        except (asyncio.CancelledError, ConnectionError):
            self.seen.left += 1
            raise
        finally:
            del self._lengths[number]
            self.seen.running -= 1
            self._tell()

    async def _answer(self, request: web.Request, body: dict[str, Any], number: int) -> web.StreamResponse:
        if body.get("stream"):
            return await self._stream(request, body, number)
        await asyncio.sleep(self.knobs.token_s)
        choice, _ = self._choice(body, list(body["prompt"]), [], body["max_tokens"])
        return web.json_response({"choices": [choice], "kv_transfer_params": self._connector(body)})

    def _connector(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """What its connector says of a request; it finds all full blocks wherever it is sent."""
        knobs, asked = self.knobs, (body.get("kv_transfer_params") or {}).get("mell")
        if asked is None or not knobs.kv_address:
            return None
        size, block_bytes = knobs.block_tokens, 64 * knobs.block_tokens
        told: dict[str, Any] = {"address": knobs.kv_address, "layout": "layout"}
        told |= {"block_tokens": size, "block_bytes": block_bytes}
        if asked.get("from"):
            blocks = 0 if knobs.kv_refused else len(body["prompt"]) // size
            told |= {"fetched_tokens": blocks * size, "fetched_bytes": blocks * block_bytes, "fetch_us": 1000}
        return {"mell": told}

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()

    def _refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        if body["model"] not in self.knobs.model.split(","):
            return 404, f"The model `{body['model']}` does not exist."
        if len(body["prompt"]) + body.get("max_tokens", 16) > self.knobs.max_model_len:
            return 400, "This model's maximum context length is exceeded."
        if "logprobs" in body and not self.knobs.gives_logprobs:
            return 400, "Requested sample logprobs of 20, which is greater than max allowed: 0"
        return None

    async def _stream(self, request: web.Request, body: dict[str, Any], number: int) -> web.StreamResponse:
        knobs, response = self.knobs, web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if knobs.says:
            await response.write(f"data: {knobs.says}\n\n".encode())
            return response
        if any(token >= FAKE_VOCAB_SIZE for token in body["prompt"]):
            await _send(response, {"error": {"message": "Token id is out of vocabulary", "code": 400}})
            return await _done(response)
        ids, output = list(body["prompt"]), list[int]()
        end = None
        while end is None:
            if knobs.mute:
                await asyncio.Event().wait()
            await asyncio.sleep(knobs.token_s)
            if len(output) == knobs.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            if len(output) == knobs.end_after:
                await _send(
                    response, {"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": "abort"}]}
                )
                break
            choice, end = self._choice(body, ids, output, knobs.chunk_tokens)
            self._lengths[number] = len(ids)
            await _send(response, {"choices": [choice]})
        return await _done(response)

    def _choice(
        self, body: dict[str, Any], ids: list[int], output: list[int], most: int
    ) -> tuple[dict[str, Any], str | None]:
        """Make up to `most` tokens; returns a chunk's choice and why the output ends with it, if it does."""
        made: list[int] = []
        end = None
        while end is None and len(made) < most:
            token = self._token(body, ids, output)
            for column in (ids, output, made):
                column.append(token)
            stops = not body.get("ignore_eos") and token == FAKE_EOS_ID
            if len(output) > body.get("min_tokens", 0) and (stops or token in body.get("stop_token_ids", ())):
                end = "stop"
            elif len(output) == body["max_tokens"]:
                end = "length"
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": end, "logprobs": None}
        if body.get("return_token_ids") and self.knobs.gives_ids:
            choice["token_ids"] = made
        if "logprobs" in body:
            choice["logprobs"] = _logprobs(made, body["logprobs"])
        return choice, end

    def _token(self, body: dict[str, Any], ids: list[int], output: list[int]) -> int:
        value = next_token(ids, body.get("seed", 0))
        constraint = body.get("structured_outputs")
        if constraint:
            text = constraint.get("grammar") or LLMatcher.grammar_from_json_schema(constraint["json"])
            chosen = self._grammars.choose(text, output, value)
            return chosen if isinstance(chosen, int) else FAKE_EOS_ID
        bias = {int(token): value for token, value in body.get("logit_bias", {}).items()}
        ends = len(output) >= body.get("min_tokens", 0) and not body.get("ignore_eos")
        for token, add in bias.items():
            if add >= _FORCED and (ends or token != FAKE_EOS_ID):
                return token
        while bias.get(value, 0.0) <= _BANNED:
            value = ALPHABET[(ALPHABET.index(value) + 1) % len(ALPHABET)]
        return value


def _logprobs(made: list[int], count: int) -> dict[str, Any]:
    tops = [[token, *(other for other in range(60, 90) if other != token)][: max(1, count)] for token in made]
    return {
        "tokens": [f"token_id:{token}" for token in made],
        "token_logprobs": [-0.5] * len(made),
        "top_logprobs": [{f"token_id:{t}": -0.5 - rank for rank, t in enumerate(top)} for top in tops],
    }


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def _done(response: web.StreamResponse) -> web.StreamResponse:
    await response.write(b"data: [DONE]\n\n")
    return response


def main() -> None:
    """Run a server until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    for knob in fields(Knobs):
        if knob.type is not bool:
            parser.add_argument(f"--{knob.name.replace('_', '-')}", type=cast("Any", knob.type), default=knob.default)
    options = vars(parser.parse_args())

    async def serve() -> None:
        await FakeVllm(**options).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
