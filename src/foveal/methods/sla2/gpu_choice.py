"""What SLA2's operators on GPUs share: the router of a call, and its choice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.host import on_device_of
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.select import select
from foveal.kernels.values import flatten, unflatten
from foveal.methods.gpu_routing import Weights, without_history
from foveal.methods.routing import Router
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


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
