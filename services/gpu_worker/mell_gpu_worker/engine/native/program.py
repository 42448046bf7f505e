"""Finds out whether a loaded model is one that the C++ step computes, and takes its weights for it."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.kv_pool import KvShape
from mell_gpu_worker.engine.native.build import NativeUnavailableError
from mell_gpu_worker.engine.native.packing import PANEL, PackedWeights
from mell_gpu_worker.engine.native.structs import Decoder, Layer

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers decoder.cpp mirrors. Others may be built of the same modules and compute something else."""
_MOST_GROUP = 48
"""Heads that share keys, at most: kQueryRows in attention.h."""


class NativeProgram:
    """A model's packed weights, described for the C++ step; the model's own modules are empty while it lives."""

    def __init__(self, model: Any, kinds: Sequence[AttentionKind]) -> None:
        _let_go_of_files(model)
        self._weights = PackedWeights(module for module in model.modules() if isinstance(module, nn.Linear))
        self._kept_alive: list[Any] = [model]
        inner = model.model
        tied = model.lm_head.weight is inner.embed_tokens.weight
        embedding = None if tied else inner.embed_tokens.weight.data
        layers = (Layer * len(inner.layers))(
            *(self._layer(layer, kind) for layer, kind in zip(inner.layers, kinds, strict=True))
        )
        self._kept_alive += [layers, embedding]
        self.rotary = inner.rotary_emb
        self.hidden: int = model.config.hidden_size
        self.vocab: int = model.lm_head.out_features
        first = layers[0]
        self.token_floats: int = (
            2 * self.hidden + first.query.outputs + 2 * first.key.outputs + first.output.inputs + first.gate.outputs
        )
        self.decoder = Decoder(
            layers=ctypes.cast(layers, ctypes.POINTER(Layer)),
            layer_count=len(layers),
            hidden=self.hidden,
            heads=model.config.num_attention_heads,
            epsilon=model.config.rms_norm_eps,
            final_norm=self._vector(inner.norm),
            embedding=None if embedding is None else embedding.data_ptr(),
            head=self._weights.take(model.lm_head),
        )

    def close(self) -> None:
        """Give the model its weights back; the program is of no use afterwards."""
        self._weights.give_back()

    def _layer(self, layer: Any, kind: AttentionKind) -> Layer:
        attention, mlp, take = layer.self_attn, layer.mlp, self._weights.take
        return Layer(
            norm_before_attention=self._vector(layer.input_layernorm),
            norm_before_mlp=self._vector(layer.post_attention_layernorm),
            query_norm=self._vector(getattr(attention, "q_norm", None)),
            key_norm=self._vector(getattr(attention, "k_norm", None)),
            query=take(attention.q_proj),
            key=take(attention.k_proj),
            value=take(attention.v_proj),
            output=take(attention.o_proj),
            gate=take(mlp.gate_proj),
            up=take(mlp.up_proj),
            down=take(mlp.down_proj),
            window=kind.window or 0,
            scaling=kind.scaling,
        )

    def _vector(self, norm: Any) -> int | None:
        """Return the address of a norm's weights."""
        if norm is None:
            return None
        weight = norm.weight.data
        assert weight.is_contiguous()
        self._kept_alive.append(weight)
        return int(weight.data_ptr())


def _let_go_of_files(model: Any) -> None:
    """Copy the small tensors: one that still lies in a mapped weight file would keep all of it mapped."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.clone()


def require_native(model: Any, shape: KvShape, device: torch.device, kinds: Sequence[AttentionKind]) -> None:
    """Raise `NativeUnavailableError` unless the C++ step computes this model; `kinds` are its layers' attentions."""
    config = model.config
    heads: int = config.num_attention_heads
    reasons = {
        "it runs on CPUs": device.type != "cpu",
        "it computes float32": shape.dtype != torch.float32,
        f"it knows {', '.join(_FAMILIES)} models": config.model_type not in _FAMILIES,
        "its activation is silu": getattr(config, "hidden_act", None) != "silu",
        "its attention has no soft-cap and no sinks": any(k.softcap is not None or k.sinks is not None for k in kinds),
        f"its head size is a multiple of {PANEL}": shape.head_dim % PANEL != 0,
        f"at most {_MOST_GROUP} heads share keys": heads % shape.kv_heads != 0 or heads // shape.kv_heads > _MOST_GROUP,
        "it rotates whole heads": _rotary_size(model) != shape.head_dim,
    }
    for reason, violated in reasons.items():
        if violated:
            raise NativeUnavailableError(f"the C++ step does not compute this model: {reason}")
    _require_plain(model)


def _rotary_size(model: Any) -> int:
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    return 0 if rotary is None else 2 * len(rotary.inv_freq)


def _require_plain(model: Any) -> None:
    """All matrices must be ordinary float32 modules: quantised or adapted ones hold more than their weight."""
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and (
            type(module) is not nn.Linear or module.weight.dtype != torch.float32 or not module.weight.is_contiguous()
        ):
            raise NativeUnavailableError(f"the C++ step does not compute this model: {name} is no plain matrix")
