"""What SLA and VSA in one answer to models, tables and the lab: their `Method`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Method, Schedule, SummaryCells
from foveal.methods.sla_vsa.attention import SparseLinearVideoAttention
from foveal.methods.sla_vsa.bench import CASES
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.sla_vsa.cost import cost_parts
from foveal.methods.vsa.layout import cube_order, picked_by_head, resolve_tile
from foveal.methods.vsa.method import VSA
from foveal.token_order import TileOrder


def _build(
    config: SLAVSAConfig, hidden_dim: int, num_heads: int, head_dim: int, impl: str
) -> SparseLinearVideoAttention:
    return SparseLinearVideoAttention(hidden_dim, num_heads, head_dim, config, impl=impl)


def _gates(module: SparseLinearVideoAttention, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return module.gates(hidden_states)


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    grid: VideoGrid | TokenLayout,
    kv_lengths: Tensor | None = None,
    config: SLAVSAConfig | None = None,
    gates: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    where = {"layout" if isinstance(grid, TokenLayout) else "grid": grid}
    return module(query, key, value, hidden_states, gates, kv_lengths=kv_lengths, config=config, **where)


def _idle(module: SparseLinearVideoAttention, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
    return *module.gates(hidden_states[:, :0]), *(module.proj() if module.proj is not None else ())  # of no token


def _cells(config: SLAVSAConfig, grid: VideoGrid | None) -> SummaryCells:
    tile = config.tile if grid is None else resolve_tile(config.cubes, grid)
    return SummaryCells(
        keep=f"{config.keep_ratio:g}" if config.topk is None else f"top {config.topk}",
        linear=config.linear_scope,
        blocks=tile if isinstance(tile, str) else "x".join(map(str, tile)),
    )


def _key_blocks(config: SLAVSAConfig, grid: VideoGrid) -> tuple[int, str]:
    tile = resolve_tile(config.cubes, grid)
    return grid.num_cubes(tile), "x".join(map(str, tile))


def _kept_blocks(config: SLAVSAConfig, grid: VideoGrid, packed: bool) -> tuple[int, int]:
    cubes, _ = _key_blocks(config, grid)
    return picked_by_head(config.cubes, cubes, packed=packed)[0], cubes


def _plan(config: SLAVSAConfig, grid: VideoGrid, device: torch.device) -> TileOrder:
    return cube_order(config.cubes, grid, device)


def _keep(config: SLAVSAConfig, amount: float) -> SLAVSAConfig:
    if config.topk is not None:
        return config.replace(topk=round(amount))
    return config.replace(keep_ratio=min(1.0, amount))


SLA_VSA = Method(
    name="sla_vsa",
    config_type=SLAVSAConfig,
    module_type=SparseLinearVideoAttention,
    build=_build,
    run=_run,
    idle=_idle,
    cost=cost_parts,
    cells=_cells,
    key_blocks=_key_blocks,
    kept_blocks=_kept_blocks,
    gates=_gates,
    plan=_plan,
    needs_grid=True,
    schedule=Schedule(kept=lambda config: VSA.schedule.kept(config.cubes), keep=_keep),
    presets={"SLA + VSA": SLAVSAConfig()},
    bench_cases=CASES,
)
