"""Block-sparse attention in Triton as custom ops: opaque to `torch.compile`, differentiable, capturable."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.block_sparse.triton.backward import backward, output_delta
from foveal.block_sparse.triton.forward import forward
from foveal.block_sparse.triton.lists import column_lists
from foveal.types import BlockSelection


def block_sparse_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Lq, D] and LSE [B, H, Lq] (float32), differentiable."""
    return _forward_op(
        query,
        key,
        value,
        selection.critical,
        selection.critical_count,
        selection.key_block_sizes,
        selection.block_q,
        selection.block_k,
        scale,
    )


@torch.library.custom_op("foveal::block_sparse_triton_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    critical, counts = critical.contiguous(), counts.contiguous()
    return forward(query, key, value, critical, counts, sizes, block_q, block_k, scale)


@_forward_op.register_fake
def _(query, key, value, critical, counts, sizes, block_q, block_k, scale):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("foveal::block_sparse_triton_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    critical: Tensor,
    counts: Tensor,
    sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    critical, counts = critical.contiguous(), counts.contiguous()
    delta = output_delta(grad, output, grad_lse)
    columns = column_lists(critical, counts, -(-key.shape[2] // block_k))
    return backward(
        grad, query, key, value, delta, lse, critical, counts, columns, sizes, block_q, block_k, scale
    )


@_backward_op.register_fake
def _(grad, grad_lse, query, key, value, output, lse, critical, counts, sizes, block_q, block_k, scale):
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, critical, counts, sizes, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, critical, counts, sizes, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    query, key, value, critical, counts, sizes, output, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(output)
    grads = _backward_op(
        grad, grad_lse, query, key, value, output, lse, critical, counts, sizes, ctx.block_q, ctx.block_k, ctx.scale
    )
    return *grads, None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
