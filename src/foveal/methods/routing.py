"""Routers: learned projections of pooled queries and keys, whose products rank the key blocks, and how they learn.

The choice is a hard top-k. Its gradient is that of a soft top-k (SLA2, arXiv 2602.12675, eq. 17) with respect to a
mask that is 1 for a block that is read exactly. What a block changes in a row if it is read is estimated from its mean
key and value, also for blocks that were not read: products of [Lq x Tk x D] in place of [Lq x Lk x D].

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, C the key blocks that are
ranked: the first ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.checks import product
from foveal.kernels.cpu import blocked
from foveal.kernels.values import Problem, flatten, unflatten
from foveal.methods.parameters import PreciseParameters

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


def start_projections(router: str, num_heads: int, head_dim: int) -> PreciseParameters:
    """proj_query and proj_key of a module, the identity: [D, D] if "shared" by the heads, [H, D, D] if "per_head"."""
    shape = (head_dim, head_dim) if router == "shared" else (num_heads, head_dim, head_dim)
    starts = {name: torch.eye(head_dim).expand(shape).clone() for name in ("proj_query", "proj_key")}
    return PreciseParameters(**starts)


def of_heads(
    weights: tuple[Tensor, Tensor], num_heads: int, query: Tensor, heads: range | None
) -> tuple[Tensor, Tensor]:
    """A module's projections for a query [B, H, L, D] of some of its heads; None for all.

    Raises:
        ValueError: the query has another number of heads.
    """
    count = num_heads if heads is None else len(heads)
    if query.shape[1] != count:
        raise ValueError(f"query must have {count} heads, got {query.shape[1]}; `heads` says which some are")
    own = slice(None) if heads is None else slice(heads.start, heads.stop)
    return tuple(x if x.dim() == 2 else x[own] for x in weights)


def check_projections(router: Router, query: Tensor) -> None:
    """Raises a ValueError for a projection that does not fit the query, [B, H, L, D], or is on another device."""
    heads, head_dim = query.shape[1], query.shape[-1]
    allowed = (head_dim, head_dim), (heads, head_dim, head_dim)
    for name, weight in zip(("proj_query", "proj_key"), router, strict=True):
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or tuple(weight.shape) not in allowed:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            shapes = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must have shape {shapes} for {heads} heads of {head_dim}, got {got}")
        if weight.device != query.device:
            raise ValueError(f"{name} is on {weight.device}, but query is on {query.device}")


class Ranked(NamedTuple):
    """The key blocks that the router ranks, and their scores.

    scores: [B, H, Tq, C], differentiable in the projections; -inf for blocks that are not its choice.
    temperature: of the soft top-k.
    """

    scores: Tensor
    temperature: float


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


class ExactFacts(NamedTuple):
    """What `exact_changes` needs to know of each query, of its block and of itself.

    alpha: [B, H, Tq], what the exact branch is multiplied by; None for 1.
    lse: [B, H, Lq], of the exact branch.
    dot: [B, H, Lq], the rowsum of the gradient with that branch, multiplied.
    """

    alpha: Tensor | None
    lse: Tensor
    dot: Tensor


def exact_changes(problem: Problem, grad: Tensor, count: int, facts: ExactFacts) -> Tensor:
    """What reading each of the first `count` key blocks exactly changes in the loss, [B, H, Tq, C]; a head at a time.

    The problem may be of any dtype and head dimension. grad: [B, H, Lq, D], that of the output.
    """
    query, key, value, selection, scale, _ = problem
    critical, block_q, dtype = selection.critical_mask()[..., :count], selection.block_q, facts.lse.dtype
    changes = facts.lse.new_empty(critical.shape)
    for b in range(query.shape[0]):
        sizes = sizes_of(selection, key, b)[:count]
        for h in range(query.shape[1]):
            # What rows would gain from a block's mean, by its share of their softmax: the share it has, or would have.
            mean_key, mean_value = (
                x.sum(1) / sizes.clamp(min=1)[:, None]
                for x in valid_blocks((key[b, h], value[b, h]), sizes, selection.block_k, dtype)
            )
            rows, of_output = (blocked(x[b, h].to(dtype), block_q) for x in (query, grad))
            lse, dots = (blocked(x[b, h, :, None], block_q) for x in (facts.lse, facts.dot))
            log_share = rows @ mean_key.t() * scale + sizes.to(dtype).log() - lse
            log_share = torch.where(sizes > 0, log_share, -torch.inf)
            share = torch.where(critical[b, h][:, None], log_share.clamp(max=0).exp(), torch.sigmoid(log_share))
            if facts.alpha is not None:
                of_output = facts.alpha[b, h, :, None, None] * of_output
            changes[b, h] = (share * (of_output @ mean_value.t() - dots)).sum(1)
    return changes


def sizes_of(selection: BlockSelection, key: Tensor, sample: int) -> Tensor:
    """The valid tokens of each key block of a sample, [Tk]."""
    sizes = selection.key_block_sizes
    if sizes is not None:
        return sizes[sample % sizes.shape[0]]
    starts = torch.arange(selection.num_key_blocks, device=key.device) * selection.block_k
    return (selection.key_length - starts).clamp(max=selection.block_k)


def valid_blocks(tensors: tuple[Tensor, ...], sizes: Tensor, block_k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Keys or values of one head [Lk, D] in blocks of these sizes, [C, block_k, D], zero behind their valid tokens."""
    valid = (torch.arange(block_k, device=sizes.device) < sizes[:, None])[..., None]
    # Padding may hold anything, NaN included, and 0 * NaN would spread it.
    return tuple(torch.where(valid, blocked(x, block_k)[: len(sizes)].to(dtype), 0) for x in tensors)


