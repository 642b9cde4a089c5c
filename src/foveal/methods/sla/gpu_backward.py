"""The backward of SLA on GPUs: the query side of the linear branch, its masked sum, the sparse branch, the key side.

The query side makes dH and, on its way, delta of the sparse branch; one product with the transposed block mask turns dH
into G of the key blocks, a few heads at a time. dQ of the sparse branch is added to that of the linear one where it is
made; on Hopper dK and dV of both branches come from one kernel.
Source: SLA (arXiv 2509.24006), Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import Backend, SharedGradients
from foveal.kernels.triton.linear import masked_sum
from foveal.kernels.triton.linear_backward import projection_gradients
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.values import LinearTerm
from foveal.methods.sla.gpu_forward import Results

# What dH of the heads in flight may take.
GROUP_BYTES = 224 * 2**20


def own_states(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    term: LinearTerm,
    mask: Tensor,
    block_q: int,
    grad_query: Tensor,
    delta: Tensor,
    backend: Backend,
    norm_scale: Tensor | None = None,
) -> SharedGradients:
    """What the query side gives, G and z for each key block, where each query block has an H of its own.

    norm_scale: float32 [B * H, padded Tq], what the rows' Z were multiplied by to become those of `term`; None for 1.
    """
    pairs, rows, columns = mask.shape
    head_dim = query.shape[-1]
    linear = None
    if term.weight is not None:
        linear = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_norm = torch.empty((pairs, rows, head_dim), dtype=torch.float32, device=query.device)
    key_state = torch.empty((pairs, columns, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    most = max(1, GROUP_BYTES // (rows * head_dim**2 * 2))
    for start in range(0, pairs, most):
        group = slice(start, min(start + most, pairs))
        part = term._replace(state=term.state[group], norm=term.norm[group], means=term.means[:, group])
        some_pairs = range(group.start, group.stop)
        grad_state = backend.query_gradients(
            query, output, grad, part, block_q, some_pairs, grad_query, delta, linear, grad_norm
        )
        torch.bmm(mask[group].transpose(1, 2), grad_state.flatten(2), out=key_state[group].flatten(2))
        # Before the next group's: its memory becomes theirs.
        del grad_state
    if norm_scale is not None:
        grad_norm *= norm_scale[..., None]
    projection = (None, None) if linear is None else projection_gradients(grad, linear)
    return SharedGradients(key_state, masked_sum(mask.transpose(1, 2), grad_norm), *projection)


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
    selection: BlockSelection,
    mask: Tensor | None,
    term: LinearTerm,
    scale: float,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dQ, dK, dV, and dW [D, D] and db [D] in float32 (None without a W).

    Args:
        grad: [B, H, Lq, D], the gradient of the output, contiguous last dimension.
        results: what `forward_in_groups` returned, with the states kept.
        selection: its lists contiguous.
        mask: bfloat16 [B * H, padded Tq, padded Tk], what H was summed over; None for every key.
        term: the same term as in the forward.
    """
    output, lse, norm, state, means = results
    grad_query, delta = torch.empty_like(query), torch.empty_like(lse)
    term = term._replace(state=state, norm=norm, means=means)
    if mask is None:
        run = backend.shared_query_gradients
        side = run(query, output, grad, term, selection.block_q, grad_query, delta)
    else:
        side = own_states(grad, query, output, term, mask, selection.block_q, grad_query, delta, backend)
    columns = column_lists(selection)
    key_side = LinearTerm(term.feature_map, state=side.state, norm=side.norm, means=means)
    grads = backend.backward(grad, query, key, value, delta, lse, selection, columns, scale, grad_query, key_side)
    return *grads, side.weight, side.bias
