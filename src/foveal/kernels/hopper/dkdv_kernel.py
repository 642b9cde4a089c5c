"""The gradients of keys and values on Hopper, over the columns' lists; and the row statistics of the whole backward.

With P = exp(S - LSE), dP = dO V^T and dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE:

    dK = scale * dS^T Q,    dV = P^T dO.

Every output tile belongs to one program that adds in list order: no atomics, the same bits each time. Everything is cut
into tiles of 64 rows, whatever the block sizes. A product whose result ordinary code reads starts and is waited for in
the same iteration: with one in flight over the back edge ptxas serializes them all.
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
from foveal.kernels.hopper.gluon_names import aggregate, async_load, async_store, base_value, reinterpret
from foveal.kernels.hopper.linear_branch import HALF_WIDTH, load_row
from foveal.kernels.hopper.linear_gradients import (
    features,
    features_backward,
    halves_of,
    store_halves,
)
from foveal.kernels.hopper.raster import return_gradient
from foveal.kernels.hopper.tiles import (
    barriers,
    copy_rows,
    keep_rows,
    retire,
    store_rows,
)
from foveal.kernels.triton.await_previous import await_previous

# Row statistics lie tile by tile, for each 64 queries their 64 LSEs in log2 units and then their 64 deltas, so that
# one copy brings both.


@gluon.jit(do_not_specialize=["query_length", "num_tiles"])
def row_statistics_kernel(lse_ptr, delta_ptr, statistics_ptr, query_length, num_tiles):
    """Grid (num_tiles / 4, B * H). Rows past the end, and rows without keys, get an LSE that makes P zero."""
    await_previous()
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    row = gl.program_id(0) * 256 + gl.arange(0, 256, layout)
    pair = gl.program_id(1).to(gl.int64)
    inside = row < query_length
    lse = gl.load(lse_ptr + pair * query_length + row, mask=inside, other=-float("inf"))
    delta = gl.load(delta_ptr + pair * query_length + row, mask=inside, other=0.0)
    lse = gl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    place = statistics_ptr + pair * num_tiles * 128 + row // 64 * 128 + row % 64
    gl.store(place, lse, mask=row < num_tiles * 64)
    gl.store(place + 64, delta, mask=row < num_tiles * 64)


@aggregate
class QuerySource:
    """Where query tiles come from: descriptors of Q, dO and the row statistics, which head, and its first tile."""

    query: base_value
    grad: base_value
    statistics: base_value
    batch: gl.tensor
    head: gl.tensor
    first_tile: gl.tensor

    @gluon.constexpr_function
    def __init__(self, query, grad, statistics, batch, head, first_tile):
        self.query, self.grad, self.statistics = query, grad, statistics
        self.batch, self.head, self.first_tile = batch, head, first_tile


@aggregate
class QueryRing:
    """Query tiles in shared memory: Q and dO [SLOTS, 64, D], row statistics [SLOTS, 128], a barrier a slot."""

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, g, rows, full, SLOTS):
        self.q, self.g, self.rows, self.full, self.SLOTS = q, g, rows, full, gl.constexpr(SLOTS)

    @gluon.jit
    def fill(self, slot, source, tile, wanted):
        """Starts the copies of one query tile into a slot that nobody reads any more."""
        BYTES: gl.constexpr = (
            source.query.block_type.nbytes + source.grad.block_type.nbytes + source.statistics.block_type.nbytes
        )
        barrier = self.full.index(slot)
        where = [source.batch, source.head, tile * 64, 0]
        mbarrier.expect(barrier, BYTES, pred=wanted)
        async_load(source.query, where, barrier, self.q.index(slot), pred=wanted)
        async_load(source.grad, where, barrier, self.g.index(slot), pred=wanted)
        first = (source.first_tile + tile) * 128
        async_load(source.statistics, [first], barrier, self.rows.index(slot), pred=wanted)

    @gluon.jit
    def wait(self, t):
        """Waits until the t-th tile has arrived."""
        mbarrier.wait(self.full.index(t % self.SLOTS), (t // self.SLOTS) & 1)


@gluon.jit
def statistic(rows, WHICH: gl.constexpr, layout: gl.constexpr):
    """LSE (0) or delta (1) of the query tile whose row statistics lie in shared memory."""
    return reinterpret(rows, gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(WHICH).load(layout)


@gluon.jit
def add_queries(queries, slot, v, scores, grad_k, grad_v, scale_log2):
    """Starts dV += P^T dO and dK += dS^T Q for one query tile, given its scores [64 keys, 64 queries]."""
    q, g, rows = queries.q.index(slot), queries.g.index(slot), queries.rows.index(slot)
    score_layout: gl.constexpr = scores.type.layout
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, grad_k.type.layout, 2)
    zeros = gl.zeros([64, 64], gl.float32, score_layout)
    products = warpgroup_mma(v, g.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = statistic(rows, 0, column_layout)
    delta = statistic(rows, 1, column_layout)
    p = gl.exp2(scores * scale_log2 - gl.expand_dims(lse, 0))
    products, p = warpgroup_mma_wait(0, deps=[products, p])
    grad_v = warpgroup_mma(gl.convert_layout(p.to(q.dtype), operand_layout), g, grad_v, is_async=True)
    ds = (p * (products - gl.expand_dims(delta, 0))).to(q.dtype)
    grad_k = warpgroup_mma(gl.convert_layout(ds, operand_layout), q, grad_k, is_async=True)
    return grad_k, grad_v


@gluon.jit
def add_key_branch(
    k,
    v,
    grad_k,
    grad_v,
    state_0,
    state_1,
    staging,
    norm_ptr,
    mean_ptr,
    grad_key,
    grad_value,
    batch,
    head,
    start,
    valid,
    FEATURE_MAP: gl.constexpr,
):
    """Adds dV = phi(K) G and dK through dphi(K) = (V - m) G^T + z, and starts the copies of both sums to memory.

    state_0 and state_1 hold the first and last 64 rows of G (the same at head_dim 64). One after the other, for the
    registers. Padding keys spoil only their own rows, which are zeroed.
    """
    rows: gl.constexpr = k.shape[0]
    head_dim: gl.constexpr = k.shape[1]
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, grad_v.type.layout, 2)
    left, right = features(k, half, FEATURE_MAP)
    grad_v = warpgroup_mma(gl.convert_layout(left.to(gl.bfloat16), operand), state_0, grad_v)
    if head_dim == 128:
        grad_v = warpgroup_mma(gl.convert_layout(right.to(gl.bfloat16), operand), state_1, grad_v)
    store_rows(grad_value, batch, head, start, keep_rows(grad_v, valid), staging)
    v_narrow = reinterpret(v, gl.bfloat16, [rows, head_dim], v.layout)
    for i in gl.static_range(head_dim // HALF_WIDTH):
        x = v.slice(i * HALF_WIDTH, HALF_WIDTH, 1).load(half).to(gl.float32)
        x -= load_row(mean_ptr + i * HALF_WIDTH, HALF_WIDTH, half)
        v_narrow.slice(i * HALF_WIDTH, HALF_WIDTH, 1).store(x.to(gl.bfloat16))
    fence_async_shared()
    zeros = gl.zeros([rows, HALF_WIDTH], gl.float32, half)
    grad_left = warpgroup_mma(v_narrow, state_0.permute((1, 0)), zeros, use_acc=False)
    grad_left += load_row(norm_ptr, HALF_WIDTH, half)
    grad_right = grad_left
    if head_dim == 128:
        grad_right = warpgroup_mma(v_narrow, state_1.permute((1, 0)), zeros, use_acc=False)
        grad_right += load_row(norm_ptr + HALF_WIDTH, HALF_WIDTH, half)
    left, right = features(k, half, FEATURE_MAP)
    left, right = features_backward(left, right, grad_left, grad_right, head_dim, FEATURE_MAP)
    k_left, k_right = halves_of(grad_k, half)
    store_halves(k, keep_rows(k_left + left, valid), keep_rows(k_right + right, valid))
    async_store(grad_key, [batch, head, start, 0], k)


@gluon.jit(
    do_not_specialize=[
        "query_length",
        "key_length",
        "size_stride",
        "state_step",
        "norm_pair_stride",
        "norm_block_stride",
        "video_length",
        "video_key_length",
    ]
)
def block_sparse_dkdv_kernel(
    query,
    key,
    value,
    grad,
    statistics,
    grad_key,
    grad_value,
    offset_ptr,
    count_ptr,
    row_ptr,
    size_ptr,
    grad_state,
    grad_norm_ptr,
    mean_ptr,
    video,
    grad_key_strides,
    grad_value_strides,
    video_length,
    video_key_length,
    scale,
    scale_log2,
    query_length,
    key_length,
    size_stride,
    state_step,
    norm_pair_stride,
    norm_block_stride,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
    HAS_SIZES: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
):
    """Grid (key tiles, H, B). K and V stay in shared memory, query tiles go through a ring of SLOTS, which is 2.

    With a FEATURE_MAP the linear branch's part is added, from G (grad_state) and z (grad_norm_ptr) of the key block,
    and m (mean_ptr) of the head; `state_step` is 0 where all key blocks share one, else 1. With a `video` (gradients of
    pooled keys and values, places, sizes) tensors stand in tile order, and the gradients, pointers then, in raster
    order.
    """
    await_previous()
    head_dim: gl.constexpr = query.block_type.shape[3]
    dtype: gl.constexpr = query.dtype
    SPLIT: gl.constexpr = BLOCK_Q // 64
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])

    start_k = gl.program_id(0) * 64
    head, batch = gl.program_id(1), gl.program_id(2)
    pair = batch * gl.num_programs(1) + head
    column = pair.to(gl.int64) * gl.cdiv(key_length, BLOCK_K) + start_k // BLOCK_K
    all_tiles = pair * gl.cdiv(query_length, BLOCK_Q) * SPLIT
    k = gl.allocate_shared_memory(dtype, [64, head_dim], tile_layout)
    v = gl.allocate_shared_memory(dtype, [64, head_dim], tile_layout)
    q = gl.allocate_shared_memory(dtype, [SLOTS, 64, head_dim], tile_layout)
    g = gl.allocate_shared_memory(dtype, [SLOTS, 64, head_dim], tile_layout)
    rows = gl.allocate_shared_memory(gl.float32, [SLOTS, 128], statistics.layout)
    kv_full, full = barriers(2, 1), barriers(SLOTS, 1)
    fence_async_shared()
    copy_rows(key, batch, head, start_k, kv_full.index(0), k, True)
    copy_rows(value, batch, head, start_k, kv_full.index(1), v, True)
    source = QuerySource(query, grad, statistics, batch, head, all_tiles)
    queries = QueryRing(q, g, rows, full, SLOTS)
    list_ptr = row_ptr + gl.load(offset_ptr + column)
    listed = gl.load(count_ptr + column) * SPLIT
    count = gl.maximum(listed, 1)  # a key block that nobody attends to computes one tile and throws it away
    for i in gl.static_range(SLOTS):
        first = tile_start(list_ptr, i, listed, 1, SPLIT)
        queries.fill(i, source, first, i < count)
    zeros = gl.zeros([64, 64], gl.float32, score_layout)
    grad_k = gl.zeros([64, head_dim], gl.float32, acc_layout)
    grad_v = gl.zeros([64, head_dim], gl.float32, acc_layout)
    mbarrier.wait(kv_full.index(0), 0)
    queries.wait(0)
    scores = warpgroup_mma(k, q.index(0).permute((1, 0)), zeros, use_acc=False)
    mbarrier.wait(kv_full.index(1), 0)
    for t in range(count - 1):
        slot, following = t % SLOTS, (t + 1) % SLOTS
        refill = tile_start(list_ptr, t + SLOTS, count, 1, SPLIT)
        sums_k, sums_v = add_queries(queries, slot, v, scores, grad_k, grad_v, scale_log2)
        queries.wait(t + 1)
        scores = warpgroup_mma(k, q.index(following).permute((1, 0)), zeros, use_acc=False, is_async=True)
        grad_v, grad_k = warpgroup_mma_wait(1, deps=[sums_v, sums_k])
        queries.fill(slot, source, refill, t + SLOTS < count)
        scores = warpgroup_mma_wait(0, deps=[scores])
    slot = (count - 1) % SLOTS
    if FEATURE_MAP is not None:
        state_full = barriers(1, 1)
        fence_async_shared()
        state_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        state_0 = reinterpret(q.index(count % SLOTS), gl.bfloat16, [HALF_WIDTH, head_dim], state_layout)
        state_1 = reinterpret(g.index(count % SLOTS), gl.bfloat16, [HALF_WIDTH, head_dim], state_layout)
        block = start_k // BLOCK_K
        mbarrier.expect(state_full.index(0), grad_state.block_type.nbytes * (head_dim // HALF_WIDTH))
        async_load(grad_state, [pair, block * state_step, 0, 0], state_full.index(0), state_0)
        if head_dim == 128:
            async_load(grad_state, [pair, block * state_step, HALF_WIDTH, 0], state_full.index(0), state_1)
    sums_k, sums_v = add_queries(queries, slot, v, scores, grad_k, grad_v, scale_log2)
    grad_v, grad_k = warpgroup_mma_wait(0, deps=[sums_v, sums_k])
    # Padding keys stay in their own rows of S^T, so they need no mask before the end.
    valid = 64
    if HAS_SIZES:
        valid = tile_valid(size_ptr + batch * size_stride, start_k, key_length, BLOCK_K, HAS_SIZES)
    if FEATURE_MAP is None:
        valid = gl.where(listed > 0, valid, 0)
        grad_k = keep_rows(grad_k * scale, valid)
        grad_v = keep_rows(grad_v, valid)
        if video is not None:
            return_gradient(
                grad_k,
                k,
                grad_key,
                grad_key_strides,
                video[0],
                video[2],
                video[3],
                batch,
                head,
                pair.to(gl.int64),
                start_k,
                query_length,
                video_length,
                video_key_length,
                BLOCK_K,
            )
            return_gradient(
                grad_v,
                v,
                grad_value,
                grad_value_strides,
                video[1],
                video[2],
                video[3],
                batch,
                head,
                pair.to(gl.int64),
                start_k,
                query_length,
                video_length,
                video_key_length,
                BLOCK_K,
            )
        else:
            store_rows(grad_key, batch, head, start_k, grad_k, k)
            store_rows(grad_value, batch, head, start_k, grad_v, v)
    else:
        grad_norm_ptr += pair.to(gl.int64) * norm_pair_stride + block.to(gl.int64) * norm_block_stride
        grad_k = gl.where(listed > 0, grad_k * scale, 0.0)
        grad_v = gl.where(listed > 0, grad_v, 0.0)
        mbarrier.wait(state_full.index(0), 0)
        add_key_branch(
            k,
            v,
            grad_k,
            grad_v,
            state_0,
            state_1,
            q.index(slot),
            grad_norm_ptr,
            mean_ptr + pair.to(gl.int64) * head_dim,
            grad_key,
            grad_value,
            batch,
            head,
            start_k,
            valid,
            FEATURE_MAP,
        )
    tma.store_wait(0)
    if FEATURE_MAP is not None:
        retire(state_full)
    retire(kv_full)
    retire(full)
