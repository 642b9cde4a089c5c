"""Tokens in another order, on the device: each program copies whole rows of one head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.tiles import row_strides

ROWS = 64


@triton.jit(do_not_specialize=["heads", "rows"])
def _rows_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    x_strides,
    out_strides,
    heads,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out[..., i, :] = x[..., index[i], :]"""
    await_previous()
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    place = tile * ROWS + tl.arange(0, ROWS)
    inside = place < rows
    row = tl.load(index_ptr + place, mask=inside, other=0)
    column = tl.arange(0, D)[None, :]
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    values = tl.load(x_ptr + row[:, None] * x_strides[2] + column, mask=inside[:, None], other=0.0)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * out_strides[2] + column, values, mask=inside[:, None])


def permuted_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, L, D] at the tokens of an index, int64 [N] without negative entries: [B, H, N, D].

    The last dimension is contiguous; the result lies as x does, heads within tokens or tokens within heads.
    """
    batch, heads, _, head_dim = x.shape
    rows = index.shape[0]
    if x.stride(1) < x.stride(2):
        out = x.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)
    else:
        out = x.new_empty((batch, heads, rows, head_dim))
    launch(
        _rows_kernel,
        (triton.cdiv(rows, ROWS), batch * heads),
        x_ptr=x,
        index_ptr=index,
        out_ptr=out,
        x_strides=row_strides(x),
        out_strides=row_strides(out),
        heads=heads,
        rows=rows,
        D=head_dim,
        ROWS=ROWS,
    )
    return out
