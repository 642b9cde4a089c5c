"""What SLA answers to models, tables and the lab: its `Method`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveal.layout import VideoGrid
from foveal.methods.base import LayerCall, Method, Schedule, SummaryCells, blocks_cell
from foveal.methods.choosing import keep_cell, known_on_host, mean_kept, ratio_cell, scaled
from foveal.methods.sla.attention import SparseLinearAttention
from foveal.methods.sla.bench import CASES
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.cost import cost_parts
from foveal.methods.sla.order import picked_by_head, plan
from foveal.rules import check_heads, ratios_of


def _build(config: SLAConfig, hidden_dim: int, num_heads: int, head_dim: int, impl: str) -> SparseLinearAttention:
    check_heads(config.keep_ratio, num_heads)
    return SparseLinearAttention(head_dim, config, impl=impl)


def _run(module: SparseLinearAttention, call: LayerCall) -> Tensor:
    return module(*call[:3], protected_keys=call.text(), **call.named())


def _idle(module: SparseLinearAttention, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
    return (*(module.proj() if module.proj is not None else ()), module.feature_weight)


def _cells(config: SLAConfig, grid: VideoGrid | None) -> SummaryCells:
    keep = keep_cell(ratio_cell(config.keep_ratio), config)
    return SummaryCells(
        keep, f"{config.drop_ratio:g}", config.linear_scope, blocks_cell(token_blocks(config), config.precision)
    )


def token_blocks(config: Any) -> str:
    """The cell of blocks of `block_q` by `block_k` tokens in `token_order`."""
    return f"{config.block_q}x{config.block_k}" + (" tile" if config.token_order == "tile" else "")


def key_blocks(config: Any, grid: VideoGrid) -> tuple[int, str]:
    """`Method.key_blocks` where blocks are of `block_k` tokens."""
    return -(-grid.num_tokens // config.block_k), str(config.block_k)


def _kept_blocks(config: SLAConfig, grid: VideoGrid, packed: bool) -> tuple[int, int] | None:
    if not known_on_host(config):
        return None
    blocks, _ = key_blocks(config, grid)
    return mean_kept(picked_by_head(config, blocks), blocks), blocks


def _keep(config: SLAConfig, ratio: float) -> SLAConfig:
    ratio = scaled(config.keep_ratio, ratio)
    highest = max(ratios_of(ratio))
    most = config.max_keep_ratio if config.keep_mass is None else max(highest, config.max_keep_ratio)
    return config.replace(keep_ratio=ratio, drop_ratio=min(config.drop_ratio, 1 - highest), max_keep_ratio=most)


SLA = Method(
    name="sla",
    config_type=SLAConfig,
    module_type=SparseLinearAttention,
    build=_build,
    run=_run,
    idle=_idle,
    cost=cost_parts,
    cells=_cells,
    key_blocks=key_blocks,
    kept_blocks=_kept_blocks,
    precision=lambda config: config.precision,
    plan=plan,
    schedule=Schedule(ratios=("keep_ratio", "drop_ratio"), keep=_keep),
    presets={"SLA, raster order": SLAConfig(), "SLA, tile order": SLAConfig(token_order="tile")},
    training_free=SLAConfig(drop_ratio=0.0, linear_scope="none", tail="pooled", token_order="tile"),
    bench_cases=CASES,
)
