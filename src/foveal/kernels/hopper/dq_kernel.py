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

from foveal.kernels.hopper.gluon_names import aggregate, async_load
from foveal.kernels.hopper.raster import return_gradient
from foveal.kernels.hopper.ring import key_walk, ring
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


@aggregate
class QueryRows:
    """The 64 queries of one consumer warpgroup.

    q, g: Q and dO in shared memory; both arrive at the barrier `full`. statistics_ptr: 64 LSEs and then 64 deltas.
    batch, head, pair, start: which queries these are. query_length: tokens of a head.
    """

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    statistics_ptr: gl.tensor
    batch: gl.tensor
    head: gl.tensor
    pair: gl.tensor
    start: gl.tensor
    query_length: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q, g, full, statistics_ptr, batch, head, pair, start, query_length):
        self.q, self.g, self.full, self.statistics_ptr = q, g, full, statistics_ptr
        self.batch, self.head, self.pair, self.start, self.query_length = batch, head, pair, start, query_length


@aggregate
class Scores:
    """What turns a product of Q and K into dS: the softmax scale, also in log2 units, and how padding is masked.

    With TAIL each key block has `uniform` keys, eight fewer than a tile at most, and zeros behind them.
    """

    scale: gl.tensor
    scale_log2: gl.tensor
    uniform: gl.tensor
    TAIL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, scale, scale_log2, uniform, TAIL):
        self.scale, self.scale_log2, self.uniform, self.TAIL = scale, scale_log2, uniform, gl.constexpr(TAIL)


@gluon.jit
def load_key_tiles(key, value, batch, head, walk, k, v):
    """The producer warp: tiles of K and V through their rings."""
    for t in range(walk.count):
        start = walk.start(t)
        k.fill(t, key, batch, head, start)
        v.fill(t, value, batch, head, start)


@gluon.jit
def sum_query_gradient(
    rows,
    walk,
    k,
    v,
    cleared,
    added_full,
    target,
    video,
    strides,
    video_length,
    score,
    BLOCK_Q: gl.constexpr,
    ADD: gl.constexpr,
    PLACE: gl.constexpr,
):
    """One consumer warpgroup: dQ of 64 queries; ADD adds it to what stands there.

    With a `video` (gradients of pooled queries, places, sizes) tensors stand in tile order and the target, a pointer
    with strides, in raster order with `video_length` tokens. These travel outside of an aggregate, which would unwrap a
    stride that is 1.

    PLACE is "alone", or of two that share tiles "first" or "second": the first clears padding keys, the second
    waits until they are clear, at `cleared`, a barrier a slot (anything where no one waits).
    """
    tile_k: gl.constexpr = k.tiles.shape[1]
    head_dim: gl.constexpr = k.tiles.shape[2]
    q, g = rows.q, rows.g
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_k, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = gl.arange(0, 64, gl.SliceLayout(1, score_layout))
    lse = gl.expand_dims(gl.load(rows.statistics_ptr + row), 1)
    delta = gl.expand_dims(gl.load(rows.statistics_ptr + 64 + row), 1)
    zeros = gl.zeros([64, tile_k], gl.float32, score_layout)
    grad_q = gl.zeros([64, head_dim], gl.float32, acc_layout)
    # Without sizes only the last tile can be partial. With them, sizes are fetched one tile ahead, list entries two.
    valid = tile_k
    next_start = 0
    if walk.HAS_SIZES:
        valid = walk.valid(walk.start(0))
        next_start = walk.start(1)
        last_valid = valid
    else:
        last_valid = walk.key_length - walk.start(gl.maximum(walk.count - 1, 0))
    clearings = 0  # a bit a slot: whether it was cleared an odd number of times
    mbarrier.wait(rows.full, 0)
    for t in range(walk.count):
        k.wait(t)
        scores = warpgroup_mma(q, k.tile(t).permute((1, 0)), zeros, use_acc=False, is_async=True)
        v.wait(t)
        products = warpgroup_mma(g, v.tile(t).permute((1, 0)), zeros, use_acc=False, is_async=True)
        next_valid = valid
        if walk.HAS_SIZES:
            next_valid = walk.valid(next_start)
            next_start = walk.start(t + 2)
        elif t == walk.count - 1:
            valid = last_valid
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * score.scale_log2 - lse)
        scheduling_fence(t)
        products, p = warpgroup_mma_wait(0, deps=[products, p])
        v.release(t)
        ds = p * (products - delta)
        if score.TAIL:
            ds = keep_tail(ds, score.uniform, 0.0)
        else:
            if valid < tile_k:
                ds = keep_columns(ds, valid, 0.0)
                if walk.HAS_SIZES:
                    slot = t % k.SLOTS
                    if PLACE == "second":
                        mbarrier.wait(cleared.index(slot), (clearings >> slot) & 1)
                        clearings ^= 1 << slot
                    else:
                        clear_rows(k.tile(t), valid)
                    if PLACE == "first":
                        mbarrier.arrive(cleared.index(slot), count=1)
        ds = gl.convert_layout(ds.to(q.dtype), operand_layout)
        sums = warpgroup_mma(ds, k.tile(t), grad_q, is_async=True)
        grad_q = warpgroup_mma_wait(0, deps=[sums])
        k.release(t)
        valid = next_valid
    grad_q *= score.scale
    if ADD:
        copy_rows(target, rows.batch, rows.head, rows.start, added_full, g, True)
        mbarrier.wait(added_full, 0)
        grad_q += g.load(acc_layout).to(gl.float32)
    if video is not None:
        return_gradient(
            grad_q,
            q,
            target,
            strides,
            video[0],
            video[1],
            video[2],
            rows.batch,
            rows.head,
            rows.pair,
            rows.start,
            rows.query_length,
            video_length,
            video_length,
            BLOCK_Q,
        )
    else:
        store_rows(target, rows.batch, rows.head, rows.start, grad_q, q)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["query_length", "key_length", "width", "size_stride", "uniform", "video_length"])
