import ctypes
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.native import build, load
from mell_gpu_worker.engine.native.build import NativeUnavailableError, load_library
from mell_gpu_worker.engine.native.packing import PANEL, pack, packed_size, unpack
from mell_gpu_worker.engine.native.program import NativeProgram
from mell_gpu_worker.engine.native.runner import NativeRunner
from mell_gpu_worker.engine.runner import Runner, StepRunner
from mell_gpu_worker.engine.torch_engine import TorchEngine
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.driver import GREEDY, Driver, Job
from tests.gpu_worker.engine.families import FAMILIES, VOCAB, make_config, save_model
from tests.gpu_worker.engine.reference import Tally, generate

WIDE = {"head_dim": 16, "vocab_size": VOCAB + 3, "intermediate_size": 72}
"""A head size that the C++ step takes, and sizes that do not fill the last panel."""
MODELS: dict[str, dict[str, Any]] = {
    **{name: FAMILIES[name] for name in ("llama", "llama3_rope", "mistral", "qwen2", "qwen3")},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "one_kv_head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 32},
}
Made = Callable[[str], tuple[Path, Any]]

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build._COMPILERS)), reason="no C++ compiler: apt-get install g++"
)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build once for this module, apart from what the machine may have already."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "mell" / "native"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the folder and the reference model of each, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, save_model(make_config(**{**WIDE, **MODELS[name]}), folder)
        return made[name]

    return get


def runner_of(engine: TorchEngine) -> StepRunner:
    """Look inside: which path serves."""
    return engine._open().runner


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_output_of_any_mix_equals_generate_alone(
    name: str, threads: int, models: Made, make_engine: MakeEngine
) -> None:
    """Chunked prefill, shared prefixes and preemption in C++ give the tokens of `generate` for each alone."""
    folder, model = models(name)
    engine = make_engine(folder, compile="auto", threads=threads, block_tokens=4, kv_blocks=240)
    assert isinstance(runner_of(engine), NativeRunner)
    draw = random.Random(threads)
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.choice([1, 3, 30, 90]))] for _ in range(6)]
    jobs = [Job(str(i), list(ids), len(ids), draw.randint(8, 20)) for i, ids in enumerate(prompts)]
    Driver(engine, seed=threads, most_chunk=70).run(jobs)
    tally = Tally()
    for job, prompt in zip(jobs, prompts, strict=True):
        tally.compare(job.output, *generate(model, prompt, job.max_tokens))
    assert tally.ties == 0


@needs_compiler
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_numbers_do_not_depend_on_the_mix(name: str, models: Made, make_engine: MakeEngine) -> None:
    """A sequence's logits are bit for bit the same alone, chunked or whole, and among others on more threads."""
    engines = [make_engine(models(name)[0], compile="auto", threads=n, kv_blocks=200) for n in (1, 3)]
    texts = [[(7 * i + 3 * n) % VOCAB for i in range(length)] for n, length in enumerate((150, 9, 67, 101))]
    tables = [list(range(50 * n, 50 * n + 50)) for n in range(4)]

    def rows(chosen: list[int], cuts: list[tuple[int, int]]) -> list[StepRow]:
        return [
            StepRow(str(n), texts[n], 1, start, count, tables[n], GREEDY)
            for n, (start, count) in zip(chosen, cuts, strict=True)
        ]

    def last(runner: StepRunner, steps: list[list[StepRow]]) -> torch.Tensor:
        for step in steps:
            logits = runner.run(step, [step[0].count - 1])
        return logits[0]

    with torch.inference_mode():
        one, three = map(runner_of, engines)
        whole = last(one, [rows([0], [(0, 150)])])
        token_by_token = last(one, [rows([0], [(i, 1)]) for i in range(150)])
        others = [(0, 9), (0, 67), (0, 101)]
        mixed = last(
            three, [rows([0, 1, 2, 3], [(0, 83), *others]), rows([0], [(83, 66)]), rows([0, 2], [(149, 1), (66, 1)])]
        )
    assert torch.equal(whole, token_by_token)
    assert torch.equal(whole, mixed)


@needs_compiler
def test_seeded_output_survives_a_move_by_tokens(models: Made, make_engine: MakeEngine) -> None:
    """What goes on elsewhere from its ids alone, recomputed, samples the very tokens it would have had."""
    draws = GREEDY.model_copy(update={"temperature": 1.3, "seed": 5})
    engine = make_engine(models("qwen2")[0], compile="auto")
    stays = Job("a", list(range(1, 40)), 39, 30, draws)
    Driver(engine, seed=1).run([stays])
    moved = Job("b", list(range(1, 40)) + stays.output[:11], 39, 30, draws)
    Driver(make_engine(models("qwen2")[0], compile="auto", block_tokens=16), seed=2).run([moved])
    assert moved.output == stays.output


