"""The linear branch's backward on the device: dQ, dH and the projection on the query side, dK and dV on the key side.

    g = dO W                  dphi(Q_i) = (g H_i^T - C Z_i) / n         C = rowsum(g * (O^l - m))
    dH_i = (phi(Q_i) / n)^T g                dZ_i = -(phi(Q_i) / n)^T C
    G_j = sum of dH_i         z_j = sum of dZ_i                         one batched GEMM with the block mask
    dphi(K_j) = (V_j - m) G_j^T + z_j        dV_j = phi(K_j) G_j

H_i is the state of V - m, as in `linear`. With O^l = phi(Q_i) H_i / n + (1 - eps / n) m nothing of the mean's size is
subtracted from another such thing: C = rowsum(g * phi(Q_i) H_i / n) - (eps / n) rowsum(g * m).
Source: SLA (arXiv 2509.24006), Algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import QuerySide, SharedGradients
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.feature_maps import EPSILON, feature_map, feature_map_backward
from foveal.kernels.triton.forward import tile_valid
from foveal.kernels.triton.tiles import TILE, load_rows, row_strides, store_rows
from foveal.kernels.values import LinearTerm, identity, size_stride, state_strides


@triton.jit(do_not_specialize=["heads", "length", "first_pair"])
def _query_grad_kernel(
    query_ptr,
    output_ptr,
    grad_ptr,
    state_ptr,
    norm_ptr,
    mean_ptr,
    projected_ptr,
    weight_ptr,
    bias_ptr,
    grad_query_ptr,
    delta_ptr,
    linear_ptr,
    grad_state_ptr,
    grad_norm_ptr,
    mix_ptr,
    linear_dot_ptr,
    query_strides,
    output_strides,
    grad_strides,
    grad_query_strides,
    state_strides,
    mix_stride,
    heads,
    length,
    first_pair,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
):
    """The query side of the linear branch's backward for one block, and delta of the sparse branch.

    With g = dO W: dQ through phi; dH and dZ; O^l for the projection's gradient; and
    delta = rowsum(dO * O) - rowsum(g * O^l) - dO b, which is rowsum(dO * O^s) for only the sparse branch.
    With a mix O^s and O^l have their weights here, but delta; rowsum(g * O^l) is stored then.
    Queries past the end have dO = 0 and so add nothing to dH and dZ.
    """
    await_previous()
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    all_pairs = (first_pair + pair).to(tl.int64)
    feature = tl.arange(0, D)
    square = feature[:, None] * D + feature[None, :]
    state_ptr += pair.to(tl.int64) * state_strides[0] + block * state_strides[1]
    norm_ptr += pair.to(tl.int64) * state_strides[2] + block * state_strides[3]
    mean_ptr += pair.to(tl.int64) * state_strides[4] + block * state_strides[5]
    projected_ptr += pair.to(tl.int64) * state_strides[4] + block * state_strides[5]
    norm_state = tl.load(norm_ptr + feature)
    if mix_ptr is not None:
        mix_ptr += all_pairs * mix_stride + block * 2
    grad_state = tl.zeros([D, D], tl.float32)
    grad_norm = tl.zeros([D], tl.float32)
    for tile in tl.static_range(BLOCK_Q // TILE):
        start = block * BLOCK_Q + tile * TILE
        rows = start + tl.arange(0, TILE)
        do = load_rows(grad_ptr, grad_strides, batch, head, start, length, TILE, D, False)
        o = load_rows(output_ptr, output_strides, batch, head, start, length, TILE, D, False)
        q = load_rows(query_ptr, query_strides, batch, head, start, length, TILE, D, False)
        delta = tl.sum(do.to(tl.float32) * (o.to(tl.float32) - tl.load(bias_ptr + feature)[None, :]), 1)
        grad_dot_mean = tl.sum(do.to(tl.float32) * tl.load(projected_ptr + feature)[None, :], 1)
        g = tl.dot(do.to(tl.bfloat16), tl.load(weight_ptr + square)).to(tl.bfloat16)
        phi = feature_map(q, FEATURE_MAP)
        total = tl.sum(phi * norm_state[None, :], 1)
        inverse = 1.0 / (total + EPSILON)
        if mix_ptr is not None:
            inverse *= tl.load(mix_ptr + 1)
        share = total * inverse  # 1 - eps / n by the mix, and 0 for a row without marginal blocks
        scaled = (phi * inverse[:, None]).to(tl.bfloat16)
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            linear = tl.dot(scaled, tl.load(state_ptr + feature[:, None] * D + column[None, :]))
            linear += share[:, None] * tl.load(mean_ptr + column)[None, :]
            linear_offsets = (all_pairs * length + rows)[:, None] * D + column[None, :]
            tl.store(linear_ptr + linear_offsets, linear.to(tl.bfloat16), mask=(rows < length)[:, None])
        product = tl.dot(g, tl.trans(tl.load(state_ptr + square)))
        grad_dot_linear = tl.sum(phi * product, 1) * inverse
        linear_dot = grad_dot_linear + share * grad_dot_mean
        delta -= linear_dot
        if mix_ptr is not None:
            tl.store(linear_dot_ptr + all_pairs * length + rows, linear_dot, mask=rows < length)
            delta /= tl.load(mix_ptr)
        tl.store(delta_ptr + all_pairs * length + rows, delta, mask=rows < length)
        change = grad_dot_linear - EPSILON * inverse * grad_dot_mean
        if mix_ptr is not None:
            change /= tl.load(mix_ptr + 1)
        grad_phi = (product - change[:, None] * norm_state[None, :]) * inverse[:, None]
        grad_query = feature_map_backward(q, phi, grad_phi, FEATURE_MAP)
        store_rows(grad_query_ptr, grad_query_strides, batch, head, start, length, grad_query, TILE, D)
        grad_norm -= tl.sum(scaled.to(tl.float32) * change[:, None], 0)
        grad_state = tl.dot(tl.trans(scaled), g, grad_state)
    blocks = tl.num_programs(0)
    tl.store(grad_norm_ptr + (all_pairs * blocks + block) * D + feature, grad_norm)
    tl.store(grad_state_ptr + (pair.to(tl.int64) * blocks + block) * D * D + square, grad_state.to(tl.bfloat16))


@triton.jit(do_not_specialize=["heads", "length", "tiles"])
def _projection_grad_kernel(
    grad_ptr,
    linear_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_strides,
    linear_strides,
    heads,
    length,
    tiles,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """dW = dO^T O^l and db = column sums of dO over `tiles` tiles of one head, for `_projection_sum_kernel`."""
    await_previous()
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    feature = tl.arange(0, D)
    acc = tl.zeros([D, D], tl.float32)
    bias = tl.zeros([D], tl.float32)
    for tile in tl.range(0, tiles):
        start = (part * tiles + tile) * TILE
        do = load_rows(grad_ptr, grad_strides, batch, head, start, length, TILE, D, False)
        linear = load_rows(linear_ptr, linear_strides, batch, head, start, length, TILE, D, False)
        acc = tl.dot(tl.trans(do.to(tl.bfloat16)), linear, acc)
        bias += tl.sum(do.to(tl.float32), 0)
    index = pair.to(tl.int64) * tl.num_programs(0) + part
    tl.store(grad_weight_ptr + index * D * D + feature[:, None] * D + feature[None, :], acc)
    tl.store(grad_bias_ptr + index * D + feature, bias)


@triton.jit
def column_sums(part_ptr, column, length, parts, PARTS: tl.constexpr):
    """sum over p of part[p, i] for these of `length` columns."""
    total = tl.zeros([PARTS, column.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part.to(tl.int64)[:, None] * length + column[None, :]
        total += tl.load(part_ptr + place, mask=(part < parts)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["parts"])
def _projection_sum_kernel(
    weight_part_ptr,
    bias_part_ptr,
    weight_ptr,
    bias_ptr,
    parts,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums parts of dW and, in the last programs, of db: one launch, for which PyTorch's sums would be two."""
    await_previous()
    strip = tl.program_id(0)
    strips: tl.constexpr = D * D // COLUMNS
    if strip < strips:
        column = strip * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(weight_ptr + column, column_sums(weight_part_ptr, column, D * D, parts, PARTS))
    else:
        column = (strip - strips) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(bias_ptr + column, column_sums(bias_part_ptr, column, D, parts, PARTS))


