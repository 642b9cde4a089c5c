"""Block selection: pool -> score -> pick -> BlockSelection.

The rule (SLA, arXiv 2509.24006, section 3; VSA, arXiv 2505.13389, section 2): pool query and key per block, score the
pooled pairs, keep the highest-scoring key blocks of each row and drop the lowest. Ranking by the scaled dot products is
ranking by their softmax, without its underflow.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.types import BlockSelection, check_positive_int, check_ratio, check_scale, count, lists_from_mask

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# What the registers of one program hold: at 64 tokens a block, a million keys.
_KERNEL_MAX_BLOCKS = 16384


def pool_blocks(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """Mean over each block's valid tokens, in float32 or better.

    Args:
        x: [B, H, L, D], any strides. What stands in the padding never counts, NaN included.
        block: tokens in a block; the last may be partial.
        sizes: int [B or 1, T], valid tokens at the front of each block; None when all are full.

    Returns:
        [B, H, T, D] in float32, or float64 for float64 inputs; 0 for a block without a valid token. Differentiable.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[2]
    full = length // block
    parts = []
    if sizes is not None:
        short = -length % block
        blocks = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block))
        valid = torch.arange(block, device=x.device) < sizes[:, None, :, None]
        total = torch.where(valid[..., None], blocks, 0).sum(3, dtype=dtype)
        return total / sizes.clamp(min=1)[:, None, :, None]
    if full:
        parts.append(x[:, :, : full * block].unflatten(2, (full, block)).mean(3, dtype=dtype))
    if length > full * block:
        parts.append(x[:, :, full * block :].mean(2, dtype=dtype, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def pooled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, H, Tq, D] and [B, H, Tk, D], pooled, to the scores [B, H, Tq, Tk]."""
    return (query * scale) @ key.transpose(-1, -2)


@torch.no_grad()
def pick_blocks(
    scores: Tensor,
    *,
    keep_ratio: float | None = None,
    topk: int | None = None,
    drop_ratio: float = 0.0,
    valid_blocks: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores to lists, by the counting rule, ties to the lower block for critical and the higher one for negligible.

    Args:
        scores: [B, H, Tq, Tk].
        keep_ratio or topk: how many are critical: max(1, floor(keep_ratio * n)) of n blocks (none for 0), or topk
            capped at n.
        drop_ratio: fraction that is negligible, of what is left at most.
        valid_blocks: int [B], leading key blocks that hold a valid token; None for all.
        protected_keys, protected_queries: [start, stop) in *blocks*: key blocks critical for every row, query blocks
            that attend to everything.

    Returns:
        critical int32 [B, H, Tq, W], counts int32 [B, H, Tq], marginal bool [B, H, Tq, Tk] or None if nothing is
        dropped. W is known without looking at the scores.
    """
    total = scores.shape[-1]
    index = torch.arange(total, device=scores.device)
    if valid_blocks is None:
        blocks = torch.full((1, 1, 1, 1), total, device=scores.device)
        n_critical = _num_critical(total, keep_ratio, topk)
        n_negligible = count(drop_ratio, total)
    else:
        blocks = valid_blocks.to(scores.device).long().view(-1, 1, 1, 1)
        n_critical = _count_table(total, keep_ratio, topk, scores.device)[blocks]
        n_negligible = _count_table(total, drop_ratio, None, scores.device, floor=0)[blocks]
        scores = scores.masked_fill(index >= blocks, -math.inf)

    order = scores.sort(dim=-1, descending=True, stable=True).indices
    width = _num_critical(total, keep_ratio, topk)
    plain = valid_blocks is None and protected_keys is None and protected_queries is None
    if plain and drop_ratio == 0.0 and width:
        critical = order[..., :width].sort(-1).values.to(torch.int32)
        return critical, torch.full(critical.shape[:-1], width, dtype=torch.int32, device=scores.device), None

    in_order = (index < n_critical).expand(order.shape)
    critical = torch.zeros_like(in_order, dtype=torch.bool).scatter(-1, order, in_order)
    if protected_keys is not None:
        critical[..., protected_keys[0] : protected_keys[1]] = True
        width += protected_keys[1] - protected_keys[0]
    if protected_queries is not None:
        critical[:, :, protected_queries[0] : protected_queries[1]] = True
        width = total
    if not plain:
        critical &= index < blocks
    lists, counts = lists_from_mask(critical)
    lists = lists[..., : max(1, min(width, total))].contiguous()
    if drop_ratio == 0.0:
        return lists, counts, None

    rest = ~critical & (index < blocks)
    rest_in_order = rest.gather(-1, order)
    from_bottom = rest_in_order.flip(-1).cumsum(-1).flip(-1)
    dropped = torch.zeros_like(rest).scatter(-1, order, rest_in_order & (from_bottom <= n_negligible))
    return lists, counts, rest & ~dropped


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    keep_ratio: float,
    drop_ratio: float = 0.0,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
) -> BlockSelection:
    """Choose the critical, marginal and negligible key blocks of every query block.

    Per row of the pooled score matrix, the `max(1, floor(keep_ratio * Tk))` largest are critical (none if keep_ratio is
    0), the `floor(drop_ratio * Tk)` smallest negligible, the others marginal (SLA, arXiv 2509.24006, eq. 4-6, with
    the bottom labelled -1). Not differentiated through.

    Args:
        query: [B, H, Lq, D], floating point, any strides.
        key: [B, H, Lk, D].
        block_q, block_k: block sizes in tokens; the last block may be partial.
        keep_ratio, drop_ratio: in [0, 1], together at most 1.
        scale: softmax scale; None for 1 / sqrt(D).
        kv_lengths: int [B], valid keys at the front of each sample, at most Lk; the rest is padding. The ratios
            then count each sample's own blocks.
        protected_keys: token range [start, stop) (text, say) whose key blocks are critical for every row, beside
            those picked.
        protected_queries: token range [start, stop) whose query blocks attend to every valid key.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be non-empty and have shape [B, H, L, D], got {tuple(x.shape)}")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.device != key.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    check_positive_int("block_q", block_q)
    check_positive_int("block_k", block_k)
    check_ratio("keep_ratio", keep_ratio)
    check_ratio("drop_ratio", drop_ratio)
    if keep_ratio + drop_ratio > 1.0 + 1e-9:
        raise ValueError(f"keep_ratio + drop_ratio must be at most 1, got {keep_ratio} + {drop_ratio}")
    scale = check_scale(scale, query.shape[-1])
    query_length, key_length = query.shape[2], key.shape[2]

    limits = _limits(query, key, block_q, block_k, kv_lengths, protected_keys, protected_queries)
    sizes, valid_blocks, key_range, query_range = limits
    if fits_kernel(query, key, block_k):
        rule = _rule(query, key, block_q, block_k, keep_ratio, drop_ratio, limits)
        critical, counts, marginal = _select_on_device(query, key, block_q, block_k, scale, rule, drop_ratio > 0.0)
    else:
        with torch.no_grad():
            scores = pooled_scores(pool_blocks(query, block_q), pool_blocks(key, block_k, sizes), scale)
        critical, counts, marginal = pick_blocks(
            scores,
            keep_ratio=keep_ratio,
            drop_ratio=drop_ratio,
            valid_blocks=valid_blocks,
            protected_keys=key_range,
            protected_queries=query_range,
        )
    return BlockSelection(
        critical=critical,
        critical_count=counts,
        marginal=marginal,
        block_q=block_q,
        block_k=block_k,
        query_length=query_length,
        key_length=key_length,
        key_block_sizes=sizes,
    )


def fits_kernel(query: Tensor, key: Tensor, block_k: int) -> bool:
    """Whether the selection kernels take these: the same rule, on the device."""
    return (
        _HAS_TRITON
        and query.device.type == "cuda"
        and query.dtype == key.dtype
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and query.shape[-1] in (64, 128)
        and query.stride(-1) == key.stride(-1) == 1
        and -(-key.shape[2] // block_k) <= _KERNEL_MAX_BLOCKS
    )


class SelectionRule(NamedTuple):
    """All that `select_blocks` settles before it looks at a score, for kernels that select on the way.

    width: of the critical lists.
    critical, negligible: how many blocks a row gets, if every sample has all its keys.
    key_block_sizes: int32 [B, Tk] or None, as in `BlockSelection`.
    valid_blocks: int32 [B], leading key blocks with a valid token, or None for all; then
    table: int32 [Tk + 1, 2] has how many are critical and negligible for each number of valid blocks.
    key_range, query_range: [start, stop) in blocks: critical for every row, and rows that attend to everything.
    """

    width: int
    critical: int
    negligible: int
    key_block_sizes: Tensor | None
    valid_blocks: Tensor | None
    table: Tensor | None
    key_range: tuple[int, int]
    query_range: tuple[int, int]


def selection_rule(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    keep_ratio: float,
    drop_ratio: float,
    kv_lengths: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
) -> SelectionRule:
    """The rule of `select_blocks` for inputs that `fits_kernel` accepts; arguments and errors as there."""
    limits = _limits(query, key, block_q, block_k, kv_lengths, protected_keys, protected_queries)
    return _rule(query, key, block_q, block_k, keep_ratio, drop_ratio, limits)


def _limits(query, key, block_q, block_k, kv_lengths, protected_keys, protected_queries):
    """Sizes of key blocks, valid blocks, and the protected blocks of keys and queries; each None if there is none."""
    sizes = valid_blocks = None
    if kv_lengths is not None:
        sizes, valid_blocks = _sizes_from_lengths(kv_lengths, query.shape[0], key.shape[2], block_k, key.device)
    key_range = _token_to_block_range("protected_keys", protected_keys, key.shape[2], block_k)
    query_range = _token_to_block_range("protected_queries", protected_queries, query.shape[2], block_q)
    return sizes, valid_blocks, key_range, query_range


def _rule(query, key, block_q, block_k, keep_ratio, drop_ratio, limits) -> SelectionRule:
    sizes, valid_blocks, key_range, query_range = limits
    columns = -(-key.shape[2] // block_k)
    critical = width = _num_critical(columns, keep_ratio, None)
    if key_range is not None:
        width += key_range[1] - key_range[0]
    if query_range is not None:
        width = columns
    table = None
    if valid_blocks is not None:
        valid_blocks = valid_blocks.to(torch.int32)
        table = _wanted_table(columns, keep_ratio, drop_ratio, key.device)
    return SelectionRule(
        width=max(1, min(width, columns)),
        critical=critical,
        negligible=count(drop_ratio, columns),
        key_block_sizes=sizes,
        valid_blocks=valid_blocks,
        table=table,
        key_range=key_range or (0, 0),
        query_range=query_range or (0, 0),
    )


def _select_on_device(
    query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, rule: SelectionRule, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from foveal.block_sparse.triton.select import select_op

    rows, columns = -(-query.shape[2] // block_q), -(-key.shape[2] // block_k)
    critical, counts, marginal = select_op(
        query.detach(),
        key.detach(),
        block_q,
        block_k,
        rule.key_block_sizes,
        rule.valid_blocks,
        rule.table,
        scale,
        rule.width,
        rule.critical,
        rule.negligible,
        *rule.key_range,
        *rule.query_range,
        with_marginal,
    )
    return critical, counts, marginal[:, :, :rows, :columns] if with_marginal else None


@functools.lru_cache(maxsize=64)
def _wanted_table(total: int, keep_ratio: float, drop_ratio: float, device: torch.device) -> Tensor:
    """int32 [total + 1, 2]: how many blocks are critical and negligible for every number of valid ones."""
    table = [(_num_critical(n, keep_ratio, None), count(drop_ratio, n)) for n in range(total + 1)]
    return torch.tensor(table, dtype=torch.int32, device=device)


def _num_critical(total: int, keep_ratio: float | None, topk: int | None, floor: int = 1) -> int:
    if total == 0:
        return 0
    if topk is not None:
        return min(topk, total)
    return max(floor, count(keep_ratio, total)) if keep_ratio else 0


@functools.lru_cache(maxsize=64)
def _count_table(total: int, ratio: float | None, topk: int | None, device: torch.device, floor: int = 1) -> Tensor:
    """int64 [total + 1]: the count for every number of valid blocks, so that devices never round a ratio themselves."""
    return torch.tensor([_num_critical(n, ratio, topk, floor) for n in range(total + 1)], device=device)


def _sizes_from_lengths(
    kv_lengths: Tensor, batch: int, key_length: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if not isinstance(kv_lengths, Tensor) or kv_lengths.is_floating_point():
        raise TypeError(f"kv_lengths must be an integer tensor, got {getattr(kv_lengths, 'dtype', type(kv_lengths))}")
    if tuple(kv_lengths.shape) != (batch,):
        raise ValueError(f"kv_lengths must have shape [{batch}], got {list(kv_lengths.shape)}")
    readable = kv_lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and ((kv_lengths < 0) | (kv_lengths > key_length)).any():
        raise ValueError(f"kv_lengths must be in [0, {key_length}], got {kv_lengths.tolist()}")
    lengths = kv_lengths.to(device).clamp(0, key_length)
    starts = torch.arange(-(-key_length // block_k), device=device) * block_k
    sizes = (lengths[:, None] - starts).clamp(0, block_k).to(torch.int32)
    return sizes, (lengths + block_k - 1) // block_k


def _token_to_block_range(name: str, tokens: tuple[int, int] | None, length: int, block: int) -> tuple[int, int] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, tuple | list) or len(tokens) != 2 or not all(isinstance(t, int) for t in tokens):
        raise TypeError(f"{name} must be a token range (start, stop), got {tokens!r}")
    start, stop = tokens
    if not 0 <= start <= stop <= length:
        raise ValueError(f"{name} must satisfy 0 <= start <= stop <= {length}, got ({start}, {stop})")
    if start == stop:
        return None
    return start // block, -(-stop // block)
