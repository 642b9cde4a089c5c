"""Which key blocks each query block reads: what was chosen, and how scores choose it.

The rule (SLA, arXiv 2509.24006, section 3; VSA, arXiv 2505.13389, section 2): pool query and key per block, score the
pooled pairs, keep the highest-scoring key blocks of each row and drop the lowest. Ranking by the scaled dot products is
ranking by their softmax, without its underflow.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, bq / bk block sizes, Tq = ceil(Lq / bq), Tk = ceil(Lk / bk),
W the width of the longest list of critical blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.checks import check_positive_int, product
from foveal.rules import MASS_UNITS, Choosing, FixedBlocks, Limits, SelectionRule, rule_of
from foveal.symbols import ceil_div

PARTS = 4  # of a block, where its quarters are scored


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks each query block attends to exactly (critical), linearly (marginal), or not at all (negligible).

    Args:
        critical: int32 [B, H, Tq, W], each row's critical key blocks, ascending; entries past the row's count are 0.
        critical_count: int32 [B, H, Tq], how many entries of each row count.
        marginal: [B, H, Tq, Tk], nonzero where marginal (bool, or the float operand of a mask product); None when
            nothing was dropped, so that every block that is not critical is marginal.
        block_q, block_k: block sizes in tokens.
        query_length, key_length: tokens; the last block may be partial.
        key_block_sizes: int32 [B, Tk] or [1, Tk], valid tokens at the front of each key block; None when all blocks
            are full, except for a partial last one.
    """

    critical: Tensor
    critical_count: Tensor
    marginal: Tensor | None
    block_q: int
    block_k: int
    query_length: int
    key_length: int
    key_block_sizes: Tensor | None = None

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        *,
        block_q: int,
        block_k: int,
        query_length: int,
        key_length: int,
        key_block_sizes: Tensor | None = None,
    ) -> BlockSelection:
        """Build a selection from explicit labels, for tests and for your own patterns.

        Args:
            labels: [B, H, Tq, Tk] of +1 (critical), 0 (marginal) or -1 (negligible), any signed dtype.
            block_q, block_k, query_length, key_length, key_block_sizes: as in the class.

        Raises:
            TypeError, ValueError: labels of another shape or with other values.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        for name, value in (
            ("block_q", block_q),
            ("block_k", block_k),
            ("query_length", query_length),
            ("key_length", key_length),
        ):
            check_positive_int(name, value)
        expected = (ceil_div(query_length, block_q), ceil_div(key_length, block_k))
        if labels.dim() != 4 or tuple(labels.shape[2:]) != expected:
            raise ValueError(
                f"labels must have shape [B, H, {expected[0]}, {expected[1]}] for lengths ({query_length}, "
                f"{key_length}) in blocks of ({block_q}, {block_k}), got {tuple(labels.shape)}"
            )
        wrong = (labels < -1) | (labels > 1)
        if wrong.any():
            raise ValueError(f"labels must be -1, 0 or 1, got {labels[wrong].unique().tolist()[:5]}")
        critical, counts = lists_from_mask(labels == 1)
        width = max(1, int(counts.max())) if counts.numel() else 1
        return cls(
            critical=critical[..., :width].contiguous(),
            critical_count=counts,
            marginal=labels == 0,
            block_q=block_q,
            block_k=block_k,
            query_length=query_length,
            key_length=key_length,
            key_block_sizes=key_block_sizes,
        )

    @classmethod
    def by_rule(
        cls,
        rule: SelectionRule,
        query: Tensor,
        key: Tensor,
        critical: Tensor,
        counts: Tensor,
        marginal: Tensor | None = None,
    ) -> BlockSelection:
        """What a rule chose over query and key, [B, H, L, D]."""
        return cls(
            critical=critical,
            critical_count=counts,
            marginal=marginal,
            block_q=rule.block_q,
            block_k=rule.block_k,
            query_length=query.shape[2],
            key_length=key.shape[2],
            key_block_sizes=rule.key_block_sizes,
        )

    @property
    def num_query_blocks(self) -> int:
        return ceil_div(self.query_length, self.block_q)

    @property
    def num_key_blocks(self) -> int:
        return ceil_div(self.key_length, self.block_k)

    def with_contiguous_lists(self) -> BlockSelection:
        """This selection with its critical lists contiguous, as kernels read them."""
        if self.critical.is_contiguous() and self.critical_count.is_contiguous():
            return self
        lists = {"critical": self.critical.contiguous(), "critical_count": self.critical_count.contiguous()}
        return dataclasses.replace(self, **lists)

    def critical_mask(self) -> Tensor:
        """bool [B, H, Tq, Tk], True where critical."""
        width = self.critical.shape[-1]
        listed = torch.arange(width, device=self.critical.device) < self.critical_count[..., None]
        slots = torch.where(listed, self.critical, self.num_key_blocks).long()
        mask = slots.new_zeros((*slots.shape[:-1], self.num_key_blocks + 1), dtype=torch.bool)
        return mask.scatter_(-1, slots, True)[..., :-1]

    def labels(self) -> Tensor:
        """int8 [B, H, Tq, Tk]: +1 critical, 0 marginal, -1 negligible."""
        critical = self.critical_mask()
        if self.marginal is None:
            return critical.to(torch.int8)
        return critical.to(torch.int8) * 2 + (self.marginal != 0).to(torch.int8) - 1

    def linear_mask(self, scope: str) -> Tensor | None:
        """The blocks that a `linear_scope` sums over, nonzero where summed: [B, H, Tq, Tk]; None for "all"."""
        if scope == "all":
            return None
        if scope == "marginal" and self.marginal is not None:
            return self.marginal
        return ~self.critical_mask()

    def key_valid(self) -> Tensor:
        """bool [B or 1, Lk], False for padding keys."""
        position = torch.arange(self.key_length, device=self.critical.device)
        if self.key_block_sizes is None:
            return torch.ones_like(position, dtype=torch.bool)[None]
        block = position // self.block_k
        return position % self.block_k < self.key_block_sizes[:, block]

    def expand(self, block_mask: Tensor) -> Tensor:
        """A [B, H, Tq, Tk] block mask as a bool token mask [B, H, Lq, Lk], without the padding keys."""
        tokens = (block_mask != 0).repeat_interleave(self.block_q, 2)[:, :, : self.query_length]
        tokens = tokens.repeat_interleave(self.block_k, 3)[..., : self.key_length]
        return tokens & self.key_valid()[:, None, None, :]


def lists_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Convert bool [..., T] to ascending int32 [..., T] indices of the True entries, then zeros, and int32 counts."""
    total = mask.shape[-1]
    index = torch.arange(total, device=mask.device, dtype=torch.int32)
    ordered = torch.where(mask, index, total).sort(-1).values
    counts = mask.sum(-1, dtype=torch.int32)
    return torch.where(ordered < total, ordered, 0), counts


