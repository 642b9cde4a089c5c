"""The linear branch of SLA on the device: block states and their masked sums.

    h_j = phi(K_j)^T V_j        z_j = column sums of phi(K_j)          one state per key block
    H_i = sum of h_j            Z_i = sum of z_j                       one batched GEMM with the block mask
    O^l = phi(Q_i) H_i / n      n = phi(Q_i) Z_i + eps                 in the epilogue of the forward kernel

States are bfloat16 whatever the input dtype: sums over a whole video leave the range of float16. Where a backward
follows they are those of V - m, for a constant m of each head near the mean of V, and the epilogue adds what they lack:

    H_i = sum of (h_j - z_j m^T)                    O^l = phi(Q_i) H_i / n + (1 - eps / n) m

Any m gives the same O^l. The gradients of Q and K are differences that cancel as far as V has a mean, and what is left
of H's rounding then is not small; without the mean nothing cancels. h_j - z_j m^T is a difference of float32 sums.
Source: SLA (arXiv 2509.24006), eq. 5 and Algorithms 1 and 2, with G_j and z_j the masked sums of dH_i and dZ_i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.host import launch, num_sms, register_limit
from foveal.kernels.tma import tma_takes
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.feature_maps import feature_map
from foveal.kernels.triton.pooling import (
    add_column_sums,
    add_part_sums,
    block_mean,
    part_means,
    part_of,
    store_first_row,
    store_parts,
)
from foveal.kernels.triton.tiles import TILE, load_rows, row_strides, tile_argument
from foveal.kernels.values import size_stride

# The rows of V whose mean is m: all of a short sequence, one in MEAN_STEP of a long one. Where rows are independent,
# one in four makes H 1.4 times as large, and its rounding is a small part of the errors of the gradients.
MEAN_ROWS, MEAN_STEP = 4096, 4
MEAN_PARTS = 32  # programs that a head's rows are cut into


@triton.jit
def store_means(mean, weight_ptr, mean_ptr, projected_ptr, D: tl.constexpr):
    """Stores m [D] and W m, the same where there is no W."""
    feature = tl.arange(0, D)
    tl.store(mean_ptr + feature, mean)
    if weight_ptr is None:
        tl.store(projected_ptr + feature, mean)
    else:
        for first in range(0, D, 16):
            row = first + tl.arange(0, 16)
            weight = tl.load(weight_ptr + row[:, None] * D + feature[None, :]).to(tl.float32)
            tl.store(projected_ptr + row, tl.sum(weight * mean[None, :], 1))


@triton.jit(do_not_specialize=["heads", "pairs", "first_pair", "length", "step", "size_stride"])
def _value_sum_kernel(
    value_ptr,
    sum_ptr,
    count_ptr,
    size_ptr,
    strides,
    heads,
    pairs,
    first_pair,
    length,
    step,
    size_stride,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """The sum over every `step`-th valid row in one of PARTS parts of a head, and how many there are."""
    await_previous()
    part, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    value_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + tl.arange(0, D)[None, :]
    rows = tl.cdiv(length, step)
    each = tl.cdiv(rows, PARTS)
    total = tl.zeros([ROWS, D], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    stop = tl.minimum((part + 1) * each, rows)
    for first in tl.range(part * each, stop, ROWS):
        place = first + tl.arange(0, ROWS)
        row = place * step
        valid = place < stop
        if HAS_SIZES:
            listed = size_ptr + batch.to(tl.int64) * size_stride + row // BLOCK_K
            valid &= row % BLOCK_K < tl.load(listed, mask=valid, other=0)
        offsets = row.to(tl.int64)[:, None] * strides[2]
        total += tl.load(value_ptr + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
        count += tl.where(valid, 1.0, 0.0)
    index = pair * PARTS + part
    tl.store(sum_ptr + index * D + tl.arange(0, D), tl.sum(total, 0))
    tl.store(count_ptr + index, tl.sum(count, 0))


@triton.jit(do_not_specialize=["heads", "pairs", "length", "size_stride", "first_pair", "blocks", "at_once"])
def _key_state_kernel(
    key,
    value,
    state_ptr,
    norm_ptr,
    pooled_ptr,
    size_ptr,
    mean_ptr,
    projected_ptr,
    weight_ptr,
    value_sums,
    key_strides,
    value_strides,
    heads,
    pairs,
    length,
    size_stride,
    first_pair,
    blocks,
    at_once,
    state_step,
    norm_step,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    PARTS_OF_BLOCK: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    ZEROED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """h and z of `at_once` key blocks, of each block or of their sum, and their pooled keys, in one pass over K and V.

    With POOL the mean of each block's keys is stored, or with 4 PARTS_OF_BLOCK those of its quarters, as `pool` has it.
    Blocks past the end get zeros, which the padding of the mask product needs. Heads are neighbors, as in `pool`.
    ZEROED: there are zeros behind each block's tokens already.
    With a mean_ptr the h of each block is that of V - m, and m and W m are stored, from `value_sums` (what
    `_value_sum_kernel` made). For the sum of blocks mean_ptr takes its sums over the features of K, of which m is made.
    """
    await_previous()
    SPLIT: tl.constexpr = BLOCK_K // TILE
    part, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    key_blocks = tl.cdiv(length, BLOCK_K)
    feature = tl.arange(0, D)
    square = feature[:, None] * D + feature[None, :]
    if PER_BLOCK and mean_ptr is not None:
        # Through memory: in registers m would take those of the loop. Every program of a head stores the same.
        sums = value_sums[0] + pair * (PARTS * D) + tl.arange(0, PARTS)[:, None] * D + feature[None, :]
        count = tl.sum(tl.load(value_sums[1] + pair * PARTS + tl.arange(0, PARTS)), 0)
        mean_ptr += pair * D
        mean_value = tl.sum(tl.load(sums), 0) / tl.maximum(count, 1.0)
        if part == 0:
            store_means(mean_value, weight_ptr, mean_ptr, projected_ptr + pair * D, D)
        else:
            tl.store(mean_ptr + feature, mean_value)
        tl.debug_barrier()
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
        if HAS_SIZES and not ZEROED:
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
            if PARTS_OF_BLOCK > 1:
                place = tile % SPLIT * TILE + tl.arange(0, TILE)
                part_tokens: tl.constexpr = BLOCK_K // PARTS_OF_BLOCK
                total = add_part_sums(total, k, part_of(place, valid, part_tokens), PARTS_OF_BLOCK)
            else:
                total = add_column_sums(total, k, valid)
            if (tile % SPLIT == SPLIT - 1) & (block < key_blocks):
                if PARTS_OF_BLOCK > 1:
                    parts = tl.cdiv(length, part_tokens)
                    means = pooled_ptr + pair.to(tl.int64) * parts * D
                    store_parts(means, part_means(total, size, part_tokens), block * PARTS_OF_BLOCK, parts, D)
                else:
                    mean = block_mean(total, size)
                    store_first_row(pooled_ptr + (pair.to(tl.int64) * key_blocks + block) * D + feature, mean)
        if PER_BLOCK:  # noqa: SIM102
            if tile % SPLIT == SPLIT - 1:
                index = pair.to(tl.int64) * blocks + block
                if mean_ptr is not None:
                    z = tl.max(norm, 0)  # which each row of norm is
                    state -= z[:, None] * tl.load(mean_ptr + feature)[None, :]
                tl.store(state_ptr + index * state_step + square, state.to(state_ptr.dtype.element_ty))
                store_first_row(norm_ptr + index * norm_step + feature, norm)
    if not PER_BLOCK:
        index = pair.to(tl.int64) * (tl.num_programs(0) // pairs) + part
        tl.store(state_ptr + index * state_step + square, state)
        store_first_row(norm_ptr + index * norm_step + feature, norm)
        if mean_ptr is not None:
            tl.store(mean_ptr + index * D + feature, tl.sum(state, 0))


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(
    part_ptr,
    norm_part_ptr,
    value_part_ptr,
    state_ptr,
    norm_ptr,
    mean_ptr,
    projected_ptr,
    weight_ptr,
    parts,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums what the parts of one head's keys gave: a few rows of the state, and Z, m and W m with the first.

    With a mean_ptr the state is that of V - m, and m is the mean of V by weights, the sums over the features of K.
    """
    await_previous()
    strip, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    feature, row = tl.arange(0, D), strip * ROWS + tl.arange(0, ROWS)
    square = row[:, None] * D + feature[None, :]
    state = tl.zeros([ROWS, D], tl.float32)
    norm = tl.zeros([D], tl.float32)
    norm_of_rows = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([D], tl.float32)
    for part in range(parts):
        state += tl.load(part_ptr + (pair * parts + part) * D * D + square)
        norm += tl.load(norm_part_ptr + (pair * parts + part) * D + feature)
        if mean_ptr is not None:
            norm_of_rows += tl.load(norm_part_ptr + (pair * parts + part) * D + row)
            weighted += tl.load(value_part_ptr + (pair * parts + part) * D + feature)
    if mean_ptr is not None:
        mean = weighted / tl.maximum(tl.sum(norm, 0), 1e-30)
        state -= norm_of_rows[:, None] * mean[None, :]
        if strip == 0:
            store_means(mean, weight_ptr, mean_ptr + pair * D, projected_ptr + pair * D, D)
    tl.store(state_ptr + pair * D * D + square, state.to(state_ptr.dtype.element_ty))
    tl.store(norm_ptr + pair * D + feature, norm, mask=strip + feature * 0 == 0)


