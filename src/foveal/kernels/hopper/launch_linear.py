"""Launchers of the linear branch's query side in the backward of SLA on Hopper; see `linear_gradients`."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.backend import QuerySide, SharedGradients
from foveal.kernels.hopper.launch import mix_of, tiles, walkable
from foveal.kernels.hopper.shared_sums import shared_sums
from foveal.kernels.host import launch, num_sms
from foveal.kernels.values import state_strides

SHARED_ROWS = 128  # rows of a block where all share one H


def query_gradients(side: QuerySide, pairs: range) -> Tensor:
    """See `Backend.query_gradients`; O^l comes with a W, and without one W is the identity."""
    from foveal.kernels.hopper.linear_gradients import linear_query_grad_kernel

    query, output, grad, term, block_q, grad_query, delta, linear, grad_norm, linear_dot = side
    heads, length, head_dim = query.shape[1:]
    rows = grad_norm.shape[1]
    grad_state = torch.empty((len(pairs), rows, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    projected = linear is not None
    launch(
        linear_query_grad_kernel,
        (rows, len(pairs)),
        query=tiles(walkable(query), block_q),
        output=tiles(walkable(output), block_q),
        grad=tiles(walkable(grad), block_q),
        state=tiles(term.state, head_dim),
        weight=tiles(term.weight, head_dim) if projected else None,
        grad_query=tiles(grad_query, block_q),
        linear=tiles(linear, block_q) if projected else None,
        grad_state=tiles(grad_state, min(block_q, head_dim)),
        norm_ptr=term.norm,
        mean=(term.means[0], *state_strides(term.means[0])),
        mix=mix_of(term),
        bias_ptr=term.bias,
        delta_ptr=delta,
        linear_dot_ptr=linear_dot,
        grad_norm_ptr=grad_norm,
        heads=heads,
        query_length=length,
        first_pair=pairs.start,
        norm_pair_stride=term.norm.stride(0),
        norm_block_stride=term.norm.stride(1),
        FEATURE_MAP=term.feature_map,
        num_warps=block_q // 16,
    )
    return grad_state


def shared_query_gradients(side: QuerySide) -> SharedGradients:
    """See `Backend.shared_query_gradients`; blocks of any size are walked by `SHARED_ROWS` rows."""
    from foveal.kernels.hopper.linear_gradients import shared_query_grad_kernel

    query, output, grad, term, _, grad_query, delta, *_ = side
    batch, heads, length, head_dim = query.shape
    pairs, blocks = batch * heads, -(-length // SHARED_ROWS)
    per_program = -(-blocks // max(1, num_sms(query.device) // pairs))
    parts = -(-blocks // per_program)
    memory = {"dtype": torch.float32, "device": query.device}
    grad_states = torch.empty((pairs, parts, head_dim, head_dim), **memory)
    grad_norm, grad_bias = torch.empty((2, pairs, blocks, head_dim), **memory)
    projected = term.weight is not None
    launch(
        shared_query_grad_kernel,
        (parts, pairs),
        query=tiles(walkable(query), SHARED_ROWS),
        output=tiles(walkable(output), SHARED_ROWS),
        grad=tiles(walkable(grad), SHARED_ROWS),
        state=tiles(term.state @ term.weight.t() if projected else term.state, head_dim),
        grad_query=tiles(grad_query, SHARED_ROWS),
        grad_state_ptr=grad_states,
        norm_ptr=term.norm,
        mean_ptr=term.means[1],
        bias_ptr=term.bias,
        delta_ptr=delta,
        grad_norm_ptr=grad_norm,
        grad_bias_ptr=grad_bias,
        heads=heads,
        query_length=length,
        num_blocks=blocks,
        per_program=per_program,
        FEATURE_MAP=term.feature_map,
        num_warps=SHARED_ROWS // 16,
    )
    return shared_sums(term, grad_states, grad_norm, grad_bias)
