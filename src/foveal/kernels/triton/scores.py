"""Scores of pairs of pooled blocks, as order-preserving integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.thresholds import order_preserving
from foveal.kernels.values import size_stride
from foveal.rules import SelectionRule

SCORE_TILE = 64  # what `padded_blocks` pads to


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
    query_ptr, key_ptr, score_ptr, query_blocks, key_blocks, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """order_preserving(scale * q k^T) of a tile of pooled blocks; what is past the last key block is undefined."""
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    padded_columns = tl.num_programs(0) * TILE
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < query_blocks, column < key_blocks
    scores = _products(
        query_ptr + (pair * query_blocks + row)[:, None] * D, key_ptr + (pair * key_blocks + column)[None, :] * D,
        in_rows, in_columns, scale, D, TILE, PRECISION,
    )  # fmt: skip
    offsets = (pair * query_blocks + row)[:, None] * padded_columns + column[None, :]
    tl.store(score_ptr + offsets, order_preserving(scores), mask=in_rows[:, None])


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_quarters",
        "key_quarters",
        "query_blocks",
        "padded_columns",
        "first_pair",
        "size_stride",
        "scale",
    ]
)
def _quarter_score_kernel(
    query_ptr, key_ptr, score_ptr, size_ptr,
    heads, query_quarters, key_quarters, query_blocks, padded_columns, first_pair, size_stride, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """order_preserving(log-sum-exp of scale * q k^T over the quarters of two blocks), for a tile of blocks."""
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < query_quarters, column < key_quarters
    scores = _products(
        query_ptr + (pair * query_quarters + row)[:, None] * D, key_ptr + (pair * key_quarters + column)[None, :] * D,
        in_rows, in_columns, scale, D, TILE, PRECISION,
    )  # fmt: skip
    if HAS_SIZES:
        sizes = size_ptr + ((first_pair + pair) // heads) * size_stride + column
        in_columns = in_columns & (tl.load(sizes, mask=in_columns, other=0) > 0)
    scores = tl.where(in_rows[:, None] & in_columns[None, :], scores, float("-inf"))
    parts = tl.reshape(scores, [TILE // 4, 4, TILE // 4, 4])
    highest = tl.max(tl.max(parts, 3), 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.sum(tl.exp(parts - base[:, None, :, None]), 3), 1)
    block_row = tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    block_column = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
    offsets = (pair * query_blocks + block_row)[:, None] * padded_columns + block_column[None, :]
    tl.store(score_ptr + offsets, order_preserving(base + tl.log(total)), mask=(block_row < query_blocks)[:, None])


def write_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    rule: SelectionRule,
    blocks: tuple[int, int],
    heads: int,
    first_pair: int,
    pairs: int,
    part_sizes: Tensor | None,
    scores: Tensor,
) -> None:
    """Writes the scores of some pairs of batch and head.

    Args:
        query, key: pooled, as `pick` gets them, from these pairs on.
        blocks: Tq and Tk.
        heads: H.
        first_pair, pairs: where these pairs start among all of them, and how many they are.
        part_sizes: as `pick` gets it.
        scores: order-preserving int32 [at least pairs, Tq, padded Tk]; what is past the last key block is undefined.
    """
    rows, columns = blocks
    column_tiles = -(-columns // SCORE_TILE)
    # Three products of 11-bit parts are as good as float32, and the same for equal columns: ties stay ties. AMD's
    # compiler has no such products, but those of float32.
    precision = "ieee" if torch.version.hip else "tf32x3"
    if rule.quarters:
        launch(
            _quarter_score_kernel,
            (-(-PARTS * columns // SCORE_TILE), -(-PARTS * rows // SCORE_TILE), pairs),
            query_ptr=query,
            key_ptr=key,
            score_ptr=scores,
            size_ptr=scores if part_sizes is None else part_sizes,
            heads=heads,
            query_quarters=query.shape[1],
            key_quarters=key.shape[1],
            query_blocks=rows,
            padded_columns=column_tiles * SCORE_TILE,
            first_pair=first_pair,
            size_stride=size_stride(part_sizes),
            scale=scale,
            D=query.shape[2],
            TILE=SCORE_TILE,
            PRECISION=precision,
            HAS_SIZES=part_sizes is not None,
            num_warps=4,
            num_stages=1,
        )
    else:
        launch(
            _score_kernel,
            (column_tiles, -(-rows // SCORE_TILE), pairs),
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
