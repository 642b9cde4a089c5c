"""Block selection on the device: pooling, scores, and one program a row from scores to lists and mask.

The rule is that of `foveal.blocks`, ties included. Scores become order-preserving integers, a few heads at a time. A
search by halves finds both thresholds of a row at once; a running count settles ties and places the lists in
ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS, quarter_sizes
from foveal.kernels import chips
from foveal.kernels.choice import with_squares
from foveal.kernels.host import is_plain, launch, on_device_of, register_limit
from foveal.kernels.replay import replayed
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.lists import padded_blocks
from foveal.kernels.triton.thresholds import count_for_mass, order_preserving, thresholds
from foveal.kernels.triton.tiles import row_strides
from foveal.kernels.values import flatten, size_stride, unflatten
from foveal.rules import MASS_UNITS, SelectionRule
from foveal.symbols import ceil_div

SCORES_PER_THREAD = 16  # what a thread of a program holds in its registers
# Scores are made for so many pairs of batch and head at a time that they stay within these bytes, and in the L2 cache.
SCORE_BYTES = 32 * 2**20
SCORE_TILE = 64  # what `padded_blocks` pads to
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def add_column_sums(total, x, valid):
    """`total` [16, D] float32 plus the sum of the `valid` [N] rows of x [N, D], in each of its rows; others are finite.

    By a matrix product: whichever kernel pools a block of 16-bit numbers, and however it lays them out, gets the same
    bits, and so the same selection.
    """
    if x.dtype == tl.float32:
        return total + tl.sum(tl.where(valid[:, None], x, 0.0), 0)[None, :]
    else:
        ones = tl.zeros([16, x.shape[0]], tl.float32) + tl.where(valid, 1.0, 0.0)[None, :]
        return tl.dot(ones.to(x.dtype), x, total)


@triton.jit
def block_mean(total, size):
    """The mean over a block's `size` valid tokens, given their sum; 0 if there are none."""
    return total / tl.maximum(size, 1).to(tl.float32)


@triton.jit
def store_first_row(pointers, x):
    """Stores the first row of x [16, D] to `pointers` [D]; what `add_column_sums` makes has the same in each."""
    row = tl.arange(0, 16)[:, None]
    tl.store(row * 0 + pointers[None, :], x, mask=row == 0)