def block_sparse_dq_kernel(
    query,
    key,
    value,
    grad,
    grad_query,
    statistics_ptr,
    critical_ptr,
    count_ptr,
    size_ptr,
    video,
    grad_query_strides,
    video_length,
    scale,
    scale_log2,
    query_length,
    key_length,
    width,
    size_stride,
    uniform,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr,
    K_SLOTS: gl.constexpr,
    V_SLOTS: gl.constexpr,
    HAS_SIZES: gl.constexpr,
    TAIL: gl.constexpr,
    ADD: gl.constexpr,
):
    """Grid (query tiles / CONSUMERS, H, B). One producer warp and CONSUMERS (1 or 2) warpgroups of 64 queries.

    ADD adds to what stands in grad_query. With TAIL each key block has `uniform` keys, eight less than a tile at least,
    and zeros behind them. With a `video` (gradients of pooled queries, places, sizes) tensors stand in tile order and
    grad_query, a pointer then, in raster order.
    """
    await_previous()
    head_dim: gl.constexpr = query.block_type.shape[3]
    tile_k: gl.constexpr = key.block_type.shape[2]
    dtype: gl.constexpr = query.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    start_q = gl.program_id(0) * 64 * CONSUMERS
    head, batch = gl.program_id(1), gl.program_id(2)
    pair = (batch * gl.num_programs(1) + head).to(gl.int64)
    num_query_blocks = gl.cdiv(query_length, BLOCK_Q)
    row = pair * num_query_blocks + start_q // BLOCK_Q
    statistics_ptr += (pair * num_query_blocks * BLOCK_Q + start_q) * 2
    q = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, head_dim], tile_layout)
    g = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, head_dim], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [K_SLOTS, tile_k, head_dim], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [V_SLOTS, tile_k, head_dim], tile_layout)
    q_full = barriers(1 + CONSUMERS, 1)  # one of Q and dO, and for ADD one a consumer
    k, v = ring(k_tiles, CONSUMERS), ring(v_tiles, CONSUMERS)
    cleared = k.empty
    if HAS_SIZES and CONSUMERS == 2:
        cleared = barriers(K_SLOTS, 1)
    fence_async_shared()
    mbarrier.expect(q_full.index(0), CONSUMERS * (query.block_type.nbytes + grad.block_type.nbytes))
    for w in gl.static_range(CONSUMERS):
        async_load(query, [batch, head, start_q + 64 * w, 0], q_full.index(0), q.index(w))
        async_load(grad, [batch, head, start_q + 64 * w, 0], q_full.index(0), g.index(w))

    list_ptr = critical_ptr + row * width
    if HAS_SIZES:
        size_ptr += batch * size_stride
    else:
        size_ptr = count_ptr
    walk = key_walk(list_ptr, size_ptr, gl.load(count_ptr + row), key_length, tile_k, BLOCK_K, HAS_SIZES)
    score = Scores(scale, scale_log2, uniform, TAIL)
    rows = QueryRows(q.index(0), g.index(0), q_full.index(0), statistics_ptr, batch, head, pair, start_q, query_length)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    sum_query_gradient,
                    (
                        rows,
                        walk,
                        k,
                        v,
                        cleared,
                        q_full.index(1),
                        grad_query,
                        video,
                        grad_query_strides,
                        video_length,
                        score,
                        BLOCK_Q,
                        ADD,
                        "alone",
                    ),
                ),
                (load_key_tiles, (key, value, batch, head, walk, k, v)),
            ],
            [1],
            [24],
        )
    else:
        more_ptr, more_start = statistics_ptr + 128, start_q + 64
        more = QueryRows(q.index(1), g.index(1), q_full.index(0), more_ptr, batch, head, pair, more_start, query_length)
        gl.warp_specialize(
            [
                (
                    sum_query_gradient,
                    (
                        rows,
                        walk,
                        k,
                        v,
                        cleared,
                        q_full.index(1),
                        grad_query,
                        video,
                        grad_query_strides,
                        video_length,
                        score,
                        BLOCK_Q,
                        ADD,
                        "first",
                    ),
                ),
                (
                    sum_query_gradient,
                    (
                        more,
                        walk,
                        k,
                        v,
                        cleared,
                        q_full.index(2),
                        grad_query,
                        video,
                        grad_query_strides,
                        video_length,
                        score,
                        BLOCK_Q,
                        ADD,
                        "second",
                    ),
                ),
                (load_key_tiles, (key, value, batch, head, walk, k, v)),
            ],
            [4, 1],
            [240, 24],
        )
    retire(q_full)
    k.retire()
    v.retire()
    if HAS_SIZES and CONSUMERS == 2:
        retire(cleared)
