"""The router of SLA2: learned projections of pooled queries and keys, whose products rank the key blocks.

The choice is a hard top-k. Its gradient is that of a soft top-k (SLA2, arXiv 2602.12675, eq. 17) with respect to a
mask that is 1 for a block that is read exactly and 0 for one that is summed linearly. What a block changes in a row if
it is read exactly is estimated from its mean key and value, also for blocks that were not read: products of
[Lq x Tk x D] in place of [Lq x Lk x D].

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, C the key blocks that are
ranked: the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.checks import product
from foveal.kernels.cpu import blocked
from foveal.kernels.values import Problem, unflatten
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla.linear import EPSILON
from foveal.rules import SelectionRule

# Halvings of the interval that holds lambda: to the precision of float32, and of float64.
BISECTIONS = {torch.float32: 40, torch.float64: 70}


class Router(NamedTuple):
    """proj_q and proj_k, [D, D] or [H, D, D] in any floating dtype; None for the identity, which is SLA's choice."""

    query: Tensor | None
    key: Tensor | None

    def project(self, pooled_query: Tensor, pooled_key: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled blocks [B, H, T, D], float32 or float64, projected in their dtype."""
        return _projected(pooled_query, self.query), _projected(pooled_key, self.key)


def _projected(pooled: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return pooled
    weight = weight.to(pooled.dtype).mT
    if weight.dim() == 2:
        return product(pooled.flatten(0, -2), weight).unflatten(0, pooled.shape[:-1])
    batch, _, blocks, _ = pooled.shape
    by_head = product(pooled.transpose(0, 1).flatten(1, 2), weight)
    return by_head.unflatten(1, (batch, blocks)).transpose(0, 1)


class Ranked(NamedTuple):
    """The key blocks that the router ranks, and their scores.

    scores: [B, H, Tq, C], differentiable in the projections; -inf for blocks that are not its choice.
    temperature: of the soft top-k.
    """

    scores: Tensor
    temperature: float


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


def soft_top_k(scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """sigmoid(score / temperature + lambda) with lambda such that each row sums to `kept`; 0 where a score is -inf.

    Args:
        scores: [..., C], float32 or float64.
        kept: [..., 1], how many blocks each row keeps.
    """
    scaled = scores / temperature
    size = scaled.masked_fill(scaled == -torch.inf, 0).abs().amax(-1, keepdim=True) + 40
    low, high = -size, size
    for _ in range(BISECTIONS[scores.dtype]):
        middle = (low + high) / 2
        less = torch.sigmoid(scaled + middle).sum(-1, keepdim=True) < kept
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.sigmoid(scaled + (low + high) / 2)


def soft_top_k_gradient(scores: Tensor, kept: Tensor, temperature: float, grad: Tensor) -> Tensor:
    """The gradient of the scores from that of the soft mask: lambda moves so that the sum stays."""
    soft = soft_top_k(scores, kept, temperature)
    slope = soft * (1 - soft)
    total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    grad = slope * (grad - (slope * grad).sum(-1, keepdim=True) / total) / temperature
    # A row that keeps all or nothing has no choice.
    choice = (kept > 0) & (kept < (scores != -torch.inf).sum(-1, keepdim=True))
    return torch.where(choice, grad, 0)


class RowFacts(NamedTuple):
    """What the gradient of the choice needs to know of each query, of its block and of itself.

    alpha, rest: [B, H, Tq], the weights of the exact and of the linear branch.
    lse: [B, H, Lq], of the exact branch.
    exact_dot, linear_dot: [B, H, Lq], the rowsum of the gradient with each branch's weighted output.

    Without a linear branch, `rest` and `linear_dot` are None.
    """

    alpha: Tensor
    rest: Tensor | None
    lse: Tensor
    exact_dot: Tensor
    linear_dot: Tensor | None


def score_gradient(problem: Problem, grad: Tensor, ranked: Ranked, facts: RowFacts, feature_map: str | None) -> Tensor:
    """The gradient of the router's scores, [B, H, Tq, C], from that of the output, [B, H, Lq, D]; a head at a time.

    The problem may be of any dtype and head dimension. The feature map is the linear branch's; None without one.
    """
    query, key, value, selection, scale, _ = problem
    count = ranked.scores.shape[-1]
    critical = selection.critical_mask()[..., :count]
    linear = None
    if feature_map is not None:
        linear = selection.linear_mask("marginal")[:, :, : selection.num_query_blocks, :count]  # kernels have it padded
    sizes = selection.key_block_sizes
    of_mask = torch.empty_like(ranked.scores)
    for b in range(query.shape[0]):
        sample_sizes = _sizes(selection, key) if sizes is None else sizes[b % sizes.shape[0]]
        for h in range(query.shape[1]):
            tensors = [x[b, h] for x in (grad, query, key, value)]
            rows = RowFacts(*(None if x is None else x[b, h].to(ranked.scores.dtype) for x in facts))
            masks = critical[b, h], None if linear is None else linear[b, h], sample_sizes[:count]
            of_mask[b, h] = _head_gradient(tensors, masks, rows, selection, feature_map, scale)
    kept = (critical & (ranked.scores != -torch.inf)).sum(-1, keepdim=True)
    return soft_top_k_gradient(ranked.scores, kept, ranked.temperature, of_mask)


def _sizes(selection: BlockSelection, key: Tensor) -> Tensor:
    starts = torch.arange(selection.num_key_blocks, device=key.device) * selection.block_k
    return (selection.key_length - starts).clamp(max=selection.block_k)


def _head_gradient(
    tensors: Sequence[Tensor],
    masks: tuple[Tensor, Tensor | None, Tensor],
    facts: RowFacts,
    selection: BlockSelection,
    feature_map: str | None,
    scale: float,
) -> Tensor:
    """[Tq, C]: the gradient of one head's mask.

    Args:
        tensors: the gradient of the output, query, key, and value, [L, D] each.
        masks: what is critical and what is linear, [Tq, C], and the sizes of the key blocks, [C].
    """
    (grad, query, key, value), (critical, linear, sizes) = tensors, masks
    dtype, count = facts.lse.dtype, sizes.shape[0]
    block_q, block_k = selection.block_q, selection.block_k
    valid = (torch.arange(block_k, device=sizes.device) < sizes[:, None])[..., None]
    # Padding may hold anything, NaN included, and 0 * NaN would spread it.
    key, value = (torch.where(valid, blocked(x, block_k)[:count].to(dtype), 0) for x in (key, value))
    grad, rows = blocked(grad.to(dtype), block_q), blocked(query.to(dtype), block_q)
    dots, lse = (blocked(x[:, None], block_q) for x in (facts.exact_dot, facts.lse))

    # What rows would gain from a block's mean, by its share of their softmax: the share it has, or would have.
    mean_key, mean_value = (x.sum(1) / sizes.clamp(min=1)[:, None] for x in (key, value))
    log_share = rows @ mean_key.t() * scale + sizes.to(dtype).log() - lse
    log_share = torch.where(sizes > 0, log_share, -torch.inf)
    share = torch.where(critical[:, None], log_share.clamp(max=0).exp(), torch.sigmoid(log_share))
    exact = (share * ((facts.alpha[:, None, None] * grad) @ mean_value.t() - dots)).sum(1)
    if feature_map is None:
        return exact

    # What they lose of the linear branch: the gradients of its sums, with each block's states.
    phi_key = torch.where(valid, apply_feature_map(key, feature_map), 0)
    states, sums = phi_key.mT @ value, phi_key.sum(1)
    phi = apply_feature_map(rows, feature_map)
    scaled = phi / (phi @ (linear != 0).to(dtype).matmul(sums)[..., None] + EPSILON)
    grad_states = scaled.mT @ (facts.rest[:, None, None] * grad)
    grad_sums = -(scaled * blocked(facts.linear_dot[:, None], block_q)).sum(1)
    return exact - grad_states.flatten(1) @ states.flatten(1).t() - grad_sums @ sums.t()


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
    return score_gradient(problem, grad, Ranked(scores, temperature), RowFacts(*facts), feature_map)


@score_gradient_op.register_fake
def _(grad, query, key, value, scores, *rest):
    return torch.empty_like(scores)
