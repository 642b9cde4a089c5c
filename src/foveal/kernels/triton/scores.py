"""Scores of pairs of pooled blocks, as order-preserving integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.thresholds import order_preserving
from foveal.kernels.triton.tiles import LN_2
from foveal.kernels.values import size_stride
from foveal.rules import SelectionRule

SCORE_TILE = 64  # what `padded_blocks` pads to
QUARTER_TILE = 128
LOG2_E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """Valid tokens at the front of each block, int32 [B or 1, T], where quarters are scored; None if all are full."""

    query: Tensor | None = None
    key: Tensor | None = None


NO_SIZES = Sizes()


@triton.jit
def _products(
    query_ptrs, key_ptrs, in_rows, in_columns, scale, D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """scale * q k^T of a tile of pooled rows and columns, float32, from pointers to the first feature of each."""
    scores = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, 32):
        feature = start + tl.arange(0, 32)
        q = tl.load(query_ptrs + feature[None, :], mask=in_rows[:, None], other=0.0) * scale
        k = tl.load(key_ptrs + feature[:, None], mask=in_columns[None, :], other=0.0)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "scale"])
def _score_kernel(
    query_ptr,
    key_ptr,
    score_ptr,
    query_blocks,
    key_blocks,
    scale,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """order_preserving(scale * q k^T) of a tile of pooled blocks; what is past the last key block is undefined."""
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    padded_columns = tl.num_programs(0) * TILE
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < query_blocks, column < key_blocks
    scores = _products(
        query_ptr + (pair * query_blocks + row)[:, None] * D,
        key_ptr + (pair * key_blocks + column)[None, :] * D,
        in_rows,
        in_columns,
        scale,
        D,
        TILE,
        PRECISION,
    )
    offsets = (pair * query_blocks + row)[:, None] * padded_columns + column[None, :]
    tl.store(score_ptr + offsets, order_preserving(scores), mask=in_rows[:, None])


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_quarters",
        "key_quarters",
        "query_blocks",
        "key_blocks",
        "padded_columns",
        "first_pair",
        "query_size_stride",
        "key_size_stride",
        "query_part",
        "key_part",
        "scale",
    ]
)
def _quarter_score_kernel(
    query_ptr,
    key_ptr,
    score_ptr,
    query_size_ptr,
    key_size_ptr,
    heads,
    query_quarters,
    key_quarters,
    query_blocks,
    key_blocks,
    padded_columns,
    first_pair,
    query_size_stride,
    key_size_stride,
    query_part,
    key_part,
    scale,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_SIZES: tl.constexpr,
    KEY_SIZES: tl.constexpr,
):
    """order_preserving(log-sum-exp of scale * q k^T over the quarters of two blocks), for a tile of blocks.

    Quarters without a valid token do not count, by the blocks' ..._SIZES in tokens and the ..._part of a quarter.
    """
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    batch = (first_pair + pair) // heads
    # Quarters stand where one thread of four warps holds the products of all those of two blocks: an accumulator of 128
    # rows gives a thread four, 8 and 64 apart, and columns 32 apart.
    place = tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + 4 * (place // 16 % 4 * 8 + place % 8) + place // 64 * 2 + place // 8 % 2
    column = tl.program_id(0) * TILE + 4 * (place % 32) + place // 32
    in_rows, in_columns = row < query_quarters, column < key_quarters
    feature = tl.arange(0, D)
    query_ptrs = query_ptr + (pair * query_quarters + row)[:, None] * D + feature[None, :]
    key_ptrs = key_ptr + (pair * key_quarters + column)[:, None] * D + feature[None, :]
    q = tl.load(query_ptrs, mask=in_rows[:, None], other=0.0)
    k = tl.load(key_ptrs, mask=in_columns[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k))
    if QUERY_SIZES:
        sizes = query_size_ptr + batch * query_size_stride + row // 4
        in_rows = in_rows & (tl.load(sizes, mask=row // 4 < query_blocks, other=0) > row % 4 * query_part)
    if KEY_SIZES:
        sizes = key_size_ptr + batch * key_size_stride + column // 4
        in_columns = in_columns & (tl.load(sizes, mask=column // 4 < key_blocks, other=0) > column % 4 * key_part)
    scores = tl.where(in_rows[:, None] & in_columns[None, :], scores * (scale * LOG2_E), float("-inf"))
    parts = tl.reshape(scores, [2, 4, 2, 8, 4, 32])
    highest = tl.max(tl.max(tl.max(parts, 4), 2), 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.sum(tl.sum(tl.math.exp2(parts - base[None, :, None, :, None, :]), 4), 2), 0)
    found = tl.reshape(order_preserving((base + tl.math.log2(total)) * LN_2), [TILE // 4, TILE // 4])
    block_row = tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    block_column = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
    offsets = (pair * query_blocks + block_row)[:, None] * padded_columns + block_column[None, :]
    inside = (block_row < query_blocks)[:, None] & (block_column < padded_columns)[None, :]
    tl.store(score_ptr + offsets, found, mask=inside)


def write_scores(
    pooled: tuple[Tensor, Tensor],
    scale: float,
    rule: SelectionRule,
    blocks: tuple[int, int],
    heads: int,
    pairs: range,
    sizes: Sizes,
    scores: Tensor,
) -> None:
    """Writes the scores of some pairs of batch and head.

    Args:
        pooled: query and key as `pick` gets them, from these pairs on.
        blocks: Tq and Tk.
        heads: H.
        pairs: these pairs among all of them.
        sizes: as `pick` gets it.
        scores: order-preserving int32 [at least pairs, Tq, padded Tk]; what is past the last key block is undefined.
    """
    (query, key), (rows, columns) = pooled, blocks
    column_tiles = -(-columns // SCORE_TILE)
    # Three products of 11-bit parts are as good as float32, and the same for equal columns: ties stay ties. AMD's
    # compiler has no such products, but those of float32.
    precision = "ieee" if torch.version.hip else "tf32x3"
    if rule.quarters:
        of_queries, of_keys = sizes
        launch(
            _quarter_score_kernel,
            (-(-PARTS * columns // QUARTER_TILE), -(-PARTS * rows // QUARTER_TILE), len(pairs)),
            query_ptr=query,
            key_ptr=key,
            score_ptr=scores,
            query_size_ptr=scores if of_queries is None else of_queries,
            key_size_ptr=scores if of_keys is None else of_keys,
            heads=heads,
            query_quarters=query.shape[1],
            key_quarters=key.shape[1],
            query_blocks=rows,
            key_blocks=columns,
            padded_columns=column_tiles * SCORE_TILE,
            first_pair=pairs.start,
            query_size_stride=size_stride(of_queries),
            key_size_stride=size_stride(of_keys),
            query_part=rule.block_q // PARTS,
            key_part=rule.block_k // PARTS,
            scale=scale,
            D=query.shape[2],
            TILE=QUARTER_TILE,
            QUERY_SIZES=of_queries is not None,
            KEY_SIZES=of_keys is not None,
            num_warps=4,
            num_stages=1,
        )
    else:
        launch(
            _score_kernel,
            (column_tiles, -(-rows // SCORE_TILE), len(pairs)),
            query_ptr=query,
            key_ptr=key,
            score_ptr=scores,
            query_blocks=rows,
            key_blocks=columns,
            scale=scale,
            D=query.shape[2],
            TILE=SCORE_TILE,
            PRECISION=precision,
            num_warps=4,
            num_stages=1,
        )
