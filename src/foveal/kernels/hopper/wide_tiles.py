"""Tiles that two warpgroups share: which keys they hold, and the producer warp that loads them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from foveal.kernels.hopper.gluon_names import aggregate, async_load, reinterpret

HALF = gl.constexpr(64)
Q_SLOTS = gl.constexpr(2)  # a slot falls free only when the next query block has begun: one would deadlock


@aggregate
class QueryBlocks:
    """The query blocks that persistent programs go through, item by item, and the key blocks listed for each.

    total: how many; num_blocks of each pair of batch and head. width: of a list. count_ptr: how many each list has.
    """

    critical_ptr: gl.tensor
    count_ptr: gl.tensor
    heads: gl.tensor
    num_blocks: gl.tensor
    total: gl.tensor
    width: gl.tensor

    @gluon.constexpr_function
    def __init__(self, critical_ptr, count_ptr, heads, num_blocks, total, width):
        self.critical_ptr, self.count_ptr = critical_ptr, count_ptr
        self.heads, self.num_blocks, self.total, self.width = heads, num_blocks, total, width

    @gluon.jit
    def list_of(self, item):
        """Where the list of an item begins."""
        return self.critical_ptr + item.to(gl.int64) * self.width

    @gluon.jit
    def kept(self, item):
        """How many key blocks are listed for an item."""
        return gl.load(self.count_ptr + item)


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
    state,
    weight,
    blocks,
    first_pair,
    key_length,
    state_step,
    SPLIT: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
):
    """The producer warp: Q of each query block, then its tiles of K and V, then H and W for the linear branch.

    q: a ring in which two tiles share a slot.
    """
    TILE_BYTES: gl.constexpr = 2 * key.block_type.nbytes
    step = 0
    turn = 0
    for item in range(gl.program_id(0), blocks.total, gl.num_programs(0)):
        block, pair = item % blocks.num_blocks, item // blocks.num_blocks
        head, batch = (first_pair + pair) % blocks.heads, (first_pair + pair) // blocks.heads
        list_ptr = blocks.list_of(item)
        listed, _ = listed_halves(list_ptr, blocks.kept(item), key_length, SPLIT)
        slot = turn % Q_SLOTS
        mbarrier.wait(q.empty.index(slot), (turn // Q_SLOTS + 1) & 1)
        mbarrier.expect(q.full.index(slot), 2 * query.block_type.nbytes)
        for w in gl.static_range(2):
            start = block * 128 + w * 64
            async_load(query, [batch, head, start, 0], q.full.index(slot), q.tiles.index(slot * 2 + w))
        for t in range(gl.maximum((listed + 1) // 2, 1)):
            first = half_start(list_ptr, 2 * t, listed, key_length, SPLIT)
            second = half_start(list_ptr, 2 * t + 1, listed, key_length, SPLIT)
            tile, full = k.begin(step, TILE_BYTES)
            async_load(key, [batch, head, first, 0], full, tile.slice(0, 64, 0))
            async_load(key, [batch, head, second, 0], full, tile.slice(64, 64, 0))
            tile, full = v.begin(step, TILE_BYTES)
            async_load(value, [batch, head, first, 0], full, tile.slice(0, 64, 0))
            async_load(value, [batch, head, second, 0], full, tile.slice(64, 64, 0))
            step += 1
        if HAS_LINEAR:
            tile, full = k.begin(step, state.block_type.nbytes)
            async_load(state, [pair, block * state_step, 0, 0], full, square(tile))
            if weight is not None:
                tile, full = v.begin(step, weight.block_type.nbytes)
                async_load(weight, [0, 0], full, square(tile))
            else:  # both rings turn alike
                v.skip(step)
            step += 1
        turn += 1  # noqa: SIM113