@triton.jit(do_not_specialize=["heads", "pairs", "length", "size_stride", "block"])
def _pool_kernel(
    x_ptr, pooled_ptr, size_ptr, strides, heads, pairs, length, size_stride, block,
    D: tl.constexpr, ROWS: tl.constexpr, HAS_SIZES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Mean over one block's valid tokens, in float32, and behind it the variance of each channel if SPREAD.

    Heads are neighbors: in [B, L, H, D] memory they are, too.
    """
    await_previous()
    index, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = pair // heads, pair % heads
    start = index * block
    size = tl.minimum(block, length - start)
    if HAS_SIZES:
        size = tl.minimum(size, tl.load(size_ptr + batch.to(tl.int64) * size_stride + index))
    x_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + tl.arange(0, D)[None, :]
    total = tl.zeros([16, D], tl.float32)
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        tokens = (start + row).to(tl.int64)[:, None] * strides[2]
        total = add_column_sums(total, tl.load(x_ptr + tokens, mask=(row < size)[:, None], other=0.0), row < size)
    mean = block_mean(total, size)
    pooled_ptr += (pair.to(tl.int64) * tl.cdiv(length, block) + index) * (2 * D if SPREAD else D)
    store_first_row(pooled_ptr + tl.arange(0, D), mean)
    if SPREAD:
        mean = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, mean, 0.0), 0)
        squares = tl.zeros([D], tl.float32)
        for first in range(0, size, ROWS):
            row = first + tl.arange(0, ROWS)
            tokens = (start + row).to(tl.int64)[:, None] * strides[2]
            x = tl.load(x_ptr + tokens, mask=(row < size)[:, None], other=0.0).to(tl.float32)
            apart = tl.where((row < size)[:, None], x - mean[None, :], 0.0)
            squares += tl.sum(apart * apart, 0)
        tl.store(pooled_ptr + D + tl.arange(0, D), block_mean(squares, size))


@triton.jit
def _products(
    query_ptrs, key_ptrs, in_rows, in_columns, scale, D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """scale * q k^T of a tile of pooled rows and columns, float32, from pointers to the first feature of each."""
    scores = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, 32):
        feature = start + tl.arange(0, 32)
        q = tl.load(query_ptrs + feature[None, :], mask=in_rows[:, None], other=0.0) * scale
        k = tl.load(key_ptrs + feature[:, None], mask=in_columns[None, :], other=0.0)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "scale"])
def _score_kernel(
    query_ptr, key_ptr, score_ptr, query_blocks, key_blocks, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """order_preserving(scale * q k^T) of a tile of pooled blocks; what is past the last key block is undefined."""
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    padded_columns = tl.num_programs(0) * TILE
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < query_blocks, column < key_blocks
    scores = _products(
        query_ptr + (pair * query_blocks + row)[:, None] * D, key_ptr + (pair * key_blocks + column)[None, :] * D,
        in_rows, in_columns, scale, D, TILE, PRECISION,
    )  # fmt: skip
    offsets = (pair * query_blocks + row)[:, None] * padded_columns + column[None, :]
    tl.store(score_ptr + offsets, order_preserving(scores), mask=in_rows[:, None])


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_quarters",
        "key_quarters",
        "query_blocks",
        "padded_columns",
        "first_pair",
        "size_stride",
        "scale",
    ]
)
def _quarter_score_kernel(
    query_ptr, key_ptr, score_ptr, size_ptr,
    heads, query_quarters, key_quarters, query_blocks, padded_columns, first_pair, size_stride, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """order_preserving(log-sum-exp of scale * q k^T over the quarters of two blocks), for a tile of blocks."""
    await_previous()
    pair = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < query_quarters, column < key_quarters
    scores = _products(
        query_ptr + (pair * query_quarters + row)[:, None] * D, key_ptr + (pair * key_quarters + column)[None, :] * D,
        in_rows, in_columns, scale, D, TILE, PRECISION,
    )  # fmt: skip
    if HAS_SIZES:
        sizes = size_ptr + ((first_pair + pair) // heads) * size_stride + column
        in_columns = in_columns & (tl.load(sizes, mask=in_columns, other=0) > 0)
    scores = tl.where(in_rows[:, None] & in_columns[None, :], scores, float("-inf"))
    parts = tl.reshape(scores, [TILE // 4, 4, TILE // 4, 4])
    highest = tl.max(tl.max(parts, 3), 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.sum(tl.exp(parts - base[:, None, :, None]), 3), 1)
    block_row = tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    block_column = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
    offsets = (pair * query_blocks + block_row)[:, None] * padded_columns + block_column[None, :]
    tl.store(score_ptr + offsets, order_preserving(base + tl.log(total)), mask=(block_row < query_blocks)[:, None])


@triton.jit(
    do_not_specialize=[
        "heads", "query_blocks", "key_blocks", "width", "padded_rows", "column_tiles", "critical_wanted",
        "negligible_wanted", "most_wanted", "mass", "key_start", "key_stop", "query_start", "query_stop", "first_pair",
    ]
)  # fmt: skip
def _pick_kernel(
    score_ptr, critical_ptr, count_ptr, marginal_ptr, valid_ptr, wanted_ptr,
    heads, query_blocks, key_blocks, width, padded_rows, column_tiles, critical_wanted, negligible_wanted,
    most_wanted, mass, key_start, key_stop, query_start, query_stop, first_pair,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, MARGINAL: tl.constexpr, PER_SAMPLE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """One row of scores to its list, its count and its row of the mask."""
    await_previous()
    row, score_pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = first_pair + score_pair
    column = tl.arange(0, COLUMNS)
    # With TILE 64 a multiple that the compiler knows for one: only then are loads and stores of rows wide.
    padded_columns = column_tiles * TILE
    inside = column < padded_columns
    marginal_ptr += (pair * padded_rows + row) * padded_columns + column
    if row < query_blocks:
        blocks = key_blocks
        if PER_SAMPLE:
            blocks = tl.load(valid_ptr + pair // heads)
            critical_wanted = tl.load(wanted_ptr + 3 * blocks)
            negligible_wanted = tl.load(wanted_ptr + 3 * blocks + 1)
            if MASS:
                most_wanted = tl.load(wanted_ptr + 3 * blocks + 2)
        valid = column < blocks
        protected = (column >= key_start) & (column < key_stop)
        scores = score_ptr + (score_pair * query_blocks + row) * padded_columns + column
        keys = tl.where(valid, tl.load(scores, mask=inside, other=LOWEST), LOWEST)
        lowest = tl.min(tl.where(valid, keys, HIGHEST), 0)
        if MASS:
            needed = count_for_mass(keys, valid, mass, lowest, tl.max(keys, 0))
            critical_wanted = tl.maximum(tl.minimum(needed, most_wanted), critical_wanted)
        # What is protected may not fill the number of the negligible; the highest-scoring blocks never do.
        low_candidates = valid & (protected == 0)
        low_keys = tl.where(low_candidates, keys, HIGHEST)
        low_wanted = tl.minimum(negligible_wanted, tl.sum(low_candidates.to(tl.int32), 0))
        top, low = thresholds(keys, low_keys, lowest, tl.max(keys, 0), critical_wanted, low_wanted, MARGINAL)

        above = (keys > top).to(tl.int32)
        tied = ((keys == top) & valid).to(tl.int32)
        below = (low_keys < low).to(tl.int32)
        low_tied = ((keys == low) & low_candidates).to(tl.int32)
        totals = tl.sum(above + (below << 16), 0)
        missing, low_missing = critical_wanted - (totals & 0xFFFF), low_wanted - (totals >> 16)
        tied = tl.where(missing > 0, tied, 0)
        low_tied = tl.where(low_missing > 0, low_tied, 0)
        totals = tl.sum(tied + (low_tied << 16), 0)
        if (missing < (totals & 0xFFFF)) | (low_missing < (totals >> 16)):
            # Ties go to the low columns, or to the high ones.
            rank = tl.cumsum(tied + (low_tied << 16), 0)
            tied = tl.where((rank & 0xFFFF) <= missing, tied, 0)
            low_tied = tl.where((totals >> 16) - (rank >> 16) < low_missing, low_tied, 0)

        whole_row = (row >= query_start) & (row < query_stop)
        critical = ((above + tied > 0) | protected | whole_row) & valid
        marks = critical.to(tl.int32)
        count = tl.sum(marks, 0)
        place = tl.cumsum(marks, 0) - 1
        lists = critical_ptr + (pair * query_blocks + row) * width
        tl.store(lists + place, column, mask=marks > 0)
        tl.store(lists + column, tl.zeros([COLUMNS], tl.int32), mask=(column >= count) & (column < width))
        tl.store(count_ptr + pair * query_blocks + row, count)
        if MARGINAL:
            marginal = tl.where(valid & (marks + below + low_tied == 0), 1.0, 0.0)
            tl.store(marginal_ptr, marginal.to(marginal_ptr.dtype.element_ty), mask=inside)
    elif MARGINAL:
        tl.store(marginal_ptr, tl.zeros([COLUMNS], tl.float32).to(marginal_ptr.dtype.element_ty), mask=inside)


def pool(x: Tensor, block: int, sizes: Tensor | None = None, *, spread: bool = False) -> Tensor:
    """Mean over each block's valid tokens, float32 [B, H, T, D]; [B, H, T, 2 D] with the variances behind the means.

    Args:
        x: [B, H, L, D], D a power of two.
        sizes: int32 [B or 1, T], valid tokens at the front of each block; None when all are full but the last.
        spread: whether the variances are wanted.
    """
    batch, heads, length, head_dim = x.shape
    blocks = -(-length // block)
    features = 2 * head_dim if spread else head_dim
    pooled = torch.empty((batch, heads, blocks, features), dtype=torch.float32, device=x.device)
    launch(
        _pool_kernel,
        (blocks * batch * heads,),
        x_ptr=x,
        pooled_ptr=pooled,
        size_ptr=pooled if sizes is None else sizes,
        strides=row_strides(x),
        heads=heads,
        pairs=batch * heads,
        length=length,
        size_stride=size_stride(sizes),
        block=block,
        D=head_dim,
        ROWS=64,
        HAS_SIZES=sizes is not None,
        SPREAD=spread,
        num_warps=4,
    )
    return pooled


class Lists(NamedTuple):
    """Memory for what a rule chooses, or what it has chosen.

    critical, counts: int32 [B, H, Tq, width] and [B, H, Tq], as in `BlockSelection`.
    marginal: bfloat16 [B, H, padded Tq, padded Tk], the operand of a mask product; None if it is not wanted.
    """

    critical: Tensor
    counts: Tensor
    marginal: Tensor | None


def new_lists(query: Tensor, key: Tensor, rule: SelectionRule, with_marginal: bool) -> Lists:
    """Memory for the choice of a rule over query and key, [B, H, L, D]."""
    rows, columns = ceil_div(query.shape[2], rule.block_q), ceil_div(key.shape[2], rule.block_k)
    return _lists(*query.shape[:2], rows, columns, rule.width, with_marginal, query.device)


def _lists(
    batch: int, heads: int, rows: int, columns: int, width: int, with_marginal: bool, device: torch.device
) -> Lists:
    critical = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=device)
    marginal = None
    if with_marginal:
        padded = padded_blocks(rows), padded_blocks(columns)
        marginal = torch.empty((batch, heads, *padded), dtype=torch.bfloat16, device=device)
    return Lists(critical, counts, marginal)


def pick(
    query: Tensor,
    key: Tensor,
    scale: float,
    rule: SelectionRule,
    first_pair: int,
    lists: Lists,
    part_sizes: Tensor | None = None,
) -> None:
    """Writes the rows of some pairs of batch and head.

    Args:
        query, key: pooled, float32 [pairs, Tq, D] and [pairs, Tk, D], contiguous; of the blocks' quarters, where
            the rule scores these.
        rule: how to choose; its block sizes do not matter any more.
        first_pair: where these pairs start among all of
        lists: what is written.
        part_sizes: int32 [B or 1, quarters], valid tokens of each quarter of the keys; None when all are full.
    """
    pairs, rows, head_dim = query.shape
    critical, counts, marginal = lists
    columns, heads = key.shape[1], critical.shape[1]
    if rule.quarters:
        rows, columns = ceil_div(rows, PARTS), ceil_div(columns, PARTS)
    column_tiles = -(-columns // SCORE_TILE)
    held = max(128, 1 << (columns - 1).bit_length())
    row_bytes = 4 * SCORE_TILE * column_tiles
    step = max(1, SCORE_BYTES // (rows * row_bytes))
    scores = torch.empty(min(step, pairs) * rows * row_bytes // 4, dtype=torch.int32, device=query.device)
    padded_rows = rows if marginal is None else marginal.shape[2]
    # Three products of 11-bit parts are as good as float32, and the same for equal columns: ties stay ties. AMD's
    # compiler has no such products, but those of float32.
    precision = "ieee" if torch.version.hip else "tf32x3"
    chip = chips.chip_of(query.device)
    # Wide loads and stores need other threads than running counts do: addresses of eight bytes pass between them in
    # shared memory. Where a row's addresses do not fit, loads and stores are narrow.
    row_tile = SCORE_TILE if 8 * held <= chip.shared_memory else 1
    for start in range(0, pairs, step):
        some = min(step, pairs - start)
        pooled = {"query_ptr": query[start:] if start else query, "key_ptr": key[start:] if start else key}
        if rule.quarters:
            launch(
                _quarter_score_kernel,
                (-(-PARTS * columns // SCORE_TILE), -(-PARTS * rows // SCORE_TILE), some),
                **pooled,
                score_ptr=scores,
                size_ptr=scores if part_sizes is None else part_sizes,
                heads=heads,
                query_quarters=query.shape[1],
                key_quarters=key.shape[1],
                query_blocks=rows,
                padded_columns=column_tiles * SCORE_TILE,
                first_pair=first_pair + start,
                size_stride=size_stride(part_sizes),
                scale=scale,
                D=head_dim,
                TILE=SCORE_TILE,
                PRECISION=precision,
                HAS_SIZES=part_sizes is not None,
                num_warps=4,
                num_stages=1,
            )
        else:
            launch(
                _score_kernel,
                (column_tiles, -(-rows // SCORE_TILE), some),
                **pooled,
                score_ptr=scores,
                query_blocks=rows,
                key_blocks=columns,
                scale=scale,
                D=head_dim,
                TILE=SCORE_TILE,
                PRECISION=precision,
                num_warps=4,
                num_stages=1,
            )
        launch(
            _pick_kernel,
            (padded_rows, some),
            score_ptr=scores,
            critical_ptr=critical,
            count_ptr=counts,
            marginal_ptr=critical if marginal is None else marginal,
            valid_ptr=counts if rule.valid_blocks is None else rule.valid_blocks,
            wanted_ptr=counts if rule.table is None else rule.table,
            heads=heads,
            query_blocks=rows,
            key_blocks=columns,
            width=critical.shape[-1],
            padded_rows=padded_rows,
            column_tiles=column_tiles * SCORE_TILE // row_tile,
            critical_wanted=rule.critical,
            negligible_wanted=rule.negligible,
            most_wanted=rule.most,
            mass=rule.mass / MASS_UNITS,
            key_start=rule.key_range[0],
            key_stop=rule.key_range[1],
            query_start=rule.query_range[0],
            query_stop=rule.query_range[1],
            first_pair=first_pair + start,
            COLUMNS=held,
            TILE=row_tile,
            MARGINAL=marginal is not None,
            PER_SAMPLE=rule.valid_blocks is not None,
            MASS=rule.mass > 0,
            num_warps=max(1, held // (SCORES_PER_THREAD * chip.warp_size)),
            **register_limit(96 if held <= 8192 else 64),
        )


def select(query: Tensor, key: Tensor, scale: float, rule: SelectionRule, with_marginal: bool) -> Lists:
    """Pooled blocks, float32 [B, H, Tq, D] and [B, H, Tk, D], contiguous, to the choice of a rule."""
    lists = _lists(*query.shape[:3], key.shape[2], rule.width, with_marginal, query.device)
    pick(query.flatten(0, 1), key.flatten(0, 1), scale, rule, 0, lists)
    return lists


def _select(tensors: Sequence[Tensor], given: tuple) -> tuple[Lists, None]:
    """The choice over query and key, of a flat rule; for `replayed`."""
    query, key, *rule_tensors = tensors
    numbers, scale, with_marginal = given
    rule = unflatten(rule_tensors, numbers)
    with on_device_of(query):  # Triton launches on the current device
        if not rule.quarters:
            pooled_key = pool(key, rule.block_k, rule.key_block_sizes, spread=bool(rule.spread))
            pooled_query = pool(query, rule.block_q)
            if rule.spread:
                pooled_query = with_squares(pooled_query, scale)
            return select(pooled_query, pooled_key, scale, rule, with_marginal), None
        sizes = rule.key_block_sizes
        if sizes is not None:
            sizes = quarter_sizes(sizes, rule.block_k)[:, : ceil_div(key.shape[2], rule.block_k // PARTS)].contiguous()
        lists = new_lists(query, key, rule, with_marginal)
        pooled = (pool(query, rule.block_q // PARTS), pool(key, rule.block_k // PARTS, sizes))
        pick(*(x.flatten(0, 1) for x in pooled), scale, rule, 0, lists, sizes)
        return lists, None


@torch.library.custom_op("foveal::select_blocks_gpu", mutates_args=())
def _select_op(
    query: Tensor, key: Tensor, rule_tensors: list[Tensor], rule_numbers: list[int], scale: float, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (critical, counts, marginal), _ = _select((query, key, *rule_tensors), (rule_numbers, scale, with_marginal))
    return critical, counts, query.new_empty(0, dtype=torch.bfloat16) if marginal is None else marginal


@_select_op.register_fake
def _(query, key, rule_tensors, rule_numbers, scale, with_marginal):
    critical, counts, marginal = new_lists(query, key, unflatten(rule_tensors, rule_numbers), with_marginal)
    return critical, counts, query.new_empty(0, dtype=torch.bfloat16) if marginal is None else marginal


def select_blocks_gpu(query: Tensor, key: Tensor, rule: SelectionRule, scale: float, with_marginal: bool) -> Lists:
    """The choice of a rule over query and key, [B, H, L, D]; its mask is padded."""
    query, key, (tensors, numbers) = query.detach(), key.detach(), flatten(rule)
    if is_plain(query, key):
        lists, _ = replayed(_select, (query, key, *tensors), (tuple(numbers), scale, with_marginal))
        return Lists(*lists)
    critical, counts, marginal = _select_op(query, key, tensors, numbers, scale, with_marginal)
    return Lists(critical, counts, marginal if with_marginal else None)
