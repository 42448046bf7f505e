"""KV blocks as bytes, whatever the tensors of a server look like."""

import pytest
import torch

from mell_vllm_connector.kv_memory import open_memory

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


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_and_written_elsewhere_is_the_same(shape: str) -> None:
    """Every layer of every block, no other block touched, whatever the order asked for."""
    source = {f"layer {number}": SHAPES[shape]() for number in range(3)}
    target = {name: torch.zeros_like(layer) for name, layer in source.items()}
    giver, taker = open_memory(source, BLOCKS), open_memory(target, BLOCKS)
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
