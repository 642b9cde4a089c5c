"""Selection in plain PyTorch: eager mode runs it as it is, and in a compiled graph it is one node.

A node takes any number of blocks. It counts, branches, and rounds as eager mode does, so both choose the same blocks.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, W the width of the lists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import PARTS, pick_by_rule, pool_blocks, pooled_scores, quarter_sizes
from foveal.checks import cached_constant, check_choice, check_ratio
from foveal.kernels.values import flatten, unflatten
from foveal.rules import SelectionRule, ratios_of
from foveal.symbols import ceil_div

SCORES = ("mean", "log_sum_exp", "mean_spread")
MOST_SCORES = 2**26  # that are sorted at a time; each takes about 24 bytes


def check_rule(
    score: str,
    keep_mass: float | None,
    max_keep_ratio: float,
    keep_ratio: float | Sequence[float] | None,
    *blocks: int,
) -> None:
    """Raises a TypeError or ValueError unless these choose blocks of these sizes, see `select_blocks`."""
    check_choice("score", score, SCORES)
    if score == "log_sum_exp" and any(block % PARTS for block in blocks):
        sizes = "x".join(map(str, blocks))
        raise ValueError(f'score="log_sum_exp" needs block sizes that are multiples of {PARTS}, got {sizes}')
    check_ratio("max_keep_ratio", max_keep_ratio)
    if keep_mass is not None:
        check_ratio("keep_mass", keep_mass)
        if keep_mass == 0.0:
            raise ValueError("keep_mass must be above 0; None keeps no more than keep_ratio")
        if keep_ratio is not None and max(ratios_of(keep_ratio)) > max_keep_ratio:
            raise ValueError(
                f"keep_ratio is the least that keep_mass keeps, and must be at most max_keep_ratio, got {keep_ratio} "
                f"and {max_keep_ratio}"
            )
    elif max_keep_ratio != 1.0:
        raise ValueError(f"max_keep_ratio bounds keep_mass, which is None, got max_keep_ratio={max_keep_ratio}")


def block_scores(
    query: Tensor,
    key: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    score: str,
    key_sizes: Tensor | None = None,
    query_sizes: Tensor | None = None,
) -> Tensor:
    """The scores of all pairs of blocks, [B, H, Tq, Tk], by one of `SCORES`.

    "mean" is the product of the blocks' means. "mean_spread" adds half the variance of the mean query's scores over the
    keys of the block, channel by channel: the log of the mean of their exponentials, to second order. "log_sum_exp"
    cuts each block into quarters and takes the log-sum-exp of the products of the quarters' means, of those quarters
    that hold a valid token; -inf for a block without any.

    Args:
        query, key: [B, H, L, D].
        block_q, block_k: tokens per block, multiples of 4 for "log_sum_exp".
        key_sizes, query_sizes: int [B or 1, T], valid tokens at the front of each block; None when all are full.
    """
    if score == "mean":
        pooled = pool_blocks(query, block_q, query_sizes), pool_blocks(key, block_k, key_sizes)
        return pooled_scores(*pooled, scale)
    if score == "mean_spread":
        query = with_squares(pool_blocks(query, block_q, query_sizes), scale)
        return pooled_scores(query, _means_and_variances(key, block_k, key_sizes), scale)
    query, in_query = _quarters(query, block_q, query_sizes)
    key, in_key = _quarters(key, block_k, key_sizes)
    scores = None
    for part in range(PARTS):  # of the queries' blocks: all of them at once would take four times the memory
        one = pooled_scores(query[:, :, :, part], key.flatten(2, 3), scale).unflatten(-1, (-1, PARTS))
        one = one.masked_fill(~in_key[:, None, None], -math.inf).logsumexp(-1)
        one = one.masked_fill(~in_query[:, None, :, part, None], -math.inf)
        scores = one if scores is None else torch.logaddexp(scores, one)
    return scores


def with_squares(query: Tensor, scale: float) -> Tensor:
    """Mean queries q, [..., D], as [q, scale * q^2 / 2], which [mean, variance] of keys are multiplied with."""
    return torch.cat((query, query.square() * (0.5 * scale)), -1)


def _means_and_variances(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    """The mean of each block's valid tokens and the variance of each channel, [B, H, T, 2 D]."""
    mean = pool_blocks(x, block, sizes)
    apart = x.to(mean.dtype) - mean.repeat_interleave(block, 2)[:, :, : x.shape[2]]
    return torch.cat((mean, pool_blocks(apart.square(), block, sizes)), -1)


