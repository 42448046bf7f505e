"""KV blocks as bytes, whatever the tensors of a server look like."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mell_vllm_connector import kv_memory
from mell_vllm_connector.kv_memory import DeviceMemory, KvMemory, open_memory

Layers = dict[str, torch.Tensor]
BLOCKS = 6


def plain(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A layer with a block after the other."""
    return torch.arange(BLOCKS * 2 * 4 * 6).reshape(BLOCKS, 2, 4, 6).to(dtype)


SHAPES = {
    "one after the other": plain,
    "half precision": lambda: plain(torch.bfloat16),
    "bytes": lambda: plain(torch.uint8),
    "heads outside": lambda: torch.rand(2, BLOCKS, 4, 6).transpose(0, 1),
    "tokens outside": lambda: torch.rand(4, BLOCKS, 2, 6).permute(1, 2, 0, 3),
    "three smaller blocks each": lambda: torch.rand(BLOCKS * 3, 2, 4, 6),
}


class FakeStream:
    """Of an accelerator that is none: all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.waited = 0

    def wait_event(self, event: "FakeEvent") -> None:
        """Count."""
        self.waited += 1

    def synchronize(self) -> None:
        """Nothing is under way."""


class FakeEvent:
    """A mark that is passed."""

    def record(self) -> None:
        """Nothing is under way."""


ACCELERATOR = SimpleNamespace(Stream=FakeStream, Event=FakeEvent, stream=lambda stream: contextlib.nullcontext())


@pytest.fixture(params=["host", "device, on the host", pytest.param("device", marks=pytest.mark.gpu)])
def open_on(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Layers], tuple[Layers, KvMemory]]:
    """Bring layers to where the memory under test is, and open them there."""
    if request.param == "device, on the host":
        monkeypatch.setattr(torch, "get_device_module", lambda device: ACCELERATOR)
        monkeypatch.setattr(kv_memory, "_pinned", lambda shape: torch.empty(shape, dtype=torch.uint8))
        monkeypatch.setattr(kv_memory, "HostMemory", DeviceMemory)

    def open_there(layers: Layers) -> tuple[Layers, KvMemory]:
        if request.param == "device":
            layers = {name: layer.cuda() for name, layer in layers.items()}
        memory = open_memory(layers, BLOCKS)
        memory.note()
        return layers, memory

    return open_there


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_and_written_elsewhere_is_the_same(
    shape: str, open_on: Callable[[Layers], tuple[Layers, KvMemory]]
) -> None:
    """Every layer of every block, no other block touched, whatever the order asked for."""
    source, giver = open_on({f"layer {number}": SHAPES[shape]() for number in range(3)})
    target, taker = open_on({name: torch.zeros_like(layer) for name, layer in source.items()})
    each = source["layer 0"]
    assert giver.block_bytes == taker.block_bytes == 3 * each.numel() * each.element_size() // BLOCKS
    taker.write([1, 2, 5], giver.read([4, 0, 5]))
    for name, layer in source.items():
        wanted = torch.zeros_like(layer).unflatten(0, (BLOCKS, -1))
        for to, place in ((1, 4), (2, 0), (5, 5)):
            wanted[to] = layer.unflatten(0, (BLOCKS, -1))[place]
        assert torch.equal(target[name], wanted.flatten(0, 1))


def test_layers_that_share_their_memory_count_once() -> None:
    """Some models' layers use the KV of others."""
    layer = plain()
    assert open_memory({"a": layer, "b": layer}, BLOCKS).block_bytes == layer.numel() * 4 // BLOCKS


@pytest.mark.parametrize("layer", [torch.rand(2, 7, 4), torch.rand(BLOCKS), torch.rand(BLOCKS, 4, 2).transpose(1, 2)])
def test_a_layout_that_is_not_known_is_refused(layer: torch.Tensor) -> None:
    """By name, instead of given as something that it is not."""
    with pytest.raises(ValueError, match="layer odd"):
        open_memory({"odd": layer}, BLOCKS)
