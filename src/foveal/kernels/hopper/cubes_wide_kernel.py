"""VSA's fine stage on Hopper for cubes of 65 to 128 tokens: two warpgroups share the cubes that a producer warp loads.

From raster order to raster order, as in `cubes_kernel`; each key cube is read once for 128 queries, half the bytes a
product. Programs are persistent, one per SM, so that the producer runs ahead into the next cube.
Source: VSA (arXiv 2505.13389), eq. 3 and 4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from foveal.kernels.hopper.forward_kernel import (
    finished,
    keep_valid,
    online_softmax_update,
    sums_by_eight,
    tile_start,
    tile_valid,
)
from foveal.kernels.hopper.forward_wide_kernel import add_wide_tile
from foveal.kernels.hopper.raster import load_lines, store_gated_sum, video_tokens
from foveal.kernels.hopper.ring import ring
from foveal.kernels.hopper.wide_tiles import QueryBlocks
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit
def load_cubes(key, value, k, v, blocks):
    """The producer warp: the listed cubes of K and V through their rings."""
    step = 0
    for item in range(gl.program_id(0), blocks.total, gl.num_programs(0)):
        pair = item // blocks.num_blocks
        head, batch = pair % blocks.heads, pair // blocks.heads
        list_ptr = blocks.list_of(item)
        kept = blocks.kept(item)
        for t in range(gl.maximum(kept, 1)):
            start = tile_start(list_ptr, t, kept, 128, 1)
            k.fill(step, key, batch, head, start)
            v.fill(step, value, batch, head, start)
            step += 1


@gluon.jit
def listed_valid(size_ptr, list_ptr, tile, kept, uniform, MASK: gl.constexpr):
    """How many keys of the tile-th listed block count."""
    if MASK == "columns":
        return tile_valid(size_ptr, tile_start(list_ptr, tile, kept, 128, 1), 0, 128, True)
    else:
        return uniform


@gluon.jit
def load_queries(query_ptr, strides, place_ptr, part, item, blocks, head_dim: gl.constexpr):
    """Queries 64 * part ... of a cube; zeros past the last one."""
    block, pair = item % blocks.num_blocks, item // blocks.num_blocks
    token = video_tokens(place_ptr, block * 128 + part * 64, item < blocks.total, head_dim)
    return load_lines(query_ptr, strides, pair // blocks.heads, pair % blocks.heads, token, head_dim)


@gluon.jit
def attend_cubes(
    part,
    q,
    shared,
    query_strides,
    gate_coarse_strides,
    gate_fine_strides,
    output_strides,
    MASK: gl.constexpr,
    GATED_COARSE: gl.constexpr,
    GATED_FINE: gl.constexpr,
    SAVE_FINE: gl.constexpr,
):
    """One consumer warpgroup: queries 64 * part ... of each cube, whose lines it fetches one cube ahead."""
    k, v, fine, query_ptr, coarse_ptr, gate_coarse_ptr, gate_fine_ptr, output_ptr, place_ptr, lse_ptr = shared[:10]
    size_ptr, scale_log2, blocks, uniform, size_stride = shared[10:]
    head_dim: gl.constexpr = k.tiles.shape[2]
    SLOTS: gl.constexpr = k.SLOTS
    MAY_BE_EMPTY: gl.constexpr = MASK == "columns"
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    zeros = gl.zeros([64, 128], gl.float32, score_layout)
    step = 0
    first = gl.program_id(0)
    queries = load_queries(query_ptr, query_strides, place_ptr, part, first, blocks, head_dim)
    for item in range(first, blocks.total, gl.num_programs(0)):
        block, pair = item % blocks.num_blocks, item // blocks.num_blocks
        head, batch = pair % blocks.heads, pair // blocks.heads
        list_ptr = blocks.list_of(item)
        sizes = size_ptr
        if MASK == "columns":
            sizes = size_ptr + batch * size_stride
        kept = blocks.kept(item)
        count = gl.maximum(kept, 1)  # an empty row computes one tile and throws it away
        if SAVE_FINE:
            tma.store_wait(0)  # the cube before has left the tile of queries
        q.store(queries)
        fence_async_shared()
        top = gl.full([64], -float("inf"), gl.float32, row_layout)
        sums_of_weights = sums_by_eight(zeros)
        acc = gl.zeros([64, head_dim], gl.float32, acc_layout)
        valid = listed_valid(sizes, list_ptr, 0, kept, uniform, MASK)
        next_valid = listed_valid(sizes, list_ptr, 1, kept, uniform, MASK)
        slot = step % SLOTS
        phase = (step // SLOTS) & 1
        mbarrier.wait(k.full.index(slot), phase)
        scores = warpgroup_mma(q, k.tiles.index(slot).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k.empty.index(slot), count=1)
        scores = keep_valid(scores, valid, MASK)
        p, top, sums_of_weights, decay = online_softmax_update(scores, top, sums_of_weights, scale_log2, MAY_BE_EMPTY)
        weights = gl.convert_layout(p.to(q.dtype), operand_layout)
        for t in range(1, count):
            before, before_phase = slot, phase
            valid = next_valid
            next_valid = listed_valid(sizes, list_ptr, t + 1, kept, uniform, MASK)
            step += 1
            slot = step % SLOTS
            phase = (step // SLOTS) & 1
            weights, acc, top, sums_of_weights, decay = add_wide_tile(
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
                sums_of_weights,
                decay,
                True,
                valid,
                scale_log2,
                MASK,
                MAY_BE_EMPTY,
            )
        acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
        mbarrier.wait(v.full.index(slot), phase)
        acc = warpgroup_mma(weights, v.tiles.index(slot), acc)
        mbarrier.arrive(v.empty.index(slot), count=1)
        step += 1

        following = item + gl.num_programs(0)
        queries = load_queries(query_ptr, query_strides, place_ptr, part, following, blocks, head_dim)
        result, lse = finished(acc, top, sums_of_weights, kept, row_layout)
        start = block * 128 + part * 64
        gl.store(lse_ptr + item.to(gl.int64) * 128 + part * 64 + gl.arange(0, 64, row_layout), lse)
        token = video_tokens(place_ptr, start, True, head_dim)
        store_gated_sum(
            result,
            q,
            fine,
            output_ptr,
            coarse_ptr + item.to(gl.int64) * head_dim,
            gate_coarse_ptr,
            gate_fine_ptr,
            output_strides,
            gate_coarse_strides,
            gate_fine_strides,
            batch,
            head,
            token,
            start,
            GATED_COARSE,
            GATED_FINE,
            SAVE_FINE,
        )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "num_cubes", "total", "uniform", "width", "size_stride"])
def cubes_fwd_wide_kernel(
    key,
    value,
    fine,
    query_ptr,
    coarse_ptr,
    gate_coarse_ptr,
    gate_fine_ptr,
    output_ptr,
    place_ptr,
    lse_ptr,
    critical_ptr,
    count_ptr,
    size_ptr,
    query_strides,
    gate_coarse_strides,
    gate_fine_strides,
    output_strides,
    scale_log2,
    heads,
    num_cubes,
    total,
    uniform,
    width,
    size_stride,
    SLOTS: gl.constexpr,
    MASK: gl.constexpr,
    GATED_COARSE: gl.constexpr,
    GATED_FINE: gl.constexpr,
    SAVE_FINE: gl.constexpr,
):
    """Any grid; `total` = B * H * num_cubes. Cubes and blocks of text stand in slots of 128, zeros behind their tokens.

    MASK, SAVE_FINE: as in `cubes_fwd_kernel`, with "tail" for `uniform` from 120 on.
    """
    await_previous()
    head_dim: gl.constexpr = key.block_type.shape[4]
    dtype: gl.constexpr = key.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(dtype, [2, 64, head_dim], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 128, head_dim], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 128, head_dim], tile_layout)
    k, v = ring(k_tiles, 2), ring(v_tiles, 2)
    fence_async_shared()
    blocks = QueryBlocks(critical_ptr, count_ptr, heads, num_cubes, total, width)
    shared = (
        k,
        v,
        fine,
        query_ptr,
        coarse_ptr,
        gate_coarse_ptr,
        gate_fine_ptr,
        output_ptr,
        place_ptr,
        lse_ptr,
        size_ptr,
        scale_log2,
        blocks,
        uniform,
        size_stride,
    )
    gl.warp_specialize(
        [
            (
                attend_cubes,
                (
                    0,
                    q.index(0),
                    shared,
                    query_strides,
                    gate_coarse_strides,
                    gate_fine_strides,
                    output_strides,
                    MASK,
                    GATED_COARSE,
                    GATED_FINE,
                    SAVE_FINE,
                ),
            ),
            (
                attend_cubes,
                (
                    1,
                    q.index(1),
                    shared,
                    query_strides,
                    gate_coarse_strides,
                    gate_fine_strides,
                    output_strides,
                    MASK,
                    GATED_COARSE,
                    GATED_FINE,
                    SAVE_FINE,
                ),
            ),
            (load_cubes, (key, value, k, v, blocks)),
        ],
        [4, 1],
        [240, 24],
    )
    k.retire()
    v.retire()
