"""What SLA and VSA in one answer to models, tables and the lab: their `Method`."""

from __future__ import annotations

from torch import Tensor

from foveal.layout import VideoGrid
from foveal.methods.base import LayerCall, Method, Schedule, SummaryCells, blocks_cell
from foveal.methods.sla_vsa.attention import SparseLinearVideoAttention
from foveal.methods.sla_vsa.bench import CASES
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.sla_vsa.cost import cost_parts
from foveal.methods.vsa.layout import cube_order, picked_by_head
from foveal.methods.vsa.method import VSA, cube_cell


def _build(
    config: SLAVSAConfig, hidden_dim: int, num_heads: int, head_dim: int, impl: str
) -> SparseLinearVideoAttention:
    return SparseLinearVideoAttention(hidden_dim, num_heads, head_dim, config, impl=impl)


def _run(module: SparseLinearVideoAttention, call: LayerCall) -> Tensor:
    return module(*call[:3], call.hidden_states, call.gates, **call.named())


def _idle(module: SparseLinearVideoAttention, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
    return *module.gates(hidden_states[:, :0]), *(module.proj() if module.proj is not None else ())  # of no token


def _cells(config: SLAVSAConfig, grid: VideoGrid | None) -> SummaryCells:
    return SummaryCells(
        keep=f"{config.keep_ratio:g}" if config.topk is None else f"top {config.topk}",
        linear=config.linear_scope,
        blocks=blocks_cell(cube_cell(config.cubes, grid), config.precision),
    )


def _kept_blocks(config: SLAVSAConfig, grid: VideoGrid, packed: bool) -> tuple[int, int]:
    cubes, _ = VSA.key_blocks(config.cubes, grid)
    return picked_by_head(config.cubes, cubes, packed=packed)[0], cubes


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
    key_blocks=lambda config, grid: VSA.key_blocks(config.cubes, grid),
    kept_blocks=_kept_blocks,
    gates=VSA.gates,
    plan=lambda config, grid, device: cube_order(config.cubes, grid, device),
    needs_grid=True,
    schedule=Schedule(kept=lambda config: VSA.schedule.kept(config.cubes), keep=_keep),
    precision=lambda config: config.precision,
    presets={"SLA + VSA": SLAVSAConfig()},
    bench_cases=CASES,
)
