"""What SLA answers to models, tables and the lab: its `Method`."""

from __future__ import annotations

from torch import Tensor, nn

from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Method, Schedule, SummaryCells, blocks_cell
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


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    grid: VideoGrid | TokenLayout,
    kv_lengths: Tensor | None = None,
    config: SLAConfig | None = None,
    gates: None = None,
) -> Tensor:
    if isinstance(grid, TokenLayout):
        return module(query, key, value, layout=grid, kv_lengths=kv_lengths, config=config)
    text = (query.shape[2], key.shape[2]) if key.shape[2] > query.shape[2] else None
    return module(query, key, value, grid=grid, protected_keys=text, kv_lengths=kv_lengths, config=config)


def _idle(module: SparseLinearAttention, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
    return (*(module.proj() if module.proj is not None else ()), module.feature_weight)


def _cells(config: SLAConfig, grid: VideoGrid | None) -> SummaryCells:
    blocks = f"{config.block_q}x{config.block_k}" + (" tile" if config.token_order == "tile" else "")
    keep = keep_cell(ratio_cell(config.keep_ratio), config)
    return SummaryCells(keep, f"{config.drop_ratio:g}", config.linear_scope, blocks_cell(blocks, config.precision))


def _key_blocks(config: SLAConfig, grid: VideoGrid) -> tuple[int, str]:
    return -(-grid.num_tokens // config.block_k), str(config.block_k)


def _kept_blocks(config: SLAConfig, grid: VideoGrid, packed: bool) -> tuple[int, int] | None:
    if not known_on_host(config):
        return None
    blocks, _ = _key_blocks(config, grid)
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
    key_blocks=_key_blocks,
    kept_blocks=_kept_blocks,
    precision=lambda config: config.precision,
    plan=plan,
    schedule=Schedule(ratios=("keep_ratio", "drop_ratio"), keep=_keep),
    presets={"SLA, raster order": SLAConfig(), "SLA, tile order": SLAConfig(token_order="tile")},
    training_free=SLAConfig(drop_ratio=0.0, linear_scope="none", tail="pooled", token_order="tile"),
    bench_cases=CASES,
)
