"""The query side of the linear branch's backward on Hopper, and what it shares with the key side.

With phi / n the features of a row over its normalizer and g = dO W, for the rows of one query block:

    R = g H^T        C = rowsum(phi / n * R) - (eps / n) rowsum(g * m)        dphi = (R - C Z) / n
    dH = (phi / n)^T g        dZ = -(phi / n)^T C        O^l = (phi / n) H + (1 - eps / n) m, for dW
    delta of the sparse branch = rowsum(dO * (O - b)) - rowsum(g * O^l)

H is the state of V - m, so that nothing of the mean's size cancels; see `triton.linear_backward`. Where all rows share
one H, W is folded into it beforehand (H W^T takes the place of H, W m that of m, and dO that of g).
Source: SLA (arXiv 2509.24006), Algorithm 2. H, W and g are bfloat16 whatever the dtype of Q.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from foveal.kernels.hopper.gluon_names import async_load, async_store, reinterpret
from foveal.kernels.hopper.linear_branch import HALF_WIDTH, load_row, mean_of_block, mix_of_block
from foveal.kernels.hopper.tiles import barriers, copy_rows, retire, store_rows
from foveal.kernels.triton.await_previous import await_previous


@gluon.jit
def load_halves(tile, layout: gl.constexpr):
    """Left and right columns of a tile in shared memory, float32; the same twice at head_dim 64."""
    left = tile.slice(0, HALF_WIDTH, 1).load(layout).to(gl.float32)
    right = left
    if tile.shape[1] == 128:
        right = tile.slice(64, HALF_WIDTH, 1).load(layout).to(gl.float32)
    return left, right


@gluon.jit
def store_halves(tile, left, right):
    """The inverse of `load_halves`, visible to TMA and the tensor cores."""
    tile.slice(0, HALF_WIDTH, 1).store(left.to(tile.dtype))
    if tile.shape[1] == 128:
        tile.slice(64, HALF_WIDTH, 1).store(right.to(tile.dtype))
    fence_async_shared()


@gluon.jit
def halves_of(x, layout: gl.constexpr):
    """Left and right columns of a tile in registers, without leaving them."""
    if x.shape[1] == 64:
        return x, x
    else:
        left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, 64]), (0, 2, 1)))
        return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


@gluon.jit
def sum_rows(left, right, head_dim: gl.constexpr):
    """Row sums over both halves."""
    total = gl.sum(left, 1)
    if head_dim == 128:
        total += gl.sum(right, 1)
    return total


@gluon.jit
def features(tile, layout: gl.constexpr, FEATURE_MAP: gl.constexpr):
    """phi of a tile in shared memory, left and right columns in float32."""
    gl.static_assert(FEATURE_MAP == "softmax" or FEATURE_MAP == "elu" or FEATURE_MAP == "relu")
    LOG2_E: gl.constexpr = 1.4426950408889634
    left, right = load_halves(tile, layout)
    if FEATURE_MAP == "softmax":
        top = gl.max(left, 1)
        if tile.shape[1] == 128:
            top = gl.maximum(top, gl.max(right, 1))
        top = gl.expand_dims(top * LOG2_E, 1)
        left = gl.exp2(left * LOG2_E - top)
        right = gl.exp2(right * LOG2_E - top)
        inverse = gl.expand_dims(1.0 / sum_rows(left, right, tile.shape[1]), 1)
        left *= inverse
        right *= inverse
    elif FEATURE_MAP == "elu":
        left = gl.where(left > 0.0, left + 1.0, gl.exp2(gl.minimum(left, 0.0) * LOG2_E))
        right = gl.where(right > 0.0, right + 1.0, gl.exp2(gl.minimum(right, 0.0) * LOG2_E))
    else:
        left = gl.maximum(left, 0.0)
        right = gl.maximum(right, 0.0)
    return left, right


@gluon.jit
def features_backward(left, right, grad_left, grad_right, head_dim: gl.constexpr, FEATURE_MAP: gl.constexpr):
    """The gradient of what phi was taken of, from phi and its gradient, all as left and right columns."""
    if FEATURE_MAP == "softmax":
        total = gl.expand_dims(sum_rows(left * grad_left, right * grad_right, head_dim), 1)
        return left * (grad_left - total), right * (grad_right - total)
    elif FEATURE_MAP == "elu":
        # 1 where x > 0, and exp(x) = phi elsewhere.
        return grad_left * gl.minimum(left, 1.0), grad_right * gl.minimum(right, 1.0)
    else:
        return gl.where(left > 0.0, grad_left, 0.0), gl.where(right > 0.0, grad_right, 0.0)


@gluon.jit
def store_column_sums(pointer, x):
    """Sums over the rows of x [rows, HALF_WIDTH], from `pointer` on.

    Half of the columns at a time: with the scratch of all, two programs do not fit on an SM.
    """
    HALF: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF]), (0, 2, 1)))
    left, right = gl.sum(left, 0), gl.sum(right, 0)
    gl.store(pointer + gl.arange(0, HALF, left.type.layout), left)
    gl.store(pointer + HALF + gl.arange(0, HALF, right.type.layout), right)


@gluon.jit
def row_gradients(
    q,
    o,
    g,
    h,
    w,
    q_full,
    og_full,
    h_full,
    phase,
    grad_query,
    linear,
    norm_ptr,
    mean_ptr,
    mix_ptr,
    bias_ptr,
    delta_ptr,
    linear_dot_ptr,
    grad_norm_ptr,
    grad_bias_ptr,
    batch,
    head,
    start,
    query_length,
    FEATURE_MAP: gl.constexpr,
):
    """Everything of one block but dH, for which phi / n stays in o's slot and g in its own, both bfloat16.

    q, o and g are the slots of Q, O and dO, h that of H (h_full is None where it is there already), w that of W (None:
    without a projection). delta_ptr points to the head's first row, the other pointers to this block's; grad_bias_ptr
    (or None) to column sums of dO. O^l is stored where there is a W. With a mix_ptr (or None) O^l has its weight, delta
    is without that of O^s, and rowsum(g * O^l) is stored behind linear_dot_ptr, the head's first row.
    """
    rows: gl.constexpr = q.shape[0]
    head_dim: gl.constexpr = q.shape[1]
    warps: gl.constexpr = gl.num_warps()
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 64, 16])
    full: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, head_dim, 16])
    half_zeros = gl.zeros([rows, HALF_WIDTH], gl.float32, half)
    g_narrow = reinterpret(g, gl.bfloat16, [rows, head_dim], g.layout)
    scaled = reinterpret(o, gl.bfloat16, [rows, head_dim], o.layout)

    mbarrier.wait(og_full, phase)
    delta = gl.zeros([rows], gl.float32, gl.SliceLayout(1, half))
    grad_dot_mean = delta
    for i in gl.static_range(head_dim // HALF_WIDTH):
        x = g.slice(i * HALF_WIDTH, HALF_WIDTH, 1).load(half).to(gl.float32)
        if grad_bias_ptr is not None:
            store_column_sums(grad_bias_ptr + i * HALF_WIDTH, x)
        out = o.slice(i * HALF_WIDTH, HALF_WIDTH, 1).load(half).to(gl.float32)
        delta += gl.sum(x * (out - load_row(bias_ptr + i * HALF_WIDTH, HALF_WIDTH, half)), 1)
        if w is None:
            grad_dot_mean += gl.sum(x * load_row(mean_ptr + i * HALF_WIDTH, HALF_WIDTH, half), 1)
        if g.dtype != gl.bfloat16:
            g_narrow.slice(i * HALF_WIDTH, HALF_WIDTH, 1).store(x.to(gl.bfloat16))
    if g.dtype != gl.bfloat16:
        fence_async_shared()
    if w is not None:
        projected = warpgroup_mma(
            g_narrow, w.slice(0, head_dim, 0), gl.zeros([rows, head_dim], gl.float32, full), use_acc=False
        )
        g_narrow.store(projected.to(gl.bfloat16))
        fence_async_shared()
        grad_dot_mean = gl.sum(projected * load_row(mean_ptr, head_dim, full), 1)
        grad_dot_mean = gl.convert_layout(grad_dot_mean, gl.SliceLayout(1, half))

    mbarrier.wait(q_full, phase)
    left, right = features(q, half, FEATURE_MAP)
    normalizer = gl.sum(left * load_row(norm_ptr, HALF_WIDTH, half), 1)
    if head_dim == 128:
        normalizer += gl.sum(right * load_row(norm_ptr + 64, HALF_WIDTH, half), 1)
    inverse = 1.0 / (normalizer + 1e-5)
    if mix_ptr is not None:
        inverse *= gl.load(mix_ptr + 1)
    by_row = gl.expand_dims(inverse, 1)
    store_halves(scaled, left * by_row, right * by_row)
    if h_full is not None:
        mbarrier.wait(h_full, phase)
    grad_left = warpgroup_mma(g_narrow, h.slice(0, HALF_WIDTH, 0).permute((1, 0)), half_zeros, use_acc=False)
    grad_right = grad_left
    if head_dim == 128:
        grad_right = warpgroup_mma(g_narrow, h.slice(64, HALF_WIDTH, 0).permute((1, 0)), half_zeros, use_acc=False)
    product = sum_rows(left * grad_left, right * grad_right, head_dim) * inverse
    row = start + gl.arange(0, rows, gl.SliceLayout(1, half))
    share = normalizer * inverse  # 1 - eps / n by the mix
    linear_dot = product + share * grad_dot_mean
    delta -= linear_dot
    product -= 1e-5 * inverse * grad_dot_mean
    if mix_ptr is not None:
        gl.store(linear_dot_ptr + row, linear_dot, mask=row < query_length)
        delta /= gl.load(mix_ptr)
        product /= gl.load(mix_ptr + 1)
    gl.store(delta_ptr + row, delta, mask=row < query_length)
    product = gl.expand_dims(product, 1)
    grad_left = (grad_left - product * load_row(norm_ptr, HALF_WIDTH, half)) * by_row
    if head_dim == 128:
        grad_right = (grad_right - product * load_row(norm_ptr + 64, HALF_WIDTH, half)) * by_row
    product = product * by_row
    store_column_sums(grad_norm_ptr, left * -product)
    if head_dim == 128:
        store_column_sums(grad_norm_ptr + 64, right * -product)
    left, right = features_backward(left, right, grad_left, grad_right, head_dim, FEATURE_MAP)
    store_halves(q, left, right)
    async_store(grad_query, [batch, head, start, 0], q)
    if w is not None:
        values = warpgroup_mma(scaled, h, gl.zeros([rows, head_dim], gl.float32, full), use_acc=False)
        share = gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, full)), 1)
        values += share * load_row(mean_ptr, head_dim, full)
        store_rows(linear, batch, head, start, values, w.slice(0, rows, 0))


@gluon.jit(do_not_specialize=["heads", "query_length", "first_pair", "norm_pair_stride", "norm_block_stride"])
def linear_query_grad_kernel(
    query,
    output,
    grad,
    state,
    weight,
    grad_query,
    linear,
    grad_state,
    norm_ptr,
    mean,
    mix,
    bias_ptr,
    delta_ptr,
    linear_dot_ptr,
    grad_norm_ptr,
    heads,
    query_length,
    first_pair,
    norm_pair_stride,
    norm_block_stride,
    FEATURE_MAP: gl.constexpr,
):
    """Grid (blocks, pairs of batch and head from first_pair on): one query block each, with its own H.

    Blocks past the end have dO = 0 and write zeros into dH and dZ. Without a weight, linear is None.
    """
    await_previous()
    rows: gl.constexpr = query.block_type.shape[2]
    head_dim: gl.constexpr = query.block_type.shape[3]
    dtype: gl.constexpr = query.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    block, pair = gl.program_id(0), gl.program_id(1)
    all_pairs = (first_pair + pair).to(gl.int64)
    batch, head = (first_pair + pair) // heads, (first_pair + pair) % heads
    start = block * rows
    q = gl.allocate_shared_memory(dtype, [rows, head_dim], tile_layout)
    o = gl.allocate_shared_memory(dtype, [rows, head_dim], tile_layout)
    g = gl.allocate_shared_memory(dtype, [rows, head_dim], tile_layout)
    h = gl.allocate_shared_memory(gl.bfloat16, [head_dim, head_dim], tile_layout)
    full = barriers(3, 1)
    fence_async_shared()
    w = None
    if weight is None:
        mbarrier.expect(full.index(0), output.block_type.nbytes + grad.block_type.nbytes)
    else:
        w_rows: gl.constexpr = max(rows, head_dim)  # O^l leaves through it
        w = gl.allocate_shared_memory(gl.bfloat16, [w_rows, head_dim], tile_layout)
        mbarrier.expect(full.index(0), output.block_type.nbytes + grad.block_type.nbytes + weight.block_type.nbytes)
        async_load(weight, [0, 0], full.index(0), w.slice(0, head_dim, 0))
    async_load(grad, [batch, head, start, 0], full.index(0), g)
    async_load(output, [batch, head, start, 0], full.index(0), o)
    copy_rows(query, batch, head, start, full.index(1), q, True)
    mbarrier.expect(full.index(2), state.block_type.nbytes)
    async_load(state, [pair, block, 0, 0], full.index(2), h)

    place = (all_pairs * gl.num_programs(0) + block) * head_dim
    norm_ptr += pair.to(gl.int64) * norm_pair_stride + block.to(gl.int64) * norm_block_stride
    mix_ptr, linear_dots = None, None
    if mix is not None:
        mix_ptr = mix_of_block(mix, all_pairs, block)
        linear_dots = linear_dot_ptr + all_pairs * query_length
    row_gradients(
        q,
        o,
        g,
        h,
        w,
        full.index(1),
        full.index(0),
        full.index(2),
        0,
        grad_query,
        linear,
        norm_ptr,
        mean_of_block(mean, pair, block),
        mix_ptr,
        bias_ptr,
        delta_ptr + all_pairs * query_length,
        linear_dots,
        grad_norm_ptr + place,
        None,
        batch,
        head,
        start,
        query_length,
        FEATURE_MAP,
    )
    g = reinterpret(g, gl.bfloat16, [rows, head_dim], tile_layout)
    scaled = reinterpret(o, gl.bfloat16, [rows, head_dim], tile_layout).permute((1, 0))
    # A warpgroup makes 64 rows of dH at a time; at head_dim 64 the two of 128 queries split its columns.
    wide: gl.constexpr = rows > head_dim
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 2] if wide else [rows // 16, 1], [16, 32 if wide else head_dim, 16]
    )
    part: gl.constexpr = min(rows, head_dim)
    for i in gl.static_range(head_dim // part):
        zeros = gl.zeros([part, head_dim], gl.float32, layout)
        sums = warpgroup_mma(scaled.slice(part * i, part, 0), g, zeros, use_acc=False)
        piece = h.slice(part * i, part, 0)
        piece.store(sums.to(gl.bfloat16))
        fence_async_shared()
        async_store(grad_state, [pair, block, part * i, 0], piece)
    tma.store_wait(0)
    retire(full)


@gluon.jit
def copy_block(query, output, grad, batch, head, start, og_full, q_full, q, o, g, stage, wanted):
    """Starts the copies of one block's rows into a stage."""
    barrier = og_full.index(stage)
    mbarrier.expect(barrier, output.block_type.nbytes + grad.block_type.nbytes, pred=wanted)
    async_load(grad, [batch, head, start, 0], barrier, g.index(stage), pred=wanted)
    async_load(output, [batch, head, start, 0], barrier, o.index(stage), pred=wanted)
    copy_rows(query, batch, head, start, q_full.index(stage), q.index(stage), wanted)


