"""How long an engine's step takes: a roofline of weights, KV reads and prefill, for a model on a GPU.

A decode step reads all weights and all KV, and computes 2 x parameters per token; a step that also
prefills a chunk computes that too. Efficiencies are typical of served engines, not measured here.
"""

from dataclasses import dataclass
from math import ceil

from mell_scheduler.policy.base import StepProfile
from mell_scheduler.sim.hardware import Gpu, Model, capacity_tokens, find_gpu, find_model

BLOCK_TOKENS = 16
CHUNK_TOKENS = 512
"""Prefill tokens beside the decodes of one step."""
_BANDWIDTH_SHARE = 0.8
_FLOPS_SHARE = 0.5
_OVERHEAD_S = 0.002
"""Of each step: launches, sampling."""
_SPLIT_SHARE = 0.9
"""What each further GPU of an instance adds, after its all-reduces."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """An instance: one model on one or several GPUs."""

    model: Model
    gpu: Gpu
    gpus: int
    capacity_tokens: int

    @classmethod
    def of(cls, model: str, gpu: str, gpus: int = 1) -> "Roofline":
        """By names; raises HardwareError."""
        return cls(find_model(model), find_gpu(gpu), gpus, capacity_tokens(model, gpu, gpus))

    @property
    def _speedup(self) -> float:
        return 1.0 + (self.gpus - 1) * _SPLIT_SHARE

    @property
    def capacity_blocks(self) -> int:
        """Whole blocks of KV."""
        return self.capacity_tokens // BLOCK_TOKENS

    @property
    def _bytes_per_s(self) -> float:
        return self.gpu.bandwidth_bytes_per_s * _BANDWIDTH_SHARE * self._speedup

    @property
    def _token_s(self) -> float:
        return 2.0 * self.model.parameters / (self.gpu.flops_per_s * _FLOPS_SHARE * self._speedup)

    def step_s(self, sequences: int, kv_tokens: int, prefill_tokens: int = 0) -> float:
        """One step of `sequences` decodes over `kv_tokens` of KV, beside `prefill_tokens` of a prompt."""
        read_s = (self.model.weight_bytes + kv_tokens * self.model.kv_bytes_per_token) / self._bytes_per_s
        return _OVERHEAD_S + max(read_s, (sequences + prefill_tokens) * self._token_s)

    def unloaded_ttft_s(self, prompt_tokens: int) -> float:
        """Time to the first token on an idle instance."""
        chunks, rest = divmod(prompt_tokens, CHUNK_TOKENS)
        last_s = self.step_s(0, prompt_tokens, rest) if rest else 0.0
        return chunks * self.step_s(0, prompt_tokens // 2, CHUNK_TOKENS) + last_s

    def unloaded_tpot_s(self, tokens: int) -> float:
        """Time per output token on an idle instance."""
        return self.step_s(1, tokens)

    def profile(self, limit_s: float) -> StepProfile:
        """The policies' second capacity: decode step time, in blocks."""
        per_block_s = BLOCK_TOKENS * self.model.kv_bytes_per_token / self._bytes_per_s
        base_s = _OVERHEAD_S + self.model.weight_bytes / self._bytes_per_s
        return StepProfile(round(base_s * 1e9), 0, max(1, round(per_block_s * 1e9)), round(limit_s * 1e9))

    def growth_blocks(self, seconds: float) -> int:
        """The most that one request grows in this time."""
        return ceil(seconds / self.step_s(1, 0) / BLOCK_TOKENS)


def blocks(tokens: float) -> int:
    """Blocks that hold so many tokens."""
    return -(-int(tokens) // BLOCK_TOKENS)
