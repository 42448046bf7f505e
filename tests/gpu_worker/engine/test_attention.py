from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import ATTENTION_NAME, MaskDescription, PagedCall, paged_attention, register
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.paged_step import PagedStep
from mell_gpu_worker.engine.reference_attention import ReferenceAttention
from tests.gpu_worker.engine.families import make_config

FULL = MaskDescription(window=None, own=False)


def call(**arguments: Any) -> torch.Tensor:
    """Call the attention function for a step of three tokens."""
    shape = KvShape(layers=1, block_tokens=4, kv_heads=2, head_dim=8, dtype=torch.float32)
    step = PagedStep(
        KvPool(2, shape, torch.device("cpu")), [StepRow("a", [1, 2, 3], 3, 0, 3, [1], None)], torch.float32
    )
    tensors = [torch.randn(1, heads, 3, 8) for heads in (4, 2, 2)]
    values = {"attention_mask": FULL, "paged": PagedCall(step, ReferenceAttention()), **arguments}
    return paged_attention(SimpleNamespace(layer_idx=0), *tensors, **values)[0]  # type: ignore[arg-type]


def test_a_plain_call_attends() -> None:
    """What every model passes is accepted: no dropout, positions, no cache, arguments that are null."""
    out = call(scaling=0.3, dropout=0.0, position_ids=torch.arange(3)[None], use_cache=False, output_attentions=None)
    assert out.shape == (1, 3, 4, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position_bias", torch.zeros(1)), ("alibi_slopes", torch.ones(4)), ("dropout", 0.1), ("is_causal", True)],
)
def test_an_unknown_argument_is_an_error(name: str, value: Any) -> None:
    """Anything not null that we do not compute is refused by name; there is no sink that swallows it."""
    with pytest.raises(EngineError, match=name):
        call(**{name: value})


def test_a_cache_of_theirs_is_an_error() -> None:
    """A model that insists on its own cache is refused."""
    with pytest.raises(EngineError, match="use_cache"):
        call(use_cache=True)


def test_a_model_that_drops_our_arguments_is_an_error() -> None:
    """Without our step the function does not guess."""
    with pytest.raises(EngineError, match="does not pass our arguments"):
        call(paged=None)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 3, 3), MaskDescription(window=None, own=True)])
def test_a_mask_of_the_models_own_is_an_error(mask: Any) -> None:
    """Only causal masks, under a window or not, made by transformers' builders are computed."""
    with pytest.raises(EngineError, match="in its own way"):
        call(attention_mask=mask)


@pytest.mark.parametrize(("masked", "asked"), [(5, None), (None, 5), (5, 6)])
def test_mask_and_window_must_agree(masked: int | None, asked: int | None) -> None:
    """A window in the mask that the call does not name, or the other way round, is refused."""
    with pytest.raises(EngineError, match="both agree"):
        call(attention_mask=MaskDescription(window=masked, own=False), sliding_window=asked)


def test_masks_are_described_not_built() -> None:
    """Transformers' mask builders, under our name, say their window, and whether a model adds to them."""
    register()
    config = make_config(model_type="mistral", sliding_window=7)
    config._attn_implementation = ATTENTION_NAME
    config.attention_chunk_size = 9
    # By position: between releases the cache's argument changes its name.
    arguments: tuple[Any, ...] = (config, torch.zeros(1, 3, 8), None, None, torch.tensor([[0, 1, 0]]))
    assert create_causal_mask(*arguments) == MaskDescription(window=None, own=False)
    assert create_sliding_window_causal_mask(*arguments) == MaskDescription(window=7, own=False)
    assert create_chunked_causal_mask(*arguments) == MaskDescription(window=9, own=False)
    changed = create_causal_mask(*arguments, or_mask_function=lambda _b, _h, q, k: q == k)
    assert changed == MaskDescription(window=None, own=True)