def pool_blocks(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """Mean over each block's valid tokens, in float32 or better.

    Args:
        x: [B, H, L, D], any strides. The padding never counts, whatever it holds, including NaN.
        block: tokens per block; the last block may be partial.
        sizes: int [B or 1, T], valid tokens at the front of each block; None when all are full.

    Returns:
        [B, H, T, D] in float32, or float64 for float64 inputs; 0 for a block without a valid token. Differentiable.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[2]
    full = length // block
    parts = []
    if sizes is not None:
        number = sizes.shape[-1]
        if length < number * block:  # padding by nothing copies
            x = torch.nn.functional.pad(x, (0, 0, 0, number * block - length))
        blocks = x.unflatten(2, (number, block))
        valid = torch.arange(block, device=x.device) < sizes[:, None, :, None]
        total = torch.where(valid[..., None], blocks, 0).sum(3, dtype=dtype)
        return total / sizes.clamp(min=1)[:, None, :, None]
    if full:
        parts.append(x[:, :, : full * block].unflatten(2, (full, block)).mean(3, dtype=dtype))
    if length > full * block:
        parts.append(x[:, :, full * block :].mean(2, dtype=dtype, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def quarter_sizes(sizes: Tensor, block: int) -> Tensor:
    """Valid tokens of blocks, int [B or 1, T], to those of their quarters, [B or 1, 4 T]."""
    starts = torch.arange(PARTS, device=sizes.device, dtype=sizes.dtype) * (block // PARTS)
    return (sizes[..., None] - starts).clamp(0, block // PARTS).flatten(-2)


def pooled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, H, Tq, D] and [B, H, Tk, D], pooled, to the scores [B, H, Tq, Tk]."""
    return product(query * scale, key.transpose(-1, -2))


def pick_blocks(
    scores: Tensor,
    *,
    keep_ratio: float | Sequence[float] | None = None,
    topk: int | None = None,
    drop_ratio: float = 0.0,
    valid_blocks: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
    keep_mass: float | None = None,
    max_keep_ratio: float = 1.0,
    fixed: FixedBlocks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores to lists, by the counting rule, ties to the lower block for critical and the higher one for negligible.

    Args:
        scores: [B, H, Tq, Tk].
        keep_ratio or topk: how many are critical: max(1, floor(keep_ratio * n)) of n blocks (none for 0), or topk
            capped at n. A ratio for each head, or one for all.
        drop_ratio: fraction that is negligible, at most what is left.
        valid_blocks: int [B], leading key blocks that hold a valid token; None for all.
        protected_keys, protected_queries: [start, stop) in *blocks*: key blocks critical for every row, query blocks
            that attend to everything.
        keep_mass: each row keeps further blocks, the best first, until those that it keeps by score have this share of
            the softmax of its scores; at most max_keep_ratio of the blocks. None for no more.
        fixed: blocks that rows keep whatever their scores, beside those picked.

    Returns:
        critical int32 [B, H, Tq, W], counts int32 [B, H, Tq], and marginal bool [B, H, Tq, Tk] or None if nothing is
        dropped. W does not depend on the scores.
    """
    kept = {"keep_ratio": keep_ratio, "topk": topk, "drop_ratio": drop_ratio}
    choosing = Choosing(**kept, keep_mass=keep_mass, max_keep_ratio=max_keep_ratio, fixed=fixed)
    limits = Limits(None, valid_blocks, protected_keys, protected_queries)
    rule = rule_of(scores.shape[-1], scores.device, (1, 1), choosing, limits)
    return pick_by_rule(scores, rule, drop_ratio > 0.0)


@torch.no_grad()
def pick_by_rule(scores: Tensor, rule: SelectionRule, with_marginal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pick_blocks` by a rule, over scores [B, H, Tq, Tk]; the marginal mask only where it is wanted."""
    total = scores.shape[-1]
    index = torch.arange(total, device=scores.device)
    n_critical, n_negligible, most = rule.critical, rule.negligible, rule.most
    if rule.table is not None:
        places = 0 if rule.valid_blocks is None else rule.valid_blocks.long()
        # [H or 1, B, 3] to [B, H or 1, 1, 1] each
        of_rows = rule.table[:, places].view(rule.table.shape[0], -1, 3).transpose(0, 1)[:, :, None, None]
        n_critical, n_negligible, most = of_rows.unbind(-1)
    blocks = total
    if rule.valid_blocks is not None:
        blocks = rule.valid_blocks.long().view(-1, 1, 1, 1)
        scores = scores.masked_fill(index >= blocks, -math.inf)

    values, order = scores.sort(dim=-1, descending=True, stable=True)
    if rule.mass:
        n_critical = _count_for_mass(values, rule.mass / MASS_UNITS, n_critical, most)
    if not (rule.ragged() or with_marginal or rule.query_range != (0, 0)) and n_critical:
        critical = order[..., :n_critical].sort(-1).values.to(torch.int32)
        counts = torch.full(critical.shape[:-1], n_critical, dtype=torch.int32, device=scores.device)
        return F.pad(critical, (0, rule.width - n_critical)), counts, None

    in_order = (index < n_critical).expand(order.shape)
    critical = torch.zeros_like(in_order, dtype=torch.bool).scatter(-1, order, in_order)
    critical[..., rule.key_range[0] : rule.key_range[1]] = True
    critical[:, :, rule.query_range[0] : rule.query_range[1]] = True
    if rule.ranges is not None:
        starts, stops = rule.ranges[..., None].unbind(2)
        critical |= ((index >= starts) & (index < stops)).any(1)
    critical &= index < blocks
    lists, counts = lists_from_mask(critical)
    lists = lists[..., : rule.width].contiguous()
    if not with_marginal:
        return lists, counts, None

    rest = ~critical & (index < blocks)
    rest_in_order = rest.gather(-1, order)
    from_bottom = rest_in_order.flip(-1).cumsum(-1).flip(-1)
    dropped = torch.zeros_like(rest).scatter(-1, order, rest_in_order & (from_bottom <= n_negligible))
    return lists, counts, rest & ~dropped


def _count_for_mass(values: Tensor, mass: float, least: int | Tensor, most: int | Tensor) -> Tensor:
    """How many of a row's scores, [..., T] descending, have `mass` of their softmax: [..., 1], in [least, most]."""
    before = values.to(torch.promote_types(values.dtype, torch.float32)).softmax(-1).cumsum(-1)
    needed = (before < mass).sum(-1, keepdim=True) + 1
    least, most = (torch.as_tensor(n, device=values.device) for n in (least, most))
    return needed.clamp(max=most).maximum(least)
