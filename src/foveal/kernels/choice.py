"""Selection in plain PyTorch: eager mode runs it as it is, and in a compiled graph it is one node.

A node takes any number of blocks. It counts, branches, and rounds as eager mode does, so both choose the same blocks.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, W the width of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import list_width, pick_blocks, pool_blocks, pooled_scores, roomy
from foveal.symbols import ceil_div


@torch.no_grad()
def choose_cubes(scores: Tensor, keep_ratio: float | None, topk: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_blocks` for scores [B, H, Tq, Tk]."""
    if torch.compiler.is_compiling():
        return *_cubes_op(scores.detach(), keep_ratio, topk), None
    return pick_blocks(scores, keep_ratio=keep_ratio, topk=topk)


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_blocks` for the scores of query [B, H, Lq, D] and key [B, H, Lk, D]; the ranges are in blocks."""
    ranges = (None if blocks is None else list(blocks) for blocks in (protected_keys, protected_queries))
    rule = scale, block_q, block_k, keep_ratio, drop_ratio, key_block_sizes, valid_blocks, *ranges
    if not torch.compiler.is_compiling():
        return _choose(query, key, *rule)
    critical, counts, marginal = _blocks_op(query.detach(), key.detach(), *rule)
    return critical, counts, marginal if drop_ratio else None


def _choose(
    query, key, scale, block_q, block_k, keep_ratio, drop_ratio, sizes, valid_blocks, protected_keys, protected_queries
) -> tuple[Tensor, Tensor, Tensor | None]:
    return pick_blocks(
        pooled_scores(pool_blocks(query, block_q), pool_blocks(key, block_k, sizes), scale),
        keep_ratio=keep_ratio,
        drop_ratio=drop_ratio,
        valid_blocks=valid_blocks,
        protected_keys=protected_keys,
        protected_queries=protected_queries,
    )


def append_blocks(
    critical: Tensor, counts: Tensor, start: int, stop: int, valid: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Lists without gaps, int32 [B, H, Tq, W] and their counts, with [start, stop) behind each row's entries.

    Args:
        valid: how many of these blocks count, the first ones: int32 [B or 1], or one number for all samples.
    """
    append = _append_op if torch.compiler.is_compiling() else _appended
    return append(critical, start, stop), counts + (valid if isinstance(valid, int) else valid[:, None, None])


def _appended(critical: Tensor, start: int, stop: int) -> Tensor:
    more = torch.arange(start, stop, dtype=torch.int32, device=critical.device)
    return torch.cat([critical, more.expand(*critical.shape[:3], -1)], -1)


@torch.library.custom_op("foveal::choose_cubes", mutates_args=())
def _cubes_op(scores: Tensor, keep_ratio: float | None, topk: int | None) -> tuple[Tensor, Tensor]:
    critical, counts, _ = pick_blocks(scores, keep_ratio=keep_ratio, topk=topk)
    return _with_room(critical, scores.shape[3]), counts


def _with_room(critical: Tensor, columns: int) -> Tensor:
    width = critical.shape[-1]
    return F.pad(critical, (0, roomy(width, columns) - width))


@_cubes_op.register_fake
def _(scores, keep_ratio, topk):
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    width = roomy(list_width(scores.shape[3], keep_ratio, topk), scores.shape[3])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`_choose`; an empty marginal mask for None."""
    rule = scale, block_q, block_k, keep_ratio, drop_ratio, key_block_sizes, valid_blocks
    critical, counts, marginal = _choose(query, key, *rule, protected_keys, protected_queries)
    marginal = counts.new_empty(0, dtype=torch.bool) if marginal is None else marginal
    return _with_room(critical, ceil_div(key.shape[2], block_k)), counts, marginal


@_blocks_op.register_fake
def _(query, key, scale, block_q, block_k, keep_ratio, drop_ratio, sizes, valid_blocks, keys, queries):
    rows, columns = ceil_div(query.shape[2], block_q), ceil_div(key.shape[2], block_k)
    counts = query.new_empty((*query.shape[:2], rows), dtype=torch.int32)
    width = roomy(list_width(columns, keep_ratio, None, keys, queries), columns)
    marginal = counts.new_empty((*counts.shape, columns) if drop_ratio else 0, dtype=torch.bool)
    return counts.new_empty((*counts.shape, width)), counts, marginal


@torch.library.custom_op("foveal::append_blocks", mutates_args=())
def _append_op(critical: Tensor, start: int, stop: int) -> Tensor:
    return _appended(critical, start, stop)


@_append_op.register_fake
def _(critical, start, stop):
    return critical.new_empty((*critical.shape[:3], critical.shape[3] + stop - start))
