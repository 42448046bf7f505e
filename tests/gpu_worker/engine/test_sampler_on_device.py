"""Sampling as a GPU does it, on tensors that tell when the host would have to wait for what they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from torch.utils._python_dispatch import TorchDispatchMode

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine import draw, upload
from mell_gpu_worker.engine.draw import DrawParams
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.native.build import load_library
from mell_gpu_worker.engine.native.draw import NativeDraw
from mell_gpu_worker.engine.sampler import DrawTokens, Sampler
from mell_shared.messages.sampling import Grammar, SamplingParams
from tests.gpu_worker.engine.test_draw import needs_compiler
from tests.gpu_worker.engine.test_sampler import EOS, VOCAB, row

MakeSampler = Callable[..., Sampler]
WAITING = {"item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"}
WAITING_OPERATIONS = {"nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "_unique2"}

SAMPLINGS = [
    SamplingParams(seed=0, temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=5, logprobs=3),
    SamplingParams(seed=3, temperature=1.3, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(seed=4, min_p=0.1, repetition_penalty=1.4, logit_bias={7: 3.0, 9: -100.0}),
    SamplingParams(seed=5, temperature=0, min_tokens=9, logprobs=0, stop_token_ids=(3,)),
    SamplingParams(seed=6, temperature=0.9, grammar=Grammar(text=LLMatcher.grammar_from_regex("[a-z]{9}"))),
    SamplingParams(seed=7, temperature=1.8, top_k=40, top_p=0.95, min_p=0.01, choice=3),
]
ROWS = [row(sampling, [1, 2, 3], [98, 99, 99][: index % 4], str(index)) for index, sampling in enumerate(SAMPLINGS)]


class OnDevice(torch.Tensor):
    """A tensor, and all that is computed from it, of which only `cpu` may tell the host anything."""

    copies = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be looked at; count copies to the host."""
        name = getattr(function, "__name__", "")
        assert name not in WAITING, f"{name} waits for the device"
        result = super().__torch_function__(function, types, args, kwargs)
        if name != "cpu":
            return result
        cls.copies += 1
        return result.as_subclass(torch.Tensor)


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result's size, or whose course, hangs on values."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation if it needs no waiting."""
        name = operation.name().split("::")[1].split(".")[0]
        assert name not in WAITING_OPERATIONS, f"{name} waits for the device"
        if name in {"index", "index_put", "index_put_"}:
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "a mask as index waits"
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def make_sampler(byte_tokenizer: Path) -> MakeSampler:
    """Build samplers over the byte vocabulary."""

    def make(draw_tokens: DrawTokens | None = None) -> Sampler:
        return Sampler(VOCAB, (EOS,), GrammarMasks(byte_tokenizer, VOCAB, (EOS,), most_replays=4), draw_tokens)

    return make


@pytest.fixture
def logits() -> torch.Tensor:
    """One row for each of `SAMPLINGS`, one of them flat."""
    values = torch.randn(len(ROWS), VOCAB, generator=torch.Generator().manual_seed(8)) * 2
    values[1] *= 0.1
    return values


def sample_on_device(sampler: Sampler, values: torch.Tensor, rows: list[StepRow]) -> tuple[Any, int]:
    """Return what was sampled, and how often the host waited."""
    OnDevice.copies = 0
    with NoWaiting():
        sampled = sampler.sample(values.as_subclass(OnDevice), rows)
    return sampled, OnDevice.copies


def test_a_step_waits_for_the_device_once(make_sampler: MakeSampler, logits: torch.Tensor) -> None:
    """Every kind of parameter in one batch, a failing row too: one copy, with the tokens of each row alone."""
    logits[3, 5] = float("nan")
    (tokens, failed), copies = sample_on_device(make_sampler(), logits, ROWS)
    assert copies == 1
    assert failed == {3: "the model's logits are not finite"}
    for index, sampled in enumerate(ROWS):
        ((alone,), _), copies = sample_on_device(make_sampler(), logits[index : index + 1], [sampled])
        assert copies == 1
        if index != 3:
            assert tokens[index].token_id == alone.token_id
            assert (tokens[index].logprobs is None) == (SAMPLINGS[index].logprobs is None)


@needs_compiler
def test_the_device_draws_what_the_cpu_draws(make_sampler: MakeSampler, logits: torch.Tensor, tmp_path: Path) -> None:
    """The same tokens and log-probabilities as through the CPU's own drawing, over many steps' logits."""
    cpu = make_sampler(NativeDraw(load_library(tmp_path), threads=1))
    device = make_sampler()
    for step in range(20):
        values = logits.roll(step, dims=-1) * (1 + step % 3)
        (found, failed), _ = sample_on_device(device, values, ROWS)
        assert (found, failed) == cpu.sample(values, ROWS)
        assert not failed


def test_rows_that_reach_far_are_drawn_in_a_second_look(
    make_sampler: MakeSampler, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few candidates are sorted at first, wide cuts take more copies and give the same."""
    (expected, _), _ = sample_on_device(make_sampler(), logits, ROWS)
    monkeypatch.setattr(draw, "_FIRST_CANDIDATES", 2)
    (found, failed), copies = sample_on_device(make_sampler(), logits, ROWS)
    assert found == expected
    assert not failed
    assert copies > 2


def test_parameters_reach_the_device_unchanged() -> None:
    """Packed for one copy, they come out as they were, the seeds' 53 bits too."""
    double = torch.float64
    params = DrawParams(
        torch.tensor([0.1, 2.0], dtype=double),
        torch.tensor([0, 100_003]),
        torch.tensor([1.0, 0.95], dtype=double),
        torch.tensor([0.0, 0.05], dtype=double),
        torch.tensor([1 - 2.0**-53, 2.0**-53], dtype=double),
    )
    found = params.on(torch.device("cpu"))
    for name in DrawParams.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(params, name))
        assert getattr(found, name).dtype == getattr(params, name).dtype


def test_uploads_hold_what_they_were_given() -> None:
    """Arrays that are views, and tensors, arrive as they look."""
    values = np.arange(12).reshape(3, 4)
    assert upload.upload(values[:, ::2], torch.device("cpu")).tolist() == values[:, ::2].tolist()
    assert upload.upload(torch.tensor([1.5]), torch.device("cpu")).tolist() == [1.5]
