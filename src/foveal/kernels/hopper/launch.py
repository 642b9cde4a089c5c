"""Launchers of the Hopper kernels: how each case is cut up, descriptors, grids.

Kernels are compiled once per dtype, head_dim, block sizes and presence of `sizes`; lengths, list widths, counts and
strides are read at run time. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.backend import BackwardCall, ForwardCall, RasterGradients
from foveal.kernels.host import Descriptors, launch, num_sms
from foveal.kernels.tma import copyable, tma_strides
from foveal.kernels.values import LOG2_E, LinearTerm, size_stride, state_strides

TILE = 64  # rows of most tiles
TAIL = 8  # masks of so many columns at a tile's end are cheap


def short_tail(size: int, tile: int) -> bool:
    """Whether so many valid rows leave a tile's last few, and no others, to mask."""
    return tile - TAIL <= size < tile


@functools.cache
def forward_plan(
    head_dim: int,
    block_q: int,
    block_k: int,
    has_sizes: bool,
    feature_map: str | None = None,
    projected: bool = False,
    uniform: int | None = None,
) -> dict[str, Any]:
    """How the forward is cut: which kernel, rows and columns of a copy of H (of W too), constants and launch options.

    Args:
        projected: whether H is, and W stays away.
        uniform: as in `Problem`.
    """
    if block_q == 128 and not has_sizes:
        constants = {"BLOCK_K": block_k, "SLOTS": 2 if head_dim == 128 else 3, "FEATURE_MAP": feature_map}
        return {"wide": True, "state_box": (head_dim,) * 2, "constants": constants, "options": {"num_warps": 4}}
    mask = None
    if has_sizes:
        tail = uniform is not None and block_k == TILE and short_tail(uniform, TILE)
        mask = "clear" if uniform is None else "tail" if tail else "columns"
    constants = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "MASK": mask, "FEATURE_MAP": feature_map}
    # Three programs per SM: what the linear branch needs in the epilogue must not cost one of them.
    box = (64, head_dim) if projected else (head_dim, 64)
    return {"wide": False, "state_box": box, "constants": constants, "options": {"num_warps": 4, "maxnreg": 168}}


@functools.cache
def dkdv_plan(block_q: int, block_k: int, has_sizes: bool) -> dict[str, Any]:
    """Constants and launch options of the dK, dV kernel."""
    return {
        "constants": {"BLOCK_Q": block_q, "BLOCK_K": block_k, "SLOTS": 2, "HAS_SIZES": has_sizes},
        "options": {"num_warps": 4},
    }


