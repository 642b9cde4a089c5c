"""Block selection on the device: pooling, and one kernel from pooled blocks to lists and mask.

The rule is that of `foveal.selection`, ties included. Scores live in registers as order-preserving integers; a bitwise
search finds each row's thresholds, and a running count settles ties and places the lists in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.block_sparse.triton.lists import padded_blocks
from foveal.block_sparse.triton.tiles import register_limit, row_strides

# Scores a program holds in the registers of its eight warps; also the most key blocks a row can have.
MAX_SCORES = 16384
LOWEST = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["heads", "length", "size_stride", "block"])
def _pool_kernel(
    x_ptr, pooled_ptr, size_ptr, strides, pooled_strides, heads, length, size_stride, block,
    D: tl.constexpr, ROWS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """Mean over one block's valid tokens, in float32."""
    index, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    start = index * block
    size = tl.minimum(block, length - start)
    if HAS_SIZES:
        size = tl.minimum(size, tl.load(size_ptr + batch.to(tl.int64) * size_stride + index))
    feature = tl.arange(0, D)
    x_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + feature[None, :]
    total = tl.zeros([D], tl.float32)
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        tokens = (start + row).to(tl.int64)[:, None] * strides[2]
        total += tl.sum(tl.load(x_ptr + tokens, mask=(row < size)[:, None], other=0.0).to(tl.float32), 0)
    pooled_ptr += pair.to(tl.int64) * pooled_strides[0] + index * pooled_strides[1]
    tl.store(pooled_ptr + feature * pooled_strides[2], total / tl.maximum(size, 1).to(tl.float32))


