"""CUDA graphs of decode steps: one launch for a step instead of some thousands, proven to give the model's logits."""

from typing import Any

import structlog
import torch

from mell_gpu_worker.engine.attention import AttentionBackend
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.decode_runner import MOST_TOKENS, Compute, DecodeLimits, DecodeRunner
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.reference_attention import ReferenceAttention
from mell_gpu_worker.engine.runner import Runner, StepRunner
from mell_gpu_worker.engine.self_check import MakeRunner, ModelCheck

_WARM_UPS = 2
"""Runs before recording, in which Triton compiles and libraries take their workspaces."""
_CHECKED_ROWS = 2


class GraphsUnavailableError(Exception):
    """Decode steps cannot be recorded here; the message says why."""


class CudaGraphs:
    """Records computations as CUDA graphs that share their memory: only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, compute: Compute) -> Compute:
        """Return what replays `compute` on the current stream. Raises `RuntimeError` if it waits for the device."""
        current = torch.cuda.current_stream(self._device)
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                compute()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy KV meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, stream=aside, capture_error_mode="thread_local"):
            out = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


def graphed_runner(
    model: Any, shape: KvShape, backend: AttentionBackend, check: ModelCheck, limits: DecodeLimits
) -> MakeRunner:
    """Return how to make a runner with recorded decodes, proven by `check`. Raises `GraphsUnavailableError`."""
    if isinstance(backend, ReferenceAttention):
        raise GraphsUnavailableError("Triton is not installed")
    limits = DecodeLimits(limits.rows, min(limits.tokens, MOST_TOKENS))

    def make(pool: KvPool, rows: int) -> StepRunner:
        graphs = CudaGraphs(pool.data.device)
        return DecodeRunner(model, pool, backend, graphs.record, DecodeLimits(rows, limits.tokens))

    try:
        check.require_equal(lambda pool: make(pool, _CHECKED_ROWS), shape)
    except (EngineError, RuntimeError) as error:
        raise GraphsUnavailableError(_first_line(error)) from error

    def make_or_do_without(pool: KvPool) -> StepRunner:
        try:
            return make(pool, limits.rows)
        except RuntimeError as error:
            structlog.get_logger().warning("no_cuda_graphs", reason=_first_line(error))
            return Runner(model, pool, backend)

    return make_or_do_without


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
