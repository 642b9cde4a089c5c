"""The calls of SLA that `foveal bench` checks and times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.api import select_blocks
from foveal.layout import VideoGrid
from foveal.methods.bench import BenchCase
from foveal.methods.sla.attention import sla_attention
from foveal.methods.sla.config import SLAConfig


def _select(query: Tensor, key: Tensor, *, config: SLAConfig, grid: VideoGrid) -> BlockSelection:
    ratios = {"keep_ratio": config.keep_ratio, "drop_ratio": config.drop_ratio}
    return select_blocks(query, key, block_q=config.block_q, block_k=config.block_k, **ratios)


def _head(
    in_chunks: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    config: SLAConfig,
    grid: VideoGrid,
    selection: BlockSelection,
    dtype: torch.dtype,
    **weights: Tensor,
) -> Tensor:
    # The projection stays in float32 where the tensors are half precision.
    weights = {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in weights.items()}

    def rows(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection) -> Tensor:
        return sla_attention(query, key, value, config=config, selection=selection, impl="reference", **weights)

    return in_chunks(rows, *inputs, selection, dtype)


CONFIGS = {
    "SLA 64x64 marginal": SLAConfig(keep_ratio=0.05, drop_ratio=0.10),
    "SLA 64x64 marginal, int8": SLAConfig(keep_ratio=0.05, drop_ratio=0.10, precision="int8"),
    "SLA 128x64 marginal": SLAConfig(keep_ratio=0.05, drop_ratio=0.10, block_q=128),
    # Over all keys nothing is negligible.
    "SLA 128x64 all": SLAConfig(keep_ratio=0.05, drop_ratio=0.0, block_q=128, linear_scope="all"),
}
CASES = tuple(
    BenchCase(name, config, sla_attention, _select, {"proj_weight": "DD", "proj_bias": "D"}, _head)
    for name, config in CONFIGS.items()
)
