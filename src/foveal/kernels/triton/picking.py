"""From scores to lists and masks on the device: one program a row.

The rule is that of `foveal.blocks`, ties included. Scores are order-preserving integers, of a few heads at a time. A
search by halves finds both thresholds of a row at once; a running count settles ties and places the lists in
ascending order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels import chips
from foveal.kernels.host import launch, register_limit
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.lists import padded_blocks
from foveal.kernels.triton.scores import NO_SIZES, SCORE_TILE, Sizes, write_scores
from foveal.kernels.triton.thresholds import threshold_of_mass, thresholds
from foveal.rules import MASS_UNITS, SelectionRule
from foveal.symbols import ceil_div

SCORES_PER_THREAD = 16  # what a thread of a program holds in its registers
# Scores are made for so many pairs of batch and head at a time that they stay within these bytes, and in the L2 cache.
SCORE_BYTES = 32 * 2**20
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_blocks",
        "key_blocks",
        "width",
        "padded_rows",
        "column_tiles",
        "critical_wanted",
        "negligible_wanted",
        "most_wanted",
        "mass",
        "key_start",
        "key_stop",
        "query_start",
        "query_stop",
        "first_pair",
        "head_stride",
        "num_ranges",
    ]
)
def _pick_kernel(
    score_ptr,
    critical_ptr,
    count_ptr,
    marginal_ptr,
    valid_ptr,
    wanted_ptr,
    range_ptr,
    heads,
    query_blocks,
    key_blocks,
    width,
    padded_rows,
    column_tiles,
    critical_wanted,
    negligible_wanted,
    most_wanted,
    mass,
    key_start,
    key_stop,
    query_start,
    query_stop,
    first_pair,
    head_stride,
    num_ranges,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    MARGINAL: tl.constexpr,
    DROPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    TABLE: tl.constexpr,
    MASS: tl.constexpr,
    RANGES: tl.constexpr,
    PROTECTED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One row of scores to its list, its count and its row of the mask.

    DROPS: rows may have negligible blocks. PROTECTED: there are protected keys or rows. RAGGED: rows may have fewer
    entries than the list is wide.
    """
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
            wanted_ptr += 3 * blocks
        if TABLE:
            wanted_ptr += (pair % heads) * head_stride
            critical_wanted = tl.load(wanted_ptr)
            negligible_wanted = tl.load(wanted_ptr + 1)
            if MASS:
                most_wanted = tl.load(wanted_ptr + 2)
        valid = column < blocks
        low_candidates = valid
        if PROTECTED or RANGES:
            protected = (column >= key_start) & (column < key_stop)
            if RANGES:
                range_ptr += row * num_ranges * 2
                for i in range(num_ranges):
                    start, stop = tl.load(range_ptr + 2 * i), tl.load(range_ptr + 2 * i + 1)
                    protected = protected | ((column >= start) & (column < stop))
            # What is protected may not fill the number of the negligible; the highest-scoring blocks never do.
            low_candidates = valid & (protected == 0)
            negligible_wanted = tl.minimum(negligible_wanted, tl.sum(low_candidates.to(tl.int32), 0))
        scores = score_ptr + (score_pair * query_blocks + row) * padded_columns + column
        keys = tl.where(valid, tl.load(scores, mask=inside, other=LOWEST), LOWEST)
        low_keys = tl.where(low_candidates, keys, HIGHEST)
        lowest, highest = tl.min(tl.where(valid, keys, HIGHEST), 0), tl.max(keys, 0)
        top_from, top_to = lowest, highest
        # Without a low threshold to look for it is below all keys.
        low_from, low_to = lowest - 1, lowest - 1
        if DROPS:
            low_from = tl.where(negligible_wanted > 0, lowest, low_from)
            low_to = tl.where(negligible_wanted > 0, highest, low_to)
        if MASS:
            top, reached, needed, low_from, low_to = threshold_of_mass(
                keys, valid, low_keys, lowest, highest, low_from, low_to, mass, negligible_wanted, DROPS
            )
            critical_wanted = tl.maximum(tl.minimum(needed, most_wanted), critical_wanted)
            top_from = tl.where(critical_wanted <= reached, top, lowest)
            top_to = tl.where(critical_wanted < needed, highest, top)
        top_from = tl.where(critical_wanted > 0, top_from, top_to)
        top, low = thresholds(
            keys, low_keys, top_from, top_to, low_from, low_to, critical_wanted, negligible_wanted, DROPS
        )
        chosen = ((keys >= top) & valid).to(tl.int32)
        dropped = tl.zeros([COLUMNS], tl.int32)
        if DROPS:
            dropped = ((low_keys <= low) & low_candidates).to(tl.int32)
        totals = tl.sum(chosen + (dropped << 16), 0)
        if totals != critical_wanted + (negligible_wanted << 16 if DROPS else 0):
            # Ties, of which some go with the rest: those of the low columns, or of the high ones.
            tied = ((keys == top) & valid).to(tl.int32)
            low_tied = tl.zeros([COLUMNS], tl.int32)
            if DROPS:
                low_tied = ((low_keys == low) & low_candidates).to(tl.int32)
            ties = tl.sum(tied + (low_tied << 16), 0)
            spare, low_spare = (totals & 0xFFFF) - critical_wanted, (totals >> 16) - negligible_wanted
            rank = tl.cumsum(tied + (low_tied << 16), 0)
            chosen = tl.where((tied > 0) & ((rank & 0xFFFF) > (ties & 0xFFFF) - spare), 0, chosen)
            if DROPS:
                dropped = tl.where((low_tied > 0) & ((rank >> 16) <= low_spare), 0, dropped)

        marks = chosen
        if PROTECTED or RANGES:
            whole_row = (row >= query_start) & (row < query_stop)
            marks = (((chosen > 0) | protected | whole_row) & valid).to(tl.int32)
        place = tl.cumsum(marks, 0) - 1
        lists = critical_ptr + (pair * query_blocks + row) * width
        tl.store(lists + place, column, mask=marks > 0)
        count = critical_wanted
        if RAGGED:
            count = tl.sum(marks, 0)
            tl.store(lists + column, tl.zeros([COLUMNS], tl.int32), mask=(column >= count) & (column < width))
        tl.store(count_ptr + pair * query_blocks + row, count)
        if MARGINAL:
            marginal = tl.where(valid & (marks + dropped == 0), 1.0, 0.0)
            tl.store(marginal_ptr, marginal.to(marginal_ptr.dtype.element_ty), mask=inside)
    elif MARGINAL:
        tl.store(marginal_ptr, tl.zeros([COLUMNS], tl.float32).to(marginal_ptr.dtype.element_ty), mask=inside)


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
    return empty_lists(*query.shape[:2], rows, columns, rule.width, with_marginal, query.device)


