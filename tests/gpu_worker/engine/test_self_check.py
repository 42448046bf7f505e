from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mell_gpu_worker.engine import paged_step, reference_attention
from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.base import EngineError
from tests.gpu_worker.engine.conftest import MakeEngine

TinyModels = Callable[[str], tuple[Path, Any]]


def test_attending_across_requests_is_found(
    tiny_models: TinyModels, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If rows see each other's keys, the load is refused."""
    spans = paged_step._spans

    def one_table(rows: Any, block_tokens: int) -> Any:
        given = list(spans(rows, block_tokens))
        return [paged_step.Span(s.first, s.start, s.count, given[0].blocks[: len(s.blocks)]) for s in given]

    monkeypatch.setattr(paged_step, "_spans", one_table)
    with pytest.raises(EngineError, match="differ from its own"):
        make_engine(tiny_models("llama")[0])


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("mistral", {"window": None}),
        ("granite", {"scaling": 0.5}),
    ],
)
def test_attention_of_another_kind_is_found(
    family: str,
    wrong: dict[str, Any],
    tiny_models: TinyModels,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention without the model's soft-cap, sinks, window or scaling is refused at load."""
    attend: Any = reference_attention.ReferenceAttention.attend

    def other(self: Any, *arguments: Any) -> Any:
        *rest, kind = arguments
        fields = {name: getattr(kind, name) for name in AttentionKind.__dataclass_fields__}
        return attend(self, *rest, AttentionKind(**{**fields, **wrong}))

    monkeypatch.setattr(reference_attention.ReferenceAttention, "attend", other)
    with pytest.raises(EngineError, match="differ from its own"):
        make_engine(tiny_models(family)[0])


def test_a_layer_that_goes_past_our_attention_is_found(
    tiny_models: TinyModels, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose layers do not all attend through us is refused."""
    model = tiny_models("llama")[1]
    forward = type(model.model.layers[0]).forward

    def skip_last(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        last = self.self_attn.layer_idx == 2
        return hidden_states if last else forward(self, hidden_states, **arguments)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", skip_last)
    with pytest.raises(EngineError, match="2 of the model's 3 layers"):
        make_engine(tiny_models("llama")[0])