@triton.jit(do_not_specialize=["heads", "length", "size_stride"])
def _key_grad_kernel(
    key_ptr,
    value_ptr,
    grad_state_ptr,
    grad_norm_ptr,
    mean_ptr,
    size_ptr,
    grad_key_ptr,
    grad_value_ptr,
    key_strides,
    value_strides,
    grad_key_strides,
    grad_value_strides,
    state_strides,
    heads,
    length,
    size_stride,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
):
    """Adds to dK and dV: dphi(K_j) = (V_j - m) G_j^T + z_j, dV_j = phi(K_j) G_j, of one tile of keys."""
    await_previous()
    start, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    feature = tl.arange(0, D)
    block = start // BLOCK_K
    state = pair.to(tl.int64) * state_strides[0] + block * state_strides[1]
    norm = pair.to(tl.int64) * state_strides[2] + block * state_strides[3]
    valid = tile_valid(size_ptr, size_stride, batch, start, length, TILE, BLOCK_K, HAS_SIZES)
    k = load_rows(key_ptr, key_strides, batch, head, start, length, TILE, D, False)
    grad_state = tl.load(grad_state_ptr + state + feature[:, None] * D + feature[None, :])
    grad_norm = tl.load(grad_norm_ptr + norm + feature)
    grad_value = load_rows(grad_value_ptr, grad_value_strides, batch, head, start, length, TILE, D, False)
    phi = feature_map(k, FEATURE_MAP)
    grad_value = tl.dot(phi.to(tl.bfloat16), grad_state, grad_value.to(tl.float32))
    if HAS_SIZES:
        grad_value = tl.where(valid[:, None], grad_value, 0.0)
    store_rows(grad_value_ptr, grad_value_strides, batch, head, start, length, grad_value, TILE, D)
    v = load_rows(value_ptr, value_strides, batch, head, start, length, TILE, D, False)
    grad_key = load_rows(grad_key_ptr, grad_key_strides, batch, head, start, length, TILE, D, False)
    mean = tl.load(mean_ptr + pair * state_strides[4] + block * state_strides[5] + feature)
    grad_phi = tl.dot((v.to(tl.float32) - mean[None, :]).to(tl.bfloat16), tl.trans(grad_state)) + grad_norm[None, :]
    grad_key = grad_key.to(tl.float32) + feature_map_backward(k, phi, grad_phi, FEATURE_MAP)
    if HAS_SIZES:
        grad_key = tl.where(valid[:, None], grad_key, 0.0)
    store_rows(grad_key_ptr, grad_key_strides, batch, head, start, length, grad_key, TILE, D)


