"""The bare engine loop against transformers' `generate`, interleaved round by round in one process.

For each batch and context: tokens/s of both, the median of the rounds' ratios and their range. A ratio whose range
spans its target shows nothing. Each round also tells how fast memory can be read just then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.torch_engine import TorchEngine, load_torch_engine
from mell_gpu_worker.model_store import pull
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import default_model_dir
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, spread

ROUNDS = 5
NEW_TOKENS = 12
PREFILL = 512
GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)


@dataclass
class Setup:
    """The same weights in our engine and in transformers."""

    engine: TorchEngine
    model: Any
    vocab: int


@pytest.fixture(scope="module")
def setup() -> Setup:
    """Load the default model twice."""
    folder = pull("smollm2-135m", default_model_dir(), lambda _stage, _fraction: None)
    options = EngineOptions(engine="torch", model="smollm2-135m", model_dir=default_model_dir(), kv_blocks=1200)
    engine = load_torch_engine(options)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    return Setup(engine, load(folder, dtype=torch.float32), engine.spec.vocab_size)


def _prompts(batch: int, tokens: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    rows: list[list[int]] = torch.randint(3, vocab, (batch, tokens), generator=generator).tolist()
    return rows


def _rows(sequences: list[list[int]], prompt: int, start: int) -> list[StepRow]:
    blocks = -(-(prompt + NEW_TOKENS) // 16)
    return [
        StepRow(f"{i}", ids, prompt, start, len(ids) - start, range(i * blocks, (i + 1) * blocks), GREEDY)
        for i, ids in enumerate(sequences)
    ]


def _engine_decode_s(setup: Setup, prompts: list[list[int]]) -> float:
    """Time decode steps; whatever keys the pool holds cost the same to read, so nothing is prefilled."""
    sequences = [list(ids) for ids in prompts]
    began = time.perf_counter()
    for _ in range(NEW_TOKENS):
        result = setup.engine.execute(_rows(sequences, len(prompts[0]), len(sequences[0]) - 1))
        for ids, sampled in zip(sequences, result.sampled, strict=True):
            ids.append(sampled.token_id if sampled else 0)
    return time.perf_counter() - began


def _generate_decode_s(setup: Setup, prompts: list[list[int]], cache: DynamicCache) -> float:
    """Time `generate` going on from a cache that holds all but the last token; the cache is cut back after."""
    ids = torch.tensor(prompts)
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
    began = time.perf_counter()
    with torch.inference_mode():
        setup.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments)
    took_s = time.perf_counter() - began
    cache.crop(len(prompts[0]) - 1 - cache.get_seq_length())
    return took_s


def _random_cache(setup: Setup, batch: int, tokens: int) -> DynamicCache:
    shape = setup.engine.pool.shape
    cache = DynamicCache()
    with torch.inference_mode():
        for layer in range(shape.layers):
            size = (batch, shape.kv_heads, tokens, shape.head_dim)
            cache.update(torch.randn(size), torch.randn(size), layer)
    return cache


def _row(name: str, tokens: int, ours: list[float], theirs: list[float], memory: list[float]) -> list[str]:
    """Return a table's row from the seconds that both took for so many tokens in each round."""
    rates = [[tokens / time_s for time_s in times] for times in (ours, theirs)]
    ratios = [our / their for our, their in zip(*rates, strict=True)]
    return [name, *(spread(rate) for rate in rates), spread(ratios, 2), spread(memory, 1)]


def _tell(rows: list[list[str]]) -> None:
    head = ("what", "engine, tokens/s", "transformers, tokens/s", "ratio", "memory read, GB/s")
    print_table(f"Engine on the default model, {ROUNDS} rounds", head, rows)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_decode(setup: Setup) -> None:
    """Decode tokens/s of full batches, each at one context."""
    _tell([_decode(setup, batch, context) for batch in (1, 8, 32) for context in (64, 500)])


def _decode(setup: Setup, batch: int, context: int) -> list[str]:
    prompts = _prompts(batch, context, setup.vocab)
    cache = _random_cache(setup, batch, context - 1)
    setup.engine.pool.data[:-1].normal_()
    ours, theirs, memory = [], [], []
    for _ in range(ROUNDS):
        memory.append(memory_read_gb_per_s())
        ours.append(_engine_decode_s(setup, prompts))
        theirs.append(_generate_decode_s(setup, prompts, cache))
    return _row(f"decode, batch {batch}, context {context}", batch * NEW_TOKENS, ours, theirs, memory)


@pytest.mark.benchmark
@pytest.mark.timeout(300)
def test_prefill(setup: Setup) -> None:
    """Prefill tokens/s of one prompt in one step, against a forward pass of the model's own."""
    prompt = _prompts(1, PREFILL, setup.vocab)
    ours, theirs, memory = [], [], []
    for _ in range(ROUNDS):
        memory.append(memory_read_gb_per_s())
        began = time.perf_counter()
        setup.engine.execute(_rows(prompt, PREFILL, 0))
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.inference_mode():
            setup.model(torch.tensor(prompt), logits_to_keep=1)
        theirs.append(time.perf_counter() - began)
    _tell([_row(f"prefill of {PREFILL} tokens", PREFILL, ours, theirs, memory)])