@functools.cache
def dq_plan(block_q: int, block_k: int, has_sizes: bool, tail: bool = False) -> dict[str, Any]:
    """How dQ is cut: keys a tile, constants and launch options; `tail` for key blocks that all lack a few keys.

    64 queries: two programs per SM, for which the compiler is limited to 128 registers per thread on average.
    """
    single = block_q == 64
    tile_k = 128 if block_q == block_k == 128 and (tail or not has_sizes) else 64  # masks take registers
    slots = (3, 2) if single else (256 // tile_k, 256 // tile_k)
    return {
        "tile_k": tile_k,
        "constants": {
            "BLOCK_Q": block_q,
            "BLOCK_K": block_k,
            "CONSUMERS": 1 if single else 2,
            "K_SLOTS": slots[0],
            "V_SLOTS": slots[1],
            "HAS_SIZES": has_sizes and not tail,
            "TAIL": tail,
        },
        "options": {"num_warps": 4, "maxnreg": 128} if single else {"num_warps": 4},
    }


@Descriptors
def tiles(x: Tensor, rows: int, columns: int | None = None):
    """The TMA descriptor of a tensor in tiles of `rows` by `columns` (all of them) of its last two dimensions."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1] * (x.dim() - 2) + [rows, columns or x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), tma_strides(x), box, gl.NVMMASharedLayout(128, 16, x.dim()))


@Descriptors
def _statistics_tiles(x: Tensor):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [2 * TILE], gl.NVMMASharedLayout(0, 32, 1))


def walkable(x: Tensor) -> Tensor:
    """x, or a copy if TMA cannot walk it as it lies."""
    return x if copyable(x) else x.clone(memory_format=torch.contiguous_format)


def mix_of(linear: LinearTerm | None) -> tuple[Tensor, int] | None:
    """What both branches are multiplied by, as kernels take it: with its stride over pairs."""
    return None if linear is None or linear.mix is None else (linear.mix, linear.mix.stride(0))


class Forward(ForwardCall):
    """`ForwardCall` for the Hopper kernels, of inputs that `support.why_not` accepts."""

    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        selection, linear, (output, lse) = self.selection, self.linear, self.results
        sizes = selection.key_block_sizes
        self.device, self.blocks = query.device, selection.critical.shape[2]
        projected = linear is not None and linear.weight is None
        self.plan = forward_plan(
            query.shape[-1],
            selection.block_q,
            selection.block_k,
            sizes is not None,
            None if linear is None else linear.feature_map,
            projected,
            self.uniform,
        )
        self.shared = {
            "query": tiles(walkable(query), TILE),
            "key": tiles(walkable(key), TILE),
            "value": tiles(walkable(value), TILE),
            "output": tiles(output, TILE),
            "lse_ptr": lse,
            "critical_ptr": selection.critical,
            "count_ptr": selection.critical_count,
            "weight": None if linear is None or projected else tiles(linear.weight, *self.plan["state_box"]),
            "bias_ptr": None if linear is None else linear.bias,
            "mix": mix_of(linear),
            "scale_log2": self.scale_log2,
            "heads": self.heads,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "width": self.width,
            **self.plan["constants"],
            **self.plan["options"],
        }
        if not self.plan["wide"]:
            self.shared |= {"size_ptr": sizes, "size_stride": self.size_stride, "uniform": self.uniform or 0}

    def run(
        self, pairs: range, state: Tensor | None = None, norm: Tensor | None = None, means: Tensor | None = None
    ) -> None:
        from foveal.kernels.hopper.forward_kernel import block_sparse_fwd_kernel
        from foveal.kernels.hopper.forward_wide_kernel import block_sparse_fwd_wide_kernel

        states = {"state": None, "norm_ptr": norm, "state_step": 0, "norm_pair_stride": 0, "norm_block_stride": 0}
        if state is not None:
            one_for_all = state.stride(1) == 0 or state.shape[1] == 1
            states["state"] = tiles(state[:, :1] if one_for_all else state, *self.plan["state_box"])
            states["state_step"] = 0 if one_for_all else 1
            states["norm_pair_stride"], states["norm_block_stride"] = state_strides(norm)
        states["mean"] = None if means is None else (means[1], *state_strides(means[1]))
        named = self.shared | states
        if self.plan["wide"]:
            total = len(pairs) * self.blocks
            grid = (min(total, num_sms(self.device)),)
            launch(
                block_sparse_fwd_wide_kernel, grid, first_pair=pairs.start, num_blocks=self.blocks, total=total, **named
            )
        else:
            grid = -(-self.query_length // TILE), len(pairs)
            launch(block_sparse_fwd_kernel, grid, first_pair=pairs.start, **named)


def backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`; `grad` is copied if TMA cannot walk it."""
    from foveal.kernels.hopper.dkdv_kernel import block_sparse_dkdv_kernel, row_statistics_kernel
    from foveal.kernels.hopper.dq_kernel import block_sparse_dq_kernel

    query, key, value, selection, scale, uniform = call.problem
    grad, columns, grad_query, raster = call.grad, call.columns, call.grad_query, call.raster
    batch, heads, query_length, head_dim = query.shape
    sizes, block_q, block_k = selection.key_block_sizes, selection.block_q, selection.block_k
    uniform = uniform or 0
    add = grad_query is not None
    if raster is not None:
        grads = targets = raster.grads
    else:
        grads = grad_query if add else torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        targets = [tiles(x, TILE) for x in grads]
    grad, query, key, value = walkable(grad), walkable(query), walkable(key), walkable(value)
    query_tiles, key_tiles, value_tiles, grad_tiles = (tiles(x, TILE) for x in (query, key, value, grad))
    num_tiles = -(-query_length // block_q) * (block_q // TILE)
    statistics = torch.empty(batch * heads * num_tiles * 2 * TILE, dtype=torch.float32, device=query.device)
    launch(
        row_statistics_kernel,
        (-(-num_tiles // 4), batch * heads),
        lse_ptr=call.lse,
        delta_ptr=call.delta,
        statistics_ptr=statistics,
        query_length=query_length,
        num_tiles=num_tiles,
        num_warps=4,
    )
    plan = dq_plan(block_q, block_k, sizes is not None, short_tail(uniform, block_k))
    tile_k = plan["tile_k"]
    both = {
        "size_ptr": sizes,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        "query_length": query_length,
        "key_length": selection.key_length,
        "size_stride": size_stride(sizes),
    }
    launch(
        block_sparse_dq_kernel,
        (-(-query_length // (TILE * plan["constants"]["CONSUMERS"])), heads, batch),
        query=query_tiles,
        key=key_tiles if tile_k == TILE else tiles(key, tile_k),
        value=value_tiles if tile_k == TILE else tiles(value, tile_k),
        grad=grad_tiles,
        grad_query=targets[0],
        statistics_ptr=statistics,
        critical_ptr=selection.critical,
        count_ptr=selection.critical_count,
        width=selection.critical.shape[3],
        uniform=uniform,
        ADD=add,
        **_query_raster(raster),
        **both,
        **plan["constants"],
        **plan["options"],
    )
    plan = dkdv_plan(block_q, block_k, sizes is not None)
    launch(
        block_sparse_dkdv_kernel,
        (-(-selection.key_length // TILE), heads, batch),
        query=query_tiles,
        key=key_tiles,
        value=value_tiles,
        grad=grad_tiles,
        statistics=_statistics_tiles(statistics),
        grad_key=targets[1],
        grad_value=targets[2],
        offset_ptr=columns.offsets,
        count_ptr=columns.counts,
        row_ptr=columns.rows,
        **_key_side(call.linear, head_dim),
        **_key_raster(raster),
        **both,
        **plan["constants"],
        **plan["options"],
    )
    return tuple(grads)


def _query_raster(raster: RasterGradients | None) -> dict[str, Any]:
    """What the kernel for dQ takes to write in raster order, or not to."""
    if raster is None:
        return {"video": None, "grad_query_strides": None, "video_length": 0}
    query, cubes = raster.grads[0], raster.cubes
    return {
        "video": (raster.pooled[0], cubes.places, cubes.cube_sizes),
        "grad_query_strides": query.stride(),
        "video_length": query.shape[2],
    }


def _key_raster(raster: RasterGradients | None) -> dict[str, Any]:
    """The same for the kernel for dK and dV."""
    if raster is None:
        nothing = dict.fromkeys(("video", "grad_key_strides", "grad_value_strides"))
        return {**nothing, "video_length": 0, "video_key_length": 0}
    (query, key, value), cubes = raster.grads, raster.cubes
    return {
        "video": (*raster.pooled[1:], cubes.places, cubes.cube_sizes),
        "grad_key_strides": key.stride(),
        "grad_value_strides": value.stride(),
        "video_length": query.shape[2],
        "video_key_length": key.shape[2],
    }


def _key_side(linear: LinearTerm | None, head_dim: int) -> dict[str, Any]:
    """What the kernel for dK and dV takes of the linear branch."""
    if linear is None:
        return {
            "grad_state": None,
            "grad_norm_ptr": None,
            "mean_ptr": None,
            "state_step": 0,
            "norm_pair_stride": 0,
            "norm_block_stride": 0,
            "FEATURE_MAP": None,
        }
    step = int(linear.state.shape[1] > 1)
    return {
        "grad_state": tiles(linear.state, min(TILE, head_dim)),
        "grad_norm_ptr": linear.norm,
        "mean_ptr": linear.means[0],
        "state_step": step,
        "norm_pair_stride": linear.norm.stride(0),
        "norm_block_stride": step * linear.norm.stride(1),
        "FEATURE_MAP": linear.feature_map,
    }