def query_gradients(side: QuerySide, pairs: range) -> Tensor:
    """See `Backend.query_gradients`."""
    query, output, grad, term, block_q, grad_query, delta, linear, grad_norm, linear_dot = side
    heads, length, head_dim = query.shape[1:]
    rows = grad_norm.shape[1]
    if linear is None:  # the kernel writes O^l all the same
        linear = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_state = torch.empty((len(pairs), rows, head_dim, head_dim), dtype=torch.bfloat16, device=query.device)
    launch(
        _query_grad_kernel,
        (rows, len(pairs)),
        query_ptr=query,
        output_ptr=output,
        grad_ptr=grad,
        state_ptr=term.state,
        norm_ptr=term.norm,
        mean_ptr=term.means[0],
        projected_ptr=term.means[1],
        weight_ptr=identity(head_dim, query.device) if term.weight is None else term.weight,
        bias_ptr=term.bias,
        grad_query_ptr=grad_query,
        delta_ptr=delta,
        linear_ptr=linear,
        grad_state_ptr=grad_state,
        grad_norm_ptr=grad_norm,
        mix_ptr=term.mix,
        linear_dot_ptr=linear_dot,
        query_strides=row_strides(query),
        output_strides=row_strides(output),
        grad_strides=row_strides(grad),
        grad_query_strides=row_strides(grad_query),
        state_strides=state_strides(term.state, term.norm, term.means[0]),
        mix_stride=0 if term.mix is None else term.mix.stride(0),
        heads=heads,
        length=length,
        first_pair=pairs.start,
        D=head_dim,
        BLOCK_Q=block_q,
        TILE=TILE,
        COLUMNS=64,
        FEATURE_MAP=term.feature_map,
        num_warps=8 if head_dim == 128 else 4,
        num_stages=1,
    )
    return grad_state


