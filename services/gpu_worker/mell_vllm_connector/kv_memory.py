"""The memory of a server's KV blocks: a tensor for each layer, read and written block by block as plain bytes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]


class KvMemory(Protocol):
    """A block is the bytes of all layers, one after the other. Calls come from several threads."""

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        ...

    def note(self) -> None:
        """All that was computed up to now is to be seen by those who read, and not to be hurt by those who write."""
        ...

    def read(self, blocks: Sequence[int]) -> Bytes:
        """Return the content of these blocks, one row each; what is overwritten meanwhile is anything."""
        ...

    def write(self, blocks: Sequence[int], content: Bytes) -> None:
        """Fill these blocks with rows as `read` returns them; in place when it returns."""
        ...


def open_memory(caches: Mapping[str, torch.Tensor], blocks: int) -> KvMemory:
    """Return the memory of `blocks` blocks in tensors by layer, the first dimension of each counting blocks.

    Layers that share a tensor count once. Raises `ValueError` if a tensor is something else.
    """
    layers = list({cache.data_ptr(): cache for _, cache in sorted(caches.items())}.values())
    for name, cache in caches.items():
        if cache.ndim < 2 or cache.shape[0] % blocks or cache.stride(-1) != 1:
            raise ValueError(
                f"the KV of layer {name} is laid out as {tuple(cache.shape)}, not as {blocks} blocks: "
                "this connector does not know that kind of model or backend"
            )
    views = [cache.view(torch.uint8).unflatten(0, (blocks, -1)) for cache in layers]  # type: ignore[no-untyped-call]
    return HostMemory(views) if views[0].device.type == "cpu" else DeviceMemory(views)


class HostMemory:
    """In main memory: plain copies, which take no core but the caller's."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = [layer.numpy() for layer in layers]
        self.block_bytes = sum(_row_bytes(layer) for layer in self._layers)

    def note(self) -> None:
        """Nothing to do: a step has been computed when it returns."""

    def read(self, blocks: Sequence[int]) -> Bytes:
        """See `KvMemory`."""
        content = np.empty((len(blocks), self.block_bytes), dtype=np.uint8)
        for row, block in zip(content, blocks, strict=True):
            for layer, part in self._parts(row):
                np.copyto(part, layer[block])
        return content

    def write(self, blocks: Sequence[int], content: Bytes) -> None:
        """See `KvMemory`."""
        for row, block in zip(content, blocks, strict=True):
            for layer, part in self._parts(row):
                np.copyto(layer[block], part)

    def _parts(self, row: Bytes) -> Any:
        end = 0
        for layer in self._layers:
            begin, end = end, end + _row_bytes(layer)
            yield layer, row[begin:end].reshape(layer.shape[1:])


class DeviceMemory:
    """On an accelerator: gathered and scattered there, on a stream of its own, through pinned memory."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = list(layers)
        self._device = layers[0].device
        self._accelerator = torch.get_device_module(self._device)
        self._stream = self._accelerator.Stream(self._device)
        self._computed = self._accelerator.Event()
        self.block_bytes = sum(_row_bytes(layer) for layer in self._layers)

    def note(self) -> None:
        """Mark where the computing stream is."""
        computed = self._accelerator.Event()
        computed.record()
        self._computed = computed

    def read(self, blocks: Sequence[int]) -> Bytes:
        """See `KvMemory`."""
        with self._accelerator.stream(self._stream):
            self._stream.wait_event(self._computed)
            index = torch.tensor(blocks, device=self._device)
            parts = [layer.index_select(0, index).flatten(1) for layer in self._layers]
            rows = torch.cat(parts, dim=1)
            content = _pinned(rows.shape)
            content.copy_(rows, non_blocking=True)
            self._stream.synchronize()
        return content.numpy()

    def write(self, blocks: Sequence[int], content: Bytes) -> None:
        """See `KvMemory`."""
        with self._accelerator.stream(self._stream):
            self._stream.wait_event(self._computed)
            index = torch.tensor(blocks, device=self._device)
            pinned = _pinned(content.shape)
            np.copyto(pinned.numpy(), content)
            rows, end = pinned.to(self._device, non_blocking=True), 0
            for layer in self._layers:
                begin, end = end, end + _row_bytes(layer)
                layer.index_copy_(0, index, rows[:, begin:end].reshape(-1, *layer.shape[1:]))
            self._stream.synchronize()


def _pinned(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def _row_bytes(layer: Any) -> int:
    """Return how many bytes of a block this layer holds."""
    return int(np.prod(layer.shape[1:]))
