"""Pooling on the device: the mean over each block's valid tokens, and the primitives that other kernels pool with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.host import launch, num_sms
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.tiles import row_strides
from foveal.kernels.values import size_stride


@triton.jit
def add_column_sums(total, x, valid):
    """`total` [16, D] float32 plus the sum of the `valid` [N] rows of x [N, D], in each of its rows; others are finite.

    By a matrix product: whichever kernel pools a block of 16-bit numbers, and however it lays them out, gets the same
    bits, and so the same selection.
    """
    if x.dtype == tl.float32:
        return total + tl.sum(tl.where(valid[:, None], x, 0.0), 0)[None, :]
    else:
        ones = tl.zeros([16, x.shape[0]], tl.float32) + tl.where(valid, 1.0, 0.0)[None, :]
        return tl.dot(ones.to(x.dtype), x, total)


@triton.jit
def add_part_sums(total, x, part, PARTS: tl.constexpr):
    """`total` [16, D] float32 plus sums of rows of x [N, D]: in its row r < PARTS of those whose `part` [N] is r.

    The rows behind get the sum over all parts, to the bit that of `add_column_sums`. Rows of part -1 do not count, and
    are finite.
    """
    r = tl.arange(0, 16)
    if x.dtype == tl.float32:
        for i in tl.static_range(PARTS):
            of_part = tl.sum(tl.where((part == i)[:, None], x, 0.0), 0)
            total = tl.where((r == i)[:, None], total + of_part[None, :], total)
        everything = tl.sum(tl.where((part >= 0)[:, None], x, 0.0), 0)
        return tl.where((r >= PARTS)[:, None], total + everything[None, :], total)
    else:
        mine = (part[None, :] >= 0) & ((part[None, :] == r[:, None]) | (r >= PARTS)[:, None])
        return tl.dot(tl.where(mine, 1.0, 0.0).to(x.dtype), x, total)


@triton.jit
def part_of(place, valid, part_tokens):
    """Which quarter of its block each token is in, by its place there; -1 for tokens that do not count."""
    part = tl.zeros_like(place)
    for i in tl.static_range(1, 4):
        part += (place >= i * part_tokens).to(tl.int32)
    return tl.where(valid, part, -1)


@triton.jit
def part_means(total, size, part_tokens):
    """Means [16, D] from what `add_part_sums` made of a block's `size` tokens; 0 for what has none."""
    r = tl.arange(0, 16)
    sizes = tl.where(r < 4, tl.minimum(tl.maximum(size - r * part_tokens, 0), part_tokens), size)
    return total / tl.maximum(sizes, 1).to(tl.float32)[:, None]


@triton.jit
def store_parts(pointer, mean, first, parts, D: tl.constexpr):
    """Stores the first four rows of mean [16, D], in range of float16, as rows first ... of `parts` at `pointer`."""
    r = tl.arange(0, 16)
    pointers = pointer + (first + r)[:, None] * D + tl.arange(0, D)[None, :]
    mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0)
    tl.store(pointers, mean.to(pointer.dtype.element_ty), mask=((r < 4) & (first + r < parts))[:, None])


@triton.jit
def block_mean(total, size):
    """The mean over a block's `size` valid tokens, given their sum; 0 if there are none."""
    return total / tl.maximum(size, 1).to(tl.float32)


@triton.jit
def store_first_row(pointers, x):
    """Stores the first row of x [16, D] to `pointers` [D]; what `add_column_sums` makes has the same in each."""
    row = tl.arange(0, 16)[:, None]
    tl.store(row * 0 + pointers[None, :], x, mask=row == 0)


