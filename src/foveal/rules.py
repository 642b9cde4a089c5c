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


def ratios_of(keep_ratio: float | Sequence[float]) -> tuple[float, ...]:
    """The ratio of each head; of all heads, if there is only one."""
    return tuple(keep_ratio) if isinstance(keep_ratio, Sequence) else (keep_ratio,)


def mean_ratio(keep_ratio: float | Sequence[float]) -> float:
    """The mean over heads."""
    ratios = ratios_of(keep_ratio)
    return ratios[0] if len(set(ratios)) == 1 else sum(ratios) / len(ratios)


def check_heads(keep_ratio: float | Sequence[float] | None, heads: int) -> None:
    """Raise a ValueError unless there is a ratio for each head, or one for all."""
    if isinstance(keep_ratio, Sequence) and len(keep_ratio) != heads:
        raise ValueError(
            f"keep_ratio must be a number, or a tuple of one for each of the {heads} heads, got {len(keep_ratio)}"
        )


class FixedBlocks(NamedTuple):
    """Key blocks that rows keep whatever their scores, beside those picked: the same for all samples and heads.

    ranges: int32 [Tq, R, 2], contiguous: ranges [start, stop) of key blocks of each row; an empty one keeps nothing.
    room: int8 [n + 1], for its size: no row's ranges hold more than n blocks. Compiled code reads sizes of tensors
        where a number would be a constant of its graph.
    """

    ranges: Tensor
    room: Tensor

    @property
    def most(self) -> int:
        """The most blocks that a row's ranges hold."""
        return self.room.shape[0] - 1


class Limits(NamedTuple):
    """What a call's lengths and protected ranges say in blocks.

    key_block_sizes: int32 [B, Tk], valid tokens at the front of each key block; None when all are full but the last.
    valid_blocks: int [B], leading key blocks with a valid token; None for all.
    key_range, query_range: [start, stop): key blocks critical for every row, and rows that attend to everything; or
        None.
    """

    key_block_sizes: Tensor | None = None
    valid_blocks: Tensor | None = None
    key_range: tuple[int, int] | None = None
    query_range: tuple[int, int] | None = None


