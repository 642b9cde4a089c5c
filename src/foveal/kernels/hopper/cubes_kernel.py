"""VSA's fine stage on Hopper, from raster order to raster order: one program per cube, which adds both branches.

Queries are gathered from raster order and the output is scattered back, so that only keys and values, which every
program reads many times, need a copy in tile order. The recurrence is that of `forward_kernel`.
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
    add_tile,
    finished,
    keep_valid,
    masked_valid,
    online_softmax_update,
    sums_by_eight,
    tile_start,
)
from foveal.kernels.hopper.raster import load_lines, store_gated_sum, video_tokens
from foveal.kernels.hopper.tiles import barriers, copy_rows, retire
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit(do_not_specialize=["uniform", "width", "size_stride"])
def cubes_fwd_kernel(
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
    uniform,
    width,
    size_stride,
    MASK: gl.constexpr,
    GATED_COARSE: gl.constexpr,
    GATED_FINE: gl.constexpr,
    SAVE_FINE: gl.constexpr,
):
    """Grid (cubes, H, B); cubes and blocks of text stand in slots of 64, zeros behind their tokens.

    MASK: None where all blocks are full, "tail" where each has `uniform` keys, over 56, "columns" for `size_ptr`.
    With SAVE_FINE the fine stage's own output is stored too, in tile order.
    """
    await_previous()
    head_dim: gl.constexpr = key.block_type.shape[4]
    dtype: gl.constexpr = key.dtype
    MAY_BE_EMPTY: gl.constexpr = MASK == "columns"
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    block, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    num_cubes = gl.num_programs(0)
    pair = (batch * gl.num_programs(1) + head).to(gl.int64)
    item = pair * num_cubes + block
    q = gl.allocate_shared_memory(dtype, [64, head_dim], tile_layout)
    k = gl.allocate_shared_memory(dtype, [64, head_dim], tile_layout)
    v = gl.allocate_shared_memory(dtype, [2, 64, head_dim], tile_layout)
    k_fulls, v_full = barriers(1, 1), barriers(2, 1)
    k_full = k_fulls.index(0)
    fence_async_shared()

    list_ptr = critical_ptr + item * width
    if MASK == "columns":
        size_ptr += batch * size_stride
    kept = gl.load(count_ptr + item)
    count = gl.maximum(kept, 1)  # an empty row computes one tile and throws it away
    start = tile_start(list_ptr, 0, kept, 64, 1)
    copy_rows(key, batch, head, start, k_full, k, True)
    copy_rows(value, batch, head, start, v_full.index(0), v.index(0), True)
    valid = masked_valid(size_ptr, start, 0, uniform, 64, MASK)
    start = tile_start(list_ptr, 1, count, 64, 1)

    token = video_tokens(place_ptr, block * 64, True, head_dim)
    q.store(load_lines(query_ptr, query_strides, batch, head, token, head_dim))
    fence_async_shared()
    mbarrier.wait(k_full, 0)
    zeros = gl.zeros([64, 64], gl.float32, score_layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False)
    copy_rows(key, batch, head, start, k_full, k, count > 1)
    scores = keep_valid(scores, valid, MASK)
    top = gl.full([64], -float("inf"), gl.float32, row_layout)
    total = sums_by_eight(zeros)
    p, top, total, decay = online_softmax_update(scores, top, total, scale_log2, MAY_BE_EMPTY)
    weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
    acc = gl.zeros([64, head_dim], gl.float32, acc_layout)
    valid = masked_valid(size_ptr, start, 0, uniform, 64, MASK)

    for t in range(1, count):
        slot = t % 2
        copy_rows(value, batch, head, start, v_full.index(slot), v.index(slot), True)
        start = tile_start(list_ptr, t + 1, count, 64, 1)
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
            t + 1 < count,
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
        valid = masked_valid(size_ptr, start, 0, uniform, 64, MASK)
    last = count - 1
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc_layout)), 1)
    mbarrier.wait(v_full.index(last % 2), (last // 2) & 1)
    acc = warpgroup_mma(weights, v.index(last % 2), acc)

    result, lse = finished(acc, top, total, kept, row_layout)
    gl.store(lse_ptr + item * 64 + gl.arange(0, 64, row_layout), lse)
    store_gated_sum(
        result,
        q,
        fine,
        output_ptr,
        coarse_ptr + item * head_dim,
        gate_coarse_ptr,
        gate_fine_ptr,
        output_strides,
        gate_coarse_strides,
        gate_fine_strides,
        batch,
        head,
        token,
        block * 64,
        GATED_COARSE,
        GATED_FINE,
        SAVE_FINE,
    )
    tma.store_wait(0)
    retire(k_fulls)
    retire(v_full)
