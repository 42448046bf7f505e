"""How much memory a device has left, and how many KV blocks that makes."""

import torch

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.kv_pool import KvShape
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.host import available_bytes


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; of the host: what is available and within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def forbid_expandable_segments() -> None:
    """Have CUDA memory allocated from here on in whole segments, whatever the environment says.

    Memory of expandable segments cannot be shared between processes as CUDA IPC does: transfers of it would fall
    back to a slow path without a word (ai-dynamo/nixl#1754).
    """
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def count_blocks(options: EngineOptions, shape: KvShape, device: torch.device, max_model_len: int) -> int:
    """Return the number of KV blocks to allocate, the weights being loaded; raises `EngineError` if it is too few."""
    free = free_bytes(device)
    blocks = options.kv_blocks or int(free * options.memory_share) // shape.block_bytes
    if blocks * shape.block_bytes > free:
        raise EngineError(
            f"{blocks} KV blocks take {blocks * shape.block_bytes / 1e9:.2f} GB, "
            f"{device} has {free / 1e9:.2f} GB free; lower --kv-blocks"
        )
    if not blocks:
        raise EngineError(
            f"not one KV block of {shape.block_bytes / 1e6:.1f} MB fits into {options.memory_share:.0%} of the "
            f"{free / 1e9:.2f} GB free on {device}; raise --memory-share"
        )
    # More than every sequence at full length could fill would only be wasted.
    most = options.max_sequences * -(-max_model_len // shape.block_tokens)
    return blocks if options.kv_blocks else min(blocks, most)
