"""Builds the engine that the options name; imports only that one, so that `fake` needs no torch."""

from mell_gpu_worker.engine.base import Engine, EngineError
from mell_gpu_worker.engine.openmp import wait_politely
from mell_gpu_worker.engine.options import EngineOptions


def make_engine(options: EngineOptions) -> Engine:
    """Return a ready engine; blocks while weights load. Raises `EngineError`, `ModelNotFoundError`."""
    if options.engine == "fake":
        from mell_gpu_worker.engine.fake import FakeEngine  # noqa: PLC0415 (each engine imports only what it needs)

        return FakeEngine(options)
    if options.engine == "vllm":
        try:
            from mell_gpu_worker.engine.vllm.engine import start_vllm_engine  # noqa: PLC0415 (needs an extra)
        except ModuleNotFoundError as error:
            raise EngineError(f"{error.name} is not installed: pip install 'mell[vllm]'") from error
        return start_vllm_engine(options)
    wait_politely()
    from mell_gpu_worker.engine.torch_engine import load_torch_engine  # noqa: PLC0415 (torch takes seconds to import)

    return load_torch_engine(options)
