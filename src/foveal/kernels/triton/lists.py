"""Lists that the kernels walk, made from a selection's critical lists on the device, without a look on the host.

Shape legend: B batch, H heads, Tq / Tk query / key blocks, W the width of the critical lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import ColumnLists
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.values import size_stride
from foveal.symbols import ceil_div

CHUNK = 1024


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "width"])
def _mark_kernel(critical_ptr, count_ptr, marks_ptr, num_query_blocks, num_key_blocks, width, CHUNK: tl.constexpr):
    """marks[pair, key block, query block] = 1 for each entry of one row's list."""
    await_previous()
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = pair * num_query_blocks + block
    count = tl.load(count_ptr + row)
    for start in range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        listed = slot < count
        column = tl.load(critical_ptr + row * width + slot, mask=listed, other=0)
        marks = marks_ptr + (pair * num_key_blocks + column) * num_query_blocks + block
        tl.store(marks, tl.full([CHUNK], 1, tl.int8), mask=listed)


@triton.jit(do_not_specialize=["num_query_blocks"])
def _count_kernel(marks_ptr, count_ptr, num_query_blocks, CHUNK: tl.constexpr):
    await_previous()
    column = tl.program_id(0).to(tl.int64)
    total = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_query_blocks, CHUNK):
        row = start + tl.arange(0, CHUNK)
        total += tl.load(marks_ptr + column * num_query_blocks + row, mask=row < num_query_blocks, other=0).to(tl.int32)
    tl.store(count_ptr + column, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "width"])
def _collect_kernel(
    marks_ptr, count_ptr, offset_ptr, rows_ptr, num_query_blocks, num_key_blocks, width, CHUNK: tl.constexpr
):
    """Grid (Tk, B * H): the rows of one column, behind those of the pair's columns before it."""
    await_previous()
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, block, CHUNK):
        other = start + tl.arange(0, CHUNK)
        before += tl.load(count_ptr + pair * num_key_blocks + other, mask=other < block, other=0)
    offset = pair * num_query_blocks * width + tl.sum(before, 0)
    column = pair * num_key_blocks + block
    tl.store(offset_ptr + column, offset)
    rows = rows_ptr + offset
    for start in range(0, num_query_blocks, CHUNK):
        row = start + tl.arange(0, CHUNK)
        mark = tl.load(marks_ptr + column * num_query_blocks + row, mask=row < num_query_blocks, other=0).to(tl.int32)
        place = tl.cumsum(mark, 0) - 1
        tl.store(rows + place, row, mask=mark > 0)
        rows += tl.sum(mark, 0)


