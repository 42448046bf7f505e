import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine import factory
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.torch_engine import TorchEngine
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import ModelNotFoundError
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.driver import GREEDY, Driver, Job
from tests.gpu_worker.engine.families import make_config, save_model

TinyModels = Callable[[str], tuple[Path, Any]]


def row(name: str, ids: list[int], blocks: list[int], sampling: SamplingParams | None = GREEDY) -> StepRow:
    """A whole prompt in one row."""
    return StepRow(name, ids, len(ids), 0, len(ids), blocks, sampling)


def test_the_spec_says_what_the_engine_is(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """Sizes come from the model and the options."""
    engine = make_engine(tiny_models("llama")[0], kv_blocks=9, block_tokens=8, max_model_len=100)
    spec = engine.spec
    assert (spec.name, spec.device, spec.vocab_size, spec.eos_token_ids) == ("torch", "cpu", 160, ())
    assert (spec.kv_blocks, spec.block_tokens, spec.max_model_len) == (9, 8, 100)
    assert spec.block_bytes == 3 * 2 * 8 * 2 * 8 * 4 == engine.pool.block(0).numel()


def test_the_layout_tells_pools_apart(tiny_models: TinyModels, make_engine: MakeEngine, tmp_path: Path) -> None:
    """Equal models and blocks have one layout; other weights, block sizes or types another."""
    folder = tiny_models("llama")[0]
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    same = make_engine(folder).spec.kv_layout
    assert make_engine(other).spec.kv_layout == same
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    others = [make_engine(other), make_engine(folder, block_tokens=8), make_engine(folder, dtype="bfloat16")]
    assert len({same, *(engine.spec.kv_layout for engine in others)}) == 4


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": [3, 5]}, (3, 5)), ({"eos_token_id": 4}, (4,)), ({}, (7,))]
)
def test_end_tokens_come_from_the_generation_configuration(
    generation: dict[str, Any], expected: tuple[int, ...], make_engine: MakeEngine, tmp_path: Path
) -> None:
    """The generation configuration's end tokens win, one or several; else the model's."""
    save_model(make_config(model_type="llama", eos_token_id=7), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert make_engine(tmp_path).spec.eos_token_ids == expected


def test_rows_that_do_not_sample_give_nothing(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """Results stand at their rows' places; a step may sample nothing at all."""
    engine = make_engine(tiny_models("llama")[0])
    rows = [row("a", [1, 2, 3], [5], None), row("b", [4, 5], [6]), row("c", [6], [7], None)]
    result = engine.execute(rows)
    assert [sampled is None for sampled in result.sampled] == [True, False, True]
    assert result.step_us > 0
    assert engine.execute(rows[:1]).sampled == (None,)


def test_sampled_output_does_not_depend_on_the_mix(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """Seeded sampling gives a sequence the same tokens alone and among others, chunked and preempted."""
    engine = make_engine(tiny_models("qwen3")[0])

    def jobs() -> list[Job]:
        sampling = [
            SamplingParams(seed=n, temperature=1.2, top_p=0.9, top_k=40 * (n % 2), frequency_penalty=0.3)
            for n in range(6)
        ]
        return [Job(f"{n}", [n + 1] * (5 * n + 1), 5 * n + 1, 20, sampling[n]) for n in range(6)]

    together, alone = jobs(), jobs()
    Driver(engine, seed=1).run(together)
    for job in alone:
        Driver(engine, seed=2).run([job])
    assert [job.output for job in together] == [job.output for job in alone]
    assert len({tuple(job.output) for job in together}) == 6


def test_a_sequence_with_bad_kv_fails_alone(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """NaN in one sequence's KV fails that row; the other's token, and a later user of the block, are unharmed."""
    engine = make_engine(tiny_models("llama")[0])
    good = engine.execute([row("a", list(range(1, 10)), [0, 1, 2])]).sampled[0]
    engine.execute([row("bad", [1, 2, 3, 4, 5], [3, 4])])
    engine.pool.data[3] = float("nan")
    going_on = StepRow("bad", [1, 2, 3, 4, 5, 6], 5, 5, 1, [3, 4], GREEDY)
    result = engine.execute([row("a", list(range(1, 10)), [0, 1, 2]), going_on])
    assert result.sampled == (good, None)
    assert result.failed == {1: "the model's logits are not finite"}
    assert engine.execute([row("a", list(range(1, 10)), [4, 3, 2])]).sampled[0] == good


def test_bfloat16_runs_and_passes_its_check(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """The self-check accepts reduced precision, and the pool has its type."""
    engine = make_engine(tiny_models("gemma2")[0], dtype="bfloat16")
    assert engine.pool.data.dtype == torch.bfloat16
    assert engine.execute([row("a", [1, 2, 3], [5])]).sampled[0] is not None


def test_memory_share_sizes_the_pool(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """Without kv_blocks the pool takes its share of free memory, but no more than all sequences can fill."""
    engine = make_engine(tiny_models("llama")[0], kv_blocks=0, memory_share=0.01, max_sequences=3, max_model_len=30)
    assert engine.spec.kv_blocks == 3 * 8


def test_close_frees_and_may_be_repeated(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """After close a step is a bug, closing again is not."""
    engine = make_engine(tiny_models("llama")[0])
    engine.close()
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.execute([row("a", [1], [0])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 257}, "over the model's context of 256 tokens"),
        ({"kv_blocks": 1 << 40}, "lower --kv-blocks"),
        ({"kv_blocks": 0, "memory_share": 1e-12}, "raise --memory-share"),
        ({"device": "tpu"}, "unknown device|not supported"),
        ({"device": "mps"}, "not supported"),
    ],
)
def test_options_that_cannot_be_met_are_told(
    options: dict[str, Any], message: str, tiny_models: TinyModels, make_engine: MakeEngine
) -> None:
    """Each wrong option is one line that says what to do."""
    with pytest.raises(EngineError, match=message) as caught:
        make_engine(tiny_models("llama")[0], **options)
    assert "\n" not in str(caught.value)


def test_a_missing_cuda_device_is_told(
    tiny_models: TinyModels, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for CUDA where there is none says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no CUDA device"):
        make_engine(tiny_models("llama")[0], device="cuda")


def _without(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
        lambda weights: weights.update({"model.norm.weight": torch.zeros(5)}),
        lambda weights: weights.update({"model.layers.7.extra.weight": torch.zeros(5)}),
    ],
    ids=["missing", "mismatched", "unexpected"],
)
def test_weights_that_are_not_the_models_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    tiny_models: TinyModels,
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    """A missing weight would be random: the model is refused, naming one."""
    with pytest.raises(EngineError, match=r"weights in .*(are not this model's|mismatch|size)"):
        make_engine(_without(tiny_models("llama")[0], tmp_path, change))


def test_damaged_and_absent_weights_are_told(tiny_models: TinyModels, make_engine: MakeEngine, tmp_path: Path) -> None:
    """A cut-off file and a folder without weights are errors in one line."""
    folder = tiny_models("llama")[0]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(EngineError, match="only safetensors weights are loaded"):
        make_engine(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(EngineError, match="not a whole safetensors file"):
        make_engine(tmp_path)


def test_the_factory_builds_the_torch_engine(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The worker's way to the engine; a model that is nowhere is told with the way to get it."""
    options = {"engine": "torch", "model_dir": tmp_path, "kv_blocks": 4}
    engine = factory.make_engine(EngineOptions(model=str(tiny_models("llama")[0]), **options))  # type: ignore[arg-type]
    assert isinstance(engine, TorchEngine)
    engine.close()
    with pytest.raises(ModelNotFoundError, match="mell model pull no/model"):
        factory.make_engine(EngineOptions(model="no/model", **options))  # type: ignore[arg-type]
