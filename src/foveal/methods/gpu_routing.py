"""What methods with a router share on GPUs: its projections for kernels, its scores, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.backend import BackwardCall
from foveal.kernels.int8 import lse_shift
from foveal.kernels.triton.choice_gradient import GainFacts, exact_gain, scores_gradient
from foveal.kernels.triton.lists import noncritical_mask
from foveal.methods.routing import Router

Weights = tuple[Tensor | None, Tensor | None]


def in_float32(router: Router) -> Weights:
    """Both projections in float32, or neither."""
    known = [x for x in router if x is not None]
    if len(known) == 1:
        router = (torch.eye(known[0].shape[-1], device=known[0].device) if x is None else x for x in router)
    return tuple(None if x is None else x.float() for x in router)


def without_history(router: Router) -> Weights:
    """Both projections in float32 and without gradients, or neither."""
    return tuple(None if x is None else x.detach() for x in in_float32(router))


class Scored(NamedTuple):
    """The key blocks that a router ranks, while it learns.

    scores: float32 [B, H, Tq, C], -inf where a block is not its choice.
    means: of the blocks, before they are projected, [B, H, Tq, D] and [B, H, C, D].
    projected: the same after.
    """

    scores: Tensor
    means: tuple[Tensor, Tensor]
    projected: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, means: tuple[Tensor, Tensor], weights: Weights, ranked: Tensor | None, scale: float) -> Scored:
        """The scores of these means, those of all key blocks."""
        query, key = means
        if ranked is not None:
            key = key[:, :, : ranked.shape[1]]
        projected = Router(*weights).project(query, key)
        scores = projected[0] @ (projected[1] * scale).mT
        if ranked is not None:
            scores.masked_fill_(~ranked[:, None, None], -torch.inf)
        return cls(scores, (query, key), projected)

    def gradients(self, grad: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Tensor]:
        """Those of the projections, from that of the scores."""
        query, key = (x * scale for x in self.projected)  # and not the gradient, which has a number for each pair
        of_query, of_key = weights
        return _of_weight(grad @ key, self.means[0], of_query), _of_weight(grad.mT @ query, self.means[1], of_key)


def projection_gradients(
    fine: BackwardCall, scored: Scored, weights: Weights, temperature: float, *, centers_keys: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the projections of a router that learns, where blocks it leaves are not summed otherwise.

    Args:
        fine: the backward of the blocks that are read.
        temperature: of the soft top-k.
        centers_keys: whether the log-sum-exp is that of keys less their mean, see `Backend`.
    """
    problem, lse = fine.problem, fine.lse
    selection = problem.selection
    if centers_keys:
        lse = lse + lse_shift(problem.query, problem.key, selection, problem.scale)
    unread = noncritical_mask(selection)
    mix = lse.new_ones((lse.shape[0] * lse.shape[1], selection.num_query_blocks, 2))
    gain = exact_gain(problem, fine.grad, unread, GainFacts(mix, lse, fine.delta), scored.scores.shape[3])
    of_scores = scores_gradient(scored.scores, temperature, unread, gain, None)
    return scored.gradients(of_scores, weights, problem.scale)


def _of_weight(grad: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a projection, from that of what it makes of means, [B, H, T, D]."""
    if weight.dim() == 2:
        return grad.flatten(0, 2).t() @ means.flatten(0, 2)
    return (grad.mT @ means).sum(0)
