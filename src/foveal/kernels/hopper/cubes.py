"""The launcher of VSA's fine stage on Hopper: cubes in slots of 64 or of 128 tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.backend import CubesCall
from foveal.kernels.hopper.launch import TILE, short_tail, tiles
from foveal.kernels.host import Descriptors, launch, num_sms
from foveal.kernels.values import LOG2_E, size_stride


@functools.cache
def cubes_plan(slot: int, uniform: int, gated_coarse: bool, gated_fine: bool, save_fine: bool) -> dict[str, Any]:
    """Constants and launch options; slots of 64 get three programs per SM, slots of 128 one persistent program.

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


def attend_cubes(call: CubesCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `Backend.attend_cubes`; `copies` are key and value."""
    from foveal.kernels.hopper.cubes_kernel import cubes_fwd_kernel
    from foveal.kernels.hopper.cubes_wide_kernel import cubes_fwd_wide_kernel

    query, copies, cubes, selection, coarse, gates, scale, save_fine = call
    batch, heads, _, head_dim = query.shape
    slot, uniform, sizes, num_cubes = cubes.slot, cubes.uniform, cubes.key_sizes, cubes.num_cubes
    shape = (batch, heads, num_cubes * slot)
    output = cubes.new_like(query)
    fine = query.new_empty((*shape, head_dim)) if save_fine else None
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    plan = cubes_plan(slot, uniform, gates.coarse is not None, gates.fine is not None, save_fine)
    gate_coarse, gate_fine = (output if x is None else x for x in gates)
    rows = uniform or slot
    named = {
        "key": _slots(copies[0], slot, rows),
        "value": _slots(copies[1], slot, rows),
        "fine": tiles(fine, TILE) if save_fine else None,
        "query_ptr": query,
        "coarse_ptr": coarse,
        "gate_coarse_ptr": gate_coarse,
        "gate_fine_ptr": gate_fine,
        "output_ptr": output,
        "place_ptr": cubes.places,
        "lse_ptr": lse,
        "critical_ptr": selection.critical,
        "count_ptr": selection.critical_count,
        "size_ptr": sizes,
        "query_strides": query.stride(),
        "gate_coarse_strides": gate_coarse.stride(),
        "gate_fine_strides": gate_fine.stride(),
        "output_strides": output.stride(),
        "scale_log2": scale * LOG2_E,
        "uniform": uniform,
        "width": selection.critical.shape[3],
        "size_stride": size_stride(sizes),
        **plan["constants"],
        **plan["options"],
    }
    if plan["wide"]:
        total = batch * heads * num_cubes
        grid = (min(total, num_sms(query.device)),)
        launch(cubes_fwd_wide_kernel, grid, heads=heads, num_cubes=num_cubes, total=total, **named)
    else:
        launch(cubes_fwd_kernel, (num_cubes, heads, batch), **named)
    return output, fine, lse
