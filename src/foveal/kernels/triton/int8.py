"""Queries and keys in eight bits on the device; `foveal.kernels.int8` says what is computed.

Queries are rounded by the attention kernel, which loads each block of them once. Keys are rounded once for all blocks
that read them: the mean of a head's keys comes from the means of its blocks, which the pass over K makes that scores
blocks or builds states, and one more pass reads K and writes it at half the size. Beside the passes that there are
anyway this is two launches, 3 bytes an element of K, and the means; the attention kernel then loads half of K's bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.host import launch
from foveal.kernels.int8 import LARGEST
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.tiles import load_rows, row_strides, store_rows
from foveal.kernels.values import size_stride
from foveal.symbols import ceil_div

_LARGEST = tl.constexpr(float(LARGEST))
# Added to a float32 of at most 2^22 in magnitude and taken away again, this rounds it to a whole number, ties to even.
ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def to_int8(x):
    """x [N, D] float32 as int8, and the step that they count: the largest magnitude / 127, or 1 where all are 0."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    largest = tl.where(largest > 0.0, largest, _LARGEST)
    x = x * (_LARGEST / largest) + ROUNDING - ROUNDING
    return x.to(tl.int8), largest / _LARGEST


@triton.jit(do_not_specialize=["heads", "first_pair", "blocks", "length", "block", "size_stride"])
def _key_mean_kernel(
    pooled_ptr,
    mean_ptr,
    size_ptr,
    heads,
    first_pair,
    blocks,
    length,
    block,
    size_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """The mean of a head's valid keys from those of its blocks, a few channels a program."""
    await_previous()
    feature, pair = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    batch = (first_pair + pair) // heads
    pair = pair.to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, ROWS):
        index = start + tl.arange(0, ROWS)
        size = tl.maximum(tl.minimum(length - index * block, block), 0)
        if HAS_SIZES:
            listed = size_ptr + batch.to(tl.int64) * size_stride + index
            size = tl.minimum(size, tl.load(listed, mask=index < blocks, other=0))
        pooled = pooled_ptr + (pair * blocks + index)[:, None] * D + feature[None, :]
        weight = size.to(tl.float32)
        total += tl.load(pooled, mask=(index < blocks)[:, None], other=0.0) * weight[:, None]
        count += weight
    tl.store(mean_ptr + pair * D + feature, tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0))


@triton.jit(do_not_specialize=["heads", "pairs", "first_pair", "length", "size_stride"])
def _to_int8_kernel(
    x_ptr,
    mean_ptr,
    size_ptr,
    x_8_ptr,
    step_ptr,
    back_ptr,
    strides,
    strides_8,
    back_strides,
    heads,
    pairs,
    first_pair,
    length,
    size_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    BACK: tl.constexpr,
):
    """One block in int8 and its step, and if BACK what these stand for."""
    await_previous()
    index, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    start = index * BLOCK
    size = tl.minimum(length - start, BLOCK)
    if HAS_SIZES:
        size = tl.minimum(size, tl.load(size_ptr + batch.to(tl.int64) * size_stride + index))
    x = load_rows(x_ptr, strides, batch, head, start, length, BLOCK, D, False).to(tl.float32)
    if CENTER:
        x -= tl.load(mean_ptr + pair * D + tl.arange(0, D))[None, :]
    x = tl.where((tl.arange(0, BLOCK) < size)[:, None], x, 0.0)
    x_8, step = to_int8(x)
    tl.store(step_ptr + (first_pair + pair).to(tl.int64) * tl.cdiv(length, BLOCK) + index, step)
    store_rows(x_8_ptr, strides_8, batch, head, start, length, x_8, BLOCK, D)
    if BACK:
        store_rows(back_ptr, back_strides, batch, head, start, length, x_8.to(tl.float32) * step, BLOCK, D)


class Int8(NamedTuple):
    """A tensor in int8.

    values: int8 [B, H, L, D], contiguous.
    steps: float32 [B * H, T], what 1 stands for in each block.
    """

    values: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, x: Tensor, block: int) -> Int8:
        """Memory for x [B, H, L, D] in blocks of so many tokens."""
        batch, heads, length, _ = x.shape
        steps = torch.empty((batch * heads, ceil_div(length, block)), dtype=torch.float32, device=x.device)
        return cls(torch.empty(x.shape, dtype=torch.int8, device=x.device), steps)


def key_means(pooled: Tensor, key: Tensor, block: int, sizes: Tensor | None, pairs: range) -> Tensor:
    """The means of the valid keys of these pairs of batch and head, float32 [pairs, D].

    Args:
        pooled: float32 [pairs, Tk, D], contiguous, the means of each block's valid keys.
        key: [B, H, Lk, D].
        sizes: int32 [B or 1, Tk], valid keys at the front of each block; None when all are full but the last.
    """
    number, blocks, head_dim = pooled.shape
    mean = torch.empty((number, head_dim), dtype=torch.float32, device=pooled.device)
    launch(
        _key_mean_kernel,
        (head_dim // 16, number),
        pooled_ptr=pooled,
        mean_ptr=mean,
        size_ptr=mean if sizes is None else sizes,
        heads=key.shape[1],
        first_pair=pairs.start,
        blocks=blocks,
        length=key.shape[2],
        block=block,
        size_stride=size_stride(sizes),
        D=head_dim,
        ROWS=128,
        COLUMNS=16,
        HAS_SIZES=sizes is not None,
        num_warps=4,
    )
    return mean


def write_int8(
    x: Tensor,
    block: int,
    sizes: Tensor | None,
    mean: Tensor | None,
    pairs: range,
    output: Int8,
    back: Tensor | None = None,
) -> None:
    """Writes the blocks of these pairs of x [B, H, L, D] less their means in int8.

    Args:
        sizes: as in `key_means`; what does not count becomes 0.
        mean: float32 [pairs, D], contiguous; None for 0.
        output: what to write.
        back: [B, H, L, D], for what the integers stand for in the dtype of x; None if nobody wants that.
    """
    heads, length, head_dim = x.shape[1:]
    launch(
        _to_int8_kernel,
        (ceil_div(length, block) * len(pairs),),
        x_ptr=x,
        mean_ptr=output.steps if mean is None else mean,
        size_ptr=output.steps if sizes is None else sizes,
        x_8_ptr=output.values,
        step_ptr=output.steps,
        back_ptr=x if back is None else back,
        strides=row_strides(x),
        strides_8=row_strides(output.values),
        back_strides=row_strides(x if back is None else back),
        heads=heads,
        pairs=len(pairs),
        first_pair=pairs.start,
        length=length,
        size_stride=size_stride(sizes),
        D=head_dim,
        BLOCK=block,
        CENTER=mean is not None,
        HAS_SIZES=sizes is not None,
        BACK=back is not None,
        num_warps=8 if block * head_dim == 128 * 128 else 4,
    )


def round_trip(x: Tensor, block: int, sizes: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Int8]:
    """x less its means after a round trip through int8, in its own dtype, and on the way."""
    back, output = torch.empty_like(x), Int8.empty(x, block)
    write_int8(x, block, sizes, mean, range(x.shape[0] * x.shape[1]), output, back)
    return back, output