def empty_lists(
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
    sizes: Sizes = NO_SIZES,
) -> None:
    """Writes the rows of some pairs of batch and head.

    Args:
        query, key: pooled, float32 [pairs, Tq, D] and [pairs, Tk, D], contiguous; where the rule scores quarters,
            float16 [pairs, 4 Tq, D] and [pairs, 4 Tk, D], less what is past the last token.
        rule: how to choose.
        first_pair: where these pairs start among all of
        lists: what is written.
        sizes: of the blocks that have quarters.
    """
    pairs, rows = query.shape[:2]
    critical, counts, marginal = lists
    columns, heads = key.shape[1], critical.shape[1]
    if rule.quarters:
        rows, columns = ceil_div(rows, PARTS), ceil_div(columns, PARTS)
    column_tiles = -(-columns // SCORE_TILE)
    held = max(128, 1 << (columns - 1).bit_length())
    row_bytes = 4 * SCORE_TILE * column_tiles
    step = max(1, SCORE_BYTES // (rows * row_bytes))
    scores = torch.empty((min(step, pairs), rows, SCORE_TILE * column_tiles), dtype=torch.int32, device=query.device)
    padded_rows = rows if marginal is None else marginal.shape[2]
    protected = rule.key_range != (0, 0) or rule.query_range != (0, 0)
    chip = chips.chip_of(query.device)
    # Wide loads and stores need other threads than running counts do: addresses of eight bytes pass between them in
    # shared memory. Where a row's addresses do not fit, loads and stores are narrow.
    row_tile = SCORE_TILE if 8 * held <= chip.shared_memory else 1
    for start in range(0, pairs, step):
        some = min(step, pairs - start)
        pooled = (query[start:], key[start:]) if start else (query, key)
        these = range(first_pair + start, first_pair + start + some)
        write_scores(pooled, scale, rule, (rows, columns), heads, these, sizes, scores)
        launch(
            _pick_kernel,
            (padded_rows, some),
            score_ptr=scores,
            critical_ptr=critical,
            count_ptr=counts,
            marginal_ptr=critical if marginal is None else marginal,
            valid_ptr=counts if rule.valid_blocks is None else rule.valid_blocks,
            wanted_ptr=counts if rule.table is None else rule.table,
            range_ptr=counts if rule.ranges is None else rule.ranges,
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
            head_stride=0 if rule.table is None or rule.table.shape[0] == 1 else rule.table.stride(0),
            num_ranges=0 if rule.ranges is None else rule.ranges.shape[1],
            COLUMNS=held,
            TILE=row_tile,
            MARGINAL=marginal is not None,
            DROPS=marginal is not None and (rule.negligible > 0 or rule.table is not None),
            PER_SAMPLE=rule.valid_blocks is not None,
            TABLE=rule.table is not None,
            MASS=rule.mass > 0,
            RANGES=rule.ranges is not None,
            PROTECTED=protected,
            RAGGED=rule.ragged() or protected or critical.shape[-1] != rule.critical,
            num_warps=max(1, held // (SCORES_PER_THREAD * chip.warp_size)),
            **register_limit(96 if held <= 8192 else 64),
        )
