"""The bare engine loop against transformers' `generate`, vLLM's own engine and a floor, interleaved round by round.

vLLM for CPUs takes part where `make vllm-test` has made its environment. For each batch and context: tokens/s of each,
the median of the rounds' ratios and their range. A ratio whose range spans its target shows nothing. The floor of a
step is the longer of two times: that of reading weights and KV at the bandwidth, that of the operations at the rate,
both measured in the same round with the engine's threads.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from tests.benchmarks.figures import print_table, size, spread, verdict

ROUNDS = size("ROUNDS", 5)
THREADS = size("THREADS", 0)
NEW_TOKENS = 12
PREFILL = 512
GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, seed=0, ignore_eos=True)


DECODE_TARGETS = {1: 1.3, 8: 1.5, 32: 1.3}
VLLM_TARGET = 1.2
ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"


@dataclass
class Setup:
    """The same weights in our engine, in transformers, and in vLLM if it is here."""

    engine: TorchEngine
    model: Any
    vocab: int
    weights: int
    vllm: "Vllm | None"


@dataclass
class Took:
    """Seconds of one run: wall, and CPU of all threads."""

    wall_s: float
    cpu_s: float


@contextmanager
def _timed(times: list[Took]) -> Iterator[None]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    times.append(Took(time.perf_counter() - wall_s, time.process_time() - cpu_s))


class Vllm:
    """vLLM's engine in a process of its own; see `vllm_peer`."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [VLLM_PYTHON, "-m", "tests.benchmarks.vllm_peer", folder, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._answer() == {"ready": True}

    def took(self, prompts: list[list[int]], tokens: int) -> tuple[Took, Took]:
        """Return what the prefill of all prompts and then `tokens` decode steps took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        took = self._answer()
        return tuple(Took(took[f"{what}_wall_s"], took[f"{what}_cpu_s"]) for what in ("prefill", "decode"))  # type: ignore[return-value]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@dataclass
class Machine:
    """What the machine did in one round."""

    bytes_per_s: float
    operations_per_s: float

    def floor_s(self, moved_bytes: float, operations: float) -> float:
        """Return the least time for so much."""
        return max(moved_bytes / self.bytes_per_s, operations / self.operations_per_s)


def _measure_machine(data: torch.Tensor) -> Machine:
    """Read memory that no cache holds; multiply matrices that all caches hold."""
    began = time.perf_counter()
    data.sum()
    read_s = time.perf_counter() - began
    square = torch.ones(768, 768)
    began = time.perf_counter()
    for _ in range(4):
        square @ square
    return Machine(data.nbytes / read_s, 4 * 2 * 768**3 / (time.perf_counter() - began))


@pytest.fixture(scope="module")
def setup() -> Iterator[Setup]:
    """Load the default model for each."""
    folder = pull("smollm2-135m", default_model_dir(), lambda _stage, _fraction: None)
    options = EngineOptions(
        engine="torch", model="smollm2-135m", model_dir=default_model_dir(), kv_blocks=1200, threads=THREADS
    )
    engine = load_torch_engine(options)
    # Memory never written to is read from the cache, all of it one page of zeros.
    engine.pool.data.normal_()
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32)
    vllm = Vllm(folder) if VLLM_PYTHON.exists() else None
    yield Setup(engine, model, engine.spec.vocab_size, sum(p.numel() for p in model.parameters()), vllm)
    if vllm is not None:
        vllm.close()


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


def _decode_ours(setup: Setup, prompts: list[list[int]]) -> None:
    """Run decode steps; whatever keys the pool holds, they cost the same to read, so nothing is prefilled."""
    sequences = [list(ids) for ids in prompts]
    for _ in range(NEW_TOKENS):
        result = setup.engine.execute(_rows(sequences, len(prompts[0]), len(sequences[0]) - 1))
        for ids, sampled in zip(sequences, result.sampled, strict=True):
            ids.append(sampled.token_id if sampled else 0)


def _decode_theirs(setup: Setup, prompts: list[list[int]], cache: DynamicCache) -> None:
    """Let `generate` go on from a cache that holds all but the last token."""
    ids = torch.tensor(prompts)
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
    with torch.inference_mode():
        setup.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments)


def _random_cache(setup: Setup, batch: int, tokens: int) -> DynamicCache:
    shape = setup.engine.pool.shape
    cache = DynamicCache()
    with torch.inference_mode():
        for layer in range(shape.layers):
            size = (batch, shape.kv_heads, tokens, shape.head_dim)
            cache.update(torch.randn(size), torch.randn(size), layer)
    return cache


@dataclass
class Rounds:
    """All rounds of one line of the table."""

    name: str
    tokens: int
    target: float
    vllm_target: float
    ours: list[Took] = field(default_factory=list)
    theirs: list[Took] = field(default_factory=list)
    vllms: list[Took] = field(default_factory=list)
    floors_s: list[float] = field(default_factory=list)

    def line(self) -> list[str]:
        """Return a table's row."""
        cpu = [their.cpu_s / our.cpu_s for our, their in zip(self.ours, self.theirs, strict=True)]
        shares = [floor_s / our.wall_s for our, floor_s in zip(self.ours, self.floors_s, strict=True)]
        return [
            self.name,
            spread([self.tokens / floor_s for floor_s in self.floors_s]),
            spread([self.tokens / our.wall_s for our in self.ours]),
            *self._against(self.theirs, self.target),
            spread(cpu, 2),
            spread(shares, 2),
            *self._against(self.vllms, self.vllm_target),
        ]

    def _against(self, peers: list[Took], target: float) -> tuple[str, str]:
        """Return a peer's tokens/s, and ours over it."""
        if not peers:
            return "not here", "not run"
        ratios = [their.wall_s / our.wall_s for our, their in zip(self.ours, peers, strict=True)]
        rates = [self.tokens / their.wall_s for their in peers]
        return spread(rates), f"{spread(ratios, 2)}; {verdict(ratios, target)}"


