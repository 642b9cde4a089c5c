"""Block selection on the device: from queries and keys, or from pooled ones, to lists and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.choice import with_squares
from foveal.kernels.host import is_plain, on_device_of
from foveal.kernels.replay import replayed
from foveal.kernels.triton.picking import Lists, empty_lists, new_lists, pick
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.scores import NO_SIZES, Sizes
from foveal.kernels.values import flatten, unflatten
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


def select(
    query: Tensor, key: Tensor, scale: float, rule: SelectionRule, with_marginal: bool, sizes: Sizes = NO_SIZES
) -> Lists:
    """Pooled blocks to the choice of a rule.

    Args:
        query, key: float32 [B, H, Tq, D] and [B, H, Tk, D], contiguous; of quarters as `pick` takes them.
        sizes: of blocks that have quarters, all of which are there.
    """
    rows, columns = query.shape[2], key.shape[2]
    if rule.quarters:
        rows, columns = ceil_div(rows, PARTS), ceil_div(columns, PARTS)
    lists = empty_lists(*query.shape[:2], rows, columns, rule.width, with_marginal, query.device)
    pick(query.flatten(0, 1), key.flatten(0, 1), scale, rule, 0, lists, sizes)
    return lists


def ranked_of(query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> tuple[Tensor, Tensor]:
    """What `pick` takes of query and key, [B, H, L, D], for the score of a rule."""
    sizes, quarters = rule.key_block_sizes, bool(rule.quarters)
    pooled_key = pool(key, rule.block_k, sizes, spread=bool(rule.spread), quarters=quarters)
    pooled_query = pool(query, rule.block_q, quarters=quarters)
    return with_squares(pooled_query, scale) if rule.spread else pooled_query, pooled_key


def _select(tensors: Sequence[Tensor], given: tuple) -> Lists:
    """The choice over query and key, of a flat rule; for `replayed`."""
    query, key, *rule_tensors = tensors
    numbers, scale, with_marginal = given
    rule = unflatten(rule_tensors, numbers)
    with on_device_of(query):  # Triton launches on the current device
        ranked = ranked_of(query, key, rule, scale)
        return select(*ranked, scale, rule, with_marginal, Sizes(key=rule.key_block_sizes))


@torch.library.custom_op("foveal::select_blocks_gpu", mutates_args=())
def _select_op(
    query: Tensor, key: Tensor, rule_tensors: list[Tensor], rule_numbers: list[int], scale: float, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    critical, counts, marginal = _select((query, key, *rule_tensors), (rule_numbers, scale, with_marginal))
    return critical, counts, query.new_empty(0, dtype=torch.bfloat16) if marginal is None else marginal


@_select_op.register_fake
def _(query, key, rule_tensors, rule_numbers, scale, with_marginal):
    critical, counts, marginal = new_lists(query, key, unflatten(rule_tensors, rule_numbers), with_marginal)
    return critical, counts, query.new_empty(0, dtype=torch.bfloat16) if marginal is None else marginal


def select_blocks_gpu(query: Tensor, key: Tensor, rule: SelectionRule, scale: float, with_marginal: bool) -> Lists:
    """The choice of a rule over query and key, [B, H, L, D]; its mask is padded."""
    query, key, (tensors, numbers) = query.detach(), key.detach(), flatten(rule)
    if is_plain(query, key):
        return Lists(*replayed(_select, (query, key, *tensors), (tuple(numbers), scale, with_marginal)))
    critical, counts, marginal = _select_op(query, key, tensors, numbers, scale, with_marginal)
    return Lists(critical, counts, marginal if with_marginal else None)
