"""The weights of two branches for each query block, from their log-odds, where each branch may lack keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.values import size_stride

ROWS = 128


@triton.jit(do_not_specialize=["heads", "query_blocks", "key_blocks", "padded_rows", "size_stride", "first_pair"])
def _mix_kernel(
    logit_ptr,
    count_ptr,
    size_ptr,
    mix_ptr,
    logit_strides,
    heads,
    query_blocks,
    key_blocks,
    padded_rows,
    size_stride,
    first_pair,
    ROWS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """sigmoid(x) and sigmoid(-x) of ROWS log-odds of one head; 1 and 1 where not both branches have keys."""
    await_previous()
    row, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first_pair + tl.program_id(1)
    inside = row < query_blocks
    filled = key_blocks
    if HAS_SIZES:
        found = tl.zeros([ROWS], tl.int32)
        for start in range(0, key_blocks, ROWS):
            block = start + tl.arange(0, ROWS)
            sizes = size_ptr + (pair // heads).to(tl.int64) * size_stride + block
            found += (tl.load(sizes, mask=block < key_blocks, other=0) > 0).to(tl.int32)
        filled = tl.sum(found, 0)
    count = tl.load(count_ptr + pair.to(tl.int64) * query_blocks + row, mask=inside, other=0)
    logit = tl.load(logit_ptr + pair % heads * logit_strides[0] + row * logit_strides[1], mask=inside, other=0.0)
    both = (count > 0) & (count < filled)
    exponential = tl.exp(-tl.abs(logit))
    larger = 1.0 / (1.0 + exponential)
    smaller = exponential * larger
    mix_ptr += (pair.to(tl.int64) * padded_rows + row) * 2
    tl.store(mix_ptr, tl.where(both, tl.where(logit > 0, larger, smaller), 1.0), mask=row < padded_rows)
    tl.store(mix_ptr + 1, tl.where(both, tl.where(logit > 0, smaller, larger), 1.0), mask=row < padded_rows)


def write_mix(logits: Tensor, counts: Tensor, sizes: Tensor | None, key_blocks: int, pairs: range, mix: Tensor) -> None:
    """Writes `LinearTerm.mix` of some pairs of batch and head: alpha for O^s and 1 - alpha for O^l.

    A branch without keys leaves its weight to the other. It adds zeros, so both get a weight of 1.

    Args:
        logits: float32 [1, H, Tq], log-odds of alpha, any strides.
        counts: int32 [B, H, Tq], contiguous, how many blocks each row reads exactly. It sums over all others that have
            keys.
        sizes: int32 [B or 1, Tk], keys of each block; None if each has some.
        key_blocks: Tk.
        mix: float32 [B * H, padded Tq, 2], contiguous, 1 in the padding.
    """
    launch(
        _mix_kernel,
        (-(-mix.shape[1] // ROWS), len(pairs)),
        logit_ptr=logits,
        count_ptr=counts,
        size_ptr=counts if sizes is None else sizes,
        mix_ptr=mix,
        logit_strides=logits.stride()[1:],
        heads=counts.shape[1],
        query_blocks=counts.shape[2],
        key_blocks=key_blocks,
        padded_rows=mix.shape[1],
        size_stride=size_stride(sizes),
        first_pair=pairs.start,
        ROWS=ROWS,
        HAS_SIZES=sizes is not None,
        num_warps=4,
    )
