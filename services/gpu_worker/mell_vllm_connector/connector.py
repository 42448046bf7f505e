"""The connector as vLLM loads it: its interface on one side, the two halves on the other.

    --kv-transfer-config '{"kv_connector": "MellConnector", "kv_connector_module_path": "mell_vllm_connector.connector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": "tcp://10.0.0.5:5601"}}'

A request that says where KV of its tokens may be (`"kv_transfer_params": {"mell": {"from": "tcp://10.0.0.6:5601"}}`)
waits until as many of its full blocks as are there have been fetched; the rest is computed. The other server's steps do
not wait for that.
"""

import hashlib
import json
import logging
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mell_vllm_connector.exchange import Absent
from mell_vllm_connector.kv_memory import open_memory
from mell_vllm_connector.scheduler_half import Facts, SchedulerHalf, StepOrders
from mell_vllm_connector.worker_half import WorkerHalf, rank_address

log = logging.getLogger("vllm.mell")


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's half says to the other with each step."""

    step: StepOrders


class MellConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """One half, as vLLM asks for it. Raises `ValueError` for a model or a setup whose KV it does not know."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._facts = _facts(vllm_config, kv_cache_config)
        self._bind = vllm_config.kv_transfer_config.get_from_extra_config("bind", self._facts.address)
        self._rank = vllm_config.parallel_config.rank
        self._blocks = kv_cache_config.num_blocks
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._pool = ThreadPoolExecutor(4, thread_name_prefix="mell-kv-ask")
            absent = Absent()
            self._scheduler = SchedulerHalf(
                self._facts, lambda address, wanted: self._pool.submit(absent.count_held, address, wanted)
            )

    # --- in the scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """No: whoever wanted to fetch what is gone computes it."""
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be fetched."""
        return self._planning.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has blocks."""
        self._planning.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        """What the other half must know before the step."""
        return Orders(self._planning.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """What the other half has fetched."""
        finished, failed = connector_output.finished_recving, connector_output.invalid_block_ids
        self._planning.received(finished or set(), failed or set())

    def reset_cache(self) -> bool:
        """What was computed before is not given any more."""
        self._planning.reset()
        return True

    def has_pending_push_work(self) -> bool:
        """Whether a step is wanted though no request wants one."""
        return self._planning.urgent

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is kept back: what the blocks hold is given as long as nobody overwrites them."""
        del block_ids
        return False, self._planning.finished(request)

    @property
    def _planning(self) -> SchedulerHalf:
        assert self._scheduler is not None, "this half is not the scheduler's"
        return self._scheduler

    # --- beside the memory

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Begin to give."""
        self._worker = WorkerHalf(self._bind, self._rank, open_memory(kv_caches, self._blocks))
        log.info("KV is given at %s", rank_address(self._facts.address, self._rank))

    def bind_connector_metadata(self, connector_metadata: Orders) -> None:
        """Before the step writes anything: what it overwrites is not given any more."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin(connector_metadata.step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to fetch."""
        del forward_context, kwargs
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.start(self._connector_metadata.step.loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Whose blocks have been fetched."""
        del finished_req_ids
        return None, (self._worker.finished() or None) if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Which of their blocks could not be had."""
        return self._worker.failed() if self._worker is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded during a step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: others read the blocks themselves."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        """End all threads."""
        if self._scheduler is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()


def _facts(vllm_config: Any, kv_cache_config: Any) -> Facts:
    """Return what this server tells of itself; raises `ValueError` for what the connector does not know."""
    transfer = vllm_config.kv_transfer_config
    _check(vllm_config, kv_cache_config)
    address = transfer.get_from_extra_config("address", f"tcp://127.0.0.1:{transfer.kv_port}")
    for name in ("address", "bind"):
        said = transfer.get_from_extra_config(name, address)
        if not _is_address(said):
            raise ValueError(f"{name} of MellConnector must be like tcp://10.0.0.5:5601, not {said!r}")
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    layout = json.dumps(_layout(vllm_config, kv_cache_config), default=str, sort_keys=True)
    return Facts(
        address=address,
        layout=hashlib.blake2b(layout.encode(), digest_size=8).hexdigest(),
        block_tokens=spec.block_size,
        block_bytes=spec.page_size_bytes * len(group.layer_names) * vllm_config.parallel_config.world_size,
    )


def _check(vllm_config: Any, kv_cache_config: Any) -> None:
    groups, parallel = kv_cache_config.kv_cache_groups, vllm_config.parallel_config
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise ValueError("MellConnector knows models with full attention in every layer only: leave it out")
    if parallel.data_parallel_size != 1:
        raise ValueError("MellConnector does not know data parallelism: start a server for each copy")
    if parallel.decode_context_parallel_size != 1 or parallel.prefill_context_parallel_size != 1:
        raise ValueError("MellConnector does not know context parallelism: leave one of them out")
    if vllm_config.model_config.enable_sleep_mode:
        raise ValueError("MellConnector does not know sleep, which takes the KV's memory away: leave one of them out")
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        log.warning('set "kv_load_failure_policy" to "recompute": else requests fail whose KV is gone meanwhile')


def _layout(vllm_config: Any, kv_cache_config: Any) -> dict[str, Any]:
    """Return all that the bytes of a block depend on, beside its tokens."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    (group,) = kv_cache_config.kv_cache_groups
    config = model.hf_config.to_diff_dict()
    device = current_platform.device_type
    return {
        "vllm": vllm.__version__,
        "device": device,
        # On CPUs the kernels that write KV follow what the machine can do.
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()] if device == "cpu" else [],
        "backend": str(vllm_config.attention_config.backend),
        "model": vllm_config.kv_transfer_config.get_from_extra_config("model", model.model),
        "revision": model.revision,
        "config": {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"},
        "length": model.max_model_len,
        "quantization": str(model.quantization),
        "dtypes": [str(model.dtype), str(vllm_config.cache_config.cache_dtype)],
        "spec": str(group.kv_cache_spec),
        "layers": group.layer_names,
        "order": str(kv_cache_config.kv_cache_layout),
        "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
    }


def _is_address(address: object) -> bool:
    scheme, found, rest = str(address).partition("://")
    host, _, port = rest.rpartition(":")
    return bool(found) and scheme == "tcp" and bool(host) and port.isdigit() and 0 < int(port) < 1 << 16
