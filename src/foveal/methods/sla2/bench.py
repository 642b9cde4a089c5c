"""The calls of SLA2 that `foveal bench` checks and times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.layout import VideoGrid
from foveal.methods.bench import BenchCase
from foveal.methods.sla2.attention import select_routed, sla2_attention
from foveal.methods.sla2.config import SLA2Config


def _call(query: Tensor, key: Tensor, value: Tensor, *, config: SLA2Config, **rest) -> Tensor:
    """With the projections that training starts from; the router learns where the inputs have gradients."""
    eye = torch.eye(query.shape[-1], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    eye.requires_grad_(query.requires_grad)
    return sla2_attention(query, key, value, config=config, proj_query=eye, proj_key=eye, **rest)


def _select(query: Tensor, key: Tensor, *, config: SLA2Config, grid: VideoGrid) -> BlockSelection:
    return select_routed(query, key, config)


def _head(
    in_chunks: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    config: SLA2Config,
    grid: VideoGrid,
    selection: BlockSelection,
    dtype: torch.dtype,
) -> Tensor:
    def rows(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection) -> Tensor:
        return sla2_attention(query, key, value, config=config, selection=selection, impl="reference")

    return in_chunks(rows, *inputs, selection, dtype)


CONFIGS = {
    "SLA2 64x64": SLA2Config(keep_ratio=0.05, block_q=64, routing="fixed"),
    "SLA2 128x64": SLA2Config(keep_ratio=0.05, routing="fixed"),
    "SLA2 64x64, learning": SLA2Config(keep_ratio=0.05, block_q=64),
    "SLA2 64x64, no linear branch, learning": SLA2Config(keep_ratio=0.05, block_q=64, linear_scope="none"),
}
CASES = tuple(BenchCase(name, config, _call, _select, head=_head) for name, config in CONFIGS.items())
