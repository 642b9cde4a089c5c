"""How key blocks are chosen, as far as it is settled before a score is seen: counts, widths of lists, and limits.

Shape legend: B batch, Tk = ceil(Lk / block_k) key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.checks import cached_constant, check_kv_lengths
from foveal.symbols import ceil_div, larger, smaller

MASS_UNITS = 10**9  # in a `SelectionRule`, whose fields are whole numbers


def count(ratio: float, total: int) -> int:
    """How many of `total` blocks `ratio` stands for: floor(ratio * total), safe against 0.29 * 100 = 28.999..."""
    if type(total) is int and not torch.compiler.is_compiling():
        return math.floor(ratio * total + 1e-6)
    # The same in integers: PyTorch asks of a symbol that becomes a float by what it divides.
    return (total * round(ratio * 10**12) + 10**6) // 10**12


def count_up(ratio: float, total: int) -> int:
    """The same rounded up, ceil(ratio * total), and just as safe."""
    return ceil_div(total * round(ratio * 10**12) - 10**6, 10**12)


class SelectionRule(NamedTuple):
    """How to choose: what `select_blocks` settles before it looks at a score, for kernels that select as they run.

    block_q, block_k: block sizes in tokens.
    width: of the critical lists; no row may have more critical blocks.
    critical, negligible: how many blocks a row gets, if every sample has all its keys.
    key_block_sizes: int32 [B, Tk] or None, as in `BlockSelection`.
    valid_blocks: int32 [B], leading key blocks with a valid token, or None for all; then
    table: int32 [Tk + 1, 3] has how many are critical, negligible, and critical at most, by number of valid blocks.
    key_range, query_range: [start, stop) in blocks: critical for every row, and rows that attend to everything.
    quarters: 1 where blocks are ranked by the log-sum-exp over their quarters, else 0.
    spread: 1 where the variance of the keys counts beside the means, else 0.
    mass: the share of the softmax of its scores that a row keeps, in `MASS_UNITS`; 0 for none.
    most: the most blocks that it may keep for that.
    """

    block_q: int
    block_k: int
    width: int
    critical: int
    negligible: int = 0
    key_block_sizes: Tensor | None = None
    valid_blocks: Tensor | None = None
    table: Tensor | None = None
    key_range: tuple[int, int] = (0, 0)
    query_range: tuple[int, int] = (0, 0)
    quarters: int = 0
    mass: int = 0
    most: int = 0
    spread: int = 0


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
    score: str = "mean",
    keep_mass: float | None = None,
    max_keep_ratio: float = 1.0,
) -> SelectionRule:
    """The rule of `select_blocks` for inputs that `fits_kernel` accepts, with the same arguments and errors."""
    limits = limits_of(query, key, block_q, block_k, kv_lengths, protected_keys, protected_queries)
    further = score, keep_mass, max_keep_ratio
    return rule_of(query, key, block_q, block_k, keep_ratio, drop_ratio, limits, *further)


def limits_of(query, key, block_q, block_k, kv_lengths, protected_keys, protected_queries):
    """Sizes of key blocks, valid blocks, and protected blocks of keys and queries, each None if it does not exist."""
    sizes = valid_blocks = None
    if kv_lengths is not None:
        sizes, valid_blocks = _sizes_from_lengths(kv_lengths, query.shape[0], key.shape[2], block_k, key.device)
    key_range = _token_to_block_range("protected_keys", protected_keys, key.shape[2], block_k)
    query_range = _token_to_block_range("protected_queries", protected_queries, query.shape[2], block_q)
    return sizes, valid_blocks, key_range, query_range


def rule_of(
    query, key, block_q, block_k, keep_ratio, drop_ratio, limits, score, keep_mass, max_keep_ratio
) -> SelectionRule:
    sizes, valid_blocks, key_range, query_range = limits
    columns = ceil_div(key.shape[2], block_k)
    most_ratio = None if keep_mass is None else max_keep_ratio
    width = list_width(columns, keep_ratio, None, key_range, query_range, most_ratio)
    table = None
    if valid_blocks is not None:
        valid_blocks = valid_blocks.to(torch.int32)
        counted = columns, keep_ratio, None, drop_ratio, max_keep_ratio, key.device
        table = _table_op(*counted) if torch.compiler.is_compiling() else count_table(*counted)
    return SelectionRule(
        block_q=block_q,
        block_k=block_k,
        width=roomy(width, columns) if torch.compiler.is_compiling() else width,
        critical=num_critical(columns, keep_ratio, None),
        negligible=count(drop_ratio, columns),
        key_block_sizes=sizes,
        valid_blocks=valid_blocks,
        table=table,
        key_range=key_range or (0, 0),
        query_range=query_range or (0, 0),
        quarters=int(score == "log_sum_exp"),
        spread=int(score == "mean_spread"),
        mass=0 if keep_mass is None else max(1, round(keep_mass * MASS_UNITS)),
        most=num_critical(columns, max_keep_ratio, None),
    )


def num_critical(total: int, keep_ratio: float | None, topk: int | None) -> int:
    """How many of `total` blocks, one at least, are critical."""
    if topk is not None:
        return smaller(topk, total)
    return larger(1, count(keep_ratio, total)) if keep_ratio else 0


def list_width(
    total: int,
    keep_ratio: float | None,
    topk: int | None,
    protected_keys: Sequence[int] | None = None,
    protected_queries: Sequence[int] | None = None,
    max_keep_ratio: float | None = None,
) -> int:
    """How long a row's list of critical blocks may be, from protected ranges in blocks.

    max_keep_ratio: where rows keep a mass, the most that they may keep for it.
    """
    if protected_queries is not None:
        return total
    protected = 0 if protected_keys is None else protected_keys[1] - protected_keys[0]
    kept = num_critical(total, keep_ratio, topk)
    if max_keep_ratio is not None:
        kept = larger(kept, num_critical(total, max_keep_ratio, None))
    return larger(1, smaller(kept + protected, total))


def roomy(width: int, total: int) -> int:
    """A width for lists in a compiled graph, which PyTorch compiles once more for any size of 1: 2 does as well."""
    return smaller(width + 1, total)


@cached_constant
def count_table(
    total: int,
    keep_ratio: float | None,
    topk: int | None,
    drop_ratio: float,
    max_keep_ratio: float,
    device: torch.device,
) -> Tensor:
    """int32 [total + 1, 3]: how many blocks are critical, negligible, and critical at most, by number of valid ones.

    So that no device rounds a ratio itself.
    """
    table = [
        (num_critical(n, keep_ratio, topk), count(drop_ratio, n), num_critical(n, max_keep_ratio, None))
        for n in range(1, total + 1)
    ]
    return torch.tensor([(0, 0, 0), *table], dtype=torch.int32, device=device)


@torch.library.custom_op("foveal::count_table", mutates_args=())
def _table_op(
    total: int,
    keep_ratio: float | None,
    topk: int | None,
    drop_ratio: float,
    max_keep_ratio: float,
    device: torch.device,
) -> Tensor:
    """`count_table` in a compiled graph, where a constant would hold it to one `total`."""
    return count_table(total, keep_ratio, topk, drop_ratio, max_keep_ratio, device).clone()


@_table_op.register_fake
def _(total, keep_ratio, topk, drop_ratio, max_keep_ratio, device):
    return torch.empty((total + 1, 3), dtype=torch.int32, device=device)


def _sizes_from_lengths(
    kv_lengths: Tensor, batch: int, key_length: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    check_kv_lengths(kv_lengths, batch, 0, key_length)
    lengths = kv_lengths.to(device).clamp(0, key_length)
    starts = torch.arange(ceil_div(key_length, block_k), device=device) * block_k
    sizes = (lengths[:, None] - starts).clamp(0, block_k).to(torch.int32)
    return sizes, (lengths + block_k - 1) // block_k


def _token_to_block_range(name: str, tokens: tuple[int, int] | None, length: int, block: int) -> tuple[int, int] | None:
    if tokens is None:
        return None
    if (
        not isinstance(tokens, tuple | list)
        or len(tokens) != 2
        or not all(isinstance(t, int | torch.SymInt) for t in tokens)
    ):
        raise TypeError(f"{name} must be a token range (start, stop), got {tokens!r}")
    start, stop = tokens
    if not 0 <= start <= stop <= length:
        raise ValueError(f"{name} must satisfy 0 <= start <= stop <= {length}, got ({start}, {stop})")
    if start == stop:
        return None
    return start // block, ceil_div(stop, block)