@gluon.jit(do_not_specialize=["heads", "query_length", "num_blocks", "per_program"])
def shared_query_grad_kernel(
    query,
    output,
    grad,
    state,
    grad_query,
    grad_state_ptr,
    norm_ptr,
    mean_ptr,
    bias_ptr,
    delta_ptr,
    grad_norm_ptr,
    grad_bias_ptr,
    heads,
    query_length,
    num_blocks,
    per_program,
    FEATURE_MAP: gl.constexpr,
):
    """Grid (parts, B * H): each program walks `per_program` blocks of 128 rows of one head, which share one H.

    dH, float32 [B * H, parts, D, D], is with respect to H W^T; dZ and the bias gradient come per block. The next
    block's rows are copied in while this one's are worked on.
    """
    await_previous()
    rows: gl.constexpr = query.block_type.shape[2]
    head_dim: gl.constexpr = query.block_type.shape[3]
    dtype: gl.constexpr = query.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    part, pair = gl.program_id(0), gl.program_id(1)
    batch, head = pair // heads, pair % heads
    q = gl.allocate_shared_memory(dtype, [2, rows, head_dim], tile_layout)
    o = gl.allocate_shared_memory(dtype, [2, rows, head_dim], tile_layout)
    g = gl.allocate_shared_memory(dtype, [2, rows, head_dim], tile_layout)
    h = gl.allocate_shared_memory(gl.bfloat16, [head_dim, head_dim], tile_layout)
    h_full, og_full, q_full = barriers(1, 1), barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    mbarrier.expect(h_full.index(0), state.block_type.nbytes)
    async_load(state, [pair, 0, 0, 0], h_full.index(0), h)
    mbarrier.wait(h_full.index(0), 0)
    narrow: gl.constexpr = head_dim == 64
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 2] if narrow else [8, 1], [16, 32 if narrow else head_dim, 16]
    )
    sums = gl.zeros([head_dim, head_dim], gl.float32, layout)
    first = part * per_program
    count = gl.minimum(num_blocks - first, per_program)
    all_pairs = pair.to(gl.int64)
    norm_ptr += all_pairs * head_dim
    mean_ptr += all_pairs * head_dim
    copy_block(query, output, grad, batch, head, first * rows, og_full, q_full, q, o, g, 0, count > 0)
    for i in range(count):
        stage = i % 2
        # The gradient of the block before has left the stage that the next block moves into.
        tma.store_wait(0)
        copy_block(
            query, output, grad, batch, head, (first + i + 1) * rows, og_full, q_full, q, o, g, 1 - stage, i + 1 < count
        )
        place = (all_pairs * num_blocks + first + i) * head_dim
        row_gradients(
            q.index(stage),
            o.index(stage),
            g.index(stage),
            h,
            None,
            q_full.index(stage),
            og_full.index(stage),
            None,
            (i // 2) & 1,
            grad_query,
            None,
            norm_ptr,
            mean_ptr,
            None,
            bias_ptr,
            delta_ptr + all_pairs * query_length,
            None,
            grad_norm_ptr + place,
            grad_bias_ptr + place,
            batch,
            head,
            (first + i) * rows,
            query_length,
            FEATURE_MAP,
        )
        scaled = reinterpret(o.index(stage), gl.bfloat16, [rows, head_dim], tile_layout)
        narrow_g = reinterpret(g.index(stage), gl.bfloat16, [rows, head_dim], tile_layout)
        sums = warpgroup_mma(scaled.permute((1, 0)), narrow_g, sums)
    tma.store_wait(0)
    row = gl.expand_dims(gl.arange(0, head_dim, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, head_dim, gl.SliceLayout(0, layout)), 0)
    base = grad_state_ptr + (all_pairs * gl.num_programs(0) + part) * head_dim * head_dim
    gl.store(base + row * head_dim + column, sums)
    retire(h_full)
    retire(og_full)
    retire(q_full)
