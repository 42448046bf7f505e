"""The paged KV pool: one allocation in which all layers of a block lie together, the unit of transfer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mell_gpu_worker.engine.large_pages import zeros_in_large_pages
from mell_gpu_worker.engine.upload import upload


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes of one KV pool; two pools with equal shape and `dtype` hold blocks of equal bytes."""

    layers: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_elements(self) -> int:
        """Elements of one page: the keys (or values) of one block in one layer."""
        return self.block_tokens * self.kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.layers * 2 * self.page_elements * self.dtype.itemsize


class KvPool:
    """`blocks` KV blocks in one tensor `[blocks + 2, layers, 2, block_tokens, kv_heads, head_dim]`.

    The last two are ours. One is always zero: it pads the block tables of short rows, so that nothing read there can
    be NaN. The other takes what padding rows write, and nobody else reads it. `pages` shows the same memory as
    `[pages, page_elements]`, page = (block * layers + layer) * 2, + 1 for values; `tokens` as
    `[pages * block_tokens, kv_heads * head_dim]`.
    """

    def __init__(self, blocks: int, shape: KvShape, device: torch.device) -> None:
        self.blocks = blocks
        self.shape = shape
        size = (blocks + 2, shape.layers, 2, shape.block_tokens, shape.kv_heads, shape.head_dim)
        self.data = _zeros(math.prod(size), shape.dtype, device).view(size)
        self.pages = self.data.view(-1, shape.page_elements)
        self.tokens = self.data.view(-1, shape.kv_heads * shape.head_dim)

    @property
    def zero_block(self) -> int:
        """Index of the block that is always zero."""
        return self.blocks

    @property
    def scratch_block(self) -> int:
        """Index of the block that rows of no sequence write to."""
        return self.blocks + 1

    def store(self, slots: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's keys and values, each [tokens, kv_heads, head_dim].

        `slots` [tokens] are the rows of `tokens` that take layer 0's keys.
        """
        size = self.shape.block_tokens
        at = slots + layer * 2 * size
        self.tokens.index_copy_(0, at, key.flatten(1))
        self.tokens.index_copy_(0, at + size, value.flatten(1))

    def keys(self, layer: int) -> torch.Tensor:
        """Return the keys of one layer, a strided view `[blocks + 2, block_tokens, kv_heads, head_dim]`."""
        return self.data[:, layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        """Return the values of one layer, a strided view like `keys`."""
        return self.data[:, layer, 1]

    def block(self, index: int) -> torch.Tensor:
        """Return the memory of one block as `[block_bytes]` bytes, without a copy."""
        assert 0 <= index < self.blocks, index
        return self.data[index].view(-1).view(torch.uint8)

    def clear(self, blocks: Sequence[int]) -> None:
        """Set whole blocks to zero."""
        if blocks:
            self.data[upload(np.array(blocks), self.data.device)] = 0


def _zeros(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return zeros_in_large_pages(elements, dtype)
    return torch.zeros(elements, dtype=dtype, device=device)
