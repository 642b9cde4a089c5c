"""Tiles of [B, H, L, D] tensors in kernels: loads and stores that respect strides and the end of each head.

A tensor travels to a kernel either as a TMA descriptor (Hopper and later), built on the host with
one axis per tensor dimension, so that rows past the end of a head read as zeros, or as a pointer with three strides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from foveal.kernels.host import Descriptors
from foveal.kernels.tma import tma_strides

TILE = 64
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x, strides, batch, head, row, length, ROWS: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Rows row ... row + ROWS of one head, [ROWS, D]; zero past `length`."""
    if DESCRIPTORS:
        return x.load([batch, head, row, 0]).reshape(ROWS, D)
    else:
        rows = row + tl.arange(0, ROWS)
        base = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        offsets = rows.to(tl.int64)[:, None] * strides[2] + tl.arange(0, D)[None, :]
        return tl.load(base + offsets, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def store_rows(x_ptr, strides, batch, head, row, length, tile, ROWS: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_rows` for a pointer: rows past `length` are left alone."""
    rows = row + tl.arange(0, ROWS)
    base = x_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    offsets = rows.to(tl.int64)[:, None] * strides[2] + tl.arange(0, D)[None, :]
    tl.store(base + offsets, tile.to(x_ptr.dtype.element_ty), mask=(rows < length)[:, None])


@Descriptors
def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), tma_strides(x), [1, 1, rows, x.shape[-1]])


def tile_argument(x: Tensor, rows: int, descriptors: bool):
    """What a kernel takes for x [B, H, L, D]: a descriptor of [rows, D] tiles, or x itself."""
    return _tiles(x, rows) if descriptors else x


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over batch, heads and tokens."""
    return x.stride()[:3]
