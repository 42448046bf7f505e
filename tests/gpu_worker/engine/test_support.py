from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.support import load_config, refuse_unsupported
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.families import FAMILIES, WINDOW, make_config

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": ({"model_type": "falcon"}, "_supports_attention_backend"),
    "bloom": ({"model_type": "bloom"}, "_supports_attention_backend"),
    "mpt": ({"model_type": "mpt"}, "_supports_attention_backend"),
    "t5": ({"model_type": "t5"}, "encoder-decoder"),
    "bart": ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
    "mamba": ({"model_type": "mamba"}, "recurrent"),
    "rwkv": ({"model_type": "rwkv"}, "recurrent"),
    "jamba": ({"model_type": "jamba"}, "recurrent"),
    "qwen3_next": ({"model_type": "qwen3_next"}, "recurrent"),
    "lfm2": ({"model_type": "lfm2", "full_attn_idxs": [2, 5]}, "layers of type conv"),
    "minimax": ({"model_type": "minimax"}, "layers of type linear_attention"),
    "llama4_text": ({"model_type": "llama4_text"}, "chunk"),
    "deepseek_v3": ({"model_type": "deepseek_v3"}, "latent attention"),
    "deepseek_v2": ({"model_type": "deepseek_v2"}, "latent attention"),
    "dynamic": ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE is dynamic"),
    "longrope": (
        {
            "model_type": "phi3",
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 64,
            },
        },
        "RoPE is longrope",
    ),
    "llava": ({"model_type": "llava"}, "other input than text"),
    "gemma3": ({"model_type": "gemma3"}, "other input than text"),
    "qwen2_audio": ({"model_type": "qwen2_audio"}, "other input than text"),
    "bidirectional": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    "gemma3n_text": ({"model_type": "gemma3n_text"}, "unequal shapes"),
    "vit": ({"model_type": "vit"}, "no causal language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_not_run_exactly_are_refused_by_name(name: str) -> None:
    """Each kind is refused from its configuration alone, with its reason."""
    changes, reason = REFUSED[name]
    config = AutoConfig.for_model(**changes)
    with pytest.raises(EngineError, match=f"does not run this {config.model_type} model: .*{reason}"):
        refuse_unsupported(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_are_not_refused(family: str) -> None:
    """No check is so wide that it refuses what runs."""
    refuse_unsupported(make_config(**FAMILIES[family]))


def test_refusal_comes_before_weights(tmp_path: Path, make_engine: MakeEngine) -> None:
    """A folder that holds a configuration only is refused for its kind, not for its missing weights."""
    make_config(model_type="llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="RoPE is dynamic"):
        make_engine(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"model_type": "no_such_model"}', '{"auto_map": {"AutoConfig": "code.Config"}}', "not json"]
)
def test_unknown_architectures_and_remote_code_are_refused(tmp_path: Path, text: str) -> None:
    """A model that transformers does not know, or that brings its own code, is refused in one line."""
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "code.py").write_text("raise SystemExit('code that came with a model was run')")
    with pytest.raises(EngineError, match="code that comes with a model is never run") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_layer_keeps_its_own_window() -> None:
    """The families of the tests do cover mixed layers: full and sliding in one model."""
    config: Any = make_config(**FAMILIES["gemma2"])
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    assert config.sliding_window == WINDOW
