"""The gradient of queries on Hopper, over the rows' lists: dQ = scale * dS K, with dS of `dkdv_kernel`.

Every output tile belongs to one warpgroup that adds in list order: no atomics, the same bits each time. A producer warp
fetches tiles of keys and values for one or two such warpgroups of 64 queries.
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

from foveal.kernels.hopper.forward_kernel import tile_start, tile_valid
from foveal.kernels.hopper.raster import return_gradient
from foveal.kernels.hopper.tiles import (
    barriers,
    clear_rows,
    copy_rows,
    keep_columns,
    keep_tail,
    retire,
    scheduling_fence,
    store_rows,
)
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit
def load_key_tiles(
    key, value, batch, head, list_ptr, count, k, v, k_full, k_empty, v_full, v_empty,
    SPLIT: gl.constexpr, K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles of K and V through their rings."""
    tile_k: gl.constexpr = key.block_type.shape[2]
    for t in range(count):
        k_slot, v_slot = t % K_SLOTS, t % V_SLOTS
        start = tile_start(list_ptr, t, count, tile_k, SPLIT)
        mbarrier.wait(k_empty.index(k_slot), (t // K_SLOTS + 1) & 1)
        copy_rows(key, batch, head, start, k_full.index(k_slot), k.index(k_slot), True)
        mbarrier.wait(v_empty.index(v_slot), (t // V_SLOTS + 1) & 1)
        copy_rows(value, batch, head, start, v_full.index(v_slot), v.index(v_slot), True)


@gluon.jit
def sum_query_gradient(
    q, g, q_full, k, v, k_full, k_empty, v_full, v_empty, cleared, added_full, grad_query, statistics_ptr, list_ptr,
    size_ptr, video, video_strides, video_length, pair, batch, head, start_q, query_length, key_length, count, scale,
    scale_log2, uniform,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, HAS_SIZES: gl.constexpr, TAIL: gl.constexpr, K_SLOTS: gl.constexpr,
    V_SLOTS: gl.constexpr, ADD: gl.constexpr, PLACE: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: dQ of 64 queries; ADD adds it to what stands there.

    PLACE is "alone", or of two that share tiles "first" or "second": the first clears padding keys, the second
    waits until they are clear, at `cleared`, a barrier a slot (anything where no one waits).
    """
    tile_k: gl.constexpr = k.shape[1]
    head_dim: gl.constexpr = k.shape[2]
    SPLIT: gl.constexpr = BLOCK_K // tile_k
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_k, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = gl.arange(0, 64, gl.SliceLayout(1, score_layout))
    lse = gl.expand_dims(gl.load(statistics_ptr + row), 1)
    delta = gl.expand_dims(gl.load(statistics_ptr + 64 + row), 1)
    zeros = gl.zeros([64, tile_k], gl.float32, score_layout)
    grad_q = gl.zeros([64, head_dim], gl.float32, acc_layout)
    # Without sizes only the last tile can be partial. With them, sizes are fetched one tile ahead, list entries two.
    valid = tile_k
    next_start = 0
    if HAS_SIZES:
        valid = tile_valid(size_ptr, tile_start(list_ptr, 0, count, tile_k, SPLIT), key_length, BLOCK_K, HAS_SIZES)
        next_start = tile_start(list_ptr, 1, count, tile_k, SPLIT)
        last_valid = valid
    else:
        last_valid = key_length - tile_start(list_ptr, gl.maximum(count - 1, 0), count, tile_k, SPLIT)
    clearings = 0  # a bit a slot: whether it was cleared an odd number of times
    mbarrier.wait(q_full, 0)
    for t in range(count):
        k_slot, v_slot = t % K_SLOTS, t % V_SLOTS
        mbarrier.wait(k_full.index(k_slot), (t // K_SLOTS) & 1)
        scores = warpgroup_mma(q, k.index(k_slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_slot), (t // V_SLOTS) & 1)
        products = warpgroup_mma(g, v.index(v_slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        next_valid = valid
        if HAS_SIZES:
            next_valid = tile_valid(size_ptr, next_start, key_length, BLOCK_K, HAS_SIZES)
            next_start = tile_start(list_ptr, t + 2, count, tile_k, SPLIT)
        elif t == count - 1:
            valid = last_valid
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * scale_log2 - lse)
        scheduling_fence(t)
        products, p = warpgroup_mma_wait(0, deps=[products, p])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        ds = p * (products - delta)
        if TAIL:
            ds = keep_tail(ds, uniform, 0.0)
        else:
            if valid < tile_k:
                ds = keep_columns(ds, valid, 0.0)
                if HAS_SIZES:
                    if PLACE == "second":
                        mbarrier.wait(cleared.index(k_slot), (clearings >> k_slot) & 1)
                        clearings ^= 1 << k_slot
                    else:
                        clear_rows(k.index(k_slot), valid)
                    if PLACE == "first":
                        mbarrier.arrive(cleared.index(k_slot), count=1)
        ds = gl.convert_layout(ds.to(q.dtype), operand_layout)
        sums = warpgroup_mma(ds, k.index(k_slot), grad_q, is_async=True)
        grad_q = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        valid = next_valid
    grad_q *= scale
    if ADD:
        copy_rows(grad_query, batch, head, start_q, added_full, g, True)
        mbarrier.wait(added_full, 0)
        grad_q += g.load(acc_layout).to(gl.float32)
    if video is not None:
        return_gradient(
            grad_q, q, grad_query, video_strides, video[0], video[1], video[2], batch, head, pair, start_q,
            query_length, video_length, video_length, BLOCK_Q,
        )  # fmt: skip
    else:
        store_rows(grad_query, batch, head, start_q, grad_q, q)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["query_length", "key_length", "width", "size_stride", "uniform", "video_length"])
def block_sparse_dq_kernel(
    query, key, value, grad, grad_query, statistics_ptr, critical_ptr, count_ptr, size_ptr,
    video, grad_query_strides, video_length, scale, scale_log2, query_length, key_length, width, size_stride, uniform,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, K_SLOTS: gl.constexpr,
    V_SLOTS: gl.constexpr, HAS_SIZES: gl.constexpr, TAIL: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Grid (query tiles / CONSUMERS, H, B). One producer warp and CONSUMERS (1 or 2) warpgroups of 64 queries.

    ADD adds to what stands in grad_query. With TAIL each key block has `uniform` keys, eight less than a tile at least,
    and zeros behind them. With a `video` (gradients of pooled queries, places, sizes) tensors stand in tile order and
    grad_query, a pointer then, in raster order.
    """
    await_previous()
    head_dim: gl.constexpr = query.block_type.shape[3]
    tile_k: gl.constexpr = key.block_type.shape[2]
    dtype: gl.constexpr = query.dtype
    SPLIT: gl.constexpr = BLOCK_K // tile_k
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    start_q = gl.program_id(0) * 64 * CONSUMERS
    head, batch = gl.program_id(1), gl.program_id(2)
    pair = (batch * gl.num_programs(1) + head).to(gl.int64)
    num_query_blocks = gl.cdiv(query_length, BLOCK_Q)
    row = pair * num_query_blocks + start_q // BLOCK_Q
    statistics_ptr += (pair * num_query_blocks * BLOCK_Q + start_q) * 2
    q = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, head_dim], tile_layout)
    g = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, head_dim], tile_layout)
    k = gl.allocate_shared_memory(dtype, [K_SLOTS, tile_k, head_dim], tile_layout)
    v = gl.allocate_shared_memory(dtype, [V_SLOTS, tile_k, head_dim], tile_layout)
    q_full = barriers(1 + CONSUMERS, 1)  # one of Q and dO, and for ADD one a consumer
    k_full, k_empty = barriers(K_SLOTS, 1), barriers(K_SLOTS, CONSUMERS)
    v_full, v_empty = barriers(V_SLOTS, 1), barriers(V_SLOTS, CONSUMERS)
    cleared = k_empty
    if HAS_SIZES and CONSUMERS == 2:
        cleared = barriers(K_SLOTS, 1)
    fence_async_shared()
    mbarrier.expect(q_full.index(0), CONSUMERS * (query.block_type.nbytes + grad.block_type.nbytes))
    for w in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(query, [batch, head, start_q + 64 * w, 0], q_full.index(0), q.index(w))
        tma.async_copy_global_to_shared(grad, [batch, head, start_q + 64 * w, 0], q_full.index(0), g.index(w))

    list_ptr = critical_ptr + row * width
    if HAS_SIZES:
        size_ptr += batch * size_stride
    else:
        size_ptr = count_ptr
    count = gl.load(count_ptr + row) * SPLIT
    if SPLIT > 1 and not HAS_SIZES:
        # The last key block may end before its second tile.
        last_start = tile_start(list_ptr, count - 1, count, tile_k, SPLIT)
        count = gl.where((count > 0) & (last_start >= key_length), count - 1, count)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (sum_query_gradient, (
                q.index(0), g.index(0), q_full.index(0), k, v, k_full, k_empty, v_full, v_empty,
                cleared, q_full.index(1), grad_query, statistics_ptr, list_ptr, size_ptr, video, grad_query_strides,
                video_length, pair, batch, head, start_q, query_length, key_length, count, scale, scale_log2, uniform,
                BLOCK_Q, BLOCK_K, HAS_SIZES, TAIL, K_SLOTS, V_SLOTS, ADD, "alone",
            )),
            (load_key_tiles, (
                key, value, batch, head, list_ptr, count, k, v, k_full, k_empty, v_full, v_empty,
                SPLIT, K_SLOTS, V_SLOTS,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (sum_query_gradient, (
                q.index(0), g.index(0), q_full.index(0), k, v, k_full, k_empty, v_full, v_empty,
                cleared, q_full.index(1), grad_query, statistics_ptr, list_ptr, size_ptr, video, grad_query_strides,
                video_length, pair, batch, head, start_q, query_length, key_length, count, scale, scale_log2, uniform,
                BLOCK_Q, BLOCK_K, HAS_SIZES, TAIL, K_SLOTS, V_SLOTS, ADD, "first",
            )),
            (sum_query_gradient, (
                q.index(1), g.index(1), q_full.index(0), k, v, k_full, k_empty, v_full, v_empty,
                cleared, q_full.index(2), grad_query, statistics_ptr + 128, list_ptr, size_ptr, video,
                grad_query_strides, video_length, pair, batch, head, start_q + 64, query_length, key_length, count,
                scale, scale_log2, uniform, BLOCK_Q, BLOCK_K, HAS_SIZES, TAIL, K_SLOTS, V_SLOTS, ADD, "second",
            )),
            (load_key_tiles, (
                key, value, batch, head, list_ptr, count, k, v, k_full, k_empty, v_full, v_empty,
                SPLIT, K_SLOTS, V_SLOTS,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    retire(q_full)
    retire(k_full)
    retire(k_empty)
    retire(v_full)
    retire(v_empty)
    if HAS_SIZES and CONSUMERS == 2:
        retire(cleared)
