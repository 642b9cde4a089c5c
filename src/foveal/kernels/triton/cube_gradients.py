"""The backward between raster and tile order: kernels that move a cube's gradients and, in the same pass, split or add.

Tensors stand as in `cubes`, which has the shape legend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.backend import Cubes, Gates, RasterGradients
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.cubes import (
    UNSPECIALIZED,
    block_rows,
    gate_argument,
    load_gate,
    load_tokens,
    slot_offsets,
    store_gate,
    store_tokens,
)
from foveal.kernels.triton.tiles import row_strides


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _split_gradient_kernel(
    grad_ptr,
    attended_ptr,
    coarse_ptr,
    gate_coarse_ptr,
    gate_fine_ptr,
    place_ptr,
    grad_fine_ptr,
    delta_ptr,
    grad_coarse_ptr,
    grad_gate_coarse_ptr,
    grad_gate_fine_ptr,
    grad_strides,
    attended_strides,
    gate_coarse_strides,
    gate_fine_strides,
    grad_gate_coarse_strides,
    grad_gate_fine_strides,
    heads,
    num_cubes,
    length,
    D: tl.constexpr,
    SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    GATED_COARSE: tl.constexpr,
    GATED_FINE: tl.constexpr,
):
    """Grid (B * H, C). From dO: dOf = Gf * dO in tile order and rowsum(dOf * Of), dOc, and the gates' gradients.

    `attended` is Of in tile order with GATED_FINE, else O in raster order, of which Of is what Gc * Oc leaves.
    """
    await_previous()
    pair, cube = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    feature = tl.arange(0, D)
    coarse = tl.load(coarse_ptr + (pair * num_cubes + cube) * D + feature)[None, :]
    grad_coarse = tl.zeros([D], tl.float32)
    for first in tl.static_range(0, SLOT, ROWS):
        row, inside = block_rows(place_ptr, cube, first, num_cubes, length, length, SLOT, ROWS)
        offsets = slot_offsets(pair, num_cubes, cube, first, SLOT, ROWS, D)
        grad = load_tokens(grad_ptr, grad_strides, batch, head, row, inside, D).to(tl.float32)
        gated_coarse = coarse
        if GATED_COARSE:
            gate = load_gate(gate_coarse_ptr, gate_coarse_strides, batch, head, row, inside, D)
            gated_coarse = coarse * gate
            grad_coarse += tl.sum(grad * gate, 0)
            store_gate(grad_gate_coarse_ptr, grad_gate_coarse_strides, batch, head, row, inside, grad * coarse, D)
        else:
            grad_coarse += tl.sum(grad, 0)
        if GATED_FINE:
            fine = tl.load(attended_ptr + offsets).to(tl.float32)
            gate = load_gate(gate_fine_ptr, gate_fine_strides, batch, head, row, inside, D)
            store_gate(grad_gate_fine_ptr, grad_gate_fine_strides, batch, head, row, inside, grad * fine, D)
            grad *= gate
        else:
            output = load_tokens(attended_ptr, attended_strides, batch, head, row, inside, D).to(tl.float32)
            fine = output - gated_coarse
        grad_fine = grad.to(grad_fine_ptr.dtype.element_ty)
        tl.store(grad_fine_ptr + offsets, grad_fine)
        place = (pair * num_cubes + cube) * SLOT + first + tl.arange(0, ROWS)
        tl.store(delta_ptr + place, tl.sum(grad_fine.to(tl.float32) * fine, 1))
    tl.store(grad_coarse_ptr + (pair * num_cubes + cube) * D + feature, grad_coarse)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _return_gradients_kernel(
    cube_query_ptr,
    cube_key_ptr,
    cube_value_ptr,
    pooled_query_ptr,
    pooled_key_ptr,
    pooled_value_ptr,
    place_ptr,
    size_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    query_strides,
    key_strides,
    value_strides,
    heads,
    num_cubes,
    num_blocks,
    length,
    key_length,
    D: tl.constexpr,
    SLOT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (B * H, T). Fine gradients from tile to raster order, plus each token's share of the pooled ones."""
    await_previous()
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    is_cube = block < num_cubes
    share = 1.0 / tl.load(size_ptr + block, mask=is_cube, other=1).to(tl.float32)
    feature = tl.arange(0, D)
    pooled = (pair * num_cubes + block) * D + feature
    has_pooled = (block + 0 * feature) < num_cubes
    shared_q = tl.load(pooled_query_ptr + pooled, mask=has_pooled, other=0.0)[None, :] * share
    shared_k = tl.load(pooled_key_ptr + pooled, mask=has_pooled, other=0.0)[None, :] * share
    shared_v = tl.load(pooled_value_ptr + pooled, mask=has_pooled, other=0.0)[None, :] * share
    for first in tl.static_range(0, SLOT, ROWS):
        row, inside = block_rows(place_ptr, block, first, num_cubes, length, key_length, SLOT, ROWS)
        offsets = slot_offsets(pair, num_blocks, block, first, SLOT, ROWS, D)
        k = tl.load(cube_key_ptr + offsets).to(tl.float32) + shared_k
        store_tokens(key_ptr, key_strides, batch, head, row, inside, k, D)
        v = tl.load(cube_value_ptr + offsets).to(tl.float32) + shared_v
        store_tokens(value_ptr, value_strides, batch, head, row, inside, v, D)
        if is_cube:
            q = tl.load(cube_query_ptr + slot_offsets(pair, num_cubes, block, first, SLOT, ROWS, D)).to(tl.float32)
            store_tokens(query_ptr, query_strides, batch, head, row, inside, q + shared_q, D)