def column_lists(selection: BlockSelection) -> ColumnLists:
    """The critical lists by key block.

    Deterministic: marks in a byte matrix, one count and one ordered collection per column, no atomics.
    """
    critical, num_key_blocks = selection.critical, selection.num_key_blocks
    batch, heads, num_query_blocks, width = critical.shape
    pairs, columns = batch * heads, batch * heads * num_key_blocks
    marks = torch.zeros((columns, num_query_blocks), dtype=torch.int8, device=critical.device)
    column_counts = torch.empty(columns, dtype=torch.int32, device=critical.device)
    offsets = torch.empty(columns, dtype=torch.int64, device=critical.device)
    rows = torch.empty(pairs * num_query_blocks * width, dtype=torch.int32, device=critical.device)
    launch(
        _mark_kernel,
        (num_query_blocks, pairs),
        critical_ptr=critical,
        count_ptr=selection.critical_count,
        marks_ptr=marks,
        num_query_blocks=num_query_blocks,
        num_key_blocks=num_key_blocks,
        width=width,
        CHUNK=128,
        num_warps=4,
    )
    launch(
        _count_kernel,
        (columns,),
        marks_ptr=marks,
        count_ptr=column_counts,
        num_query_blocks=num_query_blocks,
        CHUNK=CHUNK,
        num_warps=4,
    )
    launch(
        _collect_kernel,
        (num_key_blocks, pairs),
        marks_ptr=marks,
        count_ptr=column_counts,
        offset_ptr=offsets,
        rows_ptr=rows,
        num_query_blocks=num_query_blocks,
        num_key_blocks=num_key_blocks,
        width=width,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return ColumnLists(offsets, column_counts, rows)


class RowLists(NamedTuple):
    """The critical lists with full key blocks first, in ascending order, and then those with padding.

    critical: int32 [B, H, Tq, W].
    full_counts: int32 [B, H, Tq], how many entries name a full block.
    """

    critical: Tensor
    full_counts: Tensor


@triton.jit(do_not_specialize=["num_query_blocks", "width", "size_stride", "heads", "first_pair", "block_k"])
def _full_first_kernel(
    critical_ptr,
    count_ptr,
    size_ptr,
    ordered_ptr,
    full_ptr,
    num_query_blocks,
    width,
    size_stride,
    heads,
    first_pair,
    block_k,
    CHUNK: tl.constexpr,
):
    await_previous()
    block, pair = tl.program_id(0), first_pair + tl.program_id(1).to(tl.int64)
    row = pair * num_query_blocks + block
    sizes = size_ptr + (pair // heads) * size_stride
    count = tl.load(count_ptr + row)
    full = tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        column = tl.load(critical_ptr + row * width + slot, mask=slot < count, other=0)
        is_full = (tl.load(sizes + column, mask=slot < count, other=0) == block_k).to(tl.int32)
        place = full + tl.cumsum(is_full, 0) - 1
        tl.store(ordered_ptr + row * width + place, column, mask=is_full > 0)
        full += tl.sum(is_full, 0)
    tl.store(full_ptr + row, full)
    partial = full
    for start in range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        column = tl.load(critical_ptr + row * width + slot, mask=slot < count, other=0)
        short = (tl.load(sizes + column, mask=slot < count, other=block_k) != block_k).to(tl.int32)
        place = partial + tl.cumsum(short, 0) - 1
        tl.store(ordered_ptr + row * width + place, column, mask=short > 0)
        partial += tl.sum(short, 0)


def full_blocks_first(selection: BlockSelection, pairs: range | None = None, lists: RowLists | None = None) -> RowLists:
    """Orders each row's list so that a kernel's main loop needs no masks: full key blocks first.

    Args:
        selection: a selection with sizes of its key blocks.
        pairs: the pairs of batch and head whose lists are wanted; None for all.
        lists: memory for all pairs; new if None.
    """
    critical, counts, sizes = selection.critical, selection.critical_count, selection.key_block_sizes
    batch, heads, num_query_blocks, width = critical.shape
    pairs = range(batch * heads) if pairs is None else pairs
    ordered, full = (torch.empty_like(critical), torch.empty_like(counts)) if lists is None else lists
    launch(
        _full_first_kernel,
        (num_query_blocks, len(pairs)),
        critical_ptr=critical,
        count_ptr=counts,
        size_ptr=sizes,
        ordered_ptr=ordered,
        full_ptr=full,
        num_query_blocks=num_query_blocks,
        width=width,
        size_stride=size_stride(sizes),
        heads=heads,
        first_pair=pairs.start,
        block_k=selection.block_k,
        CHUNK=128,
        num_warps=4,
    )
    return RowLists(ordered, full)


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "width"])
def _noncritical_kernel(
    critical_ptr,
    count_ptr,
    mask_ptr,
    num_query_blocks,
    num_key_blocks,
    width,
    pair_stride,
    row_stride,
    CHUNK: tl.constexpr,
):
    await_previous()
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mask_ptr += pair * pair_stride + block * row_stride
    inside = block < num_query_blocks
    for start in range(0, row_stride, CHUNK):
        column = start + tl.arange(0, CHUNK)
        ones = tl.where((column < num_key_blocks) & inside, 1.0, 0.0)
        tl.store(mask_ptr + column, ones.to(mask_ptr.dtype.element_ty), mask=column < row_stride)
    # The row's zeros come from other threads than its ones.
    tl.debug_barrier()
    row = pair * num_query_blocks + block
    count = tl.load(count_ptr + row, mask=inside, other=0)
    for start in range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        column = tl.load(critical_ptr + row * width + slot, mask=slot < count, other=0)
        tl.store(mask_ptr + column, tl.zeros([CHUNK], tl.float32).to(mask_ptr.dtype.element_ty), mask=slot < count)


def padded_blocks(blocks: int) -> int:
    """Block counts are padded to a multiple of 64 in the operands of mask products, so that rows are aligned."""
    return ceil_div(blocks, 64) * 64


def noncritical_mask(selection: BlockSelection) -> Tensor:
    """bfloat16 [B, H, padded Tq, padded Tk]: 1 where a key block is not in a row's list, 0 there and in the padding."""
    critical, num_key_blocks = selection.critical, selection.num_key_blocks
    batch, heads, num_query_blocks, width = critical.shape
    rows, columns = padded_blocks(num_query_blocks), padded_blocks(num_key_blocks)
    mask = torch.empty((batch, heads, rows, columns), dtype=torch.bfloat16, device=critical.device)
    launch(
        _noncritical_kernel,
        (rows, batch * heads),
        critical_ptr=critical,
        count_ptr=selection.critical_count,
        mask_ptr=mask,
        num_query_blocks=num_query_blocks,
        num_key_blocks=num_key_blocks,
        width=width,
        pair_stride=rows * columns,
        row_stride=columns,
        CHUNK=128,
        num_warps=4,
    )
    return mask
