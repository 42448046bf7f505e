"""The `torch` engine: transformers models over our paged KV pool, on CPU and CUDA."""

import hashlib
import importlib.util
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import GenerationConfig, PreTrainedConfig

from mell_gpu_worker.core.step import SampledToken, StepResult, StepRow
from mell_gpu_worker.engine.attention import AttentionBackend, AttentionKind, KindRecorder
from mell_gpu_worker.engine.base import EngineError, EngineSpec
from mell_gpu_worker.engine.cuda_graphs import GraphsUnavailableError, graphed_runner
from mell_gpu_worker.engine.decode_runner import DecodeLimits
from mell_gpu_worker.engine.flash_attention import FlashAttention, find_flash_attention, forget_flash_attention
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.memory import count_blocks, forbid_expandable_segments
from mell_gpu_worker.engine.native.build import NativeUnavailableError
from mell_gpu_worker.engine.native.load import choose_draw, native_runner
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.reference_attention import ReferenceAttention
from mell_gpu_worker.engine.runner import Runner, StepRunner, last_tokens
from mell_gpu_worker.engine.sampler import Sampler
from mell_gpu_worker.engine.self_check import MakeRunner, ModelCheck
from mell_gpu_worker.engine.support import load_config
from mell_gpu_worker.engine.weights import choose_device, choose_dtype, load_model, model_digest
from mell_gpu_worker.model_store import ModelStoreError, verify
from mell_shared.host import usable_cores
from mell_shared.models import locate_model


@dataclass(slots=True)
class _Loaded:
    """What `close` lets go of."""

    runner: StepRunner
    pool: KvPool


class TorchEngine:
    """Steps over one model and one pool. Build it with `load_torch_engine`."""

    def __init__(self, spec: EngineSpec, runner: StepRunner, pool: KvPool, sampler: Sampler) -> None:
        self._spec = spec
        self._loaded: _Loaded | None = _Loaded(runner, pool)
        self._sampler = sampler

    @property
    def spec(self) -> EngineSpec:
        """What this engine is."""
        return self._spec

    @property
    def pool(self) -> KvPool:
        """The KV pool."""
        return self._open().pool

    @torch.inference_mode()
    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Run one step over `rows`; see the port. Raises `EngineError` if the device has no memory left."""
        with self._on_device():
            return self._execute(rows)

    def _on_device(self) -> AbstractContextManager[object]:
        """Make the pool's GPU the current one, which each thread has of its own."""
        device = self._open().pool.data.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _execute(self, rows: Sequence[StepRow]) -> StepResult:
        began = time.perf_counter_ns()
        sampling = [index for index, row in enumerate(rows) if row.sampling is not None]
        ends = last_tokens(rows)
        try:
            logits = self._open().runner.run(rows, [ends[index] for index in sampling])
            tokens, failed = self._sampler.sample(logits, [rows[i] for i in sampling]) if sampling else ([], {})
            if not sampling and self._open().pool.data.is_cuda:
                # Sampling waits for the device; without it the KV might not be there when the step is said to be.
                torch.cuda.current_stream(self._open().pool.data.device).synchronize()
        except torch.OutOfMemoryError as error:
            raise EngineError(f"no memory left on {self._spec.device} during a step; lower --memory-share") from error
        sampled: list[SampledToken | None] = [None] * len(rows)
        for place, index in enumerate(sampling):
            sampled[index] = None if place in failed else tokens[place]
        step_us = (time.perf_counter_ns() - began) // 1000
        return StepResult(tuple(sampled), step_us, {sampling[place]: why for place, why in failed.items()})

    def check_grammar(self, text: str) -> str | None:
        """Return why the grammar cannot be used, or None."""
        return self._sampler.check_grammar(text)

    def kv_block(self, index: int) -> Any:
        """Return the memory of one block: a NumPy array on the CPU, on CUDA a tensor, which tells its address."""
        block = self.pool.block(index)
        return block if block.is_cuda else block.numpy()

    def scratch(self, size_bytes: int) -> Any:
        """Return new memory where the pool is."""
        scratch = torch.zeros(size_bytes, dtype=torch.uint8, device=self.pool.data.device)
        return scratch if scratch.is_cuda else scratch.numpy()

    def close(self) -> None:
        """Free the pool and the weights; safe to repeat."""
        self._loaded = None

    def _open(self) -> _Loaded:
        assert self._loaded is not None, "the engine is closed"
        return self._loaded


