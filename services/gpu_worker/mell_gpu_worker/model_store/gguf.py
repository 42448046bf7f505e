"""Turns a llama-architecture GGUF file into a transformers folder: float32 safetensors, config, tokenizer.

Written without torch and without transformers' own converter, whose pre-tokenizer forgets that this vocabulary
splits digits. Names and layout follow the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mell_gpu_worker.model_store.errors import ModelStoreError

Fraction = Callable[[float], None]

_CONTROL_TOKEN = 3
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The fields of a GGUF file's header by name."""

    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise ModelStoreError(f"the GGUF file has no field {name}; it is damaged or of another kind")
        return self.fields[name]


def convert_gguf(path: Path, folder: Path, told: Fraction) -> None:
    """Write `folder` from the GGUF at `path`; `told` gets the fraction done. Raises `ModelStoreError`, `OSError`."""
    import gguf  # noqa: PLC0415 (half a second, only needed here)
    from safetensors.numpy import save_file  # noqa: PLC0415

    reader = gguf.GGUFReader(path)
    header = GgufHeader({name: field.contents() for name, field in reader.fields.items()})
    if header["general.architecture"] != "llama" or header["tokenizer.ggml.model"] != "gpt2":
        raise ModelStoreError(f"{path.name} holds a {header['general.architecture']} model; only llama is converted")
    tensors = dict(_tensors(reader, header, told))
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    tied = "lm_head.weight" not in tensors
    _write_json(folder / "config.json", _config(header, tied=tied))
    _write_json(folder / "generation_config.json", _special_ids(header))
    _write_json(folder / "tokenizer.json", _tokenizer(header))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(header))
    (folder / "chat_template.jinja").write_text(header["tokenizer.chat_template"])


def _tensors(reader: Any, header: GgufHeader, told: Fraction) -> Iterator[tuple[str, NDArray[np.float32]]]:
    import gguf  # noqa: PLC0415

    for done, tensor in enumerate(reader.tensors):
        told(done / len(reader.tensors))
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.endswith("attn_q.weight"):
            weights = _unpermuted(weights, header["llama.attention.head_count"])
        elif tensor.name.endswith("attn_k.weight"):
            weights = _unpermuted(weights, header["llama.attention.head_count_kv"])
        yield _transformers_name(tensor.name), np.ascontiguousarray(weights)


def _transformers_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".", 2)
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
        raise ModelStoreError(f"the GGUF file has a tensor {name} that a llama model does not have")
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"


def _unpermuted(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the reordering of rotary pairs: GGUF interleaves them, transformers keeps the halves of a head apart."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(header: GgufHeader, *, tied: bool) -> dict[str, Any]:
    heads = header["llama.attention.head_count"]
    hidden = header["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_special_ids(header),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": header["llama.feed_forward_length"],
        "max_position_embeddings": header["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": header["llama.block_count"],
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "rms_norm_eps": header["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": header["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "vocab_size": header["llama.vocab_size"],
    }


def _special_ids(header: GgufHeader) -> dict[str, int]:
    return {
        "bos_token_id": header["tokenizer.ggml.bos_token_id"],
        "eos_token_id": header["tokenizer.ggml.eos_token_id"],
        "pad_token_id": header["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(header: GgufHeader) -> dict[str, Any]:
    tokens, types = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain} for i, token in enumerate(tokens) if types[i] == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(header, byte_level),
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": _byte_pairs(header),
    }


def _pre_tokenizer(header: GgufHeader, byte_level: dict[str, Any]) -> dict[str, Any]:
    if header["tokenizer.ggml.pre"] != "smollm":
        raise ModelStoreError(f"the pre-tokenizer {header['tokenizer.ggml.pre']!r} is not converted; only smollm is")
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level]}


def _byte_pairs(header: GgufHeader) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])},
        "merges": [merge.split(" ") for merge in header["tokenizer.ggml.merges"]],
    }


def _tokenizer_config(header: GgufHeader) -> dict[str, Any]:
    tokens, ids = header["tokenizer.ggml.tokens"], _special_ids(header)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[header["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": header["llama.context_length"],
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
