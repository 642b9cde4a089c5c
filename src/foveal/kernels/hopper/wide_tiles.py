"""Tiles that two warpgroups share: which keys they hold, and the producer warp that loads them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from foveal.kernels.hopper.gluon_names import async_load, reinterpret

HALF = gl.constexpr(64)
Q_SLOTS = gl.constexpr(2)  # a slot falls free only when the next query block has begun: one would deadlock


@gluon.jit
def half_start(list_ptr, half, listed, key_length, SPLIT: gl.constexpr):
    """First key of the half-th 64 listed keys; past the list, the end of the keys, where copies read zeros."""
    block = gl.load(list_ptr + half // SPLIT, mask=half < listed, other=0)
    return gl.where(half < listed, (block * SPLIT + half % SPLIT) * HALF, key_length)


@gluon.jit
def listed_halves(list_ptr, kept, key_length, SPLIT: gl.constexpr):
    """How many halves of tiles a row's list has, and how many keys of the last one count."""
    listed = kept * SPLIT
    start = half_start(list_ptr, gl.maximum(listed - 1, 0), listed, key_length, SPLIT)
    if SPLIT == 2:  # the last key block may end before its second half
        listed = gl.where((kept > 0) & (start >= key_length), listed - 1, listed)
        start = half_start(list_ptr, gl.maximum(listed - 1, 0), listed, key_length, SPLIT)
    return listed, gl.minimum(key_length - start, HALF)


@gluon.jit
def square(tile):
    """The front of a slot for [128, D] as bfloat16 [D, D]."""
    head_dim: gl.constexpr = tile.shape[1]
    whole = reinterpret(tile, gl.bfloat16, [128, head_dim], tile.layout)
    return whole.slice(0, head_dim, 0)


@gluon.jit
def halves(tile):
    """The first and the last 64 rows of `square`; at head_dim 64 the same."""
    state = square(tile)
    return state.slice(0, HALF, 0), state.slice(state.shape[0] - HALF, HALF, 0)


@gluon.jit
def load_shared_tiles(
    query,
    key,
    value,
    q,
    k,
    v,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    state,
    weight,
    critical_ptr,
    count_ptr,
    heads,
    first_pair,
    num_blocks,
    total,
    key_length,
    width,
    state_step,
    SPLIT: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
):
    """The producer warp: Q of each query block, then its tiles of K and V, then H and W for the linear branch."""
    SLOTS: gl.constexpr = k.shape[0]
    TILE_BYTES: gl.constexpr = 2 * key.block_type.nbytes
    step = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        block, pair = item % num_blocks, item // num_blocks
        head, batch = (first_pair + pair) % heads, (first_pair + pair) // heads
        list_ptr = critical_ptr + item.to(gl.int64) * width
        listed, _ = listed_halves(list_ptr, gl.load(count_ptr + item), key_length, SPLIT)
        slot = turn % Q_SLOTS
        mbarrier.wait(q_empty.index(slot), (turn // Q_SLOTS + 1) & 1)
        mbarrier.expect(q_full.index(slot), 2 * query.block_type.nbytes)
        for w in gl.static_range(2):
            async_load(query, [batch, head, block * 128 + w * 64, 0], q_full.index(slot), q.index(slot * 2 + w))
        for t in range(gl.maximum((listed + 1) // 2, 1)):
            slot = step % SLOTS
            phase = (step // SLOTS + 1) & 1
            first = half_start(list_ptr, 2 * t, listed, key_length, SPLIT)
            second = half_start(list_ptr, 2 * t + 1, listed, key_length, SPLIT)
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), TILE_BYTES)
            tile = k.index(slot)
            async_load(key, [batch, head, first, 0], k_full.index(slot), tile.slice(0, 64, 0))
            async_load(key, [batch, head, second, 0], k_full.index(slot), tile.slice(64, 64, 0))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), TILE_BYTES)
            tile = v.index(slot)
            async_load(value, [batch, head, first, 0], v_full.index(slot), tile.slice(0, 64, 0))
            async_load(value, [batch, head, second, 0], v_full.index(slot), tile.slice(64, 64, 0))
            step += 1
        if HAS_LINEAR:
            slot = step % SLOTS
            phase = (step // SLOTS + 1) & 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), state.block_type.nbytes)
            async_load(state, [pair, block * state_step, 0, 0], k_full.index(slot), square(k.index(slot)))
            mbarrier.wait(v_empty.index(slot), phase)
            if weight is not None:
                mbarrier.expect(v_full.index(slot), weight.block_type.nbytes)
                async_load(weight, [0, 0], v_full.index(slot), square(v.index(slot)))
            else:  # both rings turn alike
                mbarrier.arrive(v_full.index(slot), count=1)
            step += 1
        turn += 1  # noqa: SIM113
