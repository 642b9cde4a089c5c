"""Queries, keys, values, and outputs to tile order and back: by a kernel that copies whole rows where kernels run.

PyTorch's `index_select` looks up an index for each number that it copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.host import is_plain, on_device_of
from foveal.token_order import TileOrder


def sort_tokens(x: Tensor, order: TileOrder, on_kernels: bool) -> Tensor:
    """[B, H, L, D] in raster order to a compact tile order; differentiable.

    on_kernels: whether the call that wants it runs on a GPU's kernels.
    """
    if not on_kernels or not is_plain(x):  # a compiler does what the kernel does, beside what comes before
        return order.sort(x)
    return _Rows.apply(x, order.to_tile, order.to_raster)


def unsort_tokens(x: Tensor, order: TileOrder, on_kernels: bool) -> Tensor:
    """The inverse of `sort_tokens`."""
    if not on_kernels or not is_plain(x):
        return order.unsort(x)
    return _Rows.apply(x, order.to_raster, order.to_tile)


class _Rows(torch.autograd.Function):
    """x at an index over its tokens; each is used once, so the backward is the same with the inverse."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        from foveal.kernels.triton.rows import permuted_rows

        ctx.save_for_backward(index, inverse)
        with on_device_of(x):  # Triton launches on the current device
            return permuted_rows(x if x.stride(-1) == 1 else x.contiguous(), index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Rows.apply(grad, inverse, index), None, None