def _quarters(x: Tensor, block: int, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The means of each block's quarters, [B, H, T, 4, D], and which hold a valid token, bool [B or 1, T, 4]."""
    quarter, length = block // PARTS, x.shape[2]
    if sizes is None:
        sizes = block_sizes(length, block, x.device)[None]
    valid = quarter_sizes(sizes, block)
    pooled = pool_blocks(x, quarter, valid)
    return pooled.unflatten(2, (-1, PARTS)), (valid > 0).unflatten(-1, (-1, PARTS))


@torch.no_grad()
def choose_from_scores(scores: Tensor, rule: SelectionRule) -> tuple[Tensor, Tensor]:
    """The lists and counts of `pick_by_rule` for scores [B, H, Tq, Tk]."""
    if torch.compiler.is_compiling():
        return _from_scores_op(scores.detach(), *flatten(rule))
    return pick_by_rule(scores, rule, False)[:2]


@torch.no_grad()
def choose_in_pieces(
    pooled_query: Tensor, pooled_key: Tensor, scale: float, rule: SelectionRule
) -> tuple[Tensor, Tensor]:
    """Lists and counts by a rule without a mask, a few rows' scores at a time.

    Args:
        pooled_query, pooled_key: [B, H, Tq, D] and [B, H, Tk, D].
        rule: one for samples that have all their keys.
    """
    rows, columns = pooled_query.shape[:3], pooled_key.shape[2]
    critical = pooled_query.new_empty((*rows, rule.width), dtype=torch.int32)
    counts = critical.new_empty(rows)
    step = max(1, MOST_SCORES // columns)
    for batch, head in itertools.product(range(rows[0]), range(rows[1])):
        pair, of_head = (slice(batch, batch + 1), slice(head, head + 1)), rule
        if rule.table is not None:
            of_head = rule._replace(table=rule.table[head : head + 1])
        for start in range(0, rows[2], step):
            some = slice(start, start + step)
            piece = of_head if rule.ranges is None else of_head._replace(ranges=rule.ranges[some])
            scores = pooled_scores(pooled_query[(*pair, some)], pooled_key[pair], scale)
            critical[(*pair, some)], counts[(*pair, some)] = pick_by_rule(scores, piece, False)[:2]
    return critical, counts


@torch.no_grad()
def choose_blocks(
    query: Tensor, key: Tensor, scale: float, rule: SelectionRule, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_by_rule` for the scores of query [B, H, Lq, D] and key [B, H, Lk, D]."""
    if not torch.compiler.is_compiling():
        return _choose(query, key, scale, rule, with_marginal)
    critical, counts, marginal = _blocks_op(query.detach(), key.detach(), *flatten(rule), scale, with_marginal)
    return critical, counts, marginal if with_marginal else None


def _choose(
    query: Tensor, key: Tensor, scale: float, rule: SelectionRule, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    scores = block_scores(query, key, rule.block_q, rule.block_k, scale, rule.score, rule.key_block_sizes)
    return pick_by_rule(scores, rule, with_marginal)


def block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """int32 [ceil(length / block)]: the tokens of each block of a sequence."""
    make = _sizes_op if torch.compiler.is_compiling() else _block_sizes
    return make(length, block, device)


@cached_constant
def _block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(ceil_div(length, block), dtype=torch.int32, device=device) * block
    return (length - starts).clamp(max=block)


@torch.library.custom_op("foveal::block_sizes", mutates_args=())
def _sizes_op(length: int, block: int, device: torch.device) -> Tensor:
    """`_block_sizes` in a compiled graph: Inductor of PyTorch 2.11 fails over the minimum of a number and an index."""
    return _block_sizes(length, block, device).clone()


@_sizes_op.register_fake
def _(length, block, device):
    return torch.empty(ceil_div(length, block), dtype=torch.int32, device=device)


def append_blocks(
    critical: Tensor, counts: Tensor, start: int, stop: int, valid: Tensor | int, *, ragged: bool = False
) -> tuple[Tensor, Tensor]:
    """Lists, int32 [B, H, Tq, W] and their counts, with [start, stop) behind each row's entries.

    Args:
        ragged: rows may have fewer than W entries.
        valid: how many of these blocks count, the first ones: int32 [B or 1], or one number for all samples.
    """
    append = _append_op if torch.compiler.is_compiling() else _appended
    lists = append(critical, counts if ragged else None, start, stop)
    return lists, counts + (valid if isinstance(valid, int) else valid[:, None, None])


def _appended(critical: Tensor, counts: Tensor | None, start: int, stop: int) -> Tensor:
    more = torch.arange(start, stop, dtype=torch.int32, device=critical.device).expand(*critical.shape[:3], -1)
    if counts is None:
        return torch.cat([critical, more], -1)
    places = counts[..., None] + torch.arange(stop - start, device=critical.device)
    return F.pad(critical, (0, stop - start)).scatter(-1, places.long(), more)


@torch.library.custom_op("foveal::choose_from_scores", mutates_args=())
def _from_scores_op(scores: Tensor, rule_tensors: list[Tensor], rule_numbers: list[int]) -> tuple[Tensor, Tensor]:
    return pick_by_rule(scores, unflatten(rule_tensors, rule_numbers), False)[:2]


@_from_scores_op.register_fake
def _(scores, rule_tensors, rule_numbers):
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts.new_empty((*counts.shape, unflatten(rule_tensors, rule_numbers).width)), counts


@torch.library.custom_op("foveal::choose_blocks", mutates_args=())
def _blocks_op(
    query: Tensor, key: Tensor, rule_tensors: list[Tensor], rule_numbers: list[int], scale: float, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_choose`; an empty marginal mask for None."""
    critical, counts, marginal = _choose(query, key, scale, unflatten(rule_tensors, rule_numbers), with_marginal)
    return critical, counts, counts.new_empty(0, dtype=torch.bool) if marginal is None else marginal


@_blocks_op.register_fake
def _(query, key, rule_tensors, rule_numbers, scale, with_marginal):
    rule = unflatten(rule_tensors, rule_numbers)
    rows, columns = ceil_div(query.shape[2], rule.block_q), ceil_div(key.shape[2], rule.block_k)
    counts = query.new_empty((*query.shape[:2], rows), dtype=torch.int32)
    marginal = counts.new_empty((*counts.shape, columns) if with_marginal else 0, dtype=torch.bool)
    return counts.new_empty((*counts.shape, rule.width)), counts, marginal


@torch.library.custom_op("foveal::append_blocks", mutates_args=())
def _append_op(critical: Tensor, counts: Tensor | None, start: int, stop: int) -> Tensor:
    return _appended(critical, counts, start, stop)


@_append_op.register_fake
def _(critical, counts, start, stop):
    return critical.new_empty((*critical.shape[:3], critical.shape[3] + stop - start))
