"""The linear branch of SLA on the device: block states, their masked sums, and the gradients.

    h_j = phi(K_j)^T V_j        z_j = column sums of phi(K_j)          one state per key block
    H_i = sum of h_j            Z_i = sum of z_j                       one batched GEMM with the block mask
    O^l = phi(Q_i) H_i / n      n = phi(Q_i) Z_i + eps                 in the epilogue of the forward kernel

States are bfloat16 whatever the input dtype: sums over a whole video leave the range of float16.
Source: SLA (arXiv 2509.24006), eq. 5 and Algorithms 1 and 2, with G_j and z_j the masked sums of dH_i and dZ_i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.block_sparse.triton.feature_maps import EPSILON, feature_map, feature_map_backward
from foveal.block_sparse.triton.forward import tile_valid
from foveal.block_sparse.triton.tiles import TILE, load_rows, row_strides, store_rows


@triton.jit(do_not_specialize=["heads", "length", "size_stride", "first_pair", "tiles"])
def _key_state_kernel(
    key_ptr, value_ptr, state_ptr, norm_ptr, size_ptr, key_strides, value_strides,
    heads, length, size_stride, first_pair, tiles,
    D: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, HAS_SIZES: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """h and z of `tiles` tiles of keys. Tiles past the end leave zeros, which the padding of the mask product needs."""
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    feature = tl.arange(0, D)
    state = tl.zeros([D, D], tl.float32)
    norm = tl.zeros([D], tl.float32)
    for tile in tl.range(0, tiles):
        start = (part * tiles + tile) * TILE
        if start < length:
            valid = tile_valid(size_ptr, size_stride, batch, start, length, TILE, BLOCK_K, HAS_SIZES)
            k = load_rows(key_ptr, key_strides, batch, head, start, length, TILE, D, False)
            v = load_rows(value_ptr, value_strides, batch, head, start, length, TILE, D, False)
            phi = tl.where(valid[:, None], feature_map(k, FEATURE_MAP), 0.0)
            v = tl.where(valid[:, None], v, 0.0)
            state = tl.dot(tl.trans(phi.to(v.dtype)), v, state)
            norm += tl.sum(phi, 0)
    index = pair.to(tl.int64) * tl.num_programs(0) + part
    offsets = index * D * D + feature[:, None] * D + feature[None, :]
    tl.store(state_ptr + offsets, state.to(state_ptr.dtype.element_ty))
    tl.store(norm_ptr + index * D + feature, norm)


@triton.jit(do_not_specialize=["terms"])
def _masked_sum_kernel(
    mask_ptr, term_ptr, sum_ptr, mask_strides, sum_strides, term_stride, terms, D: tl.constexpr, TILE: tl.constexpr
):
    """sum[pair, i] = sum over j of mask[pair, i, j] * term[pair, j], float32 to 16 bits and more."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature = tl.arange(0, D)
    acc = tl.zeros([TILE, D], tl.float32)
    for start in range(0, terms, TILE):
        column = start + tl.arange(0, TILE)
        mask = tl.load(
            mask_ptr + pair * mask_strides[0] + row[:, None] * mask_strides[1] + column[None, :] * mask_strides[2]
        )
        term = tl.load(term_ptr + pair * term_stride + column[:, None] * D + feature[None, :])
        # The mask is exact in bfloat16; the terms are, nearly, as a sum of two.
        high = term.to(tl.bfloat16)
        acc = tl.dot(mask, high, acc)
        acc = tl.dot(mask, (term - high.to(tl.float32)).to(tl.bfloat16), acc)
    tl.store(sum_ptr + pair * sum_strides[0] + row[:, None] * sum_strides[1] + feature[None, :], acc)


