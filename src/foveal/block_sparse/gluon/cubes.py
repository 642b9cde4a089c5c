"""The launcher of VSA's fine stage on Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.block_sparse.gluon.launch import TAIL, TILE, _tiles
from foveal.block_sparse.launch_arguments import LOG2_E, size_stride

SLOT = TILE  # tokens that a cube takes up


def cubes_plan(uniform: int, gated_coarse: bool, gated_fine: bool, save_fine: bool) -> dict[str, Any]:
    """Constants and launch options; three programs a multiprocessor.

    Args:
        uniform: tokens of every block, 0 where they differ.
    """
    mask = None if uniform == SLOT else "tail" if uniform > SLOT - TAIL else "columns"
    gates = {"GATED_COARSE": gated_coarse, "GATED_FINE": gated_fine}
    return {
        "constants": {"MASK": mask, "SAVE_FINE": save_fine, **gates},
        "options": {"num_warps": 4, "maxnreg": 168},
    }


def _slots(x: Tensor, rows: int):
    """The descriptor of [B, H, T * SLOT, D] as slots, whose rows from `rows` on read as zeros without being fetched."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    slots = x.unflatten(2, (-1, SLOT))[:, :, :, :rows]
    box = [1, 1, 1, SLOT, x.shape[-1]]
    return TensorDescriptor(slots, list(slots.shape), list(slots.stride()), box, gl.NVMMASharedLayout(128, 16, 5))


def attend_cubes(
    query: Tensor,
    cube_key: Tensor,
    cube_value: Tensor,
    critical: Tensor,
    counts: Tensor,
    sizes: Tensor,
    uniform: int,
    places: Tensor,
    coarse: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    scale: float,
    *,
    save_fine: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """O = Gc * Oc + Gf * Of, strided like `query`; Of in tile order, if wanted; LSE of the fine stage in tile order.

    Args:
        query: [B, H, L, D], raster order, bfloat16 or float16, D 64 or 128.
        cube_key, cube_value: [B, H, T * SLOT, D], tile order, contiguous, zeros behind each block's tokens.
        critical, counts: int32 [B, H, C, W] and [B, H, C], contiguous.
        sizes: int32 [B or 1, T], valid keys of each block.
        uniform: the size of every block, or 0 where they differ.
        places: int64 [C * SLOT], where the tokens stand in raster order; -1 for none.
        coarse: Oc, float32 [B, H, C, D], contiguous.
        gate_coarse, gate_fine: [B, H, L, D], any strides; None for 1.
    """
    from foveal.block_sparse.gluon.cubes_kernel import cubes_fwd_kernel

    batch, heads, _, head_dim = query.shape
    num_cubes = coarse.shape[2]
    shape = (batch, heads, num_cubes * SLOT)
    output = torch.empty_like(query)
    fine = query.new_empty((*shape, head_dim)) if save_fine else None
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    plan = cubes_plan(uniform, gate_coarse is not None, gate_fine is not None, save_fine)
    gates = [output if x is None else x for x in (gate_coarse, gate_fine)]
    with torch.cuda.device(query.device):
        cubes_fwd_kernel[(num_cubes, heads, batch)](
            *(_slots(x, uniform or SLOT) for x in (cube_key, cube_value)), _tiles(fine, SLOT) if save_fine else None,
            query, coarse, *gates, output, places, lse, critical, counts, sizes,
            *(x.stride() for x in (query, *gates, output)), scale * LOG2_E, uniform, critical.shape[3],
            size_stride(sizes), **plan["constants"], **plan["options"],
        )  # fmt: skip
    return output, fine, lse