@triton.jit(do_not_specialize=["heads", "pairs", "length", "size_stride", "block", "at_once"])
def _pool_kernel(
    x_ptr,
    pooled_ptr,
    size_ptr,
    strides,
    heads,
    pairs,
    length,
    size_stride,
    block,
    at_once,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Means over the valid tokens of `at_once` blocks, or with PARTS 4 over those of their quarters.

    With SPREAD the variance of each channel stands behind a block's mean. TILES of ROWS tokens cover a block. Heads are
    neighbors: in [B, L, H, D] memory they are, too.
    """
    await_previous()
    walk, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = pair // heads, pair % heads
    blocks, feature = tl.cdiv(length, block), tl.arange(0, D)
    part_tokens = block // PARTS
    x_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + feature[None, :]
    total = tl.zeros([16, D], tl.float32)
    squares = tl.zeros([D], tl.float32)
    shift = tl.zeros([D], tl.float32)
    for tile in tl.range(walk * at_once * TILES, tl.minimum((walk + 1) * at_once, blocks) * TILES):
        index, place = tile // TILES, tile % TILES * ROWS + tl.arange(0, ROWS)
        size = tl.minimum(block, length - index * block)
        if HAS_SIZES:
            size = tl.minimum(size, tl.load(size_ptr + batch.to(tl.int64) * size_stride + index))
        valid = place < size
        tokens = (index * block + place).to(tl.int64)[:, None] * strides[2]
        x = tl.load(x_ptr + tokens, mask=valid[:, None], other=0.0)
        if TILES == 1:
            total = tl.zeros([16, D], tl.float32)
        else:
            total = tl.where(tile % TILES == 0, 0.0, total)
        if PARTS > 1:
            total = add_part_sums(total, x, part_of(place, valid, part_tokens), PARTS)
        else:
            total = add_column_sums(total, x, valid)
        if SPREAD:
            # Squares of what is left of a mean near the block's, that of its first tile.
            first_row = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, total, 0.0), 0)
            shift = tl.where(tile % TILES == 0, block_mean(first_row, tl.minimum(size, ROWS)), shift)
            apart = tl.where(valid[:, None], x.to(tl.float32) - shift[None, :], 0.0)
            squares = tl.where(tile % TILES == 0, 0.0, squares) + tl.sum(apart * apart, 0)
        if tile % TILES == TILES - 1:
            row = pair.to(tl.int64) * blocks + index
            if PARTS > 1:
                parts = tl.cdiv(length, part_tokens)
                mean = part_means(total, size, part_tokens)
                store_parts(pooled_ptr + pair.to(tl.int64) * parts * D, mean, index * PARTS, parts, D)
            else:
                row *= 2 * D if SPREAD else D
                store_first_row(pooled_ptr + row + feature, block_mean(total, size))
            if SPREAD:
                moved = block_mean(first_row, size) - shift
                variance = tl.maximum(block_mean(squares, size) - moved * moved, 0.0)
                tl.store(pooled_ptr + row + D + feature, variance)


def pool(x: Tensor, block: int, sizes: Tensor | None = None, *, spread: bool = False, quarters: bool = False) -> Tensor:
    """Mean over each block's valid tokens, float32 [B, H, T, D].

    Args:
        x: [B, H, L, D], D a power of two.
        sizes: int32 [B or 1, T], valid tokens at the front of each block; None when all are full but the last.
        spread: whether the variances are wanted, behind the means: [B, H, T, 2 D].
        quarters: whether the means of the blocks' quarters are wanted instead: float16 [B, H, ceil(L / quarter), D].
    """
    batch, heads, length, head_dim = x.shape
    blocks, pairs = -(-length // block), batch * heads
    shape = (batch, heads, blocks, 2 * head_dim if spread else head_dim)
    if quarters:
        shape = (batch, heads, -(-length // (block // PARTS)), head_dim)
    pooled = torch.empty(shape, dtype=torch.float16 if quarters else torch.float32, device=x.device)
    # Five programs fit an SM. Each walks over a few blocks, and loads one while it sums another.
    at_once = -(-blocks * pairs // (5 * num_sms(x.device)))
    launch(
        _pool_kernel,
        (-(-blocks // at_once) * pairs,),
        x_ptr=x,
        pooled_ptr=pooled,
        size_ptr=pooled if sizes is None else sizes,
        strides=row_strides(x),
        heads=heads,
        pairs=pairs,
        length=length,
        size_stride=size_stride(sizes),
        block=block,
        at_once=at_once,
        D=head_dim,
        ROWS=64,
        TILES=-(-block // 64),
        PARTS=PARTS if quarters else 1,
        HAS_SIZES=sizes is not None,
        SPREAD=spread,
        num_warps=4,
    )
    return pooled
