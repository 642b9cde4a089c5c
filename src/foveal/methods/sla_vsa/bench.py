"""The calls of SLA and VSA in one that `foveal bench` checks and times."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.layout import VideoGrid
from foveal.methods.bench import BenchCase
from foveal.methods.sla_vsa.attention import sla_vsa_attention
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.vsa.attention import select_cubes


def _call(query: Tensor, key: Tensor, value: Tensor, *, proj_weight: Tensor, proj_bias: Tensor, **rest) -> Tensor:
    # The projection stays in float32 where the tensors are half precision.
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = {"proj_weight": proj_weight.to(dtype), "proj_bias": proj_bias.to(dtype)}
    return sla_vsa_attention(query, key, value, **weights, **rest)


def _select(query: Tensor, key: Tensor, *, config: SLAVSAConfig, grid: VideoGrid) -> BlockSelection:
    return select_cubes(query, key, config=config.cubes, grid=grid)


CONFIGS = {
    "SLA + VSA 12.5 %": SLAVSAConfig(),
    "SLA + VSA 12.5 %, all": SLAVSAConfig(linear_scope="all"),
}
EXTRAS = {"gate_coarse": "BHLD", "proj_weight": "DD", "proj_bias": "D"}
# The gates' projections belong to the model around.
CASES = tuple(BenchCase(name, config, _call, _select, EXTRAS, left_out=("gates",)) for name, config in CONFIGS.items())
