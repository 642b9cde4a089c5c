"""The linear branch of SLA on the device: block states and their masked sums.

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

from foveal.kernels.chips import Plan, fitting
from foveal.kernels.host import launch, num_sms, register_limit
from foveal.kernels.tma import tma_takes
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.feature_maps import feature_map
from foveal.kernels.triton.pooling import add_column_sums, block_mean, store_first_row
from foveal.kernels.triton.tiles import TILE, load_rows, row_strides, tile_argument
from foveal.kernels.values import size_stride

# By head_dim.
MASKED_SUM_PLANS = {
    64: [Plan(40960, {"num_stages": 3})],
    128: [Plan(73728, {"num_stages": 3}), Plan(65536, {"num_stages": 2})],
}


@triton.jit(do_not_specialize=["heads", "pairs", "length", "size_stride", "first_pair", "blocks", "at_once"])
def _key_state_kernel(
    key, value, state_ptr, norm_ptr, pooled_ptr, size_ptr, key_strides, value_strides,
    heads, pairs, length, size_stride, first_pair, blocks, at_once, state_step, norm_step,
    D: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, PER_BLOCK: tl.constexpr, POOL: tl.constexpr,
    HAS_SIZES: tl.constexpr, DESCRIPTORS: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """h and z of `at_once` key blocks, of each block or of their sum, and their pooled keys, in one pass over K and V.

    Blocks past the end get zeros, which the padding of the mask product needs. Heads are neighbors, as in `pool`.
    """
    await_previous()
    SPLIT: tl.constexpr = BLOCK_K // TILE
    part, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    key_blocks = tl.cdiv(length, BLOCK_K)
    feature = tl.arange(0, D)
    square = feature[:, None] * D + feature[None, :]
    state = tl.zeros([D, D], tl.float32)
    norm = tl.zeros([16, D], tl.float32)
    total = tl.zeros([16, D], tl.float32)
    for tile in tl.range(part * at_once * SPLIT, tl.minimum((part + 1) * at_once, blocks) * SPLIT):
        block, start = tile // SPLIT, tile * TILE
        size = tl.maximum(tl.minimum(length - block * BLOCK_K, BLOCK_K), 0)
        if HAS_SIZES:
            listed = size_ptr + batch.to(tl.int64) * size_stride + block
            size = tl.minimum(size, tl.load(listed, mask=block < key_blocks, other=0))
        valid = tile % SPLIT * TILE + tl.arange(0, TILE) < size
        k = load_rows(key, key_strides, batch, head, start, length, TILE, D, DESCRIPTORS)
        v = load_rows(value, value_strides, batch, head, start, length, TILE, D, DESCRIPTORS)
        if HAS_SIZES:
            k = tl.where(valid[:, None], k, 0.0)
            v = tl.where(valid[:, None], v, 0.0)
        # Rows that do not count have v = 0 and stay out of the column sums: phi of them may be anything.
        phi = feature_map(k, FEATURE_MAP).to(v.dtype)
        if SPLIT == 1:
            total = tl.zeros([16, D], tl.float32)
        else:
            total = tl.where(tile % SPLIT == 0, 0.0, total)
        if PER_BLOCK and SPLIT == 1:
            state = tl.zeros([D, D], tl.float32)
            norm = tl.zeros([16, D], tl.float32)
        elif PER_BLOCK:
            state = tl.where(tile % SPLIT == 0, 0.0, state)
            norm = tl.where(tile % SPLIT == 0, 0.0, norm)
        state = tl.dot(tl.trans(phi), v, state)
        norm = add_column_sums(norm, phi, valid)
        if POOL:
            total = add_column_sums(total, k, valid)
            if (tile % SPLIT == SPLIT - 1) & (block < key_blocks):
                mean = block_mean(total, size)
                store_first_row(pooled_ptr + (pair.to(tl.int64) * key_blocks + block) * D + feature, mean)
        if PER_BLOCK:  # noqa: SIM102
            if tile % SPLIT == SPLIT - 1:
                index = pair.to(tl.int64) * blocks + block
                tl.store(state_ptr + index * state_step + square, state.to(state_ptr.dtype.element_ty))
                store_first_row(norm_ptr + index * norm_step + feature, norm)
    if not PER_BLOCK:
        index = pair.to(tl.int64) * (tl.num_programs(0) // pairs) + part
        tl.store(state_ptr + index * state_step + square, state)
        store_first_row(norm_ptr + index * norm_step + feature, norm)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(part_ptr, norm_part_ptr, state_ptr, norm_ptr, parts, D: tl.constexpr, ROWS: tl.constexpr):
    """Sums what the parts of one head's keys gave: a few rows of the state, and Z with the first."""
    await_previous()
    strip, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    feature = tl.arange(0, D)
    square = (strip * ROWS + tl.arange(0, ROWS))[:, None] * D + feature[None, :]
    state = tl.zeros([ROWS, D], tl.float32)
    norm = tl.zeros([D], tl.float32)
    for part in range(parts):
        state += tl.load(part_ptr + (pair * parts + part) * D * D + square)
        norm += tl.load(norm_part_ptr + (pair * parts + part) * D + feature)
    tl.store(state_ptr + pair * D * D + square, state.to(state_ptr.dtype.element_ty))
    tl.store(norm_ptr + pair * D + feature, norm, mask=strip + feature * 0 == 0)


