"""The linear branch of SLA in the epilogue of the forward: O^l W^T + b, O^l = phi(Q_i) H_i / n, n = phi(Q_i) Z_i + eps.

Where H is the state of V - m, O^l has (1 - eps / n) m more. A mean is None or a tuple: a pointer to m or W m, and its
strides over pairs and blocks. A mix is None or a tuple: a pointer to what O^s and O^l are multiplied by, two numbers
for each block, and its stride over pairs. H and W are bfloat16 whatever the dtype of Q.
Source: SLA (arXiv 2509.24006), eq. 5 and 6.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from foveal.kernels.hopper.gluon_names import async_load, reinterpret

HALF_WIDTH = gl.constexpr(64)  # columns of H and W at a time, half of them at head_dim 128


@gluon.jit
def load_row(pointer, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """[1, COLUMNS] from `pointer` on, for a tile in `layout`.

    Loaded behind a zero that the compiler cannot see through: it would compute the addresses long before this, and
    keep them in registers through the main loop.
    """
    zero = gl.inline_asm_elementwise(
        "mov.b32 $0, 0; // $1", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.expand_dims(gl.load((pointer + zero) + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))), 0)


@gluon.jit
def mean_of_block(mean, pair, block):
    """Where the mean of one block lies."""
    return mean[0] + pair.to(gl.int64) * mean[1] + block.to(gl.int64) * mean[2]


@gluon.jit
def mix_of_block(mix, pair, block):
    """Where the weights of both branches lie for one block; pairs count from the first of all."""
    return mix[0] + pair.to(gl.int64) * mix[1] + block.to(gl.int64) * 2


@gluon.jit
def part_of_features(q, top, norm_ptr, column: gl.constexpr, layout: gl.constexpr, FEATURE_MAP: gl.constexpr):
    """Some columns of phi(q), for "softmax" before its division: bfloat16; their sums, and their products with Z."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    x = q.slice(column, HALF_WIDTH, 1).load(layout).to(gl.float32)
    if FEATURE_MAP == "softmax":
        phi = gl.exp2(x * LOG2_E - gl.expand_dims(top, 1))
    elif FEATURE_MAP == "elu":
        phi = gl.where(x > 0.0, x + 1.0, gl.exp2(gl.minimum(x, 0.0) * LOG2_E))
    else:
        phi = gl.maximum(x, 0.0)
    norm = load_row(norm_ptr + column, HALF_WIDTH, layout).to(gl.float32)
    return phi.to(gl.bfloat16), gl.sum(phi, 1), gl.sum(phi * norm, 1)


@gluon.jit
def features_and_inverse(q, norm_ptr, mix_ptr, FEATURE_MAP: gl.constexpr):
    """phi(q) in bfloat16 as left and right columns (the same at head_dim 64), the inverse of n, and 1 - eps / n.

    With a mix_ptr the last two are multiplied by the second number there, and so is all that is made of them. For
    "softmax" all come without the division by the sum over columns: the product with H is scaled once, after it. A part
    at a time, for the registers.
    """
    gl.static_assert(FEATURE_MAP == "softmax" or FEATURE_MAP == "elu" or FEATURE_MAP == "relu")
    head_dim: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_WIDTH, 16])
    top = gl.full([q.shape[0]], 0.0, gl.float32, gl.SliceLayout(1, layout))
    if FEATURE_MAP == "softmax":
        top = gl.max(q.slice(0, HALF_WIDTH, 1).load(layout), 1)
        if head_dim == 128:
            top = gl.maximum(top, gl.max(q.slice(64, HALF_WIDTH, 1).load(layout), 1))
        top = top.to(gl.float32) * 1.4426950408889634
    left, total, product = part_of_features(q, top, norm_ptr, 0, layout, FEATURE_MAP)
    right = left
    if head_dim == 128:
        right, right_total, right_product = part_of_features(q, top, norm_ptr, 64, layout, FEATURE_MAP)
        total += right_total
        product += right_product
    if FEATURE_MAP != "softmax":
        total = gl.full([q.shape[0]], 1.0, gl.float32, gl.SliceLayout(1, layout))
    inverse = 1.0 / (product + total * 1e-5)
    if mix_ptr is not None:
        inverse *= gl.load(mix_ptr + 1)
    return left, right, inverse, product * inverse


