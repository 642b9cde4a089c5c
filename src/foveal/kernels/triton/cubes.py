"""Between raster and tile order: kernels that move a cube's tokens and, in the same pass, pool or gate.

`cube_gradients` has the backward.

Tile-order tensors are contiguous: each cube stands in a slot of equal size, zeros behind its tokens, and blocks of text
follow the cubes. `places` says where each slot's tokens stand in raster order. Heads lie side by side in the memory of
transformers, so programs of neighboring heads run together. Shape legend: B batch, H heads, L video
tokens, C cubes, T = C + blocks of text, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.backend import Cubes, CubesCall, Gates
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.forward import Forward
from foveal.kernels.triton.pooling import add_part_sums, block_mean, part_means, part_of, store_parts
from foveal.kernels.triton.tiles import row_strides
from foveal.kernels.values import Problem, size_stride

UNSPECIALIZED = ["heads", "num_cubes", "num_blocks", "length", "key_length", "size_stride"]


@triton.jit
def block_rows(place_ptr, block, first, num_cubes, length, key_length, SLOT: tl.constexpr, ROWS: tl.constexpr):
    """Raster rows int64 [ROWS] of places first ... of a block, and which of them hold a token."""
    place = first + tl.arange(0, ROWS)
    is_cube = block < num_cubes
    row = tl.load(place_ptr + block * SLOT + place, mask=(block + 0 * place) < num_cubes, other=-1)
    text = (length + (block - num_cubes) * SLOT + place).to(tl.int64)
    row = tl.where(is_cube, row, text)
    return row, (row >= 0) & (row < key_length)


@triton.jit
def load_gate(gate_ptr, strides, batch, head, row, inside, D: tl.constexpr):
    """float32 [ROWS, D]; a gate may be expanded along any dimension."""
    base = gate_ptr + batch * strides[0] + head * strides[1]
    offsets = row[:, None] * strides[2] + tl.arange(0, D)[None, :].to(tl.int64) * strides[3]
    return tl.load(base + offsets, mask=inside[:, None] != 0, other=0.0).to(tl.float32)


@triton.jit
def store_gate(gate_ptr, strides, batch, head, row, inside, values, D: tl.constexpr):
    """The inverse of `load_gate`."""
    base = gate_ptr + batch * strides[0] + head * strides[1]
    offsets = row[:, None] * strides[2] + tl.arange(0, D)[None, :].to(tl.int64) * strides[3]
    tl.store(base + offsets, values.to(gate_ptr.dtype.element_ty), mask=inside[:, None] != 0)


@triton.jit
def load_tokens(x_ptr, strides, batch, head, row, inside, D: tl.constexpr):
    """[ROWS, D] of a raster-order tensor, zero where no token is."""
    base = x_ptr + batch * strides[0] + head * strides[1]
    return tl.load(base + row[:, None] * strides[2] + tl.arange(0, D)[None, :], mask=inside[:, None] != 0, other=0.0)


@triton.jit
def store_tokens(x_ptr, strides, batch, head, row, inside, values, D: tl.constexpr):
    """The inverse of `load_tokens`."""
    base = x_ptr + batch * strides[0] + head * strides[1]
    offsets = row[:, None] * strides[2] + tl.arange(0, D)[None, :]
    tl.store(base + offsets, values.to(x_ptr.dtype.element_ty), mask=inside[:, None] != 0)


@triton.jit
def add_token_sums(total, x):
    """`total` [16, D] float32 plus the column sums of x [ROWS, D], in each of its rows.

    By a matrix product, so that every variant of a kernel, however it lays x out, makes the same bits and the same
    selection of them.
    """
    return tl.dot(tl.full([16, x.shape[0]], 1.0, x.dtype), x, total)


@triton.jit
def store_mean(pooled_ptr, strides, pair, cube, total, size, D: tl.constexpr):
    """Stores the mean of one cube, given the sum of its `size` tokens in the last row of `total` [16, D]."""
    row = tl.arange(0, 16)[:, None]
    columns = pooled_ptr + pair * strides[0] + cube * strides[1] + tl.arange(0, D)[None, :] * strides[2]
    tl.store(columns + row * 0, total / size.to(tl.float32), mask=row == 15)


@triton.jit
def last_row(x):
    """The last row of x [16, D], [D]."""
    return tl.sum(tl.where(tl.arange(0, 16)[:, None] == 15, x, 0.0), 0)


@triton.jit
def slot_offsets(pair, num_blocks, block, first, SLOT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Offsets [ROWS, D] of places first ... of a block in a tile-order tensor of `num_blocks` blocks a head."""
    start = (pair * num_blocks + block) * SLOT + first
    return (start + tl.arange(0, ROWS))[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gather_cubes_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cube_query_ptr,
    cube_key_ptr,
    cube_value_ptr,
    pooled_query_ptr,
    pooled_key_ptr,
    pooled_value_ptr,
    ranked_query_ptr,
    ranked_key_ptr,
    place_ptr,
    size_ptr,
    query_strides,
    key_strides,
    value_strides,
    pooled_strides,
    heads,
    num_cubes,
    num_blocks,
    length,
    key_length,
    size_stride,
    D: tl.constexpr,
    SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER: tl.constexpr,
    POOL: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    QUARTERS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Grid (B * H, T). GATHER...: copies to tile order; POOL: float32 means over the cubes' tokens.

    QUARTERS: also the float16 means over the quarters of each cube's query and key. SPREAD: also each cube's mean key
    with the variance of each channel behind it, float32.
    """
    await_previous()
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    sum_q = tl.zeros([16, D], tl.float32)
    sum_k = tl.zeros([16, D], tl.float32)
    sum_v = tl.zeros([16, D], tl.float32)
    shift = tl.zeros([D], tl.float32)
    squares = tl.zeros([D], tl.float32)
    size = tl.load(size_ptr + batch * size_stride + block)
    for first in tl.static_range(0, SLOT, ROWS):
        row, inside = block_rows(place_ptr, block, first, num_cubes, length, key_length, SLOT, ROWS)
        place = first + tl.arange(0, ROWS)
        inside &= place < size
        in_video = inside & (block < num_cubes)
        q = load_tokens(query_ptr, query_strides, batch, head, row, in_video, D)
        k = load_tokens(key_ptr, key_strides, batch, head, row, inside, D)
        if WITH_VALUE:
            v = load_tokens(value_ptr, value_strides, batch, head, row, inside, D)
        if GATHER:
            offsets = slot_offsets(pair, num_blocks, block, first, SLOT, ROWS, D)
            tl.store(cube_key_ptr + offsets, k)
            tl.store(cube_value_ptr + offsets, v)
        if GATHER_QUERY:  # noqa: SIM102
            if block < num_cubes:
                tl.store(cube_query_ptr + slot_offsets(pair, num_cubes, block, first, SLOT, ROWS, D), q)
        if POOL:
            if QUARTERS:
                part = part_of(place, inside, SLOT // 4)
                sum_q = add_part_sums(sum_q, q, part, 4)
                sum_k = add_part_sums(sum_k, k, part, 4)
            else:
                sum_q = add_token_sums(sum_q, q)
                sum_k = add_token_sums(sum_k, k)
            if SPREAD:
                # Squares of what is left of a mean near the cube's, that of its first tokens.
                if first == 0:
                    shift = block_mean(last_row(sum_k), tl.minimum(size, ROWS))
                apart = tl.where(inside[:, None], k.to(tl.float32) - shift[None, :], 0.0)
                squares += tl.sum(apart * apart, 0)
            if WITH_VALUE:
                sum_v = add_token_sums(sum_v, v)
    if POOL:  # noqa: SIM102
        if block < num_cubes:
            store_mean(pooled_query_ptr, pooled_strides, pair, block, sum_q, size, D)
            store_mean(pooled_key_ptr, pooled_strides, pair, block, sum_k, size, D)
            if QUARTERS:
                start, quarters = pair * 4 * num_cubes * D, 4 * num_cubes
                mean_q, mean_k = part_means(sum_q, size, SLOT // 4), part_means(sum_k, size, SLOT // 4)
                store_parts(ranked_query_ptr + start, mean_q, 4 * block, quarters, D)
                store_parts(ranked_key_ptr + start, mean_k, 4 * block, quarters, D)
            if SPREAD:
                mean = block_mean(last_row(sum_k), size)
                variance = tl.maximum(block_mean(squares, size) - (mean - shift) * (mean - shift), 0.0)
                columns = ranked_key_ptr + (pair * num_cubes + block) * 2 * D + tl.arange(0, D)
                tl.store(columns, mean)
                tl.store(columns + D, variance)
            if WITH_VALUE:
                store_mean(pooled_value_ptr, pooled_strides, pair, block, sum_v, size, D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _combine_kernel(
    fine_ptr,
    coarse_ptr,
    gate_coarse_ptr,
    gate_fine_ptr,
    output_ptr,
    place_ptr,
    gate_coarse_strides,
    gate_fine_strides,
    output_strides,
    heads,
    num_cubes,
    length,
    D: tl.constexpr,
    SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    GATED_COARSE: tl.constexpr,
    GATED_FINE: tl.constexpr,
):
    """Grid (B * H, C). O = Gc * Oc + Gf * Of, back in raster order."""
    await_previous()
    pair, cube = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    coarse = tl.load(coarse_ptr + (pair * num_cubes + cube) * D + tl.arange(0, D))[None, :]
    for first in tl.static_range(0, SLOT, ROWS):
        row, inside = block_rows(place_ptr, cube, first, num_cubes, length, length, SLOT, ROWS)
        out = tl.load(fine_ptr + slot_offsets(pair, num_cubes, cube, first, SLOT, ROWS, D)).to(tl.float32)
        if GATED_FINE:
            out *= load_gate(gate_fine_ptr, gate_fine_strides, batch, head, row, inside, D)
        if GATED_COARSE:
            out += coarse * load_gate(gate_coarse_ptr, gate_coarse_strides, batch, head, row, inside, D)
        else:
            out += coarse
        store_tokens(output_ptr, output_strides, batch, head, row, inside, out, D)


def pool_cubes(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cubes: Cubes,
    *,
    gather: str = "",
    pool: bool = True,
    score: str = "mean",
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Copies in tile order and means over cubes, in one pass.

    Args:
        query: [B, H, L, D], raster order. key, value: [B, H, L + text, D]; without a value there is nothing to gather.
        gather: what to copy: "" (nothing), "kv" or "qkv".
        pool: whether to make means.
        score: what cubes are ranked by.

    Returns:
        Query [B, H, C * slot, D], key and value [B, H, T * slot, D], in tile order, zeros behind each block's tokens;
        pooled query, key and value, float32 [B, H, C, D]; and of query and key what `pick` takes for this score. What
        was not wanted is left out.
    """
    batch, heads, length, head_dim = query.shape
    slot, num_cubes, num_blocks = cubes.slot, cubes.num_cubes, cubes.key_sizes.shape[1]
    given = (query, key) if value is None else (query, key, value)
    copies = tuple(
        query.new_empty((batch, heads, (num_cubes if name == "q" else num_blocks) * slot, head_dim)) for name in gather
    )
    pooled = ()
    if pool:
        pooled = tuple(x.new_empty((batch, heads, num_cubes, head_dim), dtype=torch.float32) for x in given)
    ranked = pooled[:2]
    if pool and score == "log_sum_exp":
        quarters = (batch, heads, PARTS * num_cubes, head_dim)
        ranked = tuple(query.new_empty(quarters, dtype=torch.float16) for _ in range(2))
    elif pool and score == "mean_spread":
        ranked = pooled[0], query.new_empty((batch, heads, num_cubes, 2 * head_dim), dtype=torch.float32)
    # Pointers that a variant does not use.
    unused = (query,) * 3
    query_in, key_in, value_in = (given + unused)[:3]
    query_copy, key_copy, value_copy = (unused + copies)[-3:]
    query_mean, key_mean, value_mean = (pooled + unused)[:3]
    ranked_query, ranked_key = ranked or unused[:2]
    launch(
        _gather_cubes_kernel,
        (batch * heads, num_blocks if gather else num_cubes),
        query_ptr=query_in,
        key_ptr=key_in,
        value_ptr=value_in,
        cube_query_ptr=query_copy,
        cube_key_ptr=key_copy,
        cube_value_ptr=value_copy,
        pooled_query_ptr=query_mean,
        pooled_key_ptr=key_mean,
        pooled_value_ptr=value_mean,
        ranked_query_ptr=ranked_query,
        ranked_key_ptr=ranked_key,
        place_ptr=cubes.places,
        size_ptr=cubes.key_sizes,
        query_strides=row_strides(query),
        key_strides=row_strides(key),
        value_strides=(0, 0, 0) if value is None else row_strides(value),
        pooled_strides=(num_cubes * head_dim, head_dim, 1),
        heads=heads,
        num_cubes=num_cubes,
        num_blocks=num_blocks,
        length=length,
        key_length=key.shape[2],
        size_stride=size_stride(cubes.key_sizes),
        D=head_dim,
        SLOT=slot,
        ROWS=min(slot, 64),
        GATHER_QUERY="q" in gather,
        GATHER=gather != "",
        POOL=pool,
        WITH_VALUE=value is not None,
        QUARTERS=pool and score == "log_sum_exp",
        SPREAD=pool and score == "mean_spread",
        num_warps=4,
    )
    return copies, pooled, ranked


def gate_argument(gate: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A gate and its strides, or what a kernel takes in its place and does not use."""
    return (other, (0, 0, 0, 0)) if gate is None else (gate, gate.stride())


def attend_cubes(call: CubesCall, forward: type[Forward] = Forward) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `Backend.attend_cubes`; `copies` are query, key and value, and `forward` attends."""
    copies, problem = call.copies, Problem(*call.copies, call.selection, call.scale, call.cubes.uniform)
    lse = torch.empty(copies[0].shape[:3], dtype=torch.float32, device=call.query.device)
    # Every program is done with its queries when it writes its output: into their memory.
    fine, lse = forward(problem, results=(copies[0], lse)).run_all()
    output = call.cubes.new_like(call.query)
    combine(fine, call.coarse, call.gates, call.cubes, output)
    return output, fine if call.save_fine else None, lse


def combine(fine: Tensor, coarse: Tensor, gates: Gates, cubes: Cubes, output: Tensor) -> None:
    """Writes Gc * Oc + Gf * Of to `output`, [B, H, L, D] in raster order.

    Args:
        fine: Of, [B, H, C * slot, D], tile order. coarse: Oc, float32 [B, H, C, D].
    """
    batch, heads, length, head_dim = output.shape
    slot, num_cubes = cubes.slot, cubes.num_cubes
    gate_coarse, gate_coarse_strides = gate_argument(gates.coarse, coarse)
    gate_fine, gate_fine_strides = gate_argument(gates.fine, coarse)
    launch(
        _combine_kernel,
        (batch * heads, num_cubes),
        fine_ptr=fine,
        coarse_ptr=coarse,
        gate_coarse_ptr=gate_coarse,
        gate_fine_ptr=gate_fine,
        output_ptr=output,
        place_ptr=cubes.places,
        gate_coarse_strides=gate_coarse_strides,
        gate_fine_strides=gate_fine_strides,
        output_strides=row_strides(output),
        heads=heads,
        num_cubes=num_cubes,
        length=length,
        D=head_dim,
        SLOT=slot,
        ROWS=min(slot, 64),
        GATED_COARSE=gates.coarse is not None,
        GATED_FINE=gates.fine is not None,
        num_warps=4,
    )
