"""One vLLM server as asked over HTTP: what it is, whether it can be used, how it stands."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.vllm.api import MOST_LOGPROBS, Connector, connector_request, error_text, read_connector
from mell_gpu_worker.engine.vllm.metrics import CacheState, NoMetricsError, read_metrics

UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)
"""What asking a server raises if it is not there, or leaves in mid-sentence."""
_CONNECT_S = 5.0
ASK_S = 5.0
"""For an answer that costs the server nothing."""
_PROBE_S = 120.0
"""For a first token, for which a server may still have to compile."""
_LONGEST_LINE_BYTES = 1 << 23
"""A stream's first chunk repeats the prompt's ids."""
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What does not change while a server runs."""

    model: str
    max_model_len: int
    cache: CacheState
    version: str
    logprobs: bool
    connector: Connector | None = None


class Server:
    """Asks the server at `options.vllm_url`. Everything runs on one event loop."""

    def __init__(self, options: EngineOptions) -> None:
        self.url = options.vllm_url.rstrip("/")
        scheme, found, rest = self.url.rpartition("://")
        self.name = scheme + found + rest.rpartition("@")[2]
        """The address without a password, for logs."""
        self._options = options
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        """Return the connections, made at first use."""
        if self._session is None:
            key = self._options.vllm_api_key
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                read_bufsize=_LONGEST_LINE_BYTES,
            )
        return self._session

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def complete(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a completion; leaving the context closes its connection, and so ends it at the server."""
        response = await self.session().post(f"{self.url}/v1/completions", json=body)
        try:
            yield response
        finally:
            response.close()

    async def wait(self, patience_s: float, check: Callable[[], None]) -> None:
        """Wait until the server answers; raises what it raised last, or what `check` raises meanwhile."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + patience_s
        while True:
            try:
                await self._ask("/health")
            except UNREACHABLE:
                if loop.time() >= until_s:
                    raise
                check()
                await asyncio.sleep(_PAUSE_S)
            else:
                return

    async def facts(self) -> ServerFacts:
        """Return what the server is; raises `EngineError` if it cannot stand for an engine, and `UNREACHABLE`."""
        model, max_model_len = await self._model()
        cache = await self.cache()
        version = (await self._json("/version")).get("version", "of an unknown version")
        logprobs = await self._probe(model, str(version))
        return ServerFacts(model, max_model_len, cache, str(version), logprobs, await self._connector(model))

    async def _model(self) -> tuple[str, int]:
        cards = (await self._json("/v1/models")).get("data") or []
        wanted = self._options.vllm_model
        found = [card for card in cards if card.get("id") == (wanted or self._options.model)]
        if not found and not wanted:
            found = cards
        if len(found) != 1:
            names = ", ".join(str(card.get("id")) for card in cards) or "none"
            text = f"has no model {wanted!r}, it has: {names}" if wanted else f"serves several models: {names}"
            raise EngineError(f"the vLLM server at {self.name} {text}; set --vllm-model")
        length = found[0].get("max_model_len")
        if not isinstance(length, int) or length < 1:
            raise EngineError(f"the server at {self.name} tells no max_model_len: it is no vLLM server; set --vllm-url")
        return str(found[0]["id"]), length

    async def is_still(self, facts: ServerFacts) -> bool:
        """Whether the server, gone meanwhile, is what it was as far as a worker has told others."""
        cards = (await self._json("/v1/models")).get("data") or []
        same = any((card.get("id"), card.get("max_model_len")) == (facts.model, facts.max_model_len) for card in cards)
        return same and (await self.cache()).block_tokens == facts.cache.block_tokens

    async def cache(self) -> CacheState:
        """Return how its KV cache stands; raises `EngineError` if it does not tell, and `UNREACHABLE`."""
        await self._ask("/health")
        try:
            return read_metrics(await self._ask("/metrics"))
        except (NoMetricsError, ValueError) as error:
            raise EngineError(
                f"the metrics of the vLLM server at {self.name} lack {error}: start it without --disable-log-stats"
            ) from error

    async def _probe(self, model: str, version: str) -> bool:
        """Let it make one token; returns whether log-probabilities can be had."""
        body = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        said = await self._completion(body)
        ids = (said.get("choices") or [{}])[0].get("token_ids")
        if not isinstance(ids, list) or len(ids) != 1:
            raise EngineError(
                f"the vLLM server at {self.name} ({version}) gives no token ids: it must be version 0.10.2 or newer"
            )
        more = {"logprobs": MOST_LOGPROBS, "return_tokens_as_token_ids": True}
        try:
            await self._completion(body | more)
        except EngineError:
            return False
        return True

    async def _connector(self, model: str) -> Connector | None:
        """Ask for its KV connector; a server that has another one, or none, says nothing of it."""
        try:
            return read_connector(await self._completion(connector_request(model)))
        except EngineError:
            return None

    async def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        async with asyncio.timeout(_PROBE_S), self.complete(body) as response:
            said = await json_of(response)
            if response.status != 200:
                raise EngineError(f"the vLLM server at {self.name} refuses a completion: {error_text(said)}")
            return said

    async def _json(self, path: str) -> dict[str, Any]:
        async with self.session().get(self.url + path, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            self._check(response)
            return await json_of(response)

    async def _ask(self, path: str) -> str:
        async with self.session().get(self.url + path, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            self._check(response)
            return await response.text()

    def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status in (401, 403):
            raise EngineError(f"the vLLM server at {self.name} asks for another API key: set MELL_VLLM_API_KEY")
        if response.status == 404:
            path = response.url.path
            raise EngineError(f"there is no {path} at {self.name}: set --vllm-url to a vLLM server, without a path")
        response.raise_for_status()


async def json_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the object that an answer is; empty if it is something else."""
    try:
        said = await response.json(content_type=None)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {}
