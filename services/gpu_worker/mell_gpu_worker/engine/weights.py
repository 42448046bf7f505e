"""Loads a model's weights onto a device, whole or not at all, and names what was loaded."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mell_gpu_worker.engine.attention import ATTENTION_NAME, register
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.memory import free_bytes

_SAMPLE_BYTES = 1 << 16
_SAMPLES = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names; raises `EngineError` if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise EngineError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        return _cuda_device(device)
    return device


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise EngineError("no CUDA device is usable here (driver, or a CPU build of torch); use --device cpu")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise EngineError(f"there is no device cuda:{index}; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def choose_dtype(name: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device) -> torch.dtype:
    """Return the type of weights and KV; `auto` is float32 on CPU (where bfloat16 is emulated), else bfloat16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def load_model(folder: Path, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model, every weight from `folder`, with our attention in place; raises `EngineError`."""
    register()
    _require_memory(folder, device, dtype)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Callable[..., tuple[Any, dict[str, Any]]] = AutoModelForCausalLM.from_pretrained  # type: ignore[assignment]
    try:
        model, loading = load(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise EngineError(f"cannot load the weights in {folder}: {first}") from error
    _require_whole(folder, loading)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _require_whole(folder: Path, loading: dict[str, Any]) -> None:
    """A weight that is missing would be random, and the model silently wrong."""
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(name) for name in loading.get(fault) or ()):
            raise EngineError(
                f"the weights in {folder} are not this model's: {len(names)} {fault.replace('_', ' ')}, e.g. {names[0]}"
            )


def _require_memory(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    needed = sum(_elements(path) for path in weight_files(folder)) * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise EngineError(f"the weights in {folder} take {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free")


def _elements(path: Path) -> int:
    """Return how many numbers a safetensors file holds."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise EngineError(f"{path} is not a whole safetensors file: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files in order; raises `EngineError` if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{folder} has no *.safetensors file: only safetensors weights are loaded")
    return files


def model_digest(folder: Path) -> str:
    """Return a digest that tells models apart: configuration, file sizes, samples spread over all weights.

    Samples, because a worker must not read tens of gigabytes twice at each start.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
