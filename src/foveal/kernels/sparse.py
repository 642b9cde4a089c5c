"""Block-sparse attention on GPUs, differentiable: one forward and one backward, reached in two ways.

Plain eager calls go through one autograd function. Under `torch.compile`, modes and transforms the same code is a pair
of custom ops: opaque, capturable, with fakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels.backend import backend_named
from foveal.kernels.host import is_plain, on_device_of, refuse_forward_mode
from foveal.kernels.replay import replayed
from foveal.kernels.values import flatten, unflatten


def block_sparse_attention_gpu(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Lq, D] and LSE [B, H, Lq] (float32), differentiable, with the kernels of a backend."""
    refuse_forward_mode(query, key, value)
    if is_plain(query, key, value):
        tensors, numbers = flatten(selection)
        return _Attention.apply((tuple(numbers), scale, backend), query, key, value, *tensors)
    return _forward_op(query, key, value, *flatten(selection), scale, backend)


def _forward(query, key, value, selection, scale, backend) -> tuple[Tensor, Tensor]:
    with on_device_of(query):  # Triton launches on the current device
        return backend_named(backend).forward(query, key, value, selection.with_contiguous_lists(), scale).run_all()


def _backward(grad, grad_lse, query, key, value, output, lse, selection, scale, backend):
    from foveal.kernels.triton.backward import output_delta
    from foveal.kernels.triton.lists import column_lists

    selection = selection.with_contiguous_lists()
    with on_device_of(query):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = output_delta(grad, output, grad_lse)
        run = backend_named(backend).backward
        return run(grad, query, key, value, delta, lse, selection, column_lists(selection), scale)


def _flat_forward(tensors: Sequence[Tensor], given: tuple) -> tuple[tuple[Tensor, Tensor], None]:
    """`_forward` for `replayed`, of the inputs and a flat selection."""
    numbers, scale, backend = given
    return _forward(*tensors[:3], unflatten(tensors[3:], numbers), scale, backend), None


def _flat_backward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor, Tensor, Tensor], None]:
    """`_backward` for `replayed`, of the gradients, the inputs, the results, and a flat selection."""
    numbers, scale, backend = given
    return _backward(*tensors[:7], unflatten(tensors[7:], numbers), scale, backend), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, *tensors):
        (output, lse), _ = replayed(_flat_forward, tensors, given)
        ctx.given = given
        ctx.save_for_backward(*tensors[:3], output, lse, *tensors[3:])
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        grad = torch.zeros_like(saved[3]) if grad is None else grad
        grads, _ = replayed(_flat_backward, (grad, grad_lse, *saved), ctx.given)
        return None, *grads, *[None] * (len(saved) - 5)


@torch.library.custom_op("foveal::block_sparse_gpu_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection_tensors: list[Tensor],
    selection_numbers: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _forward(query, key, value, unflatten(selection_tensors, selection_numbers), scale, backend)


@_forward_op.register_fake
def _(query, key, value, selection_tensors, selection_numbers, scale, backend):
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
    selection_tensors: list[Tensor],
    selection_numbers: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    selection = unflatten(selection_tensors, selection_numbers)
    return _backward(grad, grad_lse, query, key, value, output, lse, selection, scale, backend)


@_backward_op.register_fake
def _(grad, grad_lse, query, key, value, output, lse, selection_tensors, selection_numbers, scale, backend):
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, tensors, ctx.numbers, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    query, key, value, output, lse, *tensors = ctx.saved_tensors
    grad = torch.zeros_like(output) if grad is None else grad
    options = tensors, ctx.numbers, ctx.scale, ctx.backend
    grads = _backward_op(grad, grad_lse, query, key, value, output, lse, *options)
    return *grads, [None] * len(tensors), None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