class Means(NamedTuple):
    """Where m of some heads and W m go, float32 [pairs, D], contiguous, and W, bfloat16 [D, D], None for the identity.

    For sums of blocks, `mean` takes what m is made of, and the others are None.
    """

    mean: Tensor
    projected: Tensor | None
    weight: Tensor | None


class Keys(NamedTuple):
    """What key states are made of.

    key, value: [B, H, Lk, D].
    sizes: int32 [B or 1, Tk], valid tokens at the front of each key block; None when all are full but the last.
    zeroed: whether there are zeros behind them. Else anything may be.
    """

    key: Tensor
    value: Tensor
    sizes: Tensor | None
    block_k: int
    feature_map: str
    zeroed: bool = False


def _run_key_states(
    keys: Keys,
    pairs: range,
    cut: tuple[int, int],
    state: Tensor,
    norm: Tensor,
    pooled: Tensor | None,
    means: Means | None,
    value_sums: tuple[Tensor, Tensor] | None = None,
) -> None:
    """cut: how many blocks there are, and how many of them a program takes."""
    (key, value, sizes, block_k, feature_map, zeroed), (blocks, at_once) = keys, cut
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
        mean_ptr=None if means is None else means.mean,
        projected_ptr=None if means is None else means.projected,
        weight_ptr=None if means is None else means.weight,
        value_sums=value_sums,
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
        PARTS_OF_BLOCK=PARTS if pooled is not None and pooled.dtype == torch.float16 else 1,
        HAS_SIZES=sizes is not None,
        ZEROED=zeroed,
        DESCRIPTORS=descriptors,
        FEATURE_MAP=feature_map,
        PARTS=MEAN_PARTS,
        num_warps=8 if head_dim == 128 else 4,
        **limits,
    )


