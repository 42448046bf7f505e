"""Weights in the order in which they are read: panels of 16 outputs. A permutation, so it can be undone."""

import torch
from torch import nn

from mell_gpu_worker.engine.native.structs import Linear

PANEL = 16


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return [outputs, inputs] as [ceil(outputs / 16), inputs, 16], zeros after the last output."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    packed = weight.new_zeros(panels, inputs, PANEL)
    whole = outputs // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2)
    if panels > whole:
        packed[whole, :, : outputs % PANEL] = weight[whole * PANEL :].t()
    return packed


def unpack(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return what `pack` was given."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:outputs].contiguous()


class PackedWeights:
    """A model's matrices, taken out of its modules one by one, so that memory holds each only once."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._biases: list[torch.Tensor] = []

    def take(self, module: nn.Linear) -> Linear:
        """Return the packed form of a module, whose weight is empty from now on."""
        weight = module.weight
        outputs, inputs = module.out_features, module.in_features
        packed = pack(weight.data)
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