@triton.jit(do_not_specialize=["heads", "length", "first_pair"])
def _query_grad_kernel(
    query_ptr, output_ptr, grad_ptr, state_ptr, norm_ptr, weight_ptr, bias_ptr,
    grad_query_ptr, delta_ptr, linear_ptr, scaled_ptr, projected_ptr, grad_norm_ptr,
    query_strides, output_strides, grad_strides, grad_query_strides, state_strides,
    heads, length, first_pair,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """The query side of the linear branch's backward for one tile, and delta of the sparse branch.

    With g = dO W: dQ through phi; O^l; phi(Q) / n and g, whose product per block is dH; the tile's part of dZ; and
    delta = rowsum(dO * O) - rowsum(g * O^l) - dO b, what the sparse branch alone has as rowsum(dO * O^s).
    Queries past the end have dO = 0 and so add nothing to dH and dZ.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    start = tile * TILE
    block = start // BLOCK_Q
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    feature = tl.arange(0, D)
    square = feature[:, None] * D + feature[None, :]
    state_ptr += pair.to(tl.int64) * state_strides[0] + block * state_strides[1]
    norm_ptr += pair.to(tl.int64) * state_strides[2] + block * state_strides[3]
    index = pair.to(tl.int64) * tl.num_programs(0) + tile
    rows = start + tl.arange(0, TILE)

    do = load_rows(grad_ptr, grad_strides, batch, head, start, length, TILE, D, False)
    o = load_rows(output_ptr, output_strides, batch, head, start, length, TILE, D, False)
    delta = tl.sum(do.to(tl.float32) * (o.to(tl.float32) - tl.load(bias_ptr + feature)[None, :]), 1)
    g = tl.dot(do.to(tl.bfloat16), tl.load(weight_ptr + square)).to(tl.bfloat16)
    offsets = index * TILE * D + tl.arange(0, TILE)[:, None] * D + feature[None, :]
    tl.store(projected_ptr + offsets, g)

    q = load_rows(query_ptr, query_strides, batch, head, start, length, TILE, D, False)
    phi = feature_map(q, FEATURE_MAP)
    norm_state = tl.load(norm_ptr + feature)
    norm = tl.sum(phi * norm_state[None, :], 1) + EPSILON
    scaled = (phi / norm[:, None]).to(tl.bfloat16)
    tl.store(scaled_ptr + offsets, scaled)
    state = tl.load(state_ptr + square)
    linear = tl.dot(scaled, state)
    tl.store(linear_ptr + offsets, linear.to(tl.bfloat16))
    grad_dot_linear = tl.sum(g.to(tl.float32) * linear, 1)
    tl.store(grad_norm_ptr + index * D + feature, -tl.sum(scaled.to(tl.float32) * grad_dot_linear[:, None], 0))
    delta_offsets = (first_pair + pair).to(tl.int64) * length + rows
    tl.store(delta_ptr + delta_offsets, delta - grad_dot_linear, mask=rows < length)

    grad_phi = (tl.dot(g, tl.trans(state)) - grad_dot_linear[:, None] * norm_state[None, :]) / norm[:, None]
    grad_query = feature_map_backward(q, phi, grad_phi, FEATURE_MAP)
    store_rows(grad_query_ptr, grad_query_strides, batch, head, start, length, grad_query, TILE, D)


@triton.jit(do_not_specialize=["heads", "length", "padded_length", "first_pair", "tiles"])
def _projection_grad_kernel(
    grad_ptr, linear_ptr, grad_weight_ptr, grad_bias_ptr, grad_strides, heads, length, padded_length, first_pair, tiles,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dW = dO^T O^l and db = column sums of dO over `tiles` tiles of one head; the caller sums the parts."""
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    feature = tl.arange(0, D)
    acc = tl.zeros([D, D], tl.float32)
    bias = tl.zeros([D], tl.float32)
    stop = tl.minimum((part + 1) * tiles * TILE, length)
    for start in range(part * tiles * TILE, stop, TILE):
        do = load_rows(grad_ptr, grad_strides, batch, head, start, length, TILE, D, False)
        rows = pair.to(tl.int64) * padded_length + start + tl.arange(0, TILE)
        linear = tl.load(linear_ptr + rows[:, None] * D + feature[None, :])
        acc = tl.dot(tl.trans(do.to(tl.bfloat16)), linear, acc)
        bias += tl.sum(do.to(tl.float32), 0)
    index = pair.to(tl.int64) * tl.num_programs(0) + part
    tl.store(grad_weight_ptr + index * D * D + feature[:, None] * D + feature[None, :], acc)
    tl.store(grad_bias_ptr + index * D + feature, bias)


@triton.jit(do_not_specialize=["heads", "length", "size_stride"])
def _key_grad_kernel(
    key_ptr, value_ptr, grad_state_ptr, grad_norm_ptr, size_ptr, grad_key_ptr, grad_value_ptr,
    key_strides, value_strides, grad_key_strides, grad_value_strides, state_strides,
    heads, length, size_stride,
    D: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, HAS_SIZES: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV: dphi(K_j) = V_j G_j^T + z_j, dV_j = phi(K_j) G_j, of one tile of keys."""
    start, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    feature = tl.arange(0, D)
    block = start // BLOCK_K
    state = pair.to(tl.int64) * state_strides[0] + block * state_strides[1]
    norm = pair.to(tl.int64) * state_strides[2] + block * state_strides[3]
    valid = tile_valid(size_ptr, size_stride, batch, start, length, TILE, BLOCK_K, HAS_SIZES)
    k = load_rows(key_ptr, key_strides, batch, head, start, length, TILE, D, False)
    v = load_rows(value_ptr, value_strides, batch, head, start, length, TILE, D, False)
    grad_state = tl.load(grad_state_ptr + state + feature[:, None] * D + feature[None, :])
    grad_norm = tl.load(grad_norm_ptr + norm + feature)
    phi = feature_map(k, FEATURE_MAP)
    grad_value = load_rows(grad_value_ptr, grad_value_strides, batch, head, start, length, TILE, D, False)
    grad_value = tl.dot(phi.to(tl.bfloat16), grad_state, grad_value.to(tl.float32))
    grad_phi = tl.dot(v.to(tl.bfloat16), tl.trans(grad_state)) + grad_norm[None, :]
    grad_key = load_rows(grad_key_ptr, grad_key_strides, batch, head, start, length, TILE, D, False).to(tl.float32)
    grad_key += feature_map_backward(k, phi, grad_phi, FEATURE_MAP)
    if HAS_SIZES:
        grad_key = tl.where(valid[:, None], grad_key, 0.0)
        grad_value = tl.where(valid[:, None], grad_value, 0.0)
    store_rows(grad_key_ptr, grad_key_strides, batch, head, start, length, grad_key, TILE, D)
    store_rows(grad_value_ptr, grad_value_strides, batch, head, start, length, grad_value, TILE, D)


def key_states(
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None,
    block_k: int,
    feature_map: str,
    pairs: range,
    tiles: int,
    parts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h [pairs, parts, D, D] in `dtype` and z [pairs, parts, D] in float32, each over `tiles` tiles of 64 keys."""
    heads, length, head_dim = key.shape[1:]
    state = torch.empty((len(pairs), parts, head_dim, head_dim), dtype=dtype, device=key.device)
    norm = torch.empty((len(pairs), parts, head_dim), dtype=torch.float32, device=key.device)
    _key_state_kernel[(parts, len(pairs))](
        key, value, state, norm, norm if sizes is None else sizes, row_strides(key), row_strides(value),
        heads, length, size_stride(sizes), pairs.start, tiles,
        D=head_dim, BLOCK_K=block_k, TILE=TILE, HAS_SIZES=sizes is not None, FEATURE_MAP=feature_map,
        num_warps=8 if head_dim == 128 else 4, num_stages=2,
    )  # fmt: skip
    return state, norm


def masked_sum(mask: Tensor, terms: Tensor, out: Tensor) -> None:
    """out[p, i] = sum over j of mask[p, i, j] * terms[p, j], in float32.

    Args:
        mask: bfloat16 [P, R, C] of 0 and 1, any strides, R and C multiples of 64.
        terms: float32 [P, C, D], contiguous.
        out: float32 [P, R, D], contiguous last dimension.
    """
    head_dim = terms.shape[-1]
    _masked_sum_kernel[(mask.shape[1] // TILE, mask.shape[0])](
        mask, terms, out, mask.stride(), out.stride()[:2], terms.stride(0), mask.shape[2],
        D=head_dim, TILE=TILE, num_warps=4, num_stages=2,
    )  # fmt: skip


def size_stride(sizes: Tensor | None) -> int:
    """The batch stride of key block sizes, 0 where the batch shares them."""
    return 0 if sizes is None or sizes.shape[0] == 1 else sizes.stride(0)


def query_gradients(
    query: Tensor,
    output: Tensor,
    grad: Tensor,
    state: Tensor,
    norm: Tensor,
    feature_map: str,
    proj_weight: Tensor,
    proj_bias: Tensor,
    block_q: int,
    rows: int,
    pairs: range,
    grad_query: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dQ of the linear branch and delta for these pairs of batch and head.

    Args:
        state, norm: H and Z of these pairs, [pairs, Tq or 1, D, D] and [pairs, Tq or 1, D]; see `LinearTerm`.
        rows: how many query blocks dH and dZ have room for; those past the last are zero.

    Returns:
        dH bfloat16 [pairs, rows, D, D], dZ float32 [pairs, rows, D], O^l bfloat16 [pairs, rows * block_q, D].
    """
    heads, length, head_dim = query.shape[1:]
    tiles = rows * block_q // TILE
    linear, scaled, projected = (
        torch.empty((len(pairs), rows * block_q, head_dim), dtype=torch.bfloat16, device=query.device) for _ in range(3)
    )
    grad_norm = torch.empty((len(pairs), tiles, head_dim), dtype=torch.float32, device=query.device)
    _query_grad_kernel[(tiles, len(pairs))](
        query, output, grad, state, norm, proj_weight, proj_bias,
        grad_query, delta, linear, scaled, projected, grad_norm,
        row_strides(query), row_strides(output), row_strides(grad), row_strides(grad_query),
        (*state.stride()[:2], *norm.stride()[:2]), heads, length, pairs.start,
        D=head_dim, BLOCK_Q=block_q, TILE=TILE, FEATURE_MAP=feature_map,
        num_warps=8 if head_dim == 128 else 4, num_stages=1,
    )  # fmt: skip
    scaled, projected = (x.view(-1, block_q, head_dim) for x in (scaled, projected))
    grad_state = torch.bmm(scaled.transpose(1, 2), projected).view(len(pairs), rows, head_dim, head_dim)
    if block_q > TILE:
        grad_norm = grad_norm.view(len(pairs), rows, -1, head_dim).sum(2)
    return grad_state, grad_norm, linear


def projection_gradients(grad: Tensor, linear: Tensor, pairs: range) -> tuple[Tensor, Tensor]:
    """dW [D, D] and db [D], float32, over these pairs; `linear` is O^l [pairs, Lq or more, D]."""
    heads, length, head_dim = grad.shape[1:]
    tiles = max(1, triton.cdiv(length * len(pairs), 256 * TILE))
    parts = triton.cdiv(length, tiles * TILE)
    weight = torch.empty((len(pairs), parts, head_dim, head_dim), dtype=torch.float32, device=grad.device)
    bias = torch.empty((len(pairs), parts, head_dim), dtype=torch.float32, device=grad.device)
    _projection_grad_kernel[(parts, len(pairs))](
        grad, linear, weight, bias, row_strides(grad), heads, length, linear.shape[1], pairs.start, tiles,
        D=head_dim, TILE=TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    return weight.sum((0, 1)), bias.sum((0, 1))


def add_key_gradients(
    key: Tensor,
    value: Tensor,
    grad_state: Tensor,
    grad_norm: Tensor,
    sizes: Tensor | None,
    block_k: int,
    feature_map: str,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Adds the linear branch's dK and dV in place, from G [B * H, Tk or 1, D, D] and z [B * H, Tk or 1, D]."""
    batch, heads, length, head_dim = key.shape
    _key_grad_kernel[(triton.cdiv(length, TILE), batch * heads)](
        key, value, grad_state, grad_norm, grad_norm if sizes is None else sizes, grad_key, grad_value,
        row_strides(key), row_strides(value), row_strides(grad_key), row_strides(grad_value),
        (*grad_state.stride()[:2], *grad_norm.stride()[:2]), heads, length, size_stride(sizes),
        D=head_dim, BLOCK_K=block_k, TILE=TILE, HAS_SIZES=sizes is not None, FEATURE_MAP=feature_map,
        num_warps=8 if head_dim == 128 else 4, num_stages=1,
    )  # fmt: skip
