"""Values that travel whole through the Hopper kernels: a ring of tiles with its barriers, and a walk over a list.

An aggregate goes to a warp-specialized partition as one argument. The compiler sees its fields one by one, so that the
machine code is the same as with the fields spelled out.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from foveal.kernels.hopper.forward_kernel import tile_start, tile_valid
from foveal.kernels.hopper.gluon_names import aggregate
from foveal.kernels.hopper.tiles import barriers, copy_rows, retire


@aggregate
class Ring:
    """Tiles in shared memory that a producer fills and consumers empty, in turns.

    tiles: [SLOTS, rows, D]. full: a barrier a slot, where its bytes arrive. empty: where its readers arrive when they
    are done.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty, SLOTS):
        self.tiles, self.full, self.empty, self.SLOTS = tiles, full, empty, gl.constexpr(SLOTS)

    @gluon.jit
    def tile(self, t):
        """Where tile t is."""
        return self.tiles.index(t % self.SLOTS)

    @gluon.jit
    def fill(self, t, source, batch, head, row):
        """The producer: waits until tile t's slot is empty, and starts its copy."""
        slot = t % self.SLOTS
        mbarrier.wait(self.empty.index(slot), (t // self.SLOTS + 1) & 1)
        copy_rows(source, batch, head, row, self.full.index(slot), self.tiles.index(slot), True)

    @gluon.jit
    def begin(self, t, nbytes):
        """The producer: waits until tile t's slot is empty; the tile, and the barrier where so many bytes arrive."""
        slot = t % self.SLOTS
        mbarrier.wait(self.empty.index(slot), (t // self.SLOTS + 1) & 1)
        mbarrier.expect(self.full.index(slot), nbytes)
        return self.tiles.index(slot), self.full.index(slot)

    @gluon.jit
    def skip(self, t):
        """The producer: waits until tile t's slot is empty, and lets it count as filled."""
        slot = t % self.SLOTS
        mbarrier.wait(self.empty.index(slot), (t // self.SLOTS + 1) & 1)
        mbarrier.arrive(self.full.index(slot), count=1)

    @gluon.jit
    def wait(self, t):
        """A consumer: waits until tile t has arrived."""
        mbarrier.wait(self.full.index(t % self.SLOTS), (t // self.SLOTS) & 1)

    @gluon.jit
    def release(self, t):
        """A consumer: is done with tile t."""
        mbarrier.arrive(self.empty.index(t % self.SLOTS), count=1)

    @gluon.jit
    def retire(self):
        """Ends the life of the barriers; see `tiles.retire`."""
        retire(self.full)
        retire(self.empty)


@gluon.jit
def ring(tiles, CONSUMERS: gl.constexpr):
    """A ring of `tiles` [slots, rows, D] that CONSUMERS warpgroups empty; a fence must follow before the first copy."""
    SLOTS: gl.constexpr = tiles.shape[0]
    return Ring(tiles, barriers(SLOTS, 1), barriers(SLOTS, CONSUMERS), SLOTS)


@aggregate
class KeyWalk:
    """The key tiles that one query block reads, in order.

    list_ptr: its critical key blocks. count: how many tiles. size_ptr: valid keys of each block, only read with
    HAS_SIZES. TILE, BLOCK_K: keys of a tile and of a block.
    """

    list_ptr: gl.tensor
    size_ptr: gl.tensor
    count: gl.tensor
    key_length: gl.tensor
    TILE: gl.constexpr
    BLOCK_K: gl.constexpr
    HAS_SIZES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, list_ptr, size_ptr, count, key_length, TILE, BLOCK_K, HAS_SIZES):
        self.list_ptr, self.size_ptr, self.count, self.key_length = list_ptr, size_ptr, count, key_length
        self.TILE, self.BLOCK_K = gl.constexpr(TILE), gl.constexpr(BLOCK_K)
        self.HAS_SIZES = gl.constexpr(HAS_SIZES)

    @gluon.jit
    def start(self, t):
        """The first key of tile t; 0 past the end."""
        return tile_start(self.list_ptr, t, self.count, self.TILE, self.BLOCK_K // self.TILE)

    @gluon.jit
    def valid(self, start):
        """How many keys count from `start` on: a tile with fewer than its rows needs a mask."""
        return tile_valid(self.size_ptr, start, self.key_length, self.BLOCK_K, self.HAS_SIZES)


@gluon.jit
def key_walk(
    list_ptr, size_ptr, blocks, key_length, TILE: gl.constexpr, BLOCK_K: gl.constexpr, HAS_SIZES: gl.constexpr
):
    """The walk over a list of so many blocks."""
    SPLIT: gl.constexpr = BLOCK_K // TILE
    walk = KeyWalk(list_ptr, size_ptr, blocks * SPLIT, key_length, TILE, BLOCK_K, HAS_SIZES)
    if SPLIT > 1 and not HAS_SIZES:
        # The last key block may end before its second tile.
        count = walk.count
        count = gl.where((count > 0) & (walk.start(count - 1) >= key_length), count - 1, count)
        walk = KeyWalk(list_ptr, size_ptr, count, key_length, TILE, BLOCK_K, HAS_SIZES)
    return walk
