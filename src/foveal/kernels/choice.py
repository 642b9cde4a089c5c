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

from foveal.blocks import PARTS, pick_blocks, pool_blocks, pooled_scores, quarter_sizes
from foveal.checks import cached_constant, check_choice, check_ratio
from foveal.rules import list_width, roomy
from foveal.symbols import ceil_div

SCORES = ("mean", "log_sum_exp", "mean_spread")
MOST_SCORES = 2**26  # that are sorted at a time; each takes about 24 bytes


def check_rule(
    score: str, keep_mass: float | None, max_keep_ratio: float, keep_ratio: float | None, *blocks: int
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
        if keep_ratio is not None and keep_ratio > max_keep_ratio:
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
def choose_cubes(
    scores: Tensor, topk: int, keep_mass: float | None = None, max_keep_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_blocks` for scores [B, H, Tq, Tk]."""
    if torch.compiler.is_compiling():
        return *_cubes_op(scores.detach(), topk, keep_mass, max_keep_ratio), None
    return pick_blocks(scores, topk=topk, keep_mass=keep_mass, max_keep_ratio=max_keep_ratio)


@torch.no_grad()
def choose_in_pieces(
    pooled_query: Tensor, pooled_key: Tensor, scale: float, kept: int, width: int
) -> tuple[Tensor, Tensor]:
    """Lists int32 [B, H, Tq, width] of each row's `kept` best blocks, and their counts, a few rows' scores at a time.

    Args:
        pooled_query, pooled_key: [B, H, Tq, D] and [B, H, Tk, D].
    """
    rows, columns = pooled_query.shape[:3], pooled_key.shape[2]
    critical = pooled_query.new_empty((*rows, width), dtype=torch.int32)
    step = max(1, MOST_SCORES // columns)
    for batch, head in itertools.product(range(rows[0]), range(rows[1])):
        pair = slice(batch, batch + 1), slice(head, head + 1)
        for start in range(0, rows[2], step):
            some = slice(start, start + step)
            scores = pooled_scores(pooled_query[(*pair, some)], pooled_key[pair], scale)
            critical[(*pair, some, slice(kept))] = pick_blocks(scores, topk=kept)[0]
    return critical, critical.new_full(rows, kept)


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    key: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    keep_ratio: float,
    drop_ratio: float,
    key_block_sizes: Tensor | None,
    valid_blocks: Tensor | None,
    protected_keys: Sequence[int] | None,
    protected_queries: Sequence[int] | None,
    score: str = "mean",
    keep_mass: float | None = None,
    max_keep_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_blocks` for the scores of query [B, H, Lq, D] and key [B, H, Lk, D]; the ranges are in blocks."""
    ranges = (None if blocks is None else list(blocks) for blocks in (protected_keys, protected_queries))
    rule = scale, block_q, block_k, keep_ratio, drop_ratio, key_block_sizes, valid_blocks, *ranges
    rule = *rule, score, keep_mass, max_keep_ratio
    if not torch.compiler.is_compiling():
        return _choose(query, key, *rule)
    critical, counts, marginal = _blocks_op(query.detach(), key.detach(), *rule)
    return critical, counts, marginal if drop_ratio else None


def _choose(
    query, key, scale, block_q, block_k, keep_ratio, drop_ratio, sizes, valid_blocks, protected_keys, protected_queries,
    score, keep_mass, max_keep_ratio,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    return pick_blocks(
        block_scores(query, key, block_q, block_k, scale, score, sizes),
        keep_ratio=keep_ratio,
        drop_ratio=drop_ratio,
        valid_blocks=valid_blocks,
        protected_keys=protected_keys,
        protected_queries=protected_queries,
        keep_mass=keep_mass,
        max_keep_ratio=max_keep_ratio,
    )


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


@torch.library.custom_op("foveal::choose_cubes", mutates_args=())
def _cubes_op(scores: Tensor, topk: int, keep_mass: float | None, max_keep_ratio: float) -> tuple[Tensor, Tensor]:
    critical, counts, _ = pick_blocks(scores, topk=topk, keep_mass=keep_mass, max_keep_ratio=max_keep_ratio)
    return _with_room(critical, scores.shape[3]), counts


def _with_room(critical: Tensor, columns: int) -> Tensor:
    width = critical.shape[-1]
    return F.pad(critical, (0, roomy(width, columns) - width))


@_cubes_op.register_fake
def _(scores, topk, keep_mass, max_keep_ratio):
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    most = None if keep_mass is None else max_keep_ratio
    width = roomy(list_width(scores.shape[3], None, topk, max_keep_ratio=most), scores.shape[3])
    return counts.new_empty((*counts.shape, width)), counts


@torch.library.custom_op("foveal::choose_blocks", mutates_args=())
def _blocks_op(
    query: Tensor,
    key: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    keep_ratio: float,
    drop_ratio: float,
    key_block_sizes: Tensor | None,
    valid_blocks: Tensor | None,
    protected_keys: list[int] | None,
    protected_queries: list[int] | None,
    score: str,
    keep_mass: float | None,
    max_keep_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_choose`; an empty marginal mask for None."""
    rule = scale, block_q, block_k, keep_ratio, drop_ratio, key_block_sizes, valid_blocks
    rule = *rule, protected_keys, protected_queries, score, keep_mass, max_keep_ratio
    critical, counts, marginal = _choose(query, key, *rule)
    marginal = counts.new_empty(0, dtype=torch.bool) if marginal is None else marginal
    return _with_room(critical, ceil_div(key.shape[2], block_k)), counts, marginal


@_blocks_op.register_fake
def _(
    query, key, scale, block_q, block_k, keep_ratio, drop_ratio, sizes, valid_blocks, keys, queries, score, keep_mass,
    max_keep_ratio,
):  # fmt: skip
    rows, columns = ceil_div(query.shape[2], block_q), ceil_div(key.shape[2], block_k)
    counts = query.new_empty((*query.shape[:2], rows), dtype=torch.int32)
    most = None if keep_mass is None else max_keep_ratio
    width = roomy(list_width(columns, keep_ratio, None, keys, queries, most), columns)
    marginal = counts.new_empty((*counts.shape, columns) if drop_ratio else 0, dtype=torch.bool)
    return counts.new_empty((*counts.shape, width)), counts, marginal


@torch.library.custom_op("foveal::append_blocks", mutates_args=())
def _append_op(critical: Tensor, counts: Tensor | None, start: int, stop: int) -> Tensor:
    return _appended(critical, counts, start, stop)


@_append_op.register_fake
def _(critical, counts, start, stop):
    return critical.new_empty((*critical.shape[:3], critical.shape[3] + stop - start))
