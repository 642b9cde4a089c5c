"""Rows of raster-order tensors in kernels that walk tile order: gathered by a cube's program, scattered back by it.

A row of [B, H, L, D] is one line of D entries somewhere in memory; `places` says which row stands where. Products have
another layout than lines, so what a kernel computed goes through shared memory on its way out.
Source: VSA (arXiv 2505.13389), eq. 3 and 4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from foveal.kernels.hopper.gluon_names import async_store

ROWS = gl.constexpr(64)  # of a tile


@gluon.constexpr_function
def line_layout(head_dim):
    """Rows of 16-byte pieces, as they lie in memory, for four warps."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def token_offsets(strides, batch, head, rows, columns):
    """Offsets [rows, columns] of a raster-order tensor [B, H, L, D], any strides."""
    base = batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    return base + gl.expand_dims(rows, 1) * strides[2] + gl.expand_dims(columns, 0) * strides[3]


@gluon.jit
def load_lines(x_ptr, strides, batch, head, token, head_dim: gl.constexpr):
    """[64, D] of the raster rows `token`, zeros where they are negative."""
    column = gl.arange(0, head_dim, gl.SliceLayout(0, line_layout(head_dim)))
    offsets = token_offsets(strides, batch, head, token, column)
    return gl.load(x_ptr + offsets, mask=gl.expand_dims(token >= 0, 1), other=0.0)


@gluon.jit
def video_tokens(place_ptr, start, wanted, head_dim: gl.constexpr):
    """The raster rows, int64 [64], at `start` ... in tile order; -1 where none stands, and everywhere if not wanted."""
    place = start + gl.arange(0, ROWS, gl.SliceLayout(1, line_layout(head_dim)))
    return gl.load(place_ptr + place, mask=(place >= 0) & wanted, other=-1)


@gluon.jit
def store_gated_sum(
    result,
    tile,
    fine,
    output_ptr,
    coarse_ptr,
    gate_coarse_ptr,
    gate_fine_ptr,
    output_strides,
    gate_coarse_strides,
    gate_fine_strides,
    batch,
    head,
    token,
    start,
    GATED_COARSE: gl.constexpr,
    GATED_FINE: gl.constexpr,
    SAVE_FINE: gl.constexpr,
):
    """Stores O = Gc * Oc + Gf * Of for 64 queries of a cube, in raster order; `result` is Of, `coarse_ptr` its Oc.

    Of passes through `tile`, which nobody reads any more. With SAVE_FINE it is also stored at `start` of `fine`, in
    tile order; that copy is still under way afterwards.
    """
    head_dim: gl.constexpr = tile.shape[1]
    tile.store(result.to(tile.dtype))
    if SAVE_FINE:
        fence_async_shared()
        async_store(fine, [batch, head, start, 0], tile)
    lines: gl.constexpr = line_layout(head_dim)
    column = gl.arange(0, head_dim, gl.SliceLayout(0, lines))
    out = tile.load(lines).to(gl.float32)
    if GATED_FINE:
        gate = load_lines(gate_fine_ptr, gate_fine_strides, batch, head, token, head_dim)
        out = out * gate.to(gl.float32)
    coarse = gl.expand_dims(gl.load(coarse_ptr + column), 0)
    if GATED_COARSE:
        gate = load_lines(gate_coarse_ptr, gate_coarse_strides, batch, head, token, head_dim)
        out += coarse * gate.to(gl.float32)
    else:
        out += coarse
    offsets = token_offsets(output_strides, batch, head, token, column)
    gl.store(output_ptr + offsets, out.to(tile.dtype), mask=gl.expand_dims(token >= 0, 1))


@gluon.jit
def return_gradient(
    values,
    tile,
    grad_ptr,
    strides,
    pooled_ptr,
    place_ptr,
    size_ptr,
    batch,
    head,
    pair,
    start,
    video_rows,
    length,
    key_length,
    SLOT: gl.constexpr,
):
    """Stores a fine gradient [64, D] in raster order, plus each token's share of the pooled one.

    Args:
        tile: shared memory that nobody reads any more.
        pooled_ptr: float32 [B, H, C, D].
        place_ptr, size_ptr: where tokens stand, int64 [C * SLOT], and the cubes' sizes, int32 [C].
        pair: batch * H + head, int64.
        start: the tile's first row in tile order, where blocks of text follow the cubes' `video_rows` rows.
        length, key_length: tokens of the video, and of video and text.
    """
    head_dim: gl.constexpr = tile.shape[1]
    lines: gl.constexpr = line_layout(head_dim)
    tile.store(values.to(tile.dtype))
    is_video = start < video_rows
    token = video_tokens(place_ptr, start, is_video, head_dim)
    text = length + start - video_rows + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
    token = gl.where(is_video, token, gl.where(text < key_length, text, -1).to(gl.int64))
    column = gl.arange(0, head_dim, gl.SliceLayout(0, lines))
    cube = start // SLOT
    share = 1.0 / gl.load(size_ptr + cube, mask=is_video, other=1).to(gl.float32)
    pooled_ptr += (pair * (video_rows // SLOT) + cube) * head_dim
    pooled = gl.load(pooled_ptr + column, mask=(column >= 0) & is_video, other=0.0)
    out = tile.load(lines).to(gl.float32) + gl.expand_dims(pooled * share, 0)
    offsets = token_offsets(strides, batch, head, token, column)
    gl.store(grad_ptr + offsets, out.to(tile.dtype), mask=gl.expand_dims(token >= 0, 1))
