"""Models and GPUs by name, and what follows from a pair: how many tokens of KV cache fit.

Figures are the makers' published ones: dense half-precision peak, memory bandwidth, decimal bytes.
"""

from dataclasses import dataclass

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that serving may use."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a model costs: bytes of half-precision weights, and of KV per token."""

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def weight_bytes(self) -> float:
        """Two bytes per parameter."""
        return 2.0 * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, two bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a card offers."""

    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: float


MODELS: dict[str, Model] = {
    "smollm2-135m": Model(134.5e6, 30, 3, 64),
    "llama-2-7b": Model(6.738e9, 32, 32, 128),
    "llama-2-13b": Model(13.016e9, 40, 40, 128),
    "llama-3.1-8b": Model(8.030e9, 32, 8, 128),
    "qwen2.5-14b": Model(14.770e9, 48, 8, 128),
    "qwen2.5-32b": Model(32.764e9, 64, 8, 128),
    "llama-3.1-70b": Model(70.554e9, 80, 8, 128),
}

GPUS: dict[str, Gpu] = {
    "a10g": Gpu(24e9, 600e9, 70e12),
    "rtx-4090": Gpu(24e9, 1_008e9, 165e12),
    "a100-40": Gpu(40e9, 1_555e9, 312e12),
    "l40s": Gpu(48e9, 864e9, 362e12),
    "a100-80": Gpu(80e9, 2_039e9, 312e12),
    "h100-80": Gpu(80e9, 3_350e9, 989e12),
    "h200": Gpu(141e9, 4_800e9, 989e12),
}


class HardwareError(Exception):
    """A model or GPU that is unknown or too small; the message is for the user."""


def find_model(name: str) -> Model:
    """A model by name; raises HardwareError."""
    if name not in MODELS:
        raise HardwareError(f"unknown model {name!r}: known are {', '.join(MODELS)}; or give --capacity-tokens")
    return MODELS[name]


def find_gpu(name: str) -> Gpu:
    """A GPU by name; raises HardwareError."""
    if name not in GPUS:
        raise HardwareError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}; or give --capacity-tokens")
    return GPUS[name]


def capacity_tokens(model: str, gpu: str, gpus_per_instance: int = 1) -> int:
    """Tokens of KV that fit beside the weights on one instance; raises HardwareError if they do not fit."""
    card, weights = find_gpu(gpu), find_model(model)
    free_bytes = MEMORY_SHARE * card.memory_bytes * gpus_per_instance - weights.weight_bytes
    tokens = int(free_bytes / weights.kv_bytes_per_token)
    if tokens <= 0:
        raise HardwareError(
            f"{model} does not fit on {gpus_per_instance} x {gpu}: its weights take"
            f" {weights.weight_bytes / 1e9:.1f} GB; raise --gpus-per-instance"
        )
    return tokens
