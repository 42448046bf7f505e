"""From a loaded model to a checked C++ runner, or the reason why there is none; and to what draws its tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.native.build import NativeUnavailableError, default_cache_dir, load_library
from mell_gpu_worker.engine.native.draw import NativeDraw
from mell_gpu_worker.engine.native.program import NativeProgram, require_native
from mell_gpu_worker.engine.native.runner import NativeRunner
from mell_gpu_worker.engine.self_check import ModelCheck


def native_runner(
    model: Any, shape: KvShape, device: torch.device, kinds: Sequence[AttentionKind], check: ModelCheck
) -> Callable[[KvPool], NativeRunner]:
    """Return how to make a runner on torch's number of threads; the model's modules are empty from then on.

    Raises `NativeUnavailableError`, with the model as it was.
    """
    require_native(model, shape, device, kinds)
    library = load_library(default_cache_dir())
    program = NativeProgram(model, kinds)

    def make(pool: KvPool) -> NativeRunner:
        return NativeRunner(library, program, pool, torch.get_num_threads())

    try:
        check.require_equal(make, shape)
    except EngineError as error:
        program.close()
        raise NativeUnavailableError(f"the C++ step gives other logits than the model: {error}") from error
    return make


def choose_draw(device: torch.device, compiling: str) -> NativeDraw | None:
    """Return what draws tokens in C++, for any model on a CPU, unless `compiling` is off or there is no compiler."""
    if device.type != "cpu" or compiling == "off":
        return None
    try:
        return NativeDraw(load_library(default_cache_dir()), torch.get_num_threads())
    except NativeUnavailableError:
        return None
