"""Launchers of the linear branch's query side in the backward of SLA on Hopper; see `linear_gradients`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.hopper.launch import _multiprocessors, _tiles, _walkable
from foveal.kernels.launch_arguments import LinearTerm

SHARED_ROWS = 128  # rows of a block where all share one H


def query_gradients(
    query: Tensor,
    output: Tensor,
    grad: Tensor,
    term: LinearTerm,
    block_q: int,
    pairs: range,
    grad_query: Tensor,
    delta: Tensor,
    linear: Tensor | None,
    grad_norm: Tensor,
) -> Tensor:
    """As `query_gradients` in `block_sparse.triton.linear_backward`; W counts as the identity if `linear` is None."""
    from foveal.kernels.hopper.linear_gradients import linear_query_grad_kernel
    from foveal.kernels.triton.launch import launch

    heads, length, head_dim = query.shape[1:]
    rows = grad_norm.shape[1]
    grad_state = torch.empty((len(pairs), rows, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    tensors = (_tiles(_walkable(x), block_q) for x in (query, output, grad))
    projected = linear is not None
    with torch.cuda.device(query.device):
        launch(
            linear_query_grad_kernel, (rows, len(pairs)),
            *tensors, _tiles(term.state, head_dim), _tiles(term.proj_weight, head_dim) if projected else None,
            _tiles(grad_query, block_q), _tiles(linear, block_q) if projected else None,
            _tiles(grad_state, min(block_q, head_dim)), term.norm, term.proj_bias, delta, grad_norm,
            heads, length, pairs.start, *term.norm.stride()[:2],
            FEATURE_MAP=term.feature_map, num_warps=block_q // 16,
        )  # fmt: skip
    return grad_state


class SharedGradients(NamedTuple):
    """What the query side gives where all query blocks of a head share one H.

    state: float32 [B * H, D, D], the gradient of H W^T.
    norm: float32 [B * H, 1, D], dZ.
    bias: float32 [D], the gradient of b.
    """

    state: Tensor
    norm: Tensor
    bias: Tensor


def shared_query_gradients(
    query: Tensor, output: Tensor, grad: Tensor, term: LinearTerm, grad_query: Tensor, delta: Tensor
) -> SharedGradients:
    """The query side of the backward where all query blocks of a head share one H.

    Args:
        query, output, grad: [B, H, Lq, D].
        term: the linear branch, its state H W^T [B * H, 1, D, D] and its norm [B * H, 1, D].
        grad_query, delta: written: dQ of the linear branch, and float32 [B, H, Lq] delta of the sparse branch.
    """
    from foveal.kernels.hopper.linear_gradients import shared_query_grad_kernel
    from foveal.kernels.triton.launch import launch

    batch, heads, length, head_dim = query.shape
    pairs, blocks = batch * heads, -(-length // SHARED_ROWS)
    per_program = -(-blocks // max(1, _multiprocessors(query.device) // pairs))
    parts = -(-blocks // per_program)
    memory = {"dtype": torch.float32, "device": query.device}
    grad_state = torch.empty((pairs, parts, head_dim, head_dim), **memory)
    grad_norm, grad_bias = torch.empty((2, pairs, blocks, head_dim), **memory)
    tensors = (_tiles(_walkable(x), SHARED_ROWS) for x in (query, output, grad))
    with torch.cuda.device(query.device):
        launch(
            shared_query_grad_kernel, (parts, pairs),
            *tensors, _tiles(term.state, head_dim), _tiles(grad_query, SHARED_ROWS), grad_state, term.norm,
            term.proj_bias, delta, grad_norm, grad_bias, heads, length, blocks, per_program,
            FEATURE_MAP=term.feature_map, num_warps=SHARED_ROWS // 16,
        )  # fmt: skip
    return SharedGradients(grad_state.sum(1), grad_norm.sum(1, keepdim=True), grad_bias.sum((0, 1)))
