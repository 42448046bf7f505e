"""A tiny llama model as a GGUF file inside a wheel, as the store's packages hold theirs."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from mell_gpu_worker.model_store.catalogue import PackagedModel

SPECIAL = ["<unk>", "<start>", "<end>"]
MERGES = ["l l", "ll o", "1 2"]
TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"


def tokens() -> list[str]:
    """Return the vocabulary: specials, printable characters, merged pieces."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    return SPECIAL + letters + [merge.replace(" ", "") for merge in MERGES]


def tiny_llama() -> Any:
    """Return a random llama model, in float32."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokens()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    return build(config, dtype=torch.float32).eval()


def write_gguf(model: Any, path: Path) -> None:
    """Write `model` as llama.cpp's converter does: rotary pairs of queries and keys interleaved."""
    config = model.config
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, weights in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = weights.numpy()
        writer.add_tensor(_gguf_name(name), _interleaved(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _interleaved(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }.items():
        name = name.replace(theirs, ours)
    return name


def make_wheel(member: Path, folder: Path) -> PackagedModel:
    """Put the file `member` into a wheel in `folder` and return its catalogue entry."""
    wheel = folder / "mell_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(member, f"mell_tiny/{member.name}")
        archive.writestr("mell_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mell-tiny\nVersion: 1.0\n")
        archive.writestr(
            "mell_tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("mell_tiny-1.0.dist-info/RECORD", "")
    return PackagedModel(
        package="mell-tiny",
        version="1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_member=f"mell_tiny/{member.name}",
        needed_bytes=1_000_000,
    )
