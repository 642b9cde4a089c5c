"""The forward of block-sparse attention on Hopper: one program per query block, online softmax over its key blocks.

While the softmax of a tile runs, the tensor cores multiply the weights of the tile before it with its values.
Source: FlashAttention-2's recurrence over the critical blocks of SLA (arXiv 2509.24006, Algorithm 1).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.kernels.hopper.gluon_names import reinterpret
from foveal.kernels.hopper.linear_branch import (
    HALF_WIDTH,
    add_columns,
    add_constants,
    add_projected,
    copy_state,
    copy_state_rows,
    copy_weight,
    features_and_inverse,
    mix_of_block,
)
from foveal.kernels.hopper.tiles import (
    barriers,
    clear_rows,
    copy_rows,
    keep_columns,
    keep_tail,
    retire,
    store_rows,
)
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit
def sums_by_eight(x):
    """[rows, 8]: sums over every eighth column, which each thread sums by itself; the sum over 8 waits for the end."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def online_softmax_update(scores, top, total, scale_log2, MAY_BE_EMPTY: gl.constexpr):
    """One step of the recurrence: the weights of this tile, the new maximum, the new sums and the decay of old ones."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    shift = new_top
    if MAY_BE_EMPTY:
        shift = gl.where(new_top == -float("inf"), 0.0, new_top)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 1))
    decay = gl.exp2(top - shift)
    by_eight = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))
    return weights, new_top, total * gl.expand_dims(by_eight, 1) + sums_by_eight(weights), decay


@gluon.jit
def tile_start(list_ptr, tile, count, ROWS: gl.constexpr, SPLIT: gl.constexpr):
    """First key of a tile of the list; 0 past its end."""
    block = gl.load(list_ptr + tile // SPLIT, mask=tile < count, other=0)
    return (block * SPLIT + tile % SPLIT) * ROWS


@gluon.jit
def tile_valid(size_ptr, start, key_length, BLOCK_K: gl.constexpr, HAS_SIZES: gl.constexpr):
    """How many keys count from `start` on: a tile with fewer than its rows needs a mask."""
    if HAS_SIZES:
        return gl.load(size_ptr + start // BLOCK_K) - start % BLOCK_K
    else:
        return key_length - start


@gluon.jit
def masked_valid(size_ptr, start, key_length, uniform, BLOCK_K: gl.constexpr, MASK: gl.constexpr):
    """`tile_valid` for a MASK as `block_sparse_fwd_kernel` has it."""
    if MASK == "tail":
        return uniform
    else:
        return tile_valid(size_ptr, start, key_length, BLOCK_K, MASK is not None)


@gluon.jit
def keep_valid(scores, valid, MASK: gl.constexpr):
    """Scores [rows, keys] with -inf where no key counts.

    MASK: None where all count, "tail" where all do but some of the last eight, else any number may be valid.
    """
    if MASK is None:
        return scores
    elif MASK == "tail":
        return keep_tail(scores, valid, -float("inf"))
    else:
        if valid < scores.shape[1]:
            # Cubes of 120 to 127 tokens are the rule among wide tiles that are not all alike.
            if (scores.shape[1] == 128) & (valid >= 120):
                scores = keep_tail(scores, valid, -float("inf"))
            else:
                scores = keep_columns(scores, valid, -float("inf"))
        return scores


@gluon.jit
def add_tile(
    q,
    k,
    v,
    previous_v,
    k_barrier,
    k_phase,
    v_barrier,
    v_phase,
    previous_v_barrier,
    previous_v_phase,
    key_desc,
    batch,
    head,
    refill,
    wanted,
    weights,
    acc,
    top,
    total,
    decay,
    valid,
    scale_log2,
    MASK: gl.constexpr,
    MAY_BE_EMPTY: gl.constexpr,
):
    """Scores and softmax of tile t while acc takes in tile t - 1; then K's slot is refilled.

    MASK: as in `keep_valid`; with "clear" rows of V that do not count may hold anything.
    """
    rows: gl.constexpr = q.shape[0]
    tile_k: gl.constexpr = k.shape[0]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_k, 16])
    acc_layout: gl.constexpr = acc.type.layout
    mbarrier.wait(k_barrier, k_phase)
    zeros = gl.zeros([rows, tile_k], gl.float32, score_layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
    mbarrier.wait(previous_v_barrier, previous_v_phase)
    sums = warpgroup_mma(weights, previous_v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    copy_rows(key_desc, batch, head, refill, k_barrier, k, wanted)
    if MASK == "clear":
        if valid < tile_k:
            scores = keep_columns(scores, valid, -float("inf"))
            mbarrier.wait(v_barrier, v_phase)
            clear_rows(v, valid)
    else:
        scores = keep_valid(scores, valid, MASK)
    p, top, total, decay = online_softmax_update(scores, top, total, scale_log2, MAY_BE_EMPTY)
    acc, p = warpgroup_mma_wait(0, deps=[sums, p])
    weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return weights, acc, top, total, decay


@gluon.jit
def finished(acc, top, total, kept, row_layout: gl.constexpr):
    """The output tile and its LSE; 0 and -inf for rows without a key."""
    acc_layout: gl.constexpr = acc.type.layout
    total = gl.convert_layout(gl.sum(total, 1), row_layout)
    some = (total != 0.0) & (kept > 0)  # a NaN stays one
    inverse = gl.where(some, 1.0 / total, 0.0)
    inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, acc_layout)), 1)
    lse = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, -float("inf"))
    return gl.where(inverse != 0.0, acc * inverse, 0.0), lse


@gluon.jit(
    do_not_specialize=[
        "heads",
        "first_pair",
        "query_length",
        "key_length",
        "width",
        "uniform",
        "size_stride",
        "state_step",
        "norm_pair_stride",
        "norm_block_stride",
    ]
)
def block_sparse_fwd_kernel(
    query,
    key,
    value,
    output,
    lse_ptr,
    critical_ptr,
    count_ptr,
    size_ptr,
    state,
    weight,
    norm_ptr,
    mean,
    mix,
    bias_ptr,
    scale_log2,
    heads,
    first_pair,
    query_length,
    key_length,
    width,
    uniform,
    size_stride,
    state_step,
    norm_pair_stride,
    norm_block_stride,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    MASK: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
):
    """Grid (query tiles, pairs of batch and head from `first_pair` on). One slot for a tile of K and two for V: small
    programs, three per SM.

    MASK: None where all key blocks are full but the last, "tail" where each has `uniform` keys, over 56 of 64, and
    zeros behind them, "columns" for `size_ptr` and zeros, "clear" for `size_ptr` and anything behind the keys.

    With a FEATURE_MAP the linear branch is added, from states of only these pairs: state and weight travel through the
    slots that fall free, 64 columns at a time. Without a weight states are projected already, and travel by rows. A
    mean comes with states of V - m, a mix with other weights than 1 of both branches; see `linear_branch`.
    `state_step` is 0 where all query blocks share one state, else 1.
    """
    await_previous()
    rows: gl.constexpr = query.block_type.shape[2]
    head_dim: gl.constexpr = query.block_type.shape[3]
    tile_k: gl.constexpr = key.block_type.shape[2]
    dtype: gl.constexpr = query.dtype
    SPLIT: gl.constexpr = BLOCK_K // tile_k
    MAY_BE_EMPTY: gl.constexpr = MASK == "columns" or MASK == "clear"
    LAST_MASK: gl.constexpr = "columns" if MASK is None else MASK
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_k, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    start_q = gl.program_id(0) * rows
    head, batch = (first_pair + gl.program_id(1)) % heads, (first_pair + gl.program_id(1)) // heads
    pair = (first_pair + gl.program_id(1)).to(gl.int64)
    row = pair * gl.cdiv(query_length, BLOCK_Q) + start_q // BLOCK_Q
    q = gl.allocate_shared_memory(dtype, [rows, head_dim], tile_layout)
    k = gl.allocate_shared_memory(dtype, [tile_k, head_dim], tile_layout)
    v = gl.allocate_shared_memory(dtype, [2, tile_k, head_dim], tile_layout)
    qk_full, v_full = barriers(2, 1), barriers(2, 1)
    q_full, k_full = qk_full.index(0), qk_full.index(1)
    fence_async_shared()
    copy_rows(query, batch, head, start_q, q_full, q, True)

    list_ptr = critical_ptr + row * width
    if MAY_BE_EMPTY:
        size_ptr += batch * size_stride
    kept = gl.load(count_ptr + row)
    listed = kept * SPLIT
    if SPLIT > 1 and MASK is None:
        # The last key block may end before its second tile.
        last_start = tile_start(list_ptr, listed - 1, listed, tile_k, SPLIT)
        listed = gl.where((kept > 0) & (last_start >= key_length), listed - 1, listed)
    count = gl.maximum(listed, 1)  # an empty row computes one tile and throws it away

    start = tile_start(list_ptr, 0, listed, tile_k, SPLIT)
    copy_rows(key, batch, head, start, k_full, k, True)
    copy_rows(value, batch, head, start, v_full.index(0), v.index(0), True)
    valid = masked_valid(size_ptr, start, key_length, uniform, BLOCK_K, MASK)
    start = tile_start(list_ptr, 1, count, tile_k, SPLIT)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full, 0)
    zeros = gl.zeros([rows, tile_k], gl.float32, score_layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False)
    copy_rows(key, batch, head, start, k_full, k, count > 1)
    if MASK == "clear":
        if valid < tile_k:
            scores = keep_columns(scores, valid, -float("inf"))
            mbarrier.wait(v_full.index(0), 0)
            clear_rows(v.index(0), valid)
    else:
        scores = keep_valid(scores, valid, LAST_MASK)
    top = gl.full([rows], -float("inf"), gl.float32, row_layout)
    total = sums_by_eight(zeros)
    p, top, total, decay = online_softmax_update(scores, top, total, scale_log2, MAY_BE_EMPTY)
    weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
    acc = gl.zeros([rows, head_dim], gl.float32, acc_layout)
    valid = masked_valid(size_ptr, start, key_length, uniform, BLOCK_K, MASK)

    for t in range(1, count - 1):
        slot = t % 2
        copy_rows(value, batch, head, start, v_full.index(slot), v.index(slot), True)
        start = tile_start(list_ptr, t + 1, count, tile_k, SPLIT)
        weights, acc, top, total, decay = add_tile(
            q,
            k,
            v.index(slot),
            v.index(1 - slot),
            k_full,
            t & 1,
            v_full.index(slot),
            (t // 2) & 1,
            v_full.index(1 - slot),
            ((t - 1) // 2) & 1,
            key,
            batch,
            head,
            start,
            True,
            weights,
            acc,
            top,
            total,
            decay,
            valid,
            scale_log2,
            MASK,
            MAY_BE_EMPTY,
        )
        if MAY_BE_EMPTY:
            valid = tile_valid(size_ptr, start, key_length, BLOCK_K, True)
    last = count - 1
    slot = last % 2
    if count > 1:  # on its own: without sizes only the last tile can need a mask
        copy_rows(value, batch, head, start, v_full.index(slot), v.index(slot), True)
        valid = masked_valid(size_ptr, start, key_length, uniform, BLOCK_K, MASK)
        weights, acc, top, total, decay = add_tile(
            q,
            k,
            v.index(slot),
            v.index(1 - slot),
            k_full,
            last & 1,
            v_full.index(slot),
            (last // 2) & 1,
            v_full.index(1 - slot),
            ((last - 1) // 2) & 1,
            key,
            batch,
            head,
            0,
            False,
            weights,
            acc,
            top,
            total,
            decay,
            valid,
            scale_log2,
            LAST_MASK,
            MAY_BE_EMPTY,
        )
    if FEATURE_MAP is not None:
        state_full = barriers(2, 1)
        weight_full = state_full
        if weight is not None:
            weight_full = barriers(2, 1)
        fence_async_shared()
        state_pair = gl.program_id(1)
        state_block = start_q // BLOCK_Q * state_step
        if weight is not None:
            copy_state(state, state_pair, state_block, 0, state_full.index(0), k, head_dim)
            if head_dim == 128:
                copy_state(state, state_pair, state_block, 64, state_full.index(1), v.index(1 - slot), head_dim)
        else:
            copy_state_rows(state, state_pair, state_block, 0, state_full.index(0), k, head_dim)
            if head_dim == 128:
                copy_state_rows(state, state_pair, state_block, 64, state_full.index(1), v.index(1 - slot), head_dim)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
    mbarrier.wait(v_full.index(slot), (last // 2) & 1)
    acc = warpgroup_mma(weights, v.index(slot), acc)

    result, lse = finished(acc, top, total, kept, row_layout)
    token = start_q + gl.arange(0, rows, row_layout)
    gl.store(lse_ptr + pair * query_length + token, lse, mask=token < query_length)
    out = q
    if FEATURE_MAP is not None:
        norm_ptr += (
            gl.program_id(1).to(gl.int64) * norm_pair_stride + (start_q // BLOCK_Q).to(gl.int64) * norm_block_stride
        )
        mix_ptr = None
        if mix is not None:
            mix_ptr = mix_of_block(mix, pair, start_q // BLOCK_Q)
            result *= gl.load(mix_ptr)
        if weight is not None:
            copy_weight(weight, 0, weight_full.index(0), v.index(slot), head_dim)
            left, right, inverse, share = features_and_inverse(q, norm_ptr, mix_ptr, FEATURE_MAP)
            if head_dim == 128:
                copy_weight(weight, 64, weight_full.index(1), q, head_dim)
            result = add_columns(
                result, left, right, inverse, k, state_full.index(0), v.index(slot), weight_full.index(0), head_dim
            )
            if head_dim == 128:
                result = add_columns(
                    result,
                    left,
                    right,
                    inverse,
                    v.index(1 - slot),
                    state_full.index(1),
                    q,
                    weight_full.index(1),
                    head_dim,
                )
        else:
            left, right, inverse, share = features_and_inverse(q, norm_ptr, mix_ptr, FEATURE_MAP)
            upper = reinterpret(k, gl.bfloat16, [HALF_WIDTH, head_dim], tile_layout)
            lower = reinterpret(v.index(1 - slot), gl.bfloat16, [HALF_WIDTH, head_dim], tile_layout)
            mbarrier.wait(state_full.index(0), 0)
            if head_dim == 128:
                mbarrier.wait(state_full.index(1), 0)
            result = add_projected(result, left, right, inverse, upper, lower)
        result = add_constants(result, share, mean, gl.program_id(1), start_q // BLOCK_Q, bias_ptr)
        out = k
    store_rows(output, batch, head, start_q, result, out)
    tma.store_wait(0)
    if FEATURE_MAP is not None:
        retire(state_full)
        if weight is not None:
            retire(weight_full)
    retire(qk_full)
    retire(v_full)