def _value_sums(keys: Keys, pairs: range) -> tuple[Tensor, Tensor]:
    """Sums of rows of V, float32 [pairs, MEAN_PARTS, D], and how many they are, float32 [pairs, MEAN_PARTS]."""
    _, value, sizes, block_k, *_ = keys
    heads, length, head_dim = value.shape[1:]
    sums = torch.empty((len(pairs), MEAN_PARTS, head_dim), dtype=torch.float32, device=value.device)
    counts = torch.empty((len(pairs), MEAN_PARTS), dtype=torch.float32, device=value.device)
    launch(
        _value_sum_kernel,
        (MEAN_PARTS * len(pairs),),
        value_ptr=value,
        sum_ptr=sums,
        count_ptr=counts,
        size_ptr=sums if sizes is None else sizes,
        strides=row_strides(value),
        heads=heads,
        pairs=len(pairs),
        first_pair=pairs.start,
        length=length,
        step=max(1, min(MEAN_STEP, length // MEAN_ROWS)),
        size_stride=size_stride(sizes),
        D=head_dim,
        BLOCK_K=block_k,
        ROWS=32,
        PARTS=MEAN_PARTS,
        HAS_SIZES=sizes is not None,
        num_warps=4,
        num_stages=3,
    )
    return sums, counts


def _blocks_at_once(blocks: int, device: torch.device) -> int:
    """Key blocks that a program of `_key_state_kernel` takes, so that two programs an SM cover all of them."""
    return -(-blocks // (2 * num_sms(device)))


def key_states(
    keys: Keys, pairs: range, pooled: Tensor | None, state: Tensor, norm: Tensor, means: Means | None = None
) -> None:
    """Writes h and z of each key block; zero for blocks past the last. With `means`, h of V - m.

    Args:
        pairs: the pairs of batch and head.
        pooled: for the means of each block's keys, float32 [pairs, Tk, D], or for those of quarters, float16
            [pairs, ceil(Lk / quarter), D], contiguous; None if none are wanted.
        state: h, bfloat16 [pairs, Tk or more, D, D]; blocks may stand apart.
        norm: z, float32 or bfloat16 [pairs, Tk or more, D]; blocks may stand apart.
        means: where m and W m go. They take a launch and a look at V (see `MEAN_STEP`) of their own.
    """
    blocks = state.shape[1]
    cut = blocks, _blocks_at_once(blocks * len(pairs), keys.key.device)
    value_sums = None if means is None else _value_sums(keys, pairs)
    _run_key_states(keys, pairs, cut, state, norm, pooled, means, value_sums)


def key_state_sums(keys: Keys, pooled: Tensor | None = None, means: Means | None = None) -> tuple[Tensor, Tensor]:
    """H [B * H, 1, D, D] in bfloat16 and Z [B * H, 1, D] in float32 over all keys; arguments as in `key_states`.

    m is a weighted mean of V here, which comes out of the sums: it takes neither a launch nor a look at V.
    """
    key = keys.key
    pairs, blocks, head_dim = key.shape[0] * key.shape[1], -(-key.shape[2] // keys.block_k), key.shape[-1]
    at_once = _blocks_at_once(blocks * pairs, key.device)
    parts = -(-blocks // at_once)
    memory = {"dtype": torch.float32, "device": key.device}
    part = torch.empty((pairs, parts, head_dim, head_dim), **memory)
    norm_part, norm = torch.empty((pairs, parts, head_dim), **memory), torch.empty((pairs, 1, head_dim), **memory)
    value_part = None if means is None else torch.empty_like(norm_part)
    state = torch.empty((pairs, 1, head_dim, head_dim), dtype=torch.bfloat16, device=key.device)
    of_parts = None if means is None else Means(value_part, None, None)
    _run_key_states(keys, range(pairs), (blocks, at_once), part, norm_part, pooled, of_parts)
    launch(
        _sum_parts_kernel,
        (head_dim // 8, pairs),
        part_ptr=part,
        norm_part_ptr=norm_part,
        value_part_ptr=value_part,
        state_ptr=state,
        norm_ptr=norm,
        mean_ptr=None if means is None else means.mean,
        projected_ptr=None if means is None else means.projected,
        weight_ptr=None if means is None else means.weight,
        parts=parts,
        D=head_dim,
        ROWS=8,
        num_warps=4,
    )
    return state, norm
