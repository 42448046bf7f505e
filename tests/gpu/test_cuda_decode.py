"""The fast path of the torch engine on a GPU: recorded decode steps, sampling on the device, one wait a step."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.cuda_graphs import CudaGraphs
from mell_gpu_worker.engine.decode_runner import DecodeLimits, DecodeRunner
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.sampler import Sampler
from mell_gpu_worker.engine.torch_engine import TorchEngine, load_torch_engine
from mell_shared.messages.sampling import SamplingParams
from tests.gpu_worker.engine.compared import Compared, plain_runner
from tests.gpu_worker.engine.driver import Driver, some_jobs
from tests.gpu_worker.engine.families import FAMILIES, VOCAB, make_config, save_model

# Needs one CUDA device and Triton. Has not been run yet: no GPU was at hand.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SAMPLINGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 5, "logprobs": 3},
    {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"min_p": 0.1, "repetition_penalty": 1.4, "logit_bias": {7: 3.0}},
    {"temperature": 1.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "min_tokens": 9, "stop_token_ids": (3,)},
]


def load(folder: Path, family: str, **options: Any) -> TorchEngine:
    """Return an engine on the GPU over a tiny model, in float32."""
    save_model(make_config(**FAMILIES[family]), folder)
    values = {"device": "cuda", "dtype": "float32", "kv_blocks": 200, "max_sequences": 20, **options}
    return load_torch_engine(EngineOptions(engine="torch", model=str(folder), model_dir=folder, **values))


def sampled_rows(tokens: int) -> list[StepRow]:
    """A decode of so many tokens for each of `SAMPLINGS`."""
    source = random.Random(tokens)
    rows = []
    for index, values in enumerate(SAMPLINGS):
        ids = [source.randrange(VOCAB) for _ in range(tokens)]
        sampling = SamplingParams(seed=index, **values)
        rows.append(StepRow(str(index), ids, 4, tokens - 1, 1, [4 * index + i for i in range(4)], sampling))
    return rows


def waits(run: Callable[[], Any]) -> list[str]:
    """Return what torch says of each time that the host waits for the device while it runs."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in told if "called a synchronizing" in str(warning.message)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_graphs_give_the_logits_of_plain_steps(family: str, tmp_path: Path) -> None:
    """For mixed batches, tables that grow, rows that leave, freed blocks full of NaN."""
    engine = load(tmp_path, family, compile="off")
    plain = plain_runner(engine)
    graphs = CudaGraphs(engine.pool.data.device)
    recorded = DecodeRunner(plain._model, engine.pool, plain._backend, graphs.record, DecodeLimits(rows=5, tokens=64))
    compared = Compared(plain, recorded)
    engine._open().runner = compared
    Driver(engine, seed=6, most_chunk=60).run(some_jobs(3))
    assert 3 in compared.decodes, "no step was padded"


def test_an_engine_on_a_gpu_replays_its_decodes(tmp_path: Path) -> None:
    """As loaded, nothing asked for: it records, and gives the tokens of an engine that does not."""
    outputs = []
    for compiling in ("auto", "off"):
        engine = load(tmp_path, "llama", compile=compiling)
        assert isinstance(engine._open().runner, DecodeRunner) == (compiling == "auto")
        jobs = some_jobs(5)
        Driver(engine, seed=2).run(jobs)
        outputs.append([job.output for job in jobs])
        engine.close()
    assert outputs[0] == outputs[1]


def test_a_decode_step_waits_for_the_device_once(tmp_path: Path) -> None:
    """Whatever its rows ask of sampling: at the end, for the tokens."""
    engine = load(tmp_path, "llama")
    engine.execute(sampled_rows(20))
    assert len(waits(lambda: engine.execute(sampled_rows(21)))) == 1


def test_the_device_samples_what_the_cpu_samples(tmp_path: Path) -> None:
    """The same tokens from the same logits, for every kind of parameter, over many steps."""
    sampler = Sampler(VOCAB, (), GrammarMasks(tmp_path, VOCAB, (), most_replays=1))
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        logits = torch.randn(len(SAMPLINGS), VOCAB, generator=generator) * 2
        rows = sampled_rows(10 + step)
        found, expected = (sampler.sample(values, rows)[0] for values in (logits.cuda(), logits))
        assert [token.token_id for token in found] == [token.token_id for token in expected]