@triton.jit
def order_preserving(x):
    """int32 that order like the float32 x, -0 equal to 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def top_mask(keys, candidates, wanted, LOW_FIRST: tl.constexpr):
    """Marks the `wanted` [R] largest `keys` [R, C] of `candidates`; ties go to the low columns, or to the high ones."""
    keys = tl.where(candidates, keys, LOWEST)
    # Built from the highest bit down, as the unsigned number that orders like the signed one with its sign flipped.
    positive = tl.sum((keys >= 0).to(tl.int32), 1)
    threshold = tl.where(positive >= wanted, LOWEST, 0)
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        count = tl.sum((keys >= (trial ^ LOWEST)[:, None]).to(tl.int32), 1)
        threshold = tl.where(count >= wanted, trial, threshold)
    threshold = (threshold ^ LOWEST)[:, None]
    above = keys > threshold
    tied = ((keys == threshold) & candidates).to(tl.int32)
    missing = (wanted - tl.sum(above.to(tl.int32), 1))[:, None]
    rank = tl.cumsum(tied, 1)
    if not LOW_FIRST:
        rank = tl.sum(tied, 1)[:, None] - rank + tied
    return (above & candidates) | ((tied > 0) & (rank <= missing))


@triton.jit(
    do_not_specialize=[
        "heads", "query_blocks", "key_blocks", "width", "padded_rows", "padded_columns", "scale", "critical_wanted",
        "negligible_wanted", "key_start", "key_stop", "query_start", "query_stop",
    ]
)  # fmt: skip
def _select_kernel(
    query_ptr, key_ptr, critical_ptr, count_ptr, marginal_ptr, valid_ptr, wanted_ptr,
    heads, query_blocks, key_blocks, width, padded_rows, padded_columns, scale, critical_wanted, negligible_wanted,
    key_start, key_stop, query_start, query_stop,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MARGINAL: tl.constexpr, PER_SAMPLE: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_rows, in_columns = row < query_blocks, column < key_blocks
    query_ptr += (pair * query_blocks + row) * D
    key_ptr += pair * D * key_blocks + column
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    if PRODUCT:
        # Three products of 11-bit parts are as good as float32, and the same for equal columns: ties stay ties.
        for start in range(0, D, 16):
            feature = start + tl.arange(0, 16)
            q = tl.load(query_ptr[:, None] + feature[None, :], mask=in_rows[:, None], other=0.0) * scale
            k = tl.load(key_ptr[None, :] + feature[:, None] * key_blocks, mask=in_columns[None, :], other=0.0)
            scores = tl.dot(q, k, scores, input_precision="tf32x3")
    else:
        for start in range(0, D, 4):
            for offset in tl.static_range(4):
                q = tl.load(query_ptr + start + offset, mask=in_rows, other=0.0) * scale
                k = tl.load(key_ptr + (start + offset) * key_blocks, mask=in_columns, other=0.0)
                scores += q[:, None] * k[None, :]

    valid = in_columns
    if PER_SAMPLE:
        blocks = tl.load(valid_ptr + pair // heads)
        valid = column < blocks
        critical_wanted = tl.load(wanted_ptr + 2 * blocks)
        negligible_wanted = tl.load(wanted_ptr + 2 * blocks + 1)
    candidates = valid[None, :] & in_rows[:, None]
    keys = order_preserving(scores)
    critical = top_mask(keys, candidates, tl.zeros([ROWS], tl.int32) + critical_wanted, True)
    protected = ((column >= key_start) & (column < key_stop))[None, :]
    protected |= ((row >= query_start) & (row < query_stop))[:, None]
    critical = (critical | protected) & candidates

    marks = critical.to(tl.int32)
    count = tl.sum(marks, 1)
    place = tl.cumsum(marks, 1) - 1
    lists = critical_ptr + (pair * query_blocks + row)[:, None] * width
    columns = tl.zeros([ROWS, COLUMNS], tl.int32) + column[None, :]
    tl.store(lists + place, columns, mask=critical)
    rest = (column[None, :] >= count[:, None]) & (column < width)[None, :] & in_rows[:, None]
    tl.store(lists + column[None, :], tl.zeros([ROWS, COLUMNS], tl.int32), mask=rest)
    tl.store(count_ptr + pair * query_blocks + row, count, mask=in_rows)
    if MARGINAL:
        others = candidates & (marks == 0)
        negligible = top_mask(~keys, others, tl.zeros([ROWS], tl.int32) + negligible_wanted, False)
        marginal = tl.where(others & (negligible.to(tl.int32) == 0), 1.0, 0.0)
        offsets = (pair * padded_rows + row)[:, None] * padded_columns + column[None, :]
        inside = (row < padded_rows)[:, None] & (column < padded_columns)[None, :]
        tl.store(marginal_ptr + offsets, marginal.to(marginal_ptr.dtype.element_ty), mask=inside)


def pool(x: Tensor, block: int, sizes: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """Mean over each block's valid tokens, float32 [B, H, T, D], or [B, H, D, T] if `transposed`.

    Args:
        x: [B, H, L, D], D a power of two.
        sizes: int32 [B or 1, T], valid tokens at the front of each block; None when all are full but the last.
    """
    batch, heads, length, head_dim = x.shape
    blocks = triton.cdiv(length, block)
    shape = (batch, heads, head_dim, blocks) if transposed else (batch, heads, blocks, head_dim)
    pooled = torch.empty(shape, dtype=torch.float32, device=x.device)
    strides = (head_dim * blocks, 1, blocks) if transposed else (head_dim * blocks, head_dim, 1)
    _pool_kernel[(blocks, batch * heads)](
        x, pooled, pooled if sizes is None else sizes, row_strides(x), strides, heads, length,
        0 if sizes is None or sizes.shape[0] == 1 else sizes.stride(0), block,
        D=head_dim, ROWS=64, HAS_SIZES=sizes is not None, num_warps=4,
    )  # fmt: skip
    return pooled


def select(
    query: Tensor,
    key: Tensor,
    scale: float,
    width: int,
    critical: int,
    negligible: int,
    valid_blocks: Tensor | None,
    wanted: Tensor | None,
    key_range: tuple[int, int],
    query_range: tuple[int, int],
    with_marginal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled blocks to critical lists, their counts and the marginal mask.

    Args:
        query: float32 [B, H, Tq, D], contiguous.
        key: float32 [B, H, D, Tk], contiguous; Tk at most MAX_SCORES.
        width: of the lists; no row may have more critical blocks.
        critical, negligible: how many per row.
        valid_blocks: int32 [B], leading key blocks with a valid token, or None for all; then
        wanted: int32 [Tk + 1, 2] has how many are critical and negligible for each number of valid blocks.
        key_range, query_range: [start, stop) in blocks: critical for every row, and rows that attend to everything.

    Returns:
        int32 [B, H, Tq, width], int32 [B, H, Tq], and bfloat16 [B, H, padded Tq, padded Tk], empty without the mask.
    """
    batch, heads, rows, head_dim = query.shape
    columns = key.shape[-1]
    device = query.device
    lists = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=device)
    padded = (padded_blocks(rows), padded_blocks(columns)) if with_marginal else (0, 0)
    marginal = torch.empty((batch, heads, *padded), dtype=torch.bfloat16, device=device)
    held = max(64, triton.next_power_of_2(columns))
    rows_at_once = min(16, MAX_SCORES // held)
    _select_kernel[(triton.cdiv(max(rows, padded[0]), rows_at_once), batch * heads)](
        query, key, lists, counts, marginal if with_marginal else lists,
        counts if valid_blocks is None else valid_blocks, counts if wanted is None else wanted,
        heads, rows, columns, width, *padded, scale, critical, negligible, *key_range, *query_range,
        D=head_dim, ROWS=rows_at_once, COLUMNS=held, MARGINAL=with_marginal, PER_SAMPLE=valid_blocks is not None,
        PRODUCT=rows_at_once == 16,
        num_warps=8, **register_limit(128),
    )  # fmt: skip
    return lists, counts, marginal


@torch.library.custom_op("foveal::select_triton", mutates_args=())
def select_op(
    query: Tensor,
    key: Tensor,
    block_q: int,
    block_k: int,
    sizes: Tensor | None,
    valid_blocks: Tensor | None,
    wanted: Tensor | None,
    scale: float,
    width: int,
    critical: int,
    negligible: int,
    key_start: int,
    key_stop: int,
    query_start: int,
    query_stop: int,
    with_marginal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pool` and `select` as one op: query and key are [B, H, L, D]."""
    return select(
        pool(query, block_q),
        pool(key, block_k, sizes, transposed=True),
        scale,
        width,
        critical,
        negligible,
        valid_blocks,
        wanted,
        (key_start, key_stop),
        (query_start, query_stop),
        with_marginal,
    )


@select_op.register_fake
def _(query, key, block_q, block_k, sizes, valid_blocks, wanted, scale, width, critical, negligible, *options):
    batch, heads, query_length, _ = query.shape
    rows, columns = -(-query_length // block_q), -(-key.shape[2] // block_k)
    padded = (padded_blocks(rows), padded_blocks(columns)) if options[-1] else (0, 0)
    return (
        query.new_empty((batch, heads, rows, width), dtype=torch.int32),
        query.new_empty((batch, heads, rows), dtype=torch.int32),
        query.new_empty((batch, heads, *padded), dtype=torch.bfloat16),
    )