def _tell(rounds: list[Rounds]) -> None:
    head = (
        "what",
        "floor, tok/s",
        "ours, tok/s",
        "transformers, tok/s",
        "ours / transformers",
        "in CPU time",
        "share of floor",
        "vLLM, tok/s",
        "ours / vLLM",
    )
    title = f"Engine on the default model, float32, {torch.get_num_threads()} threads, {ROUNDS} rounds in turn"
    print_table(title, head, [each.line() for each in rounds])


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_decode(setup: Setup) -> None:
    """Decode tokens/s of full batches, each at one context."""
    _tell([_decode(setup, batch, context) for batch in (1, 8, 32) for context in (64, 500)])


def _decode(setup: Setup, batch: int, context: int) -> Rounds:
    prompts = _prompts(batch, context, setup.vocab)
    cache = _random_cache(setup, batch, context - 1)
    setup.engine.pool.data[: setup.engine.pool.blocks].normal_()
    data = torch.ones(setup.weights)
    kv_bytes = batch * context * setup.engine.spec.block_bytes / setup.engine.spec.block_tokens
    rounds = Rounds(f"decode, batch {batch}, context {context}", batch * NEW_TOKENS, DECODE_TARGETS[batch], VLLM_TARGET)
    for _ in range(ROUNDS):
        machine = _measure_machine(data)
        rounds.floors_s.append(NEW_TOKENS * machine.floor_s(data.nbytes + kv_bytes, 2 * setup.weights * batch))
        with _timed(rounds.ours):
            _decode_ours(setup, prompts)
        with _timed(rounds.theirs):
            _decode_theirs(setup, prompts, cache)
        if setup.vllm is not None:
            rounds.vllms.append(setup.vllm.took(prompts, NEW_TOKENS)[1])
        cache.crop(context - 1 - cache.get_seq_length())
    return rounds


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_prefill(setup: Setup) -> None:
    """Prefill tokens/s of one prompt in one step, against a forward pass of the model's own."""
    prompt = _prompts(1, PREFILL, setup.vocab)
    data = torch.ones(setup.weights)
    operations = 2 * PREFILL * (setup.weights - setup.vocab * setup.model.config.hidden_size)
    rounds = Rounds(f"prefill of {PREFILL} tokens", PREFILL, 1.0, 1.0)
    for _ in range(ROUNDS):
        rounds.floors_s.append(_measure_machine(data).floor_s(data.nbytes, operations))
        with _timed(rounds.ours):
            setup.engine.execute(_rows(prompt, PREFILL, 0))
        with _timed(rounds.theirs), torch.inference_mode():
            setup.model(torch.tensor(prompt), logits_to_keep=1)
        if setup.vllm is not None:
            rounds.vllms.append(setup.vllm.took(prompt, 1)[0])
    _tell([rounds])


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_outside_the_model(setup: Setup) -> None:
    """Share of a step of 32 rows that is not spent computing logits: laying out, sampling."""
    runner: Any = setup.engine._open().runner
    run, inside = runner.run, list[Took]()

    def timed(*arguments: Any) -> torch.Tensor:
        with _timed(inside):
            logits: torch.Tensor = run(*arguments)
        return logits

    runner.run = timed
    lines = []
    for name, sampling in (("greedy", GREEDY), ("temperature 0.8, top_p 0.95", DRAWN)):
        inside.clear()
        steps: list[Took] = []
        prompts = _prompts(32, 500, setup.vocab)
        for _ in range(4 * ROUNDS):
            rows = [replace(row, sampling=sampling) for row in _rows(prompts, 500, 499)]
            with _timed(steps):
                setup.engine.execute(rows)
        shares = [1 - model.cpu_s / step.cpu_s for model, step in zip(inside, steps, strict=True)]
        lines.append(
            [name, spread([1e3 * step.cpu_s for step in steps], 1), spread([100 * each for each in shares], 1)]
        )
    runner.run = run
    print_table("A step of 32 rows at context 500", ("sampling", "CPU ms", "outside the model, % of CPU time"), lines)
