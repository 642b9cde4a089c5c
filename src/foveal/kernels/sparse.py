"""Block-sparse attention on GPUs, differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import BackwardCall, backend_named
from foveal.kernels.operator import KernelOperator
from foveal.kernels.values import Problem, packable


@packable
class SparseCall(NamedTuple):
    """query: [B, H, Lq, D]. key, value: [B, H, Lk, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    selection: BlockSelection


class SparseOptions(NamedTuple):
    """`backend` is a backend's name."""

    scale: float
    backend: str


def _forward(call: SparseCall, options: SparseOptions, save: bool) -> tuple[tuple[Tensor, Tensor], tuple[()]]:
    selection = call.selection.with_contiguous_lists()
    return backend_named(options.backend).forward(Problem(*call[:3], selection, options.scale)).run_all(), ()


def _backward(call: SparseCall, options: SparseOptions, outputs, saved, grads) -> tuple[Tensor, Tensor, Tensor]:
    from foveal.kernels.triton.backward import output_delta
    from foveal.kernels.triton.lists import column_lists

    (output, lse), (grad, grad_lse) = outputs, grads
    selection = call.selection.with_contiguous_lists()
    if grad is None:
        grad = torch.zeros_like(output)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = output_delta(grad, output, grad_lse)
    problem = Problem(*call[:3], selection, options.scale)
    return backend_named(options.backend).backward(BackwardCall(problem, grad, delta, lse, column_lists(selection)))


def _fake(call: SparseCall, options: SparseOptions) -> tuple[tuple[Tensor, Tensor], tuple[()]]:
    query = call.query
    return (torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)), ()


# The output [B, H, Lq, D] and its log-sum-exp, float32 [B, H, Lq].
block_sparse_attention_gpu = KernelOperator(
    "foveal::block_sparse_gpu",
    inputs=3,
    outputs=2,
    options=SparseOptions,
    forward=_forward,
    backward=_backward,
    fake=_fake,
)