def shared_query_gradients(side: QuerySide) -> SharedGradients:
    """See `Backend.shared_query_gradients`."""
    query, term, block_q = side.query, side.term, side.block_q
    pairs, rows = query.shape[0] * query.shape[1], -(-query.shape[2] // block_q)
    linear = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_norm = term.norm.new_empty((pairs, rows, query.shape[3]))
    grad_state = query_gradients(side._replace(linear=linear, grad_norm=grad_norm), range(pairs))
    state = grad_state.sum(1, keepdim=True, dtype=torch.float32).to(torch.bfloat16)
    projection = (None, None) if term.weight is None else projection_gradients(side.grad, linear)
    return SharedGradients(state, grad_norm.sum(1, keepdim=True), *projection)


def projection_gradients(grad: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """dW [D, D] and db [D], float32, from dO and O^l, both [B, H, Lq, D]."""
    batch, heads, length, head_dim = grad.shape
    tiles = max(1, -(-length * batch * heads // (256 * TILE)))
    parts = -(-length // (tiles * TILE))
    memory, columns = {"dtype": torch.float32, "device": grad.device}, 64
    weight_parts = torch.empty((batch * heads * parts, head_dim, head_dim), **memory)
    bias_parts = torch.empty((batch * heads * parts, head_dim), **memory)
    weight, bias = torch.empty((head_dim, head_dim), **memory), torch.empty(head_dim, **memory)
    launch(
        _projection_grad_kernel,
        (parts, batch * heads),
        grad_ptr=grad,
        linear_ptr=linear,
        grad_weight_ptr=weight_parts,
        grad_bias_ptr=bias_parts,
        grad_strides=row_strides(grad),
        linear_strides=row_strides(linear),
        heads=heads,
        length=length,
        tiles=tiles,
        D=head_dim,
        TILE=TILE,
        num_warps=4,
        num_stages=2,
    )
    launch(
        _projection_sum_kernel,
        (head_dim * (head_dim + 1) // columns,),
        weight_part_ptr=weight_parts,
        bias_part_ptr=bias_parts,
        weight_ptr=weight,
        bias_ptr=bias,
        parts=batch * heads * parts,
        D=head_dim,
        COLUMNS=columns,
        PARTS=32,
        num_warps=4,
    )
    return weight, bias


def add_key_gradients(
    key: Tensor, value: Tensor, term: LinearTerm, selection: BlockSelection, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Adds the linear branch's dK and dV in place; `term` has G, z, and m."""
    batch, heads, length, head_dim = key.shape
    sizes = selection.key_block_sizes
    launch(
        _key_grad_kernel,
        (-(-length // TILE), batch * heads),
        key_ptr=key,
        value_ptr=value,
        grad_state_ptr=term.state,
        grad_norm_ptr=term.norm,
        mean_ptr=term.means[0],
        size_ptr=term.norm if sizes is None else sizes,
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        key_strides=row_strides(key),
        value_strides=row_strides(value),
        grad_key_strides=row_strides(grad_key),
        grad_value_strides=row_strides(grad_value),
        state_strides=state_strides(term.state, term.norm, term.means[0]),
        heads=heads,
        length=length,
        size_stride=size_stride(sizes),
        D=head_dim,
        BLOCK_K=selection.block_k,
        TILE=TILE,
        HAS_SIZES=sizes is not None,
        FEATURE_MAP=term.feature_map,
        num_warps=8 if head_dim == 128 else 4,
        num_stages=1,
    )
