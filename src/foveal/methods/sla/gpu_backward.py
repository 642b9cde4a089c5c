"""The backward of SLA on GPUs: the query side of the linear branch, its masked sum, the sparse branch, the key side.

The query side makes dH and, on its way, delta of the sparse branch; one product with the transposed block mask turns dH
into G of the key blocks, a few heads at a time. dQ of the sparse branch is added to that of the linear one where it is
made; on Hopper dK and dV of both branches come from one kernel.
Source: SLA (arXiv 2509.24006), Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels import hopper as gluon
from foveal.kernels.launch_arguments import LinearTerm
from foveal.kernels.triton.backward import backward
from foveal.kernels.triton.linear import masked_sum
from foveal.kernels.triton.linear_backward import add_key_gradients, projection_gradients, query_gradients
from foveal.kernels.triton.lists import column_lists

# What dH of the heads in flight may take.
GROUP_BYTES = 224 * 2**20


def _own_states(grad, query, output, term, mask, block_q, grad_query, delta, linear, hopper):
    """G and z of each key block, [B * H, padded Tk, ...], where each query block has an H of its own."""
    pairs, rows, columns = mask.shape
    head_dim = query.shape[-1]
    run = gluon.query_gradients if hopper else query_gradients
    grad_norm = torch.empty((pairs, rows, head_dim), dtype=torch.float32, device=query.device)
    key_state = torch.empty((pairs, columns, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    most = max(1, GROUP_BYTES // (rows * head_dim**2 * 2))
    for start in range(0, pairs, most):
        group = slice(start, min(start + most, pairs))
        part = term._replace(state=term.state[group], norm=term.norm[group])
        some_pairs = range(group.start, group.stop)
        grad_state = run(query, output, grad, part, block_q, some_pairs, grad_query, delta, linear, grad_norm)
        torch.bmm(mask[group].transpose(1, 2), grad_state.flatten(2), out=key_state[group].flatten(2))
        # Before the next group's: its memory becomes theirs.
        del grad_state
    return key_state, masked_sum(mask.transpose(1, 2), grad_norm)


def _shared_state_hopper(grad, query, output, term, projected, grad_query, delta):
    """G and z, [B * H, 1, ...], and the projection's gradients, where all query blocks of a head share one H."""
    state, weight = term.state, term.proj_weight
    folded = term._replace(state=state @ weight.t()) if projected else term
    sums = gluon.shared_query_gradients(query, output, grad, folded, grad_query, delta)
    narrow = sums.state.to(torch.bfloat16).unsqueeze(1)
    if not projected:
        return narrow, sums.norm, None, None
    # dO^T O^l of a head is (dH W^-T)^T H: the sum over its rows is in dH already.
    grad_weight = sums.state.flatten(0, 1).t() @ state.float().flatten(0, 2)
    return narrow @ weight, sums.norm, grad_weight, sums.bias


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    norm: Tensor,
    state: Tensor,
    critical: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    sizes: Tensor | None,
    projection: tuple[Tensor, Tensor],
    block_q: int,
    block_k: int,
    scale: float,
    feature_map: str,
    *,
    projected: bool,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, and dW [D, D] and db [D] in float32 (zeros unless `projected`).

    Args:
        grad: [B, H, Lq, D], the gradient of the output, contiguous last dimension.
        output, lse, norm, state: what `gpu_forward.forward_in_groups` returned, with the states kept.
        critical, counts: contiguous; query, key, value, critical, counts, sizes, block_q, block_k, scale: as in
            `block_sparse.triton.backward`.
        mask: bfloat16 [B * H, padded Tq, padded Tk], what H was summed over; None for every key.
        projection: W in bfloat16 and b in float32; the identity and zeros unless `projected`.
    """
    num_key_blocks = -(-key.shape[2] // block_k)
    grad_query, delta = torch.empty_like(query), torch.empty_like(lse)
    term = LinearTerm(state, norm, feature_map, *projection)
    grad_weight = grad_bias = linear = None
    if mask is None and hopper:
        key_state, key_norm, grad_weight, grad_bias = _shared_state_hopper(
            grad, query, output, term, projected, grad_query, delta
        )
    else:
        if projected or not hopper:
            linear = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        if mask is None:
            rows = critical.shape[2]
            expanded = term._replace(state=state.expand(-1, rows, -1, -1), norm=norm.expand(-1, rows, -1))
            grad_norm = norm.new_empty((norm.shape[0], rows, norm.shape[2]))
            everything = range(norm.shape[0])
            key_state = query_gradients(
                query, output, grad, expanded, block_q, everything, grad_query, delta, linear, grad_norm
            )
            key_state = key_state.sum(1, keepdim=True, dtype=torch.float32).to(torch.bfloat16)
            key_norm = grad_norm.sum(1, keepdim=True)
        else:
            key_state, key_norm = _own_states(
                grad, query, output, term, mask, block_q, grad_query, delta, linear, hopper
            )
        if projected:
            grad_weight, grad_bias = projection_gradients(grad, linear)
    del linear
    if not projected:
        grad_weight, grad_bias = (torch.zeros_like(x, dtype=torch.float32) for x in projection)
    columns = column_lists(critical, counts, num_key_blocks)
    arguments = (grad, query, key, value, delta, lse, critical, counts, columns, sizes, block_q, block_k, scale)
    if hopper:
        linear_part = gluon.KeyGradients(key_state, key_norm, feature_map)
        return *gluon.backward(*arguments, grad_query, linear_part), grad_weight, grad_bias
    grad_query, grad_key, grad_value = backward(*arguments, grad_query)
    if mask is None:
        key_state, key_norm = key_state.expand(-1, num_key_blocks, -1, -1), key_norm.expand(-1, num_key_blocks, -1)
    add_key_gradients(key, value, key_state, key_norm, sizes, block_k, feature_map, grad_key, grad_value)
    return grad_query, grad_key, grad_value, grad_weight, grad_bias
