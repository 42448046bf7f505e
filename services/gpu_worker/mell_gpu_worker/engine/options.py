"""What an engine is built from: plain values, taken from the worker's settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Choices of model, device and memory; each engine reads what concerns it.

    `kv_blocks` 0: as many as `memory_share` of the free memory gives. `max_model_len` 0: the model's context; above
    it: an error. `threads` 0: all cores. `compile` "auto": steps in C++ where there is a compiler and the model is
    known, decodes in CUDA graphs on GPUs. A step computes at most `max_step_tokens` tokens over at most
    `max_sequences` rows (for sizing buffers ahead). Fields `fake_*` are the fake engine's latency model; fields
    `vllm_*` say which server stands for the engine, and how long to wait for it. A step longer than `step_timeout_s`
    is a failed engine.
    """

    engine: Literal["torch", "fake", "vllm"]
    model: str
    model_dir: Path
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0
    compile: Literal["auto", "off"] = "auto"
    kv_blocks: int = 0
    memory_share: float = 0.5
    block_tokens: int = 16
    max_model_len: int = 0
    max_sequences: int = 256
    max_step_tokens: int = 512
    step_timeout_s: float = 300.0
    fake_step_us: int = 0
    fake_sequence_us: int = 0
    fake_prefill_token_us: int = 0
    fake_kv_bytes_per_token: int = 8
    vllm_url: str = "http://127.0.0.1:8001"
    vllm_model: str = ""
    vllm_api_key: str = ""
    vllm_command: str = ""
    vllm_start_s: float = 600.0
    vllm_away_s: float = 10.0
