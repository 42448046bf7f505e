import psutil
import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.paged_step import PagedStep

SHAPE = KvShape(layers=3, block_tokens=4, kv_heads=2, head_dim=5, dtype=torch.float32)
CPU = torch.device("cpu")


def test_a_block_is_one_run_of_bytes_over_all_layers() -> None:
    """Block i is the pool's bytes [i * block_bytes, (i + 1) * block_bytes): all layers, keys and values."""
    pool = KvPool(4, SHAPE, CPU)
    pool.data.copy_(torch.arange(pool.data.numel()).view_as(pool.data))
    assert SHAPE.block_bytes == 3 * 2 * 4 * 2 * 5 * 4
    start = pool.data.data_ptr()
    for index in range(4):
        block = pool.block(index)
        assert block.is_contiguous()
        assert block.numel() == SHAPE.block_bytes
        assert block.data_ptr() == start + index * SHAPE.block_bytes


def test_memory_is_taken_as_blocks_are_written() -> None:
    """A pool of 2 GB that holds nothing takes next to nothing, reads as zeros, and one block takes one block."""
    before_bytes = psutil.Process().memory_info().rss
    pool = KvPool(2_000_000_000 // SHAPE.block_bytes, SHAPE, CPU)
    pool.block(pool.blocks // 2).fill_(1)
    assert psutil.Process().memory_info().rss - before_bytes < 100_000_000
    assert not pool.block(pool.blocks - 1).any()
    assert not pool.block(pool.blocks // 2 - 1).any()
    assert pool.block(pool.blocks // 2).all()


def test_a_block_moves_between_pools_as_bytes() -> None:
    """Bytes of a block written into another pool's block, at another index, are the same keys and values."""
    source, target = KvPool(4, SHAPE, CPU), KvPool(7, SHAPE, CPU)
    source.data.normal_()
    moved = bytes(source.block(2).numpy())
    target.block(5).copy_(torch.frombuffer(bytearray(moved), dtype=torch.uint8))
    for layer in range(SHAPE.layers):
        assert torch.equal(source.keys(layer)[2], target.keys(layer)[5])
        assert torch.equal(source.values(layer)[2], target.values(layer)[5])
    assert target.data[:5].abs().sum() == target.data[6:].abs().sum() == 0


def test_pages_and_tokens_are_views_of_the_same_memory() -> None:
    """Page (block * layers + layer) * 2 (+ 1 for values) and its token rows are the strided per-layer views."""
    pool = KvPool(3, SHAPE, CPU)
    pool.data.normal_()
    for block in range(3):
        for layer in range(SHAPE.layers):
            page = (block * SHAPE.layers + layer) * 2
            assert torch.equal(pool.pages[page], pool.keys(layer)[block].flatten())
            assert torch.equal(pool.pages[page + 1], pool.values(layer)[block].flatten())
            assert torch.equal(pool.tokens[page * 4 + 3], pool.keys(layer)[block, 3].flatten())


def test_a_step_stores_each_token_in_its_block_and_offset() -> None:
    """Token p of a row lies in block_table[p // block_tokens] at p % block_tokens, in the layer asked for."""
    pool = KvPool(6, SHAPE, CPU)
    rows = [StepRow("a", [0] * 7, 7, 2, 5, [4, 1], None), StepRow("b", [0] * 9, 9, 8, 1, [0, 5, 3], None)]
    key, value = torch.randn(6, 2, 5), torch.randn(6, 2, 5)
    PagedStep(pool, rows, torch.float32).store(1, key, value)
    places = [(4, 2), (4, 3), (1, 0), (1, 1), (1, 2), (3, 0)]
    for token, (block, offset) in enumerate(places):
        assert torch.equal(pool.keys(1)[block, offset], key[token])
        assert torch.equal(pool.values(1)[block, offset], value[token])
    assert pool.data.count_nonzero() == key.count_nonzero() + value.count_nonzero()


def test_a_step_clears_only_blocks_that_it_begins_and_does_not_fill() -> None:
    """A new partly filled block is zeroed; one begun before, one filled and foreign ones keep what they hold."""
    pool = KvPool(6, SHAPE, CPU)
    pool.data[:6] = 1
    rows = [
        StepRow("begins", [0] * 6, 6, 0, 6, [0, 1], None),
        StepRow("goes on", [0] * 6, 6, 5, 1, [2, 3], None),
        StepRow("fills", [0] * 4, 4, 0, 4, [4], None),
    ]
    PagedStep(pool, rows, torch.float32).clear_new_tails()
    assert [block for block in range(6) if not pool.data[block].any()] == [1]