class SplitGradients(NamedTuple):
    """The backward of `combine`.

    fine: dOf in tile order. delta: rowsum(dOf * Of), float32 [B, H, C * slot].
    coarse: dOc summed over each cube's tokens, float32 [B, H, C, D].
    gates: the gradients of the gates.
    """

    fine: Tensor
    delta: Tensor
    coarse: Tensor
    gates: Gates


def split_gradient(grad: Tensor, attended: Tensor, coarse: Tensor, gates: Gates, cubes: Cubes) -> SplitGradients:
    """Run the backward of `combine`.

    Args:
        attended: with a fine gate Of as `combine` has it, else the output O, [B, H, L, D] in raster order, any strides.
    """
    batch, heads, length, head_dim = grad.shape
    slot, num_cubes = cubes.slot, cubes.num_cubes
    grad_fine, grad_coarse = grad.new_empty((batch, heads, num_cubes * slot, head_dim)), torch.empty_like(coarse)
    delta = torch.empty(grad_fine.shape[:3], dtype=torch.float32, device=grad.device)
    grad_gates = Gates(*(None if x is None else cubes.new_like(x) for x in gates))
    gate_coarse, gate_coarse_strides = gate_argument(gates.coarse, coarse)
    gate_fine, gate_fine_strides = gate_argument(gates.fine, coarse)
    grad_gate_coarse, grad_gate_coarse_strides = gate_argument(grad_gates.coarse, coarse)
    grad_gate_fine, grad_gate_fine_strides = gate_argument(grad_gates.fine, coarse)
    launch(
        _split_gradient_kernel,
        (batch * heads, num_cubes),
        grad_ptr=grad,
        attended_ptr=attended,
        coarse_ptr=coarse,
        gate_coarse_ptr=gate_coarse,
        gate_fine_ptr=gate_fine,
        place_ptr=cubes.places,
        grad_fine_ptr=grad_fine,
        delta_ptr=delta,
        grad_coarse_ptr=grad_coarse,
        grad_gate_coarse_ptr=grad_gate_coarse,
        grad_gate_fine_ptr=grad_gate_fine,
        grad_strides=row_strides(grad),
        attended_strides=row_strides(attended),
        gate_coarse_strides=gate_coarse_strides,
        gate_fine_strides=gate_fine_strides,
        grad_gate_coarse_strides=grad_gate_coarse_strides,
        grad_gate_fine_strides=grad_gate_fine_strides,
        heads=heads,
        num_cubes=num_cubes,
        length=length,
        D=head_dim,
        SLOT=slot,
        ROWS=min(slot, 32),
        GATED_COARSE=gates.coarse is not None,
        GATED_FINE=gates.fine is not None,
        num_warps=4,
    )
    return SplitGradients(grad_fine, delta, grad_coarse, grad_gates)


def return_gradients(fine: tuple[Tensor, Tensor, Tensor], raster: RasterGradients) -> None:
    """Write the gradients of query, key and value in raster order: the backward of `pool_cubes`.

    Args:
        fine: fine gradients in tile order.
    """
    (grad_query, grad_key, grad_value), pooled, cubes = raster
    batch, heads, length, head_dim = grad_query.shape
    num_blocks = cubes.key_sizes.shape[1]
    launch(
        _return_gradients_kernel,
        (batch * heads, num_blocks),
        cube_query_ptr=fine[0],
        cube_key_ptr=fine[1],
        cube_value_ptr=fine[2],
        pooled_query_ptr=pooled[0],
        pooled_key_ptr=pooled[1],
        pooled_value_ptr=pooled[2],
        place_ptr=cubes.places,
        size_ptr=cubes.cube_sizes,
        query_ptr=grad_query,
        key_ptr=grad_key,
        value_ptr=grad_value,
        query_strides=row_strides(grad_query),
        key_strides=row_strides(grad_key),
        value_strides=row_strides(grad_value),
        heads=heads,
        num_cubes=cubes.num_cubes,
        num_blocks=num_blocks,
        length=length,
        key_length=grad_key.shape[2],
        D=head_dim,
        SLOT=cubes.slot,
        ROWS=min(cubes.slot, 64),
        num_warps=4,
    )
