"""The Triton kernels of paged attention: one walks keys and values where they lie, one combines what it found.

The online softmax is that of T. Dao et al., "FlashAttention", 2022; splitting a row's keys over programs is that of
T. Dao et al., "Flash-Decoding", 2023, at a fixed number of keys, so that a result depends on its own row alone. All
strides are arguments, so that the pool's layout (all layers of a block together) needs no copy. Heads that share keys
are computed together, as rows of one tile.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def paged_attention(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0915, PLR0917 (a kernel is one function)
    out,
    query,
    keys,
    values,
    sinks,
    partial,
    scales,
    tiles,
    table,
    scaling,
    softcap,
    out_token_stride,
    out_head_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    TILE_ROWS: tl.constexpr,  # noqa: N803
    TILE_KEYS: tl.constexpr,  # noqa: N803
    SPLIT_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PADDED_DIM: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    HAS_SINKS: tl.constexpr,  # noqa: N803
):
    """Attend for one tile of queries of one sequence and one KV head.

    `tiles` [tiles, 5]: row of the block table, first packed token, first position, queries, first slot. Tile row m is
    query m // GROUP of the tile, head m % GROUP of the KV head's group. WINDOW 0: none. SPLIT_KEYS 0: the program walks
    all keys and writes `out`. Else the keys are cut at multiples of SPLIT_KEYS (a multiple of TILE_KEYS); the programs
    of the grid's third axis share the pieces, and for the i-th that is seen slot + i takes the weighted sum of values,
    `partial` [slots, HEADS, HEAD_DIM], and the largest score and the sum of weights, `scales` [slots, HEADS, 2]; such
    tiles hold one query.
    """
    tile = tiles + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    table_row = tl.load(tile).to(tl.int64)
    first_token = tl.load(tile + 1).to(tl.int64)
    first_position = tl.load(tile + 2)
    queries = tl.load(tile + 3)
    slot = tl.load(tile + 4).to(tl.int64)

    m = tl.arange(0, TILE_ROWS)
    head = kv_head * GROUP + m % GROUP
    live = (m // GROUP) < queries
    position = first_position + m // GROUP
    d = tl.arange(0, PADDED_DIM)
    inside = d < HEAD_DIM
    token = first_token + m // GROUP
    query_at = query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + d[None, :]
    q = tl.load(query_at, mask=live[:, None] & inside[None, :], other=0.0)

    end = first_position + queries
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
    first_piece = 0
    pieces = 1
    if SPLIT_KEYS > 0:
        first_piece = begin // SPLIT_KEYS
        pieces = (end + SPLIT_KEYS - 1) // SPLIT_KEYS - first_piece
    for piece in range(tl.program_id(2), pieces, tl.num_programs(2)):
        piece_begin = begin
        piece_end = end
        if SPLIT_KEYS > 0:
            piece_begin = tl.maximum(begin, (first_piece + piece) * SPLIT_KEYS)
            piece_end = tl.minimum(end, (first_piece + piece + 1) * SPLIT_KEYS)
        largest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        if HAS_SINKS:
            # A sink counts once, with the first piece.
            sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
            largest = tl.where(piece == 0, sink, largest)
            total = tl.where(piece == 0, total + 1.0, total)
        gathered = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
        for start in range(piece_begin, piece_end, TILE_KEYS):
            n = start + tl.arange(0, TILE_KEYS)
            present = n < piece_end
            block = tl.load(table + table_row * table_stride + n // BLOCK_TOKENS, mask=present, other=0).to(tl.int64)
            offset = n % BLOCK_TOKENS
            key_at = keys + block * key_block_stride + offset * key_token_stride + kv_head * key_head_stride
            k = tl.load(key_at[None, :] + d[:, None], mask=inside[:, None] & present[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * scaling
            if HAS_SOFTCAP:
                # tanh(x) = 2 * sigmoid(2 * x) - 1
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
            seen = present[None, :] & (n[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            # A tile row may have seen nothing yet; -inf minus -inf would be NaN.
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(largest - base)
            total = total * shrink + tl.sum(weights, 1)
            value_at = values + block * value_block_stride + offset * value_token_stride + kv_head * value_head_stride
            v = tl.load(value_at[:, None] + d[None, :], mask=present[:, None] & inside[None, :], other=0.0)
            gathered = gathered * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            largest = new_largest
        if SPLIT_KEYS > 0:
            row = (slot + piece) * HEADS + head
            tl.store(scales + row * 2, largest, mask=live)
            tl.store(scales + row * 2 + 1, total, mask=live)
            partial_at = partial + row[:, None] * HEAD_DIM + d[None, :]
            tl.store(partial_at, gathered, mask=live[:, None] & inside[None, :])
        else:
            result = gathered / tl.where(total > 0.0, total, 1.0)[:, None]
            out_at = out + token[:, None] * out_token_stride + head[:, None] * out_head_stride + d[None, :]
            tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def combine_pieces(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 (a kernel is one function)
    out,
    partial,
    scales,
    tiles,
    out_token_stride,
    out_head_stride,
    HEADS: tl.constexpr,  # noqa: N803
    TILE_KEYS: tl.constexpr,  # noqa: N803
    SPLIT_KEYS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PADDED_DIM: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
):
    """Write one head of one tile's query from its pieces, in their order; of one piece exactly what it alone gives."""
    tile = tiles + tl.program_id(0) * 5
    head = tl.program_id(1)
    token = tl.load(tile + 1).to(tl.int64)
    position = tl.load(tile + 2)
    slot = tl.load(tile + 4).to(tl.int64)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
    pieces = position // SPLIT_KEYS + 1 - begin // SPLIT_KEYS

    d = tl.arange(0, PADDED_DIM)
    inside = d < HEAD_DIM
    row = slot * HEADS + head
    largest = tl.load(scales + row * 2)
    total = tl.load(scales + row * 2 + 1)
    gathered = tl.load(partial + row * HEAD_DIM + d, mask=inside, other=0.0)
    for piece in range(1, pieces):
        row = (slot + piece) * HEADS + head
        # No piece is without a key that is seen, so that no largest score is -inf.
        next_largest = tl.load(scales + row * 2)
        new_largest = tl.maximum(largest, next_largest)
        shrink = tl.exp(largest - new_largest)
        grow = tl.exp(next_largest - new_largest)
        total = total * shrink + tl.load(scales + row * 2 + 1) * grow
        next_gathered = tl.load(partial + row * HEAD_DIM + d, mask=inside, other=0.0)
        gathered = gathered * shrink + next_gathered * grow
        largest = new_largest
    out_at = out + token * out_token_stride + head * out_head_stride + d
    tl.store(out_at, (gathered / total).to(out.dtype.element_ty), mask=inside)
