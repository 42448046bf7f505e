"""Weights in the order in which they are read: panels of 16 outputs. A permutation, so it can be undone."""

from collections.abc import Iterable

import torch
from torch import nn

from mell_gpu_worker.engine.large_pages import zeros_in_large_pages
from mell_gpu_worker.engine.native.structs import Linear

PANEL = 16


def packed_size(outputs: int, inputs: int) -> int:
    """Return how many floats a packed matrix has."""
    return -(-outputs // PANEL) * PANEL * inputs


def pack(weight: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Write [outputs, inputs] to memory that is all zeros, as [ceil(outputs / 16), inputs, 16], and return that."""
    outputs, inputs = weight.shape
    packed = memory.view(-1, inputs, PANEL)
    whole = outputs // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2)
    if len(packed) > whole:
        packed[whole, :, : outputs % PANEL] = weight[whole * PANEL :].t()
    return packed


def unpack(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return what `pack` was given."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:outputs].contiguous()


class PackedWeights:
    """A model's matrices, taken out of its modules one by one, so that memory holds each only once.

    They lie behind each other, in the order in which they are taken.
    """

    def __init__(self, modules: Iterable[nn.Linear]) -> None:
        """`modules` are all that will be taken."""
        self._free = zeros_in_large_pages(
            sum(packed_size(m.out_features, m.in_features) for m in modules), torch.float32
        )
        self._taken: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._biases: list[torch.Tensor] = []

    def take(self, module: nn.Linear) -> Linear:
        """Return the packed form of a module, whose weight is empty from now on."""
        weight = module.weight
        outputs, inputs = module.out_features, module.in_features
        size = packed_size(outputs, inputs)
        memory, self._free = self._free[:size], self._free[size:]
        packed = pack(weight.data, memory)
        weight.data = weight.data.new_empty(0)
        self._taken[id(weight)] = weight, packed, outputs
        bias = None
        if module.bias is not None:
            bias = packed.new_zeros(packed.shape[0] * PANEL)
            bias[:outputs] = module.bias.data
            self._biases.append(bias)
        return Linear(packed.data_ptr(), bias.data_ptr() if bias is not None else None, outputs, inputs)

    def give_back(self) -> None:
        """Put every weight back where it was."""
        for weight, packed, outputs in self._taken.values():
            weight.data = unpack(packed, outputs)
        self._taken.clear()
        self._biases.clear()
        self._free = self._free.new_empty(0)
