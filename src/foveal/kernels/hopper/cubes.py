"""The launcher of VSA's fine stage on Hopper: cubes in slots of 64 or of 128 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.hopper.launch import TILE, _multiprocessors, _tiles, short_tail
from foveal.kernels.launch_arguments import LOG2_E, Descriptors, size_stride


def cubes_plan(slot: int, uniform: int, gated_coarse: bool, gated_fine: bool, save_fine: bool) -> dict[str, Any]:
    """Constants and launch options; for slots of 64 three programs a multiprocessor, for those of 128 one that stays.

    Args:
        slot: tokens that a cube takes up.
        uniform: tokens of every block, 0 where they differ.
    """
    mask = None if uniform == slot else "tail" if short_tail(uniform, slot) else "columns"
    constants = {"MASK": mask, "SAVE_FINE": save_fine, "GATED_COARSE": gated_coarse, "GATED_FINE": gated_fine}
    if slot == TILE:
        return {"wide": False, "constants": constants, "options": {"num_warps": 4, "maxnreg": 168}}
    return {"wide": True, "constants": {"SLOTS": 3, **constants}, "options": {"num_warps": 4}}


@Descriptors
def _slots(x: Tensor, slot: int, rows: int):
    """The descriptor of [B, H, T * slot, D] as slots, whose rows from `rows` on read as zeros without being fetched."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    slots = x.unflatten(2, (-1, slot))[:, :, :, :rows]
    box = [1, 1, 1, slot, x.shape[-1]]
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
    slot: int,
    save_fine: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """O = Gc * Oc + Gf * Of, strided like `query`; Of in tile order, if wanted; LSE of the fine stage in tile order.

    Args:
        query: [B, H, L, D], raster order, bfloat16 or float16, D 64 or 128.
        cube_key, cube_value: [B, H, T * slot, D], tile order, contiguous, zeros behind each block's tokens.
        critical, counts: int32 [B, H, C, W] and [B, H, C], contiguous.
        sizes: int32 [B or 1, T], valid keys of each block.
        uniform: the size of every block, or 0 where they differ.
        places: int64 [C * slot], where the tokens stand in raster order; -1 for none.
        coarse: Oc, float32 [B, H, C, D], contiguous.
        gate_coarse, gate_fine: [B, H, L, D], any strides; None for 1.
        slot: 64 or 128.
    """
    from foveal.kernels.hopper.cubes_kernel import cubes_fwd_kernel
    from foveal.kernels.hopper.cubes_wide_kernel import cubes_fwd_wide_kernel
    from foveal.kernels.triton.launch import launch

    batch, heads, _, head_dim = query.shape
    num_cubes = coarse.shape[2]
    shape = (batch, heads, num_cubes * slot)
    output = torch.empty_like(query)
    fine = query.new_empty((*shape, head_dim)) if save_fine else None
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    plan = cubes_plan(slot, uniform, gate_coarse is not None, gate_fine is not None, save_fine)
    gates = [output if x is None else x for x in (gate_coarse, gate_fine)]
    arguments = (
        *(_slots(x, slot, uniform or slot) for x in (cube_key, cube_value)), _tiles(fine, TILE) if save_fine else None,
        query, coarse, *gates, output, places, lse, critical, counts, sizes,
        *(x.stride() for x in (query, *gates, output)), scale * LOG2_E,
    )  # fmt: skip
    last, named = (uniform, critical.shape[3], size_stride(sizes)), plan["constants"] | plan["options"]
    with torch.cuda.device(query.device):
        if plan["wide"]:
            total = batch * heads * num_cubes
            grid = (min(total, _multiprocessors(query.device)),)
            launch(cubes_fwd_wide_kernel, grid, *arguments, heads, num_cubes, total, *last, **named)
        else:
            launch(cubes_fwd_kernel, (num_cubes, heads, batch), *arguments, *last, **named)
    return output, fine, lse
