"""The backward of SLA on GPUs: the query side of the linear branch, its masked sum, the sparse branch, the key side.

The query side makes dH and, on its way, delta of the sparse branch; one product with the transposed block mask turns dH
into G of the key blocks, a few heads at a time. dQ of the sparse branch is added to that of the linear one where it is
made; on Hopper dK and dV of both branches come from one kernel.
Source: SLA (arXiv 2509.24006), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.kernels.backend import Backend, BackwardCall, QuerySide, SharedGradients
from foveal.kernels.triton.linear_backward import projection_gradients
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.triton.masked_sum import masked_sum
from foveal.kernels.values import LinearTerm, Problem
from foveal.methods.sla.gpu_forward import Results

# What dH of the heads in flight may take.
GROUP_BYTES = 224 * 2**20


def own_states(
    side: QuerySide, mask: Tensor, backend: Backend, look: Callable[[range, Tensor, Tensor], None] | None = None
) -> SharedGradients:
    """What the query side gives, G and z for each key block, where each query block has an H of its own.

    Args:
        mask: bfloat16 [B * H, padded Tq, padded Tk], what H was summed over.
        look: called with some pairs of batch and head, their dH, bfloat16 [pairs, padded Tq, D, D], and dZ of all,
            float32 [B * H, padded Tq, D], that of these pairs written.
    """
    pairs, rows, columns = mask.shape
    query, term, head_dim = side.query, side.term, side.query.shape[-1]
    linear = None
    if term.weight is not None:
        linear = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_norm = torch.empty((pairs, rows, head_dim), dtype=torch.float32, device=query.device)
    side = side._replace(linear=linear, grad_norm=grad_norm)
    key_state = torch.empty((pairs, columns, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    most = max(1, GROUP_BYTES // (rows * head_dim**2 * 2))
    for start in range(0, pairs, most):
        members = range(start, min(start + most, pairs))
        group = slice(members.start, members.stop)
        part = term._replace(state=term.state[group], norm=term.norm[group], means=term.means[:, group])
        grad_state = backend.query_gradients(side._replace(term=part), members)
        torch.bmm(mask[group].transpose(1, 2), grad_state.flatten(2), out=key_state[group].flatten(2))
        if look is not None:
            look(members, grad_state, grad_norm)
        # Before the next group's: its memory becomes theirs.
        del grad_state
    projection = (None, None) if linear is None else projection_gradients(side.grad, linear)
    return SharedGradients(key_state, masked_sum(mask.transpose(1, 2), grad_norm), *projection)


def gradients(
    problem: Problem, grad: Tensor, results: Results, mask: Tensor | None, term: LinearTerm, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dQ, dK, dV, and dW [D, D] and db [D] in float32 (None without a W).

    Args:
        grad: [B, H, Lq, D], the gradient of the output, contiguous last dimension.
        results: what `forward_in_groups` returned, with the states kept.
        mask: bfloat16 [B * H, padded Tq, padded Tk], what H was summed over; None for every key.
        term: the same term as in the forward.
    """
    output, lse, norm, state, means = results
    term = term._replace(state=state, norm=norm, means=means)
    grad_query, delta = torch.empty_like(problem.query), torch.empty_like(lse)
    side = QuerySide(problem.query, output, grad, term, problem.selection.block_q, grad_query, delta)
    found = backend.shared_query_gradients(side) if mask is None else own_states(side, mask, backend)
    key_side = LinearTerm(term.feature_map, state=found.state, norm=found.norm, means=means)
    columns = column_lists(problem.selection)
    grads = backend.backward(BackwardCall(problem, grad, delta, lse, columns, grad_query, key_side))
    return *grads, found.weight, found.bias
