"""Pooling on the device: the mean over each block's valid tokens, and the primitives that other kernels pool with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.host import launch
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
def block_mean(total, size):
    """The mean over a block's `size` valid tokens, given their sum; 0 if there are none."""
    return total / tl.maximum(size, 1).to(tl.float32)


@triton.jit
def store_first_row(pointers, x):
    """Stores the first row of x [16, D] to `pointers` [D]; what `add_column_sums` makes has the same in each."""
    row = tl.arange(0, 16)[:, None]
    tl.store(row * 0 + pointers[None, :], x, mask=row == 0)


@triton.jit(do_not_specialize=["heads", "pairs", "length", "size_stride", "block"])
def _pool_kernel(
    x_ptr, pooled_ptr, size_ptr, strides, heads, pairs, length, size_stride, block,
    D: tl.constexpr, ROWS: tl.constexpr, HAS_SIZES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Mean over one block's valid tokens, in float32, and behind it the variance of each channel if SPREAD.

    Heads are neighbors: in [B, L, H, D] memory they are, too.
    """
    await_previous()
    index, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = pair // heads, pair % heads
    start = index * block
    size = tl.minimum(block, length - start)
    if HAS_SIZES:
        size = tl.minimum(size, tl.load(size_ptr + batch.to(tl.int64) * size_stride + index))
    x_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + tl.arange(0, D)[None, :]
    total = tl.zeros([16, D], tl.float32)
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        tokens = (start + row).to(tl.int64)[:, None] * strides[2]
        total = add_column_sums(total, tl.load(x_ptr + tokens, mask=(row < size)[:, None], other=0.0), row < size)
    mean = block_mean(total, size)
    pooled_ptr += (pair.to(tl.int64) * tl.cdiv(length, block) + index) * (2 * D if SPREAD else D)
    store_first_row(pooled_ptr + tl.arange(0, D), mean)
    if SPREAD:
        mean = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, mean, 0.0), 0)
        squares = tl.zeros([D], tl.float32)
        for first in range(0, size, ROWS):
            row = first + tl.arange(0, ROWS)
            tokens = (start + row).to(tl.int64)[:, None] * strides[2]
            x = tl.load(x_ptr + tokens, mask=(row < size)[:, None], other=0.0).to(tl.float32)
            apart = tl.where((row < size)[:, None], x - mean[None, :], 0.0)
            squares += tl.sum(apart * apart, 0)
        tl.store(pooled_ptr + D + tl.arange(0, D), block_mean(squares, size))


def pool(x: Tensor, block: int, sizes: Tensor | None = None, *, spread: bool = False) -> Tensor:
    """Mean over each block's valid tokens, float32 [B, H, T, D]; [B, H, T, 2 D] with the variances behind the means.

    Args:
        x: [B, H, L, D], D a power of two.
        sizes: int32 [B or 1, T], valid tokens at the front of each block; None when all are full but the last.
        spread: whether the variances are wanted.
    """
    batch, heads, length, head_dim = x.shape
    blocks = -(-length // block)
    features = 2 * head_dim if spread else head_dim
    pooled = torch.empty((batch, heads, blocks, features), dtype=torch.float32, device=x.device)
    launch(
        _pool_kernel,
        (blocks * batch * heads,),
        x_ptr=x,
        pooled_ptr=pooled,
        size_ptr=pooled if sizes is None else sizes,
        strides=row_strides(x),
        heads=heads,
        pairs=batch * heads,
        length=length,
        size_stride=size_stride(sizes),
        block=block,
        D=head_dim,
        ROWS=64,
        HAS_SIZES=sizes is not None,
        SPREAD=spread,
        num_warps=4,
    )
    return pooled
