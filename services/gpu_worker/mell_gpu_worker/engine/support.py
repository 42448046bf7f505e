"""What our engine can run exactly, told from a model's configuration alone, before any weights are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mell_gpu_worker.engine.base import EngineError

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MOVING_ROPE = {"dynamic", "longrope"}
_OTHER_INPUTS = ("vision_config", "audio_config", "video_config", "image_token_id", "speech_config")
_UNEQUAL_LAYERS = ("num_kv_shared_layers", "global_head_dim", "num_global_key_value_heads", "v_head_dim")


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the model's configuration; raises `EngineError` if this engine would not run it exactly."""
    config = _read_config(folder)
    refuse_unsupported(config)
    return config


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise `EngineError` naming the reason if this engine would not run the model exactly."""
    for check in _CHECKS:
        if reason := check(config):
            raise EngineError(f"the torch engine does not run this {config.model_type} model: {reason}")


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        first = str(error).strip().split("\n")[0]
        raise EngineError(
            f"transformers {transformers.__version__} has no model for {folder / 'config.json'}, "
            f"and code that comes with a model is never run: {first}"
        ) from error
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """Return the causal language model class of `config`, or None."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _encoder_decoder(config: PreTrainedConfig) -> str | None:
    return "it is an encoder-decoder" if config.is_encoder_decoder else None


def _other_inputs(config: PreTrainedConfig) -> str | None:
    found = [name for name in _OTHER_INPUTS if getattr(config, name, None) is not None]
    return f"it takes other input than text ({found[0]})" if found else None


def _no_causal_head(config: PreTrainedConfig) -> str | None:
    return None if model_class(config) is not None else "transformers has no causal language model of this kind"


def _recurrent(config: PreTrainedConfig) -> str | None:
    return "it is recurrent: its state is not a KV cache" if model_class(config)._is_stateful else None


def _attention_backend(config: PreTrainedConfig) -> str | None:
    if model_class(config)._supports_attention_backend:
        return None
    return "its attention cannot be replaced (_supports_attention_backend is false)"


def _layer_types(config: PreTrainedConfig) -> str | None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        return f"it has layers of type {', '.join(others)}"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks (attention_chunk_size)"
    return None


def _latent_attention(config: PreTrainedConfig) -> str | None:
    return "it uses multi-head latent attention (kv_lora_rank)" if getattr(config, "kv_lora_rank", None) else None


def _rope(config: PreTrainedConfig) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for each in nested or [parameters]:
        kind = each.get("rope_type", "default")
        if kind in _MOVING_ROPE:
            return f"its RoPE is {kind}: positions of one request would change those of others in the batch"
    return None


def _bidirectional(config: PreTrainedConfig) -> str | None:
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    return None if causal else "its attention is bidirectional"


def _unequal_layers(config: PreTrainedConfig) -> str | None:
    for name in _UNEQUAL_LAYERS:
        if getattr(config, name, None):
            return f"its layers keep KV of unequal shapes ({name})"
    heads = getattr(config, "num_key_value_heads", None)
    return "its layers have unequal numbers of KV heads" if isinstance(heads, list | tuple) else None


_CHECKS: tuple[Callable[[PreTrainedConfig], str | None], ...] = (
    _encoder_decoder,
    _other_inputs,
    _no_causal_head,
    _recurrent,
    _attention_backend,
    _layer_types,
    _latent_attention,
    _rope,
    _bidirectional,
    _unequal_layers,
)
