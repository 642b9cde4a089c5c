"""Sums of vectors over a block mask, as precise as float32: Z of each query block, and z of each key block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.chips import Plan, fitting
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.tiles import TILE

# By head_dim.
PLANS = {
    64: [Plan(40960, {"num_stages": 3})],
    128: [Plan(73728, {"num_stages": 3}), Plan(65536, {"num_stages": 2})],
}


@triton.jit(do_not_specialize=["terms"])
def _masked_sum_kernel(
    mask_ptr, term_ptr, sum_ptr, mask_strides, terms, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """sum[pair, i] = sum over j of mask[pair, i, j] * term[pair, j], float32 to 16 bits and more."""
    await_previous()
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, D)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, terms, TILE):
        column = start + tl.arange(0, TILE)
        mask = tl.load(
            mask_ptr + pair * mask_strides[0] + row[:, None] * mask_strides[1] + column[None, :] * mask_strides[2]
        )
        term = tl.load(term_ptr + (pair * terms + column)[:, None] * D + feature[None, :])
        # The mask is exact in bfloat16; the terms are, nearly, as a sum of two.
        high = term.to(tl.bfloat16)
        acc = tl.dot(mask, high, acc)
        acc = tl.dot(mask, (term - high.to(tl.float32)).to(tl.bfloat16), acc)
    rows = pair * tl.num_programs(0) * ROWS + row
    tl.store(sum_ptr + rows[:, None] * D + feature[None, :], acc)


def masked_sum(mask: Tensor, terms: Tensor, out: Tensor | None = None) -> Tensor:
    """sum over j of mask[p, i, j] * terms[p, j], float32 [P, R, D], contiguous; in `out` if that is given.

    Args:
        mask: bfloat16 [P, R, C] of 0 and 1, any strides, R and C multiples of 64.
        terms: float32 [P, C, D], contiguous.
    """
    pairs, rows, columns = mask.shape
    head_dim = terms.shape[-1]
    if out is None:
        out = torch.empty((pairs, rows, head_dim), dtype=torch.float32, device=mask.device)
    launch(
        _masked_sum_kernel,
        (rows // 32, pairs),
        mask_ptr=mask,
        term_ptr=terms,
        sum_ptr=out,
        mask_strides=mask.stride(),
        terms=columns,
        D=head_dim,
        ROWS=32,
        TILE=TILE,
        num_warps=4,
        **fitting(mask.device, PLANS[head_dim]),
    )
    return out
