"""The `vllm` engine: an unmodified vLLM server stands behind the worker, sequences are streamed completions there.

A step is a look at what the streams have brought since the last one. Tokens are the server's; which of them count is
decided as ever: the core takes one for each row, and whoever goes on elsewhere does so from the ids that were taken.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog

from mell_gpu_worker.core.capabilities import Capabilities
from mell_gpu_worker.core.events import PoolMeasured
from mell_gpu_worker.core.step import Fetched, SampledToken, StepResult, StepRow
from mell_gpu_worker.engine.base import EngineAwayError, EngineError, EngineSpec
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.vllm.loop import LoopThread
from mell_gpu_worker.engine.vllm.metrics import CacheState
from mell_gpu_worker.engine.vllm.process import ServerProcess
from mell_gpu_worker.engine.vllm.server import ASK_S, UNREACHABLE, Server, ServerFacts
from mell_gpu_worker.engine.vllm.stream import Stream, Streaming
from mell_gpu_worker.engine.vllm.warm_up import WarmUp, WarmUps
from mell_shared.models import ModelNotFoundError, locate_model

_LOOK_S = 1.0
"""Longest time for which a step waits for a token, or for being woken."""
_GATHER_S = 0.002
"""A server's tokens of one step come within about this time: one message instead of many."""
_FACTS_S = 300.0
_ANY_TOKEN = 1 << 32


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an engine is made of once its server has answered."""

    loop: LoopThread
    server: Server
    process: ServerProcess | None
    facts: ServerFacts


class VllmEngine:
    """One vLLM server. Start it with `start_vllm_engine`."""

    def __init__(self, spec: EngineSpec, parts: _Parts, options: EngineOptions) -> None:
        self._spec = spec
        self._parts = parts
        self._options = options
        self._news = threading.Event()
        self._open: dict[str, Stream | WarmUp] = {}
        model, cache = parts.facts.model, parts.facts.cache
        self._streaming = Streaming(parts.server, model, spec.max_model_len, spec.vocab_size, self._news.set)
        self._warm_ups = WarmUps(parts.server, parts.facts, self._news.set)
        self._cache = cache
        self._seen_s = time.monotonic()
        self._missed = False

    @property
    def spec(self) -> EngineSpec:
        """What this engine is."""
        return self._spec

    # --- steps

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Look at what has come for `rows`; see `PacedEngine`. Raises `EngineError` if its own server has ended."""
        began_ns = time.perf_counter_ns()
        self._check_process()
        self._streaming.check()
        self._keep({row.sequence for row in rows})
        for row in rows:
            self._follow(row)
        if not any(self._open[row.sequence].ready for row in rows) and self._news.wait(_LOOK_S) and len(rows) > 1:
            time.sleep(_GATHER_S)
        # Before it is looked at what there is: what comes from now on is for the next look.
        self._news.clear()
        sampled: list[SampledToken | None] = []
        result = StepResult((), 0)
        pending: set[int] = set()
        for place, row in enumerate(rows):
            sampled.append(self._collect(place, row, result, pending))
        step_us = (time.perf_counter_ns() - began_ns) // 1000
        return StepResult(tuple(sampled), step_us, result.failed, frozenset(pending), result.ended, result.fetched)

    def _follow(self, row: StepRow) -> None:
        """Let the server work on a row, unless it does already."""
        work = self._open.get(row.sequence)
        if row.sampling is None:
            older = work if isinstance(work, WarmUp) else None
            if older is None or (older.ready and older.tokens < row.start + row.count):
                warm_up = self._warm_ups.begin(row.token_ids, row.start + row.count, row.kv_source, older)
                self._drop(row.sequence)
                self._open[row.sequence] = warm_up
                self._parts.loop.call(self._warm_ups.open, warm_up)
        elif not isinstance(work, Stream) or not work.follows(row.token_ids):
            self._drop(row.sequence)
            ids = list(row.token_ids)
            stream = Stream(row.token_ids, row.prompt_tokens, row.sampling, ids, len(ids), opened_s=time.monotonic())
            self._open[row.sequence] = stream
            self._parts.loop.call(self._streaming.open, stream)

    def _collect(self, place: int, row: StepRow, result: StepResult, pending: set[int]) -> SampledToken | None:
        work = self._open[row.sequence]
        if not work.ready or (isinstance(work, WarmUp) and work.tokens < row.start + row.count):
            pending.add(place)
            return None
        if isinstance(work, WarmUp):
            if work.fetched.tokens:
                result.fetched[place], work.fetched = work.fetched, Fetched()
            return None
        token = None
        if work.fresh:
            token = work.fresh.popleft()
            work.taken += 1
        elif work.failure:
            result.failed[place] = work.failure
        if work.end and not work.fresh:
            result.ended[place] = work.end
        return token

    def _keep(self, sequences: set[str]) -> None:
        """Drop everything that is for none of these: closing its connection ends a request at the server."""
        for sequence in [sequence for sequence in self._open if sequence not in sequences]:
            self._drop(sequence)

    def _drop(self, sequence: str) -> None:
        work = self._open.pop(sequence, None)
        if work is not None:
            closing = self._streaming.close if isinstance(work, Stream) else self._warm_ups.close
            self._parts.loop.call(closing, work)

    def wake(self) -> None:
        """End the look under way, or the next one; see `PacedEngine`."""
        self._news.set()

    def rest(self) -> None:
        """Drop all that goes on for anybody."""
        self._keep(set())

    # --- what is asked beside the steps

    def check_grammar(self, text: str) -> str | None:
        """Return None: the server itself judges grammars, when it gets them."""
        return None

    def measure(self) -> PoolMeasured:
        """Say how the server's memory stands; see `PacedEngine`."""
        self._check_process()
        try:
            self._cache = self._parts.loop.run(self._look(), 3 * ASK_S)
            self._seen_s, self._missed = time.monotonic(), False
        except UNREACHABLE as error:
            self._missed = True
            # A busy server may be slow to say how it is while its tokens come.
            silent_s = time.monotonic() - max(self._seen_s, self._streaming.heard_s)
            if silent_s >= self._options.vllm_away_s:
                why = str(error) or type(error).__name__
                raise EngineAwayError(
                    f"no answer from {self._parts.server.name} for {silent_s:.0f} s: {why}"
                ) from error
        self._check_progress()
        cache, step_us = self._cache, round(self._streaming.token_s * 1e6)
        return PoolMeasured(cache.blocks, cache.used_blocks, cache.waiting, step_us)

    async def _look(self) -> CacheState:
        if self._missed and not await self._parts.server.is_still(self._parts.facts):
            raise EngineError(
                f"the vLLM server at {self._parts.server.name} came back with another model, length or block size: "
                "start the worker anew"
            )
        return await self._parts.server.cache()

    def _check_progress(self) -> None:
        heard_s = max((work.heard_s for work in list(self._open.values())), default=None)
        if heard_s is not None and time.monotonic() - heard_s > self._options.step_timeout_s:
            raise EngineAwayError(
                f"no token from {self._parts.server.name} for {self._options.step_timeout_s:g} s (MELL_STEP_TIMEOUT_S)"
            )

    def _check_process(self) -> None:
        if self._parts.process is not None:
            self._parts.process.check()

    def kv_block(self, index: int) -> Any:
        """Raise `EngineError`: a server shows its memory to nobody."""
        raise EngineError("a vLLM server's KV cannot be read from here: ids go to the other worker, no blocks")

    def scratch(self, size_bytes: int) -> Any:
        """Raise `EngineError`, as `kv_block`."""
        return self.kv_block(size_bytes)

    def close(self) -> None:
        """End all requests and, if the worker started it, the server; safe to repeat."""
        self.rest()
        _close(self._parts.loop, self._parts.server, self._parts.process)


