"""Our paged attention behind transformers' attention interface: checks what a model asks for, then attends.

There is no sink for unknown arguments: a model that wants anything we do not compute is an error, never a guess.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.paged_step import AttentionStep

ATTENTION_NAME = "mell_paged"


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How scores become weights in one layer.

    Scores are `scaling * q.k`, then `softcap * tanh(scores / softcap)`; a query sees at most the last `window`
    positions, its own included; `sinks` [heads] are logits that take weight and give nothing.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class MaskDescription:
    """What a model's mask says, instead of the mask: a causal one, under a window or not, or one of its own."""

    window: int | None
    own: bool


class AttentionBackend(Protocol):
    """Computes attention of one layer over a step whose new keys and values are in the pool already."""

    def attend(
        self,
        step: AttentionStep,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kind: AttentionKind,
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim] for `query` of that shape.

        `fresh` are the step's own keys and values, each [tokens, kv_heads, head_dim].
        """
        ...


class KindRecorder:
    """Notes what kind of attention each layer asks for, while another backend computes it."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self._kinds: dict[int, AttentionKind] = {}

    def attend(
        self,
        step: AttentionStep,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kind: AttentionKind,
    ) -> torch.Tensor:
        """Attend through the other backend."""
        self._kinds[layer] = kind
        return self._backend.attend(step, layer, query, fresh, kind)

    @property
    def kinds(self) -> list[AttentionKind]:
        """One for each layer, in order, of the layers seen."""
        return [self._kinds[layer] for layer in sorted(self._kinds)]


@dataclass(frozen=True, slots=True)
class PagedCall:
    """What a model call carries to its attention layers."""

    step: AttentionStep
    backend: AttentionBackend


def register() -> None:
    """Make our attention known to transformers; safe to repeat."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, describe_mask)


def describe_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> MaskDescription:
    """Stand in for transformers' mask builders; `use_vmap` says that the model adds a mask function of its own."""
    return MaskDescription(window=local_size, own=use_vmap)


def paged_attention(  # noqa: PLR0913 (transformers fixes the signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    paged: PagedCall | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the paged pool: query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim].

    Returns [1, tokens, heads, head_dim]. Raises `EngineError` for anything the model asks beyond that.
    """
    if paged is None:
        raise EngineError("the model does not pass our arguments on to its attention layers")
    _refuse_unknown({**others, "dropout": dropout, "use_cache": use_cache})
    window = _window(attention_mask, sliding_window)
    step, layer = paged.step, int(module.layer_idx)  # type: ignore[arg-type]
    step.layers_attended += 1
    fresh = key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.store(layer, *fresh)
    kind = AttentionKind(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=window, softcap=softcap, sinks=s_aux
    )
    return paged.backend.attend(step, layer, query[0].transpose(0, 1), fresh, kind)[None], None


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, bool | float) and not value):
            raise EngineError(f"the model asks its attention for {name!r}, which the torch engine does not compute")


def _window(mask: Any, sliding_window: int | None) -> int | None:
    if not isinstance(mask, MaskDescription) or mask.own:
        raise EngineError("the model masks attention in its own way, which the torch engine does not compute")
    if mask.window != sliding_window:
        raise EngineError(
            f"the model's mask has a window of {mask.window}, its attention is asked for {sliding_window}: "
            f"the torch engine computes sliding windows only where both agree"
        )
    return mask.window


AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