@needs_compiler
def test_a_sequence_with_bad_kv_fails_alone(models: Made, make_engine: MakeEngine) -> None:
    """NaN in one sequence's keys or values fails that row; the other's token is unharmed."""
    engine = make_engine(models("llama")[0], compile="auto")
    ids = list(range(1, 10))
    good_row = StepRow("a", ids, 9, 0, 9, [0, 1, 2], GREEDY)
    good = engine.execute([good_row]).sampled[0]
    going_on = StepRow("bad", [1, 2, 3, 4, 5, 6], 5, 5, 1, [3, 4], GREEDY)
    for part in (0, 1):
        engine.execute([StepRow("bad", [1, 2, 3, 4, 5], 5, 0, 5, [3, 4], GREEDY)])
        engine.pool.data[3, 1, part, 2] = float("nan")
        result = engine.execute([good_row, going_on])
        assert result.sampled == (good, None)
        assert result.failed == {1: "the model's logits are not finite"}


@needs_compiler
def test_new_tails_are_zeroed(models: Made, make_engine: MakeEngine) -> None:
    """A block that a step begins holds zeros past its end, as steps in Python leave it."""
    engine = make_engine(models("llama")[0], compile="auto")
    engine.pool.data[:4] = float("nan")
    engine.execute([StepRow("a", list(range(6)), 6, 0, 6, [2, 0], GREEDY)])
    assert engine.pool.data[2].isfinite().all()
    assert (engine.pool.data[0, :, :, 2:] == 0).all()
    assert engine.pool.data[1].isnan().all()


@needs_compiler
def test_a_step_that_computes_something_else_does_not_serve(
    models: Made, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If C++ gives other logits the engine serves in Python, with all its weights back in place."""
    folder, model = models("qwen3")
    real = NativeProgram

    def wrong(*arguments: Any) -> Any:
        program = real(*arguments)
        program.decoder.epsilon = 0.5
        return program

    monkeypatch.setattr(load, "NativeProgram", wrong)
    engine = make_engine(folder, compile="auto")
    assert isinstance(runner_of(engine), Runner)
    job = Job("a", [1, 2, 3], 3, 6)
    Driver(engine, seed=0).run([job])
    assert job.output == generate(model, [1, 2, 3], 6)[0]


@needs_compiler
def test_ids_outside_the_vocabulary_do_not_reach_cpp(models: Made, make_engine: MakeEngine) -> None:
    """What torch would raise for is not read from memory that is not ours."""
    engine = make_engine(models("llama")[0], compile="auto")
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        engine.execute([StepRow("a", [10**9], 1, 0, 1, [0], GREEDY)])
    with pytest.raises(AssertionError, match="outside the pool"):
        engine.execute([StepRow("a", [1], 1, 0, 1, [10**9], GREEDY)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "olmo2"}, "it knows llama"),
        ({"model_type": "llama", "head_dim": 8}, "multiple of 16"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "silu"),
    ],
)
def test_models_it_does_not_compute_are_served_in_python(
    changes: dict[str, Any], reason: str, make_engine: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is logged."""
    save_model(make_config(**{**WIDE, **changes}), tmp_path)
    assert isinstance(runner_of(make_engine(tmp_path, compile="auto")), Runner)
    assert reason in capsys.readouterr().out


def test_it_can_be_switched_off(models: Made, make_engine: MakeEngine) -> None:
    """`off` serves in Python even where C++ could."""
    assert isinstance(runner_of(make_engine(models("llama")[0], compile="off")), Runner)


def test_without_a_compiler_it_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says so, and nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeUnavailableError, match="no C\\+\\+ compiler"):
        load_library(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with its first error; no half-written library stays."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.h:1: fatal error: no omp.h' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeUnavailableError, match=r"fatal error: no omp\.h"):
        load_library(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


@needs_compiler
@pytest.mark.connected
def test_several_processes_build_once(tmp_path: Path) -> None:
    """Workers that start together wait for one build, and all can use it."""
    counting = tmp_path / "compiler"
    real = next(filter(None, map(shutil.which, build._COMPILERS)))
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {real} "$@" -O0\n')
    counting.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from mell_gpu_worker.engine.native.build import load_library; "
        "load_library(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "CXX": str(counting)}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")], env=environment) for _ in range(3)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0, 0]
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 5), (33, 8), (7, 3), (48, 1)])
def test_packing_is_a_permutation(outputs: int, inputs: int) -> None:
    """Unpacked, weights are bit for bit what they were; absent outputs are zero."""
    weight = torch.randn(outputs, inputs)
    packed = pack(weight, torch.zeros(packed_size(*weight.shape)))
    assert packed.shape == (-(-outputs // PANEL), inputs, PANEL)
    assert torch.equal(packed[0, :, 0], weight[0])
    assert torch.equal(unpack(packed, outputs), weight)
    assert packed.count_nonzero() == weight.count_nonzero()
    assert ctypes.sizeof(ctypes.c_float) == packed.element_size()