def changes_to_scores(selection: BlockSelection, ranked: Ranked, changes: Tensor) -> Tensor:
    """The gradient of a router's scores, from what each block changes in the loss if it is read exactly."""
    critical = selection.critical_mask()[..., : ranked.scores.shape[-1]]
    kept = (critical & (ranked.scores != -torch.inf)).sum(-1, keepdim=True)
    return soft_top_k_gradient(ranked.scores, kept, ranked.temperature, changes)


def with_choice(output: Tensor, lse: Tensor, ranked: Ranked, problem: Problem) -> Tensor:
    """The output of a problem's blocks, with a gradient for the scores by which they were chosen."""
    *inputs, selection, scale, _ = problem
    tensors, numbers = flatten(selection)
    return _Choice.apply(output, ranked.scores, (numbers, ranked.temperature, scale), *inputs, lse, *tensors)


class _Choice(torch.autograd.Function):
    """Its first argument, and a gradient for the scores by which the blocks were chosen."""

    @staticmethod
    def forward(ctx, output, scores, options, *tensors):
        ctx.options, ctx.num_tensors = options, len(tensors)
        ctx.save_for_backward(output, scores, *tensors)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        output, scores, query, key, value, lse, *selection = ctx.saved_tensors
        inputs = grad, output, query, key, value, lse, scores, selection
        return grad, _score_gradient_op(*inputs, *ctx.options), None, *[None] * ctx.num_tensors


@torch.library.custom_op("foveal::choice_gradient", mutates_args=())
def _score_gradient_op(
    grad: Tensor,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    scores: Tensor,
    selection_tensors: list[Tensor],
    selection_numbers: list[int],
    temperature: float,
    scale: float,
) -> Tensor:
    problem = Problem(query, key, value, unflatten(selection_tensors, selection_numbers), scale)
    dots = (grad.to(output.dtype) * output).sum(-1, dtype=lse.dtype)
    changes = exact_changes(problem, grad, scores.shape[-1], ExactFacts(None, lse, dots))
    return changes_to_scores(problem.selection, Ranked(scores, temperature), changes)


@_score_gradient_op.register_fake
def _(grad, output, query, key, value, lse, scores, *rest):
    return torch.empty_like(scores)