@gluon.jit
def times_state(left, right, inverse, state):
    """(phi(q) H) / n for H [D, columns] in shared memory, in bfloat16."""
    rows: gl.constexpr = left.shape[0]
    columns: gl.constexpr = state.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    acc = gl.zeros([rows, columns], gl.float32, layout)
    acc = warpgroup_mma(gl.convert_layout(left, operand), state.slice(0, HALF_WIDTH, 0), acc, use_acc=False)
    if state.shape[0] == 128:
        acc = warpgroup_mma(gl.convert_layout(right, operand), state.slice(64, HALF_WIDTH, 0), acc)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, layout))
    return (acc * gl.expand_dims(inverse, 1)).to(gl.bfloat16)


@gluon.jit
def add_projected(acc, left, right, inverse, upper, lower):
    """acc + (phi(q) H) / n for an H [D, D] that is projected already, in shared memory as its upper and lower rows.

    All of it times n first, so that products add to it; at head_dim 64 there are only upper rows.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout)), 1)
    acc = warpgroup_mma(gl.convert_layout(left, operand), upper, acc * (1.0 / inverse))
    if acc.shape[1] == 128:
        acc = warpgroup_mma(gl.convert_layout(right, operand), lower, acc)
    return acc * inverse


@gluon.jit
def add_constants(acc, share, mean, pair, block, bias_ptr):
    """acc + b, and share * W m where there is a mean: what the linear branch adds beside products.

    W m goes through shared memory: with the addresses of two rows in registers the main loop's scalars spill.
    """
    layout: gl.constexpr = acc.type.layout
    if mean is not None:
        place: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        row = gl.load(mean_of_block(mean, pair, block) + gl.arange(0, acc.shape[1], place))
        row = gl.expand_dims(gl.convert_layout(row, gl.SliceLayout(0, layout)), 0)
        acc += gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, layout)), 1) * row
    return acc + load_row(bias_ptr, acc.shape[1], layout)


@gluon.jit
def copy_state_rows(state, batch_head, block, row, barrier, slot, head_dim: gl.constexpr):
    """Starts the copy of HALF_WIDTH rows of H into a slot that held a tile of 64 rows."""
    mbarrier.expect(barrier, state.block_type.nbytes)
    piece = reinterpret(slot, gl.bfloat16, [HALF_WIDTH, head_dim], gl.NVMMASharedLayout(128, 16, 2))
    async_load(state, [batch_head, block, row, 0], barrier, piece)


@gluon.jit
def copy_state(state, batch_head, block, column, barrier, slot, head_dim: gl.constexpr):
    """Starts the copy of HALF_WIDTH columns of H into a slot that held a tile of 64 rows."""
    mbarrier.expect(barrier, state.block_type.nbytes)
    piece = reinterpret(slot, gl.bfloat16, [head_dim, HALF_WIDTH], gl.NVMMASharedLayout(128, 16, 2))
    async_load(state, [batch_head, block, 0, column], barrier, piece)


@gluon.jit
def copy_weight(weight, column, barrier, slot, head_dim: gl.constexpr):
    """Starts the copy of HALF_WIDTH columns of W into a slot that held a tile of 64 rows."""
    mbarrier.expect(barrier, weight.block_type.nbytes)
    piece = reinterpret(slot, gl.bfloat16, [head_dim, HALF_WIDTH], gl.NVMMASharedLayout(128, 16, 2))
    async_load(weight, [0, column], barrier, piece)


@gluon.jit
def add_columns(acc, left, right, inverse, state_slot, state_full, weight_slot, weight_full, head_dim: gl.constexpr):
    """acc + ((phi(q) H[:, part]) / n) W[:, part]^T for the columns whose pieces arrive at these barriers."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    state = reinterpret(state_slot, gl.bfloat16, [head_dim, HALF_WIDTH], tile_layout)
    weight = reinterpret(weight_slot, gl.bfloat16, [head_dim, HALF_WIDTH], tile_layout)
    mbarrier.wait(state_full, 0)
    linear = times_state(left, right, inverse, state)
    mbarrier.wait(weight_full, 0)
    linear = gl.convert_layout(linear, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(linear, weight.permute((1, 0)), acc)
