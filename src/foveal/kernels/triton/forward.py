"""The forward of block-sparse attention: one program per query block, online softmax over its list of key blocks.

Lists come with full key blocks first, so the main loop runs without masks; key blocks with padding follow in a second
loop. Key blocks of 128 are walked as two tiles of 64, which keeps the scores in registers.
Source: FlashAttention-2's recurrence over the critical blocks of SLA (arXiv 2509.24006, Algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.backend import ForwardCall
from foveal.kernels.host import launch
from foveal.kernels.tma import tma_takes
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.feature_maps import EPSILON, feature_map
from foveal.kernels.triton.int8 import to_int8
from foveal.kernels.triton.lists import full_blocks_first
from foveal.kernels.triton.tiles import (
    LN_2,
    TILE,
    load_rows,
    row_strides,
    store_rows,
    tile_argument,
)
from foveal.kernels.values import identity, state_strides


@triton.jit
def online_softmax_update(scores, top, total, acc, scale_log2):
    """One step of the softmax recurrence: weights of this tile, and top, total and acc rescaled to the new maximum.

    `scores` are before the scale, which is above 0 and may change from tile to tile; `top` is their running maximum
    after it. At least one score per row must be finite.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.math.exp2(scores * scale_log2 - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    return weights, new_top, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def masked_softmax_update(scores, top, total, acc, scale_log2, valid):
    """`online_softmax_update` for a tile where only the columns `valid` [N] count, maybe none."""
    scores = tl.where(valid[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.math.exp2(top - shift)
    return weights, new_top, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def scores_and_scale(q, k, key_step_ptr, block, scale_log2, INT8: tl.constexpr):
    """q k^T before the scale, float32 [M, N], and the scale of key block `block` in log2 units.

    In int8 their products are exact, and the steps of the queries are in `scale_log2` already.
    """
    if INT8:
        return tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32), scale_log2 * tl.load(key_step_ptr + block)
    else:
        return tl.dot(q, k.T), scale_log2


@triton.jit
def count_tiles(
    list_ptr,
    full_count_ptr,
    row,
    count,
    key_length,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """How many leading tiles of a row's list are full, and how many tiles hold a key at all."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    if HAS_SIZES:
        return tl.load(full_count_ptr + row) * SPLIT, count * SPLIT
    else:
        last = tl.load(list_ptr + count - 1, mask=count > 0, other=0)
        keys = tl.where(count > 0, tl.minimum(key_length - last * BLOCK_K, BLOCK_K), BLOCK_K)
        return (count - 1) * SPLIT + keys // TILE_K, (count - 1) * SPLIT + tl.cdiv(keys, TILE_K)


@triton.jit
def tile_valid(
    size_ptr,
    size_stride,
    batch,
    start,
    key_length,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """bool [TILE_K]: which keys of the tile at token `start` count."""
    key = start + tl.arange(0, TILE_K)
    valid = key < key_length
    if HAS_SIZES:
        block = start // BLOCK_K
        valid &= key < block * BLOCK_K + tl.load(size_ptr + batch.to(tl.int64) * size_stride + block)
    return valid


@triton.jit
def add_linear_branch(
    acc,
    q,
    state_ptr,
    norm_ptr,
    mean_ptr,
    mix_ptr,
    weight_ptr,
    bias_ptr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
):
    """acc + O^l W^T + b for one block's state H [D, D] and Z [D].

    O^l = phi(q) H / n with n = phi(q) Z + eps, and (phi(q) Z / n) m more where H is the state of V - m: there is a
    mean_ptr then. With a mix_ptr O^l is multiplied by the second number there. All are taken a few columns at a time:
    of full width they would cost too many registers.
    """
    phi = feature_map(q, FEATURE_MAP)
    feature = tl.arange(0, D)
    total = tl.sum(phi * tl.load(norm_ptr + feature)[None, :], 1)
    inverse = 1.0 / (total + EPSILON)
    if mix_ptr is not None:
        inverse *= tl.load(mix_ptr + 1)
    phi = (phi * inverse[:, None]).to(tl.bfloat16)
    for start in tl.static_range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = tl.load(state_ptr + feature[:, None] * D + column[None, :])
        linear = tl.dot(phi, state)
        if mean_ptr is not None:
            linear += (total * inverse)[:, None] * tl.load(mean_ptr + column)[None, :]
        weight = tl.load(weight_ptr + feature[None, :] * D + column[:, None])
        high = linear.to(tl.bfloat16)
        acc = tl.dot(high, weight, acc)
        if mean_ptr is not None:
            # The backward takes O^l off again where it has more digits.
            acc = tl.dot((linear - high.to(tl.float32)).to(tl.bfloat16), weight, acc)
    return acc + tl.load(bias_ptr + feature)[None, :]


@triton.jit(
    do_not_specialize=["heads", "first_pair", "query_length", "key_length", "width", "size_stride", "scale_log2"]
)
def _block_sparse_fwd_kernel(
    query,
    key,
    value,
    query_ptr,
    key_step_ptr,
    output_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    critical_ptr,
    count_ptr,
    full_count_ptr,
    size_ptr,
    state_ptr,
    norm_ptr,
    mean_ptr,
    mix_ptr,
    weight_ptr,
    bias_ptr,
    heads,
    first_pair,
    query_length,
    key_length,
    width,
    size_stride,
    state_strides,
    mix_stride,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    INT8: tl.constexpr,
):
    await_previous()
    block, state_pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = first_pair + tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = pair.to(tl.int64) * tl.num_programs(0) + block
    list_ptr = critical_ptr + row * width
    count = tl.load(count_ptr + row)
    full, tiles = count_tiles(list_ptr, full_count_ptr, row, count, key_length, TILE_K, BLOCK_K, HAS_SIZES)
    SPLIT: tl.constexpr = BLOCK_K // TILE_K

    start_q = block * BLOCK_Q
    q = load_rows(query, query_strides, batch, head, start_q, query_length, BLOCK_Q, D, DESCRIPTORS)
    if INT8:
        q, query_step = to_int8(q.to(tl.float32))
        scale_log2 *= query_step
        key_step_ptr += pair.to(tl.int64) * tl.cdiv(key_length, BLOCK_K)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for step in tl.range(0, full):
        listed = tl.load(list_ptr + step // SPLIT)
        start = (listed * SPLIT + step % SPLIT) * TILE_K
        k = load_rows(key, key_strides, batch, head, start, key_length, TILE_K, D, DESCRIPTORS)
        scores, scale = scores_and_scale(q, k, key_step_ptr, listed, scale_log2, INT8)
        weights, top, total, acc = online_softmax_update(scores, top, total, acc, scale)
        v = load_rows(value, value_strides, batch, head, start, key_length, TILE_K, D, DESCRIPTORS)
        acc = tl.dot(weights.to(v.dtype), v, acc)
    for step in tl.range(full, tiles, num_stages=1):
        listed = tl.load(list_ptr + step // SPLIT)
        start = (listed * SPLIT + step % SPLIT) * TILE_K
        valid = tile_valid(size_ptr, size_stride, batch, start, key_length, TILE_K, BLOCK_K, HAS_SIZES)
        k = load_rows(key, key_strides, batch, head, start, key_length, TILE_K, D, DESCRIPTORS)
        scores, scale = scores_and_scale(q, k, key_step_ptr, listed, scale_log2, INT8)
        weights, top, total, acc = masked_softmax_update(scores, top, total, acc, scale, valid)
        v = load_rows(value, value_strides, batch, head, start, key_length, TILE_K, D, DESCRIPTORS)
        if HAS_SIZES:
            v = tl.where(valid[:, None], v, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc)

    some = total != 0.0
    acc = acc * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    lse = tl.where(some, (top + tl.math.log2(tl.where(some, total, 1.0))) * LN_2, -float("inf"))
    if FEATURE_MAP is not None:
        state_ptr += state_pair * state_strides[0] + block * state_strides[1]
        norm_ptr += state_pair * state_strides[2] + block * state_strides[3]
        if mean_ptr is not None:
            mean_ptr += state_pair * state_strides[4] + block * state_strides[5]
        if mix_ptr is not None:
            mix_ptr += pair.to(tl.int64) * mix_stride + block * 2
            acc *= tl.load(mix_ptr)
        if BLOCK_Q == TILE_K:
            if INT8:
                q = load_rows(query, query_strides, batch, head, start_q, query_length, BLOCK_Q, D, DESCRIPTORS)
            acc = add_linear_branch(
                acc, q, state_ptr, norm_ptr, mean_ptr, mix_ptr, weight_ptr, bias_ptr, D, 32, FEATURE_MAP
            )
    rows = start_q + tl.arange(0, BLOCK_Q)
    tl.store(lse_ptr + pair.to(tl.int64) * query_length + rows, lse, mask=rows < query_length)
    store_rows(output_ptr, output_strides, batch, head, start_q, query_length, acc, BLOCK_Q, D)
    if FEATURE_MAP is not None and BLOCK_Q > TILE_K:
        # Through the output and back in tiles of 64 rows: beside an accumulator of 128 rows this would spill (956 : 840
        # us at 5 %, 480p, on an H100; with 64 rows the detour loses, 840 : 902).
        tl.debug_barrier()
        for start in tl.range(start_q, start_q + BLOCK_Q, TILE_K, num_stages=1):
            q_tile = load_rows(query_ptr, query_strides, batch, head, start, query_length, TILE_K, D, False)
            o = load_rows(output_ptr, output_strides, batch, head, start, query_length, TILE_K, D, False)
            o = o.to(tl.float32)
            o = add_linear_branch(
                o, q_tile, state_ptr, norm_ptr, mean_ptr, mix_ptr, weight_ptr, bias_ptr, D, 64, FEATURE_MAP
            )
            store_rows(output_ptr, output_strides, batch, head, start, query_length, o, TILE_K, D)


class Forward(ForwardCall):
    """`ForwardCall` for Triton's kernel."""

    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        selection, linear, (output, lse) = self.selection, self.linear, self.results
        sizes, block_q, head_dim = selection.key_block_sizes, selection.block_q, query.shape[-1]
        self.ordered = None
        descriptors = tma_takes((query, key, value))
        if linear is not None and linear.weight is None:
            self.linear = linear = linear._replace(weight=identity(head_dim, query.device))
        self.shared = {
            "query": tile_argument(query, block_q, descriptors),
            "key": tile_argument(key, TILE, descriptors),
            "value": tile_argument(value, TILE, descriptors),
            "query_ptr": query,
            "key_step_ptr": lse,
            "output_ptr": output,
            "lse_ptr": lse,
            "query_strides": row_strides(query),
            "key_strides": row_strides(key),
            "value_strides": row_strides(value),
            "output_strides": row_strides(output),
            "count_ptr": selection.critical_count,
            "size_ptr": selection.critical_count if sizes is None else sizes,
            "weight_ptr": lse if linear is None else linear.weight,
            "bias_ptr": lse if linear is None else linear.bias,
            "mix_ptr": None if linear is None else linear.mix,
            "mix_stride": 0 if linear is None or linear.mix is None else linear.mix.stride(0),
            "heads": self.heads,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "width": self.width,
            "size_stride": self.size_stride,
            "scale_log2": self.scale_log2,
            "D": head_dim,
            "BLOCK_Q": block_q,
            "BLOCK_K": selection.block_k,
            "TILE_K": TILE,
            "HAS_SIZES": sizes is not None,
            "DESCRIPTORS": descriptors,
            "FEATURE_MAP": None if linear is None else linear.feature_map,
            "INT8": False,
            # Without TMA, neither 128 rows of 128 features nor the linear branch of 64 fit the registers of four warps.
            "num_warps": 4 if descriptors or head_dim * (block_q if linear is None else 128) < 128 * 128 else 8,
            # Blocks of 64 rows: three unpipelined programs an SM beat two pipelined ones (473 : 433 effective
            # TFLOP/s at 5 % on an H100); of 128 rows, the other way around (475 : 517).
            "num_stages": 1 if descriptors and block_q == 64 and head_dim == 128 else 2,
        }

    def run(
        self, pairs: range, state: Tensor | None = None, norm: Tensor | None = None, means: Tensor | None = None
    ) -> None:
        mean = None if means is None else means[0]
        selection, lse = self.selection, self.results[1]
        critical = selection.critical
        full = selection.critical_count
        if selection.key_block_sizes is not None:
            self.ordered = full_blocks_first(selection, pairs, self.ordered)
            critical, full = self.ordered
        launch(
            _block_sparse_fwd_kernel,
            (critical.shape[2], len(pairs)),
            critical_ptr=critical,
            full_count_ptr=full,
            state_ptr=lse if state is None else state,
            norm_ptr=lse if state is None else norm,
            mean_ptr=mean,
            state_strides=state_strides(state, norm, mean),
            first_pair=pairs.start,
            **self.shared,
        )
