"""What the Hopper kernels share: tiles that come through TMA, masks, the end of an overlap.

Tensors [B, H, L, D] reach a kernel as descriptors with one axis a dimension and boxes of [1, 1, rows, D]: any strides,
rows past the end of a head read as zeros and are not written.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from foveal.kernels.hopper.gluon_names import async_load, async_store


@gluon.jit
def copy_rows(source, batch, head, row, barrier, tile, wanted):
    """Starts the copy of one tile into shared memory; its bytes arrive at `barrier`.

    A source of five dimensions, [B, H, blocks, rows, D], is cut into blocks that may have fewer rows than the tile.
    """
    mbarrier.expect(barrier, source.block_type.nbytes, pred=wanted)
    if source.block_type.shape[2] == 1:
        block = row // tile.shape[0]
        async_load(source, [batch, head, block, 0, 0], barrier, tile, pred=wanted)
    else:
        async_load(source, [batch, head, row, 0], barrier, tile, pred=wanted)


@gluon.jit
def store_rows(target, batch, head, row, values, tile):
    """Starts the copy of `values` to memory through shared memory that nobody reads any more."""
    tile.store(values.to(tile.dtype))
    fence_async_shared()
    async_store(target, [batch, head, row, 0], tile)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory; a fence must follow before the first copy, and `retire` at the kernel's end."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def retire(bars):
    """Ends the life of barriers: the last thing that a kernel does.

    The compiler gives memory away after its last use, a wait here, and puts the scratch of reductions there. But until
    it is invalidated a barrier's memory is the hardware's: about once in 300 launches such a scratch came back changed.
    """
    COUNT: gl.constexpr = bars.shape[0]
    for i in gl.static_range(COUNT):
        mbarrier.invalidate(bars.index(i))


@gluon.jit
def keep_columns(x, valid, other):
    """x [rows, columns] with `other` from column `valid` on."""
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    return gl.where(gl.expand_dims(column < valid, 0), x, other)


@gluon.jit
def keep_tail(x, valid, other):
    """`keep_columns` for a `valid` within the last eight: cheap, as the compiler knows which registers hold them."""
    first: gl.constexpr = x.shape[1] - 8
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    return gl.where(gl.expand_dims((column < first) | (column < valid), 0), x, other)


@gluon.jit
def keep_rows(x, valid):
    """x [rows, columns] with zeros from row `valid` on, whatever stood there."""
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    return gl.where(gl.expand_dims(row < valid, 1), x, 0.0)


@gluon.jit
def clear_rows(tile, valid):
    """Zeros in a tile in shared memory from row `valid` on: padding may hold NaN, and 0 * NaN would spread it."""
    STEP: gl.constexpr = 16  # few registers at a time
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    for i in gl.static_range(tile.shape[0] // STEP):
        part = tile.slice(STEP * i, STEP, 0)
        x = part.load(layout)
        part.store(gl.where(gl.expand_dims(row < valid - STEP * i, 1), x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def scheduling_fence(counter):
    """The scalar `counter`, which must not be negative; instructions on either side stay there.

    A wait for a product names no registers, and a copy none that hold arithmetic, so ptxas moves the arithmetic that
    should run under a product behind the wait, and copies behind arithmetic. It moves nothing across a branch, and
    this one is never taken.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred never; setp.lt.s32 never, $1, 0; @never nanosleep.u32 1; mov.b32 $0, $1;}",
        "=r,r",
        [counter],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