def start_vllm_engine(options: EngineOptions) -> VllmEngine:
    """Return an engine whose server has answered and been checked; blocks until then. Raises `EngineError`."""
    process = ServerProcess(options.vllm_command) if options.vllm_command else None
    loop, server = LoopThread(), Server(options)
    try:
        facts = loop.run(_arrive(server, process, options), options.vllm_start_s + _FACTS_S)
        spec = _spec(options, facts, server.name)
    except UNREACHABLE as error:
        _close(loop, server, process)
        why = str(error) or type(error).__name__
        raise EngineError(f"no vLLM server answers at {server.name} ({why}): start one, or set --vllm-url") from error
    except EngineError:
        _close(loop, server, process)
        raise
    structlog.get_logger().info(
        "vllm_server",
        url=server.name,
        version=facts.version,
        model=facts.model,
        prefix_cache=facts.cache.prefix_cache,
        kv_source=spec.kv_source or "none",
    )
    return VllmEngine(spec, _Parts(loop, server, process, facts), options)


async def _arrive(server: Server, process: ServerProcess | None, options: EngineOptions) -> ServerFacts:
    if process is not None:
        await server.wait(options.vllm_start_s, process.check)
    return await server.facts()


def _close(loop: LoopThread, server: Server, process: ServerProcess | None) -> None:
    if loop.alive:
        loop.run(server.close(), ASK_S)
        loop.close()
    if process is not None:
        process.stop()


