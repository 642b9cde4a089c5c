"""SLA2's router in PyTorch: `foveal.methods.routing`, and what the linear branch loses by a block that is read exactly.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, C the key blocks that are
ranked: the first ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.kernels.cpu import blocked
from foveal.kernels.values import Problem, unflatten
from foveal.methods.routing import (
    ExactFacts,
    Ranked,
    Router,
    changes_to_scores,
    exact_changes,
    sizes_of,
    valid_blocks,
)
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla.linear import EPSILON
from foveal.rules import SelectionRule


def ranked_scores(
    query: Tensor,
    key: Tensor,
    router: Router,
    choice: BlockSelection | SelectionRule,
    ranked: Tensor,
    scale: float,
) -> Tensor:
    """Scores of the ranked blocks, [B, H, Tq, C]; -inf where `ranked`, bool [B or 1, C], is False.

    Args:
        query, key: [B, H, L, D], in the order that blocks are cut from.
        choice: what was chosen, or how: the sizes of the blocks.
    """
    count, sizes = ranked.shape[1], choice.key_block_sizes
    keys = key[:, :, : count * choice.block_k]
    pooled_query = pool_blocks(query.detach(), choice.block_q)
    pooled_key = pool_blocks(keys.detach(), choice.block_k, None if sizes is None else sizes[:, :count])
    scores = pooled_scores(*router.project(pooled_query, pooled_key), scale)
    return scores.masked_fill(~ranked[:, None, None], -torch.inf)


class RowFacts(NamedTuple):
    """What the gradient of the choice needs to know of each query, of its block and of itself.

    exact: of the exact branch.
    rest: [B, H, Tq], the weight of the linear branch.
    linear_dot: [B, H, Lq], the rowsum of the gradient with that branch, weighted.
    """

    exact: ExactFacts
    rest: Tensor
    linear_dot: Tensor


def score_gradient(problem: Problem, grad: Tensor, ranked: Ranked, facts: RowFacts, feature_map: str) -> Tensor:
    """The gradient of the router's scores, [B, H, Tq, C], from that of the output, [B, H, Lq, D]."""
    count = ranked.scores.shape[-1]
    changes = exact_changes(problem, grad, count, facts.exact)
    changes -= _linear_losses(problem, grad, count, facts, feature_map)
    return changes_to_scores(problem.selection, ranked, changes)


def _linear_losses(problem: Problem, grad: Tensor, count: int, facts: RowFacts, feature_map: str) -> Tensor:
    """What rows lose of the linear branch by a block that is read, [B, H, Tq, C]: by its states; a head at a time."""
    query, key, value, selection, *_ = problem
    linear = selection.linear_mask("marginal")[:, :, : selection.num_query_blocks, :count]  # kernels have it padded
    dtype, block_q = facts.linear_dot.dtype, selection.block_q
    losses = facts.linear_dot.new_empty(linear.shape)
    for b in range(query.shape[0]):
        sizes = sizes_of(selection, key, b)[:count]
        for h in range(query.shape[1]):
            keys, values = valid_blocks((key[b, h], value[b, h]), sizes, selection.block_k, dtype)
            valid = (torch.arange(selection.block_k, device=sizes.device) < sizes[:, None])[..., None]
            phi_key = torch.where(valid, apply_feature_map(keys, feature_map), 0)
            states, sums = phi_key.mT @ values, phi_key.sum(1)
            rows, of_output = (blocked(x[b, h].to(dtype), block_q) for x in (query, grad))
            phi = apply_feature_map(rows, feature_map)
            scaled = phi / (phi @ (linear[b, h] != 0).to(dtype).matmul(sums)[..., None] + EPSILON)
            grad_states = scaled.mT @ (facts.rest[b, h, :, None, None] * of_output)
            grad_sums = -(scaled * blocked(facts.linear_dot[b, h, :, None], block_q)).sum(1)
            losses[b, h] = grad_states.flatten(1) @ states.flatten(1).t() + grad_sums @ sums.t()
    return losses


@torch.library.custom_op("foveal::sla2_score_gradient", mutates_args=())
def score_gradient_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    selection_tensors: list[Tensor],
    selection_numbers: list[int],
    facts: list[Tensor],
    temperature: float,
    feature_map: str,
    scale: float,
) -> Tensor:
    """`score_gradient` as one node of a graph, of the fields of its arguments."""
    problem = Problem(query, key, value, unflatten(selection_tensors, selection_numbers), scale)
    alpha, rest, lse, exact_dot, linear_dot = (x.to(scores.dtype) for x in facts)
    rows = RowFacts(ExactFacts(alpha, lse, exact_dot), rest, linear_dot)
    return score_gradient(problem, grad, Ranked(scores, temperature), rows, feature_map)


@score_gradient_op.register_fake
def _(grad, query, key, value, scores, *rest):
    return torch.empty_like(scores)