@triton.jit(do_not_specialize=["terms"])
def _masked_sum_kernel(
    mask_ptr, term_ptr, sum_ptr, mask_strides, terms, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """sum[pair, i] = sum over j of mask[pair, i, j] * term[pair, j], float32 to 16 bits and more."""
    await_previous()
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, D)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, terms, TILE):
        column = start + tl.arange(0, TILE)
        mask = tl.load(
            mask_ptr + pair * mask_strides[0] + row[:, None] * mask_strides[1] + column[None, :] * mask_strides[2]
        )
        term = tl.load(term_ptr + (pair * terms + column)[:, None] * D + feature[None, :])
        # The mask is exact in bfloat16; the terms are, nearly, as a sum of two.
        high = term.to(tl.bfloat16)
        acc = tl.dot(mask, high, acc)
        acc = tl.dot(mask, (term - high.to(tl.float32)).to(tl.bfloat16), acc)
    rows = pair * tl.num_programs(0) * ROWS + row
    tl.store(sum_ptr + rows[:, None] * D + feature[None, :], acc)


def _run_key_states(
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None,
    block_k: int,
    feature_map: str,
    pairs: range,
    blocks: int,
    at_once: int,
    state: Tensor,
    norm: Tensor,
    pooled: Tensor | None,
) -> None:
    heads, length, head_dim = key.shape[1:]
    descriptors = tma_takes((key, value))
    # Without TMA, two programs' share of the registers would spill kilobytes in the loop. The assembler tries for them
    # where it is not told of a limit.
    limits = {"num_stages": 3, **register_limit(128)} if descriptors else {"num_stages": 2, **register_limit(192)}
    launch(
        _key_state_kernel,
        (-(-blocks // at_once) * len(pairs),),
        key=tile_argument(key, TILE, descriptors),
        value=tile_argument(value, TILE, descriptors),
        state_ptr=state,
        norm_ptr=norm,
        pooled_ptr=norm if pooled is None else pooled,
        size_ptr=norm if sizes is None else sizes,
        key_strides=row_strides(key),
        value_strides=row_strides(value),
        heads=heads,
        pairs=len(pairs),
        length=length,
        size_stride=size_stride(sizes),
        first_pair=pairs.start,
        blocks=blocks,
        at_once=at_once,
        state_step=state.stride(1),
        norm_step=norm.stride(1),
        D=head_dim,
        BLOCK_K=block_k,
        TILE=TILE,
        PER_BLOCK=state.dtype == torch.bfloat16,
        POOL=pooled is not None,
        HAS_SIZES=sizes is not None,
        DESCRIPTORS=descriptors,
        FEATURE_MAP=feature_map,
        num_warps=8 if head_dim == 128 else 4,
        **limits,
    )


def _blocks_at_once(blocks: int, device: torch.device) -> int:
    """Key blocks that a program of `_key_state_kernel` takes, so that two programs an SM cover all of them."""
    return -(-blocks // (2 * num_sms(device)))


def key_states(
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None,
    block_k: int,
    feature_map: str,
    pairs: range,
    pooled: Tensor | None,
    state: Tensor,
    norm: Tensor,
) -> None:
    """Writes h and z of each key block; zero for blocks past the last.

    Args:
        key, value: [B, H, Lk, D].
        sizes: int32 [B or 1, Tk], valid tokens at the front of each key block; None when all are full but the last.
        pairs: the pairs of batch and head.
        pooled: float32 [pairs, Tk, D], contiguous, for the means of each block's keys; None if they are not wanted.
        state: h, bfloat16 [pairs, Tk or more, D, D]; blocks may stand apart.
        norm: z, float32 or bfloat16 [pairs, Tk or more, D]; blocks may stand apart.
    """
    blocks = state.shape[1]
    at_once = _blocks_at_once(blocks * len(pairs), key.device)
    _run_key_states(key, value, sizes, block_k, feature_map, pairs, blocks, at_once, state, norm, pooled)


def key_state_sums(
    key: Tensor, value: Tensor, sizes: Tensor | None, block_k: int, feature_map: str, pooled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """H [B * H, 1, D, D] in bfloat16 and Z [B * H, 1, D] in float32 over all keys; arguments as in `key_states`."""
    pairs, blocks, head_dim = key.shape[0] * key.shape[1], -(-key.shape[2] // block_k), key.shape[-1]
    at_once = _blocks_at_once(blocks * pairs, key.device)
    parts = -(-blocks // at_once)
    part, norm_part, norm = (
        torch.empty((pairs, n, *shape), dtype=torch.float32, device=key.device)
        for n, shape in ((parts, (head_dim, head_dim)), (parts, (head_dim,)), (1, (head_dim,)))
    )
    state = torch.empty((pairs, 1, head_dim, head_dim), dtype=torch.bfloat16, device=key.device)
    _run_key_states(key, value, sizes, block_k, feature_map, range(pairs), blocks, at_once, part, norm_part, pooled)
    launch(
        _sum_parts_kernel,
        (head_dim // 8, pairs),
        part_ptr=part,
        norm_part_ptr=norm_part,
        state_ptr=state,
        norm_ptr=norm,
        parts=parts,
        D=head_dim,
        ROWS=8,
        num_warps=4,
    )
    return state, norm


def masked_sum(mask: Tensor, terms: Tensor, out: Tensor | None = None) -> Tensor:
    """sum over j of mask[p, i, j] * terms[p, j], float32 [P, R, D], contiguous; in `out` if that is given.

    Args:
        mask: bfloat16 [P, R, C] of 0 and 1, any strides, R and C multiples of 64.
        terms: float32 [P, C, D], contiguous.
    """
    pairs, rows, columns = mask.shape
    head_dim = terms.shape[-1]
    if out is None:
        out = torch.empty((pairs, rows, head_dim), dtype=torch.float32, device=mask.device)
    launch(
        _masked_sum_kernel,
        (rows // 32, pairs),
        mask_ptr=mask,
        term_ptr=terms,
        sum_ptr=out,
        mask_strides=mask.stride(),
        terms=columns,
        D=head_dim,
        ROWS=32,
        TILE=TILE,
        num_warps=4,
        **fitting(mask.device, MASKED_SUM_PLANS[head_dim]),
    )
    return out
