"""Tiny random models, one for each architecture that the engine must run exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 160
WINDOW = 11
"""Shorter than the sequences of the tests, and no multiple of a block."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Wide enough that the likeliest tokens are far apart.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3_rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite", "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": WINDOW},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def make_config(**changes: Any) -> Any:
    """Return the configuration of a tiny model."""
    values = {**_COMMON, **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_model(config: Any, folder: Path) -> Any:
    """Save a model with random weights in `folder`; return it, in float32, with its own eager attention."""
    torch.manual_seed(0)
    build: Callable[..., Any] = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Left at their initial 0 or 1, biases, norms and sinks would hide a fault.
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