def load_torch_engine(options: EngineOptions) -> TorchEngine:
    """Return a checked and warm engine; blocks while weights load. Raises `EngineError`, `ModelNotFoundError`."""
    folder = locate_model(options.model, options.model_dir)
    try:
        verify(folder)
    except ModelStoreError as error:
        raise EngineError(str(error)) from error
    config = load_config(folder)
    max_model_len = _max_model_len(options, config)
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_dtype(options.dtype, device)
    torch.set_num_threads(options.threads or usable_cores())
    shape = kv_shape(config, options.block_tokens, dtype)
    model = load_model(folder, config, device, dtype)
    with torch.inference_mode():
        make_runner = checked_runner(model, shape, device, options)
    if device.type == "cuda":
        forbid_expandable_segments()
    pool = KvPool(count_blocks(options, shape, device, max_model_len), shape, device)
    eos = eos_token_ids(folder, config)
    spec = EngineSpec(
        name="torch",
        device=str(device),
        kv_layout=_layout(folder, shape),
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        kv_blocks=pool.blocks,
        block_tokens=shape.block_tokens,
        block_bytes=shape.block_bytes,
        migration_modes=("kv", "tokens", "hybrid"),
    )
    grammars = GrammarMasks(folder, spec.vocab_size, eos, options.max_sequences)
    sampler = Sampler(spec.vocab_size, eos, grammars, choose_draw(device, options.compile))
    return TorchEngine(spec, make_runner(pool), pool, sampler)


def checked_runner(model: Any, shape: KvShape, device: torch.device, options: EngineOptions) -> MakeRunner:
    """Return how to make the runner that serves, proven to give the model's own logits. Raises `EngineError`."""
    check = ModelCheck(model, device)
    log = structlog.get_logger()
    backend, kinds = _checked_backend(check, model, shape, device)
    reason = "switched off (--compile off)"
    if options.compile == "auto":
        try:
            if device.type == "cuda":
                limits = DecodeLimits(options.max_sequences, _max_model_len(options, model.config))
                event, make = "decodes_in_cuda_graphs", graphed_runner(model, shape, backend, check, limits)
            else:
                event, make = "steps_in_cpp", native_runner(model, shape, device, kinds, check)
        except (NativeUnavailableError, GraphsUnavailableError) as unavailable:
            reason = str(unavailable)
        else:
            log.info(event)
            return make
    log.info("steps_in_python", reason=reason)
    return lambda pool: Runner(model, pool, backend)


def _checked_backend(
    check: ModelCheck, model: Any, shape: KvShape, device: torch.device
) -> tuple[AttentionBackend, list[AttentionKind]]:
    """Return the first backend that gives the model's own logits, and what each layer asks of it."""

    def checked(backend: AttentionBackend) -> tuple[AttentionBackend, list[AttentionKind]]:
        recorder = KindRecorder(backend)
        check.require_equal(lambda pool: Runner(model, pool, recorder), shape)
        return backend, recorder.kinds

    try:
        flash = find_flash_attention(device, shape.dtype)
        if flash is not None:
            return checked(choose_backend(device, flash))
    except (EngineError, ImportError, RuntimeError, TypeError, ValueError) as error:
        forget_flash_attention()
        structlog.get_logger().warning("no_flash_attention", reason=str(error))
    return checked(choose_backend(device))


def choose_backend(device: torch.device, flash: FlashAttention | None = None) -> AttentionBackend:
    """Return the Triton kernels on CUDA where Triton is installed, beside `flash` if given, else the reference path."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from mell_gpu_worker.engine.triton_attention import TritonAttention  # noqa: PLC0415 (needs Triton)

        return TritonAttention(flash)
    return ReferenceAttention()


def kv_shape(config: PreTrainedConfig, block_tokens: int, dtype: torch.dtype) -> KvShape:
    """Return the shape of the KV pool that the model needs."""
    heads = config.num_attention_heads
    return KvShape(
        layers=config.num_hidden_layers,
        block_tokens=block_tokens,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


def _max_model_len(options: EngineOptions, config: PreTrainedConfig) -> int:
    context: int = config.max_position_embeddings
    if options.max_model_len > context:
        raise EngineError(f"--max-model-len {options.max_model_len} is over the model's context of {context} tokens")
    return options.max_model_len or context


def eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the ids that end a sequence: the generation configuration's, else the model's."""
    eos = None
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _layout(folder: Path, shape: KvShape) -> str:
    """Return the digest of all that makes two pools' blocks interchangeable."""
    return hashlib.sha256(f"{model_digest(folder)} {shape}".encode()).hexdigest()[:32]
