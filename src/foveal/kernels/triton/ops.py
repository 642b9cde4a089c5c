"""Block-sparse attention on GPUs as custom ops: opaque to `torch.compile`, differentiable, capturable.

One pair of ops serves both kernel backends, which take the same arguments: Triton, and Gluon for Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels import hopper as gluon
from foveal.kernels.triton.backward import backward, output_delta
from foveal.kernels.triton.forward import forward
from foveal.kernels.triton.lists import column_lists


def block_sparse_attention_gpu(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float, *, hopper: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Lq, D] and LSE [B, H, Lq] (float32), differentiable; `hopper` takes the Gluon kernels."""
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
        hopper,
    )


@torch.library.custom_op("foveal::block_sparse_gpu_fwd", mutates_args=())
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
    hopper: bool,
) -> tuple[Tensor, Tensor]:
    critical, counts = critical.contiguous(), counts.contiguous()
    run = gluon.forward if hopper else forward
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return run(query, key, value, critical, counts, sizes, block_q, block_k, scale)


@_forward_op.register_fake
def _(query, key, value, critical, counts, sizes, block_q, block_k, scale, hopper):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("foveal::block_sparse_gpu_bwd", mutates_args=())
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
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    critical, counts = critical.contiguous(), counts.contiguous()
    run = gluon.backward if hopper else backward
    with torch.cuda.device_of(query):
        delta = output_delta(grad, output, grad_lse)
        columns = column_lists(critical, counts, -(-key.shape[2] // block_k))
        return run(grad, query, key, value, delta, lse, critical, counts, columns, sizes, block_q, block_k, scale)


@_backward_op.register_fake
def _(grad, grad_lse, query, key, value, output, lse, critical, counts, sizes, block_q, block_k, scale, hopper):
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, critical, counts, sizes, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, critical, counts, sizes, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    query, key, value, critical, counts, sizes, output, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(output)
    grads = _backward_op(grad, grad_lse, query, key, value, output, lse, critical, counts, sizes, *ctx.options)
    return *grads, *([None] * 7)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
