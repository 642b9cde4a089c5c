"""The forward for query blocks of 128: two warpgroups of 64 queries share the tiles that a producer warp loads.

Programs are persistent, one per SM, so that the producer runs ahead into the next query block. Tiles have 128
keys, gathered from two listed key blocks where these have 64.
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

from foveal.kernels.hopper.forward_kernel import finished, keep_valid, online_softmax_update, sums_by_eight
from foveal.kernels.hopper.linear_branch import (
    add_constants,
    add_projected,
    features_and_inverse,
    mix_of_block,
    times_state,
)
from foveal.kernels.hopper.ring import Ring, ring
from foveal.kernels.hopper.tiles import barriers, keep_columns, store_rows
from foveal.kernels.hopper.wide_tiles import (
    Q_SLOTS,
    QueryBlocks,
    halves,
    listed_halves,
    load_shared_tiles,
    square,
)
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit
def add_wide_tile(
    q,
    k,
    v,
    slot,
    phase,
    before,
    before_phase,
    weights,
    acc,
    top,
    total,
    decay,
    masked,
    valid,
    scale_log2,
    MASK: gl.constexpr,
    MAY_BE_EMPTY: gl.constexpr,
):
    """Scores and softmax of the tile in `slot` of k while acc takes in the one `before` of v; then both rings move on.

    MASK: as in `keep_valid`; with "last" tiles are full unless they are `masked`.
    """
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc_layout: gl.constexpr = acc.type.layout
    zeros = gl.zeros([64, 128], gl.float32, score_layout)
    mbarrier.wait(k.full.index(slot), phase)
    scores = warpgroup_mma(q, k.tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
    mbarrier.wait(v.full.index(before), before_phase)
    sums = warpgroup_mma(weights, v.tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k.empty.index(slot), count=1)
    if MASK == "last":
        if masked:
            scores = keep_columns(scores, valid, -float("inf"))
    else:
        scores = keep_valid(scores, valid, MASK)
    p, top, total, decay = online_softmax_update(scores, top, total, scale_log2, MAY_BE_EMPTY)
    acc, p = warpgroup_mma_wait(0, deps=[sums, p])
    mbarrier.arrive(v.empty.index(before), count=1)
    weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return weights, acc, top, total, decay


@gluon.jit
def attend_queries(part, shared, mean, mix, SPLIT: gl.constexpr, FEATURE_MAP: gl.constexpr, PROJECT: gl.constexpr):
    """One consumer warpgroup: queries 64 * part ... of each query block."""
    q, k, v, output, lse_ptr, norm_ptr, bias_ptr, scale_log2, blocks = shared[:9]
    first_pair, query_length, key_length, norm_pair_stride, norm_block_stride = shared[9:]
    head_dim: gl.constexpr = k.tiles.shape[2]
    SLOTS: gl.constexpr = k.SLOTS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    zeros = gl.zeros([64, 128], gl.float32, score_layout)
    step = 0
    turn = 0
    for item in range(gl.program_id(0), blocks.total, gl.num_programs(0)):
        block, pair = item % blocks.num_blocks, item // blocks.num_blocks
        head, batch = (first_pair + pair) % blocks.heads, (first_pair + pair) // blocks.heads
        kept = blocks.kept(item)
        listed, last_valid = listed_halves(blocks.list_of(item), kept, key_length, SPLIT)
        steps = gl.maximum((listed + 1) // 2, 1)
        last_valid = gl.where(listed % 2 == 0, last_valid + 64, last_valid)
        q_slot = turn % Q_SLOTS
        tile_q = q.tiles.index(q_slot * 2 + part)
        top = gl.full([64], -float("inf"), gl.float32, row_layout)
        total = sums_by_eight(zeros)
        acc = gl.zeros([64, head_dim], gl.float32, acc_layout)
        mbarrier.wait(q.full.index(q_slot), (turn // Q_SLOTS) & 1)
        slot = step % SLOTS
        phase = (step // SLOTS) & 1
        mbarrier.wait(k.full.index(slot), phase)
        scores = warpgroup_mma(tile_q, k.tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        # The block before has left its query slot by now.
        tma.store_wait(0)
        mbarrier.arrive(q.empty.index((turn + Q_SLOTS - 1) % Q_SLOTS), count=1, pred=turn > 0)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k.empty.index(slot), count=1)
        if (steps == 1) & (last_valid < 128):
            scores = keep_columns(scores, last_valid, -float("inf"))
        p, top, total, decay = online_softmax_update(scores, top, total, scale_log2, False)
        weights = gl.convert_layout(p.to(tile_q.dtype), operand_layout)
        for t in range(1, steps):
            before, before_phase = slot, phase
            step += 1
            slot = step % SLOTS
            phase = (step // SLOTS) & 1
            weights, acc, top, total, decay = add_wide_tile(
                tile_q,
                k,
                v,
                slot,
                phase,
                before,
                before_phase,
                weights,
                acc,
                top,
                total,
                decay,
                (t == steps - 1) & (last_valid < 128),
                last_valid,
                scale_log2,
                "last",
                False,
            )
        acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
        mbarrier.wait(v.full.index(slot), phase)
        acc = warpgroup_mma(weights, v.tiles.index(slot), acc)
        mbarrier.arrive(v.empty.index(slot), count=1)
        step += 1
        turn += 1  # noqa: SIM113

        result, lse = finished(acc, top, total, kept, row_layout)
        start = block * 128 + part * 64
        token = start + gl.arange(0, 64, row_layout)
        gl.store(lse_ptr + pair.to(gl.int64) * query_length + token, lse, mask=token < query_length)
        if FEATURE_MAP is not None:
            slot = step % SLOTS
            phase = (step // SLOTS) & 1
            step += 1
            norms = norm_ptr + pair.to(gl.int64) * norm_pair_stride + block.to(gl.int64) * norm_block_stride
            mix_ptr = None
            if mix is not None:
                mix_ptr = mix_of_block(mix, first_pair + pair, block)
                result *= gl.load(mix_ptr)
            left, right, inverse, share = features_and_inverse(tile_q, norms, mix_ptr, FEATURE_MAP)
            mbarrier.wait(k.full.index(slot), phase)
            if PROJECT:
                linear = times_state(left, right, inverse, square(k.tiles.index(slot)))
                mbarrier.arrive(k.empty.index(slot), count=1)
                linear = gl.convert_layout(linear, operand_layout)
                mbarrier.wait(v.full.index(slot), phase)
                result = warpgroup_mma(linear, square(v.tiles.index(slot)).permute((1, 0)), result)
            else:
                upper, lower = halves(k.tiles.index(slot))
                result = add_projected(result, left, right, inverse, upper, lower)
                mbarrier.arrive(k.empty.index(slot), count=1)
                mbarrier.wait(v.full.index(slot), phase)
            mbarrier.arrive(v.empty.index(slot), count=1)
            result = add_constants(result, share, mean, pair, block, bias_ptr)
        store_rows(output, batch, head, start, result, tile_q)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads",
        "first_pair",
        "num_blocks",
        "total",
        "query_length",
        "key_length",
        "width",
        "state_step",
        "norm_pair_stride",
        "norm_block_stride",
    ]
)
def block_sparse_fwd_wide_kernel(
    query,
    key,
    value,
    output,
    lse_ptr,
    critical_ptr,
    count_ptr,
    state,
    weight,
    norm_ptr,
    mean,
    mix,
    bias_ptr,
    scale_log2,
    heads,
    first_pair,
    num_blocks,
    total,
    query_length,
    key_length,
    width,
    state_step,
    norm_pair_stride,
    norm_block_stride,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
):
    """Any grid; `total` = pairs * num_blocks query blocks of 128, of the pairs of batch and head from `first_pair` on.

    Key blocks have 64 or 128 tokens, full but for the last. With a FEATURE_MAP the linear branch is added, from states
    of only these pairs, already projected if there is no weight, and with a mean and a mix as in `linear_branch`.
    `state_step` is 0 where all query blocks share one state, else 1.
    """
    await_previous()
    head_dim: gl.constexpr = query.block_type.shape[3]
    dtype: gl.constexpr = query.dtype
    SPLIT: gl.constexpr = BLOCK_K // 64
    HAS_LINEAR: gl.constexpr = FEATURE_MAP is not None
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [Q_SLOTS * 2, 64, head_dim], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 128, head_dim], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 128, head_dim], tile_layout)
    critical_ptr += first_pair.to(gl.int64) * num_blocks * width
    count_ptr += first_pair.to(gl.int64) * num_blocks
    lse_ptr += first_pair.to(gl.int64) * query_length
    q = Ring(q_tiles, barriers(Q_SLOTS, 1), barriers(Q_SLOTS, 2), Q_SLOTS)
    k, v = ring(k_tiles, 2), ring(v_tiles, 2)
    fence_async_shared()
    blocks = QueryBlocks(critical_ptr, count_ptr, heads, num_blocks, total, width)
    PROJECT: gl.constexpr = weight is not None
    shared = (
        q,
        k,
        v,
        output,
        lse_ptr,
        norm_ptr,
        bias_ptr,
        scale_log2,
        blocks,
        first_pair,
        query_length,
        key_length,
        norm_pair_stride,
        norm_block_stride,
    )
    gl.warp_specialize(
        [
            (attend_queries, (0, shared, mean, mix, SPLIT, FEATURE_MAP, PROJECT)),
            (attend_queries, (1, shared, mean, mix, SPLIT, FEATURE_MAP, PROJECT)),
            (
                load_shared_tiles,
                (
                    query,
                    key,
                    value,
                    q,
                    k,
                    v,
                    state,
                    weight,
                    blocks,
                    first_pair,
                    key_length,
                    state_step,
                    SPLIT,
                    HAS_LINEAR,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
    q.retire()
    k.retire()
    v.retire()