def _spec(options: EngineOptions, facts: ServerFacts, url: str) -> EngineSpec:
    cache = facts.cache
    if options.max_model_len > facts.max_model_len:
        raise EngineError(
            f"--max-model-len {options.max_model_len} is over the {facts.max_model_len} of the vLLM server at {url}"
        )
    if options.block_tokens not in (0, cache.block_tokens):
        raise EngineError(
            f"--block-tokens {options.block_tokens} is not the block size of the vLLM server at {url}: leave it out, "
            f"or set it to {cache.block_tokens}"
        )
    if options.kv_blocks > cache.blocks:
        raise EngineError(f"--kv-blocks {options.kv_blocks} is over the {cache.blocks} of the vLLM server at {url}")
    vocab_size, eos = _vocabulary(options)
    # Without a prefix cache there is no place for KV that is fetched before its sequence runs.
    connector = facts.connector if cache.prefix_cache else None
    return EngineSpec(
        name="vllm",
        device=urlsplit(url).netloc,
        # The same for all: they move by tokens whatever their KV is like, and connectors know what fits themselves.
        kv_layout="vllm",
        max_model_len=options.max_model_len or facts.max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=eos,
        kv_blocks=options.kv_blocks or cache.blocks,
        block_tokens=cache.block_tokens,
        block_bytes=connector.block_bytes if connector else 0,
        migration_modes=("kv", "tokens") if connector else ("tokens",),
        kv_source=connector.address if connector else "",
        can=Capabilities(
            blocks="estimated",
            chunked_prefill=False,
            prefix_cache=cache.prefix_cache,
            logprobs=facts.logprobs,
            grammars="from_the_start",
            seeded_sameness=False,
            kv="fetched",
            own_pace=True,
        ),
    )


def _vocabulary(options: EngineOptions) -> tuple[int, tuple[int, ...]]:
    """Return size and end tokens from the model's folder, where there is one; else the server alone knows them."""
    try:
        folder = locate_model(options.model, options.model_dir)
    except ModelNotFoundError:
        return _ANY_TOKEN, ()
    config = json.loads((folder / "config.json").read_text())
    generation = folder / "generation_config.json"
    said = json.loads(generation.read_text()) if generation.is_file() else {}
    eos = said.get("eos_token_id", config.get("eos_token_id"))
    size = config.get("vocab_size")
    ids = tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else ()
    return (size if isinstance(size, int) else _ANY_TOKEN), ids