class SelectionRule(NamedTuple):
    """How to choose: what is settled before a score is seen. PyTorch and the kernels follow the same one.

    block_q, block_k: block sizes in tokens.
    width: of the critical lists; no row may have more critical blocks.
    critical, negligible: how many blocks a row gets, where there is no table.
    key_block_sizes: int32 [B, Tk] or None, as in `BlockSelection`.
    valid_blocks: int32 [B], leading key blocks with a valid token, or None for all.
    table: int32 [H or 1, N, 3], how many are critical, negligible, and critical at most, by head and by number of valid
        blocks, or with N = 1 for all blocks. None where all heads count alike and all blocks are valid.
    key_range, query_range: [start, stop) in blocks: critical for every row, and rows that attend to everything.
    ranges: int32 [Tq, R, 2], the ranges of `FixedBlocks`, or None.
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
    ranges: Tensor | None = None
    quarters: int = 0
    mass: int = 0
    most: int = 0
    spread: int = 0

    @property
    def score(self) -> str:
        """What blocks are ranked by, as `select_blocks` names it."""
        return "log_sum_exp" if self.quarters else "mean_spread" if self.spread else "mean"

    def ragged(self) -> bool:
        """Whether rows may have fewer critical blocks than others.

        A method, since Dynamo in PyTorch 2.10 does not trace properties of named tuples.
        """
        several = (self.valid_blocks, self.table, self.ranges)
        return bool(self.mass) or self.key_range != (0, 0) or any(x is not None for x in several)


NO_LIMITS = Limits()


class Choosing(NamedTuple):
    """What rows keep and drop, whatever the lengths; see `select_blocks`.

    keep_ratio or topk: how many are critical, as `num_critical` counts; a ratio for each head, or one for all.
    round_up: whether a ratio rounds up.
    fixed: what rows keep beside what they pick.
    """

    keep_ratio: float | Sequence[float] | None = None
    topk: int | None = None
    round_up: bool = False
    drop_ratio: float = 0.0
    score: str = "mean"
    keep_mass: float | None = None
    max_keep_ratio: float = 1.0
    fixed: FixedBlocks | None = None


def rule_of(
    columns: int, device: torch.device, blocks: tuple[int, int], choosing: Choosing, limits: Limits | None = None
) -> SelectionRule:
    """The rule over so many key blocks.

    Args:
        blocks: the sizes of query and key blocks in tokens.
        limits: see `Limits`; None for none.
    """
    limits = NO_LIMITS if limits is None else limits
    plain = limits.key_block_sizes is None and limits.valid_blocks is None and choosing.fixed is None
    hashable = type(choosing.keep_ratio) is not list
    make = _known_rule if plain and hashable and not torch.compiler.is_compiling() else _make_rule
    return make(columns, device, blocks, choosing, limits)


def _make_rule(
    columns: int, device: torch.device, blocks: tuple[int, int], choosing: Choosing, limits: Limits
) -> SelectionRule:
    keep_ratio, topk, round_up, drop_ratio, score, keep_mass, max_keep_ratio, fixed = choosing
    ratios = (0.0,) if keep_ratio is None else ratios_of(keep_ratio)
    most_ratio = None if keep_mass is None else max_keep_ratio
    kept = num_critical(columns, max(ratios), topk, round_up)
    width = _list_width(columns, kept, limits, most_ratio, fixed)
    table, valid_blocks = None, limits.valid_blocks
    if valid_blocks is not None:
        valid_blocks = valid_blocks.to(device=device, dtype=torch.int32)
    if valid_blocks is not None or len(set(ratios)) > 1:
        counted = columns, ratios, topk, round_up, drop_ratio, max_keep_ratio, valid_blocks is not None, device
        table = _table_op(*counted) if torch.compiler.is_compiling() else _count_table(*counted)
    return SelectionRule(
        block_q=blocks[0],
        block_k=blocks[1],
        width=roomy(width, columns) if torch.compiler.is_compiling() else width,
        critical=kept,
        negligible=count(drop_ratio, columns),
        key_block_sizes=limits.key_block_sizes,
        valid_blocks=valid_blocks,
        table=table,
        key_range=limits.key_range or (0, 0),
        query_range=limits.query_range or (0, 0),
        ranges=None if fixed is None else fixed.ranges,
        quarters=int(score == "log_sum_exp"),
        spread=int(score == "mean_spread"),
        mass=0 if keep_mass is None else max(1, round(keep_mass * MASS_UNITS)),
        most=num_critical(columns, max_keep_ratio, None),
    )


# Each call of a model asks for the rule of its configuration and lengths.
_known_rule = cached_constant(_make_rule)


def selection_rule(
    query: Tensor,
    key: Tensor,
    blocks: tuple[int, int],
    choosing: Choosing,
    *,
    kv_lengths: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
) -> SelectionRule:
    """The rule of `select_blocks`, with the same arguments and errors; `blocks` are block_q and block_k."""
    check_heads(choosing.keep_ratio, query.shape[1])
    block_q, block_k = blocks
    sizes = valid_blocks = None
    if kv_lengths is not None:
        sizes, valid_blocks = _sizes_from_lengths(kv_lengths, query.shape[0], key.shape[2], block_k, key.device)
    key_range = _token_to_block_range("protected_keys", protected_keys, key.shape[2], block_k)
    query_range = _token_to_block_range("protected_queries", protected_queries, query.shape[2], block_q)
    limits = Limits(sizes, valid_blocks, key_range, query_range)
    return rule_of(ceil_div(key.shape[2], block_k), key.device, blocks, choosing, limits)


def num_critical(total: int, keep_ratio: float | None, topk: int | None, round_up: bool = False) -> int:
    """How many of `total` blocks, one at least, are critical; none for a ratio of 0."""
    if topk is not None:
        return smaller(topk, total)
    return larger(1, (count_up if round_up else count)(keep_ratio, total)) if keep_ratio else 0


def _list_width(total: int, kept: int, limits: Limits, max_keep_ratio: float | None, fixed: FixedBlocks | None) -> int:
    """How long a row's list of critical blocks may be, with `kept` of `total` blocks picked.

    max_keep_ratio: where rows keep a mass, the most that they may keep for it.
    """
    if limits.query_range is not None:
        return total
    if max_keep_ratio is not None:
        kept = larger(kept, num_critical(total, max_keep_ratio, None))
    if limits.key_range is not None:
        kept = kept + (limits.key_range[1] - limits.key_range[0])
    if fixed is not None:
        kept = kept + fixed.most
    return larger(1, smaller(kept, total))


def roomy(width: int, total: int) -> int:
    """A width for lists in a compiled graph, which PyTorch compiles once more for any size of 1: 2 does as well."""
    return smaller(width + 1, total)


@cached_constant
def _count_table(
    total: int,
    keep_ratios: tuple[float, ...],
    topk: int | None,
    round_up: bool,
    drop_ratio: float,
    max_keep_ratio: float,
    by_valid: bool,
    device: torch.device,
) -> Tensor:
    """int32 [ratios, N, 3]: how many blocks are critical, negligible, and critical at most, as `SelectionRule` has it.

    N is total + 1, by number of valid blocks, or 1 if not `by_valid`. So that no device rounds a ratio itself.
    """
    numbers = range(1, total + 1) if by_valid else (total,)
    others = [(count(drop_ratio, n), num_critical(n, max_keep_ratio, None)) for n in numbers]
    known: dict[float, list[tuple[int, int, int]]] = {}
    for ratio in set(keep_ratios):
        rows = [(num_critical(n, ratio, topk, round_up), *other) for n, other in zip(numbers, others, strict=True)]
        known[ratio] = [(0, 0, 0), *rows] if by_valid else rows
    return torch.tensor([known[ratio] for ratio in keep_ratios], dtype=torch.int32, device=device)


@torch.library.custom_op("foveal::count_table", mutates_args=())
def _table_op(
    total: int,
    keep_ratios: list[float],
    topk: int | None,
    round_up: bool,
    drop_ratio: float,
    max_keep_ratio: float,
    by_valid: bool,
    device: torch.device,
) -> Tensor:
    """`_count_table` in a compiled graph, where a constant would hold it to one `total`."""
    return _count_table(total, tuple(keep_ratios), topk, round_up, drop_ratio, max_keep_ratio, by_valid, device).clone()


@_table_op.register_fake
def _(total, keep_ratios, topk, round_up, drop_ratio, max_keep_ratio, by_valid, device):
    return torch.empty((len(keep_ratios), total + 1 if by_valid else 1, 3), dtype=torch.int32, device=device)


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
