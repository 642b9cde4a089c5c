"""The backward of block-sparse attention: dQ over the rows' lists, dK and dV over the columns' lists.

Every output tile belongs to one program that adds in list order: no atomics, the same bits each time. With
P = exp(S - LSE), dP = dO V^T and dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE:

    dQ = scale * dS K,    dK = scale * dS^T Q,    dV = P^T dO.

All tiles have 64 rows, whatever the block sizes: accumulators of 128 rows would spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.backend import BackwardCall
from foveal.kernels.host import launch
from foveal.kernels.tma import tma_takes
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.forward import count_tiles, scores_and_scale, tile_valid
from foveal.kernels.triton.int8 import Int8
from foveal.kernels.triton.linear_backward import add_key_gradients
from foveal.kernels.triton.lists import full_blocks_first
from foveal.kernels.triton.tiles import (
    TILE,
    load_rows,
    row_strides,
    store_rows,
    tile_argument,
)
from foveal.kernels.values import LOG2_E, size_stride


@triton.jit
def probabilities(scores, lse, scale_log2):
    """exp(scores * scale - LSE) from scores before the scale and an LSE in log2 units, shaped to broadcast."""
    return tl.math.exp2(scores * scale_log2 - lse)


@triton.jit(do_not_specialize=["heads", "query_length"])
def _delta_kernel(
    grad,
    output,
    delta_ptr,
    grad_lse_ptr,
    grad_strides,
    output_strides,
    heads,
    query_length,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    await_previous()
    start, pair = tl.program_id(0) * ROWS, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    g = load_rows(grad, grad_strides, batch, head, start, query_length, ROWS, D, False).to(tl.float32)
    o = load_rows(output, output_strides, batch, head, start, query_length, ROWS, D, False).to(tl.float32)
    delta = tl.sum(g * o, 1)
    rows = start + tl.arange(0, ROWS)
    offsets = pair.to(tl.int64) * query_length + rows
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + offsets, mask=rows < query_length, other=0.0)
    tl.store(delta_ptr + offsets, delta, mask=rows < query_length)


@triton.jit(do_not_specialize=["heads", "query_length", "key_length", "width", "size_stride", "scale", "scale_log2"])
def _block_sparse_dq_kernel(
    query,
    key,
    value,
    grad,
    query_8,
    key_8,
    query_step_ptr,
    key_step_ptr,
    grad_query_ptr,
    lse_ptr,
    delta_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    query_8_strides,
    key_8_strides,
    grad_query_strides,
    critical_ptr,
    count_ptr,
    full_count_ptr,
    size_ptr,
    heads,
    query_length,
    key_length,
    width,
    size_stride,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INT8: tl.constexpr,
    ADD: tl.constexpr,
):
    await_previous()
    start_q, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = pair.to(tl.int64) * tl.cdiv(query_length, BLOCK_Q) + start_q // BLOCK_Q
    list_ptr = critical_ptr + row * width
    count = tl.load(count_ptr + row)
    full, tiles = count_tiles(list_ptr, full_count_ptr, row, count, key_length, TILE, BLOCK_K, HAS_SIZES)
    SPLIT: tl.constexpr = BLOCK_K // TILE

    g = load_rows(grad, grad_strides, batch, head, start_q, query_length, TILE, D, DESCRIPTORS)
    if INT8:
        q = load_rows(query_8, query_8_strides, batch, head, start_q, query_length, TILE, D, DESCRIPTORS)
        scale_log2 *= tl.load(query_step_ptr + row)
        key_step_ptr += pair.to(tl.int64) * tl.cdiv(key_length, BLOCK_K)
    else:
        q = load_rows(query, query_strides, batch, head, start_q, query_length, TILE, D, DESCRIPTORS)
    rows = start_q + tl.arange(0, TILE)
    offsets = pair.to(tl.int64) * query_length + rows
    lse = tl.load(lse_ptr + offsets, mask=rows < query_length, other=0.0)
    delta = tl.load(delta_ptr + offsets, mask=rows < query_length, other=0.0)
    acc = tl.zeros([TILE, D], tl.float32)
    for step in tl.range(0, full):
        listed = tl.load(list_ptr + step // SPLIT)
        start = (listed * SPLIT + step % SPLIT) * TILE
        k = load_rows(key, key_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        v = load_rows(value, value_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        scored = k
        if INT8:
            scored = load_rows(key_8, key_8_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        scores, tile_scale = scores_and_scale(q, scored, key_step_ptr, listed, scale_log2, INT8)
        p = probabilities(scores, lse[:, None], tile_scale)
        ds = p * (tl.dot(g, v.T) - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc)
    for step in tl.range(full, tiles, num_stages=1):
        listed = tl.load(list_ptr + step // SPLIT)
        start = (listed * SPLIT + step % SPLIT) * TILE
        valid = tile_valid(size_ptr, size_stride, batch, start, key_length, TILE, BLOCK_K, HAS_SIZES)
        k = load_rows(key, key_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        v = load_rows(value, value_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        if HAS_SIZES:
            k = tl.where(valid[:, None], k, 0.0)
        scored = k
        if INT8:
            scored = load_rows(key_8, key_8_strides, batch, head, start, key_length, TILE, D, DESCRIPTORS)
        scores, tile_scale = scores_and_scale(q, scored, key_step_ptr, listed, scale_log2, INT8)
        p = probabilities(scores, lse[:, None], tile_scale)
        ds = tl.where(valid[None, :], p * (tl.dot(g, v.T) - delta[:, None]), 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc)
    acc *= scale
    if ADD:
        acc += load_rows(grad_query_ptr, grad_query_strides, batch, head, start_q, query_length, TILE, D, False)
    store_rows(grad_query_ptr, grad_query_strides, batch, head, start_q, query_length, acc, TILE, D)


@triton.jit(do_not_specialize=["heads", "query_length", "key_length", "size_stride", "scale", "scale_log2"])
def _block_sparse_dkdv_kernel(
    query,
    key,
    value,
    grad,
    query_8,
    key_8,
    query_step_ptr,
    key_step_ptr,
    grad_key_ptr,
    grad_value_ptr,
    lse_ptr,
    delta_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    query_8_strides,
    key_8_strides,
    grad_key_strides,
    grad_value_strides,
    offset_ptr,
    count_ptr,
    row_ptr,
    size_ptr,
    heads,
    query_length,
    key_length,
    size_stride,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INT8: tl.constexpr,
):
    await_previous()
    start_k, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    column = pair.to(tl.int64) * tl.cdiv(key_length, BLOCK_K) + start_k // BLOCK_K
    list_ptr = row_ptr + tl.load(offset_ptr + column)
    count = tl.load(count_ptr + column)
    SPLIT: tl.constexpr = BLOCK_Q // TILE

    # Padding keys stay in their own rows of S^T, so they need no mask before the end.
    if INT8:
        k = load_rows(key_8, key_8_strides, batch, head, start_k, key_length, TILE, D, DESCRIPTORS)
        scale_log2 *= tl.load(key_step_ptr + column)
        query_step_ptr += pair.to(tl.int64) * tl.cdiv(query_length, BLOCK_Q)
    else:
        k = load_rows(key, key_strides, batch, head, start_k, key_length, TILE, D, DESCRIPTORS)
    v = load_rows(value, value_strides, batch, head, start_k, key_length, TILE, D, DESCRIPTORS)
    lse_ptr += pair.to(tl.int64) * query_length
    delta_ptr += pair.to(tl.int64) * query_length
    acc_k = tl.zeros([TILE, D], tl.float32)
    acc_v = tl.zeros([TILE, D], tl.float32)
    for step in tl.range(0, count * SPLIT):
        # Queries past the end read as zeros: P = 1 there, but dO = 0 and delta = 0, so they add nothing.
        listed = tl.load(list_ptr + step // SPLIT)
        start = (listed * SPLIT + step % SPLIT) * TILE
        rows = start + tl.arange(0, TILE)
        q = load_rows(query, query_strides, batch, head, start, query_length, TILE, D, DESCRIPTORS)
        g = load_rows(grad, grad_strides, batch, head, start, query_length, TILE, D, DESCRIPTORS)
        lse = tl.load(lse_ptr + rows, mask=rows < query_length, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < query_length, other=0.0)
        scored = q
        if INT8:
            scored = load_rows(query_8, query_8_strides, batch, head, start, query_length, TILE, D, DESCRIPTORS)
        scores, tile_scale = scores_and_scale(k, scored, query_step_ptr, listed, scale_log2, INT8)
        p = probabilities(scores, lse[None, :], tile_scale)
        acc_v = tl.dot(p.to(g.dtype), g, acc_v)
        ds = p * (tl.dot(v, g.T) - delta[None, :])
        acc_k = tl.dot(ds.to(q.dtype), q, acc_k)
    if HAS_SIZES:
        valid = tile_valid(size_ptr, size_stride, batch, start_k, key_length, TILE, BLOCK_K, HAS_SIZES)
        acc_k = tl.where(valid[:, None], acc_k, 0.0)
        acc_v = tl.where(valid[:, None], acc_v, 0.0)
    store_rows(grad_key_ptr, grad_key_strides, batch, head, start_k, key_length, acc_k * scale, TILE, D)
    store_rows(grad_value_ptr, grad_value_strides, batch, head, start_k, key_length, acc_v, TILE, D)


def output_delta(grad: Tensor, output: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(dO * O) - dLSE, float32 [B, H, Lq]."""
    batch, heads, query_length, head_dim = output.shape
    delta = torch.empty((batch, heads, query_length), dtype=torch.float32, device=output.device)
    launch(
        _delta_kernel,
        (-(-query_length // TILE), batch * heads),
        grad=grad,
        output=output,
        delta_ptr=delta,
        grad_lse_ptr=delta if grad_lse is None else grad_lse.contiguous(),
        grad_strides=row_strides(grad),
        output_strides=row_strides(output),
        heads=heads,
        query_length=query_length,
        D=head_dim,
        ROWS=TILE,
        HAS_GRAD_LSE=grad_lse is not None,
        num_warps=4,
    )
    return delta


def backward(call: BackwardCall, scored: tuple[Int8, Int8] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`; this one does not write raster order.

    scored: queries and keys whose products are the scores, in int8; None for those of the problem themselves.
    """
    assert call.raster is None
    query, key, value, selection, scale, _ = call.problem
    grad, delta, columns, grad_query = call.grad, call.delta, call.columns, call.grad_query
    batch, heads, query_length, head_dim = query.shape
    key_length, sizes = key.shape[2], selection.key_block_sizes
    critical, full = selection.critical, selection.critical_count
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    lse = call.lse * LOG2_E
    descriptors = tma_takes((query, key, value, grad))
    query_8, key_8 = (Int8(query, delta), Int8(key, delta)) if scored is None else scored
    both = {
        "query": tile_argument(query, TILE, descriptors),
        "key": tile_argument(key, TILE, descriptors),
        "value": tile_argument(value, TILE, descriptors),
        "grad": tile_argument(grad, TILE, descriptors),
        "query_8": tile_argument(query_8.values, TILE, descriptors and scored is not None),
        "key_8": tile_argument(key_8.values, TILE, descriptors and scored is not None),
        "query_step_ptr": query_8.steps,
        "key_step_ptr": key_8.steps,
        "query_strides": row_strides(query),
        "key_strides": row_strides(key),
        "value_strides": row_strides(value),
        "grad_strides": row_strides(grad),
        "query_8_strides": row_strides(query_8.values),
        "key_8_strides": row_strides(key_8.values),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "size_ptr": selection.critical_count if sizes is None else sizes,
        "heads": heads,
        "query_length": query_length,
        "key_length": key_length,
        "size_stride": size_stride(sizes),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        "D": head_dim,
        "BLOCK_Q": selection.block_q,
        "BLOCK_K": selection.block_k,
        "TILE": TILE,
        "HAS_SIZES": sizes is not None,
        "DESCRIPTORS": descriptors,
        "INT8": scored is not None,
        # Without TMA a tile of 128 features does not fit the registers of four warps.
        "num_warps": 4 if descriptors or head_dim == 64 else 8,
        "num_stages": 2,
    }
    launch(
        _block_sparse_dkdv_kernel,
        (-(-key_length // TILE), batch * heads),
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        grad_key_strides=row_strides(grad_key),
        grad_value_strides=row_strides(grad_value),
        offset_ptr=columns.offsets,
        count_ptr=columns.counts,
        row_ptr=columns.rows,
        **both,
    )
    if sizes is not None:
        critical, full = full_blocks_first(selection)
    launch(
        _block_sparse_dq_kernel,
        (-(-query_length // TILE), batch * heads),
        grad_query_ptr=grad_query,
        grad_query_strides=row_strides(grad_query),
        critical_ptr=critical,
        count_ptr=selection.critical_count,
        full_count_ptr=full,
        width=critical.shape[3],
        ADD=add,
        **both,
    )
    if call.linear is not None:
        add_key_gradients(key, value, call.linear, selection, grad_key, grad_value)
    return grad_query, grad_key, grad_value
