"""What SLA and VSA in one cost, part by part: VSA's parts, and those of SLA's linear branch over the same slots."""

from __future__ import annotations

import dataclasses

from foveal.methods.cost import AttentionShape, CostPart
from foveal.methods.sla.cost import cost_parts as sla_parts
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.vsa.cost import cost_parts as vsa_parts
from foveal.methods.vsa.layout import resolve_tile, slot_size

LINEAR_PARTS = ("state build", "mask GEMM", "apply", "projection")


def cost_parts(config: SLAVSAConfig, shape: AttentionShape) -> tuple[CostPart, ...]:
    """The parts of a forward pass: those of VSA (see `foveal.methods.vsa.cost.cost_parts`), and after `fine` those of
    SLA's linear branch over the video's cubes (see `foveal.methods.sla.cost.cost_parts`).
    """
    tile = resolve_tile(config.cubes, shape.grid)
    slots = shape.grid.num_cubes(tile) * slot_size(tile)
    linear = ()
    if config.linear_scope != "none":
        in_slots = dataclasses.replace(shape, query_length=slots, key_length=slots, layout=None)
        found = sla_parts(config.branch(slot_size(tile)), in_slots)
        linear = tuple(part for part in found if part.name in LINEAR_PARTS)
    parts = []
    for part in vsa_parts(config.cubes.replace(coarse=config.coarse), shape):
        parts.append(part)
        if part.name == "fine":
            parts.extend(linear)
    return tuple(parts)
