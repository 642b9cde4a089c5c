"""What SLA2's operators on GPUs share: the router of a call, its choice, and the gradients of its projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.host import on_device_of
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.select import select
from foveal.kernels.values import flatten, unflatten
from foveal.methods.sla2.routing import Router
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div

Weights = tuple[Tensor | None, Tensor | None]


class CallRouter(NamedTuple):
    """The router of a call on kernels.

    learning: proj_q and proj_k, float32, which get gradients; None twice where it does not learn.
    fixed: the same without gradients, where a rule chooses by them; None twice for SLA's choice, or no choice.
    ranked: bool [B or 1, C], which of the first C key blocks are its choice; None for all of them, or if it does not
        learn.
    """

    learning: Weights = (None, None)
    fixed: Weights = (None, None)
    ranked: Tensor | None = None


def in_float32(router: Router) -> Weights:
    """Both projections in float32, or neither."""
    known = [x for x in router if x is not None]
    if len(known) == 1:
        router = (torch.eye(known[0].shape[-1], device=known[0].device) if x is None else x for x in router)
    return tuple(None if x is None else x.float() for x in router)


def without_history(router: Router) -> Weights:
    """Both projections in float32 and without gradients, or neither."""
    return tuple(None if x is None else x.detach() for x in in_float32(router))


def choose_gpu(query: Tensor, key: Tensor, rule: SelectionRule, router: Router, scale: float) -> tuple[Tensor, Tensor]:
    """The lists and counts of a rule over the router's scores; `BlockSelection` has their shapes."""
    return _choose_op(query.detach(), key.detach(), *without_history(router), *flatten(rule), scale)


@torch.library.custom_op("foveal::sla2_choose_gpu", mutates_args=())
def _choose_op(
    query: Tensor,
    key: Tensor,
    proj_query: Tensor | None,
    proj_key: Tensor | None,
    rule_tensors: list[Tensor],
    rule_numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    rule, router = unflatten(rule_tensors, rule_numbers), Router(proj_query, proj_key)
    with on_device_of(query):  # Triton launches on the current device
        return select(*router.project(*pooled(query, key, rule)), scale, rule, with_marginal=False)[:2]


@_choose_op.register_fake
def _(query, key, proj_query, proj_key, rule_tensors, rule_numbers, scale):
    rule = unflatten(rule_tensors, rule_numbers)
    rows = (*query.shape[:2], ceil_div(query.shape[2], rule.block_q))
    return query.new_empty((*rows, rule.width), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def pooled(query: Tensor, key: Tensor, choice: BlockSelection | SelectionRule) -> tuple[Tensor, Tensor]:
    """Means of the blocks of queries and keys, float32 [B, H, T, D]."""
    return pool(query, choice.block_q), pool(key, choice.block_k, choice.key_block_sizes)


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
