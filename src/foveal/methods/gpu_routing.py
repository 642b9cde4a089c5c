"""What methods with a router share on GPUs: its projections for kernels, its scores, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
            scores = scores.masked_fill(~ranked[:, None, None], -torch.inf)
        return cls(scores, (query, key), projected)

    def gradients(self, grad: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Tensor]:
        """Those of the projections, from that of the scores."""
        grad = grad * scale
        (query, key), of_query, of_key = self.projected, *weights
        return _of_weight(grad @ key, self.means[0], of_query), _of_weight(grad.mT @ query, self.means[1], of_key)


def _of_weight(grad: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a projection, from that of what it makes of means, [B, H, T, D]."""
    if weight.dim() == 2:
        return grad.flatten(0, 2).t() @ means.flatten(0, 2)
    return (grad.mT @ means).sum(0)
