"""What VSA answers to models, tables and the lab: its `Method`."""

from __future__ import annotations

from torch import Tensor

from foveal.layout import VideoGrid
from foveal.methods.base import LayerCall, Method, Schedule, SummaryCells, blocks_cell
from foveal.methods.choosing import keep_cell, known_on_host, mean_kept, ratio_cell, scaled
from foveal.methods.vsa.attention import VideoSparseAttention
from foveal.methods.vsa.bench import CASES
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.cost import cost_parts
from foveal.methods.vsa.layout import picked_by_head, plan, resolve_tile
from foveal.rules import check_heads, ratios_of


def _build(config: VSAConfig, hidden_dim: int, num_heads: int, head_dim: int, impl: str) -> VideoSparseAttention:
    check_heads(config.keep_ratio, num_heads)
    return VideoSparseAttention(hidden_dim, num_heads, head_dim, config, impl=impl)


def _gates(module: VideoSparseAttention, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return module.gates(hidden_states)


def _run(module: VideoSparseAttention, call: LayerCall) -> Tensor:
    return module(*call[:3], call.hidden_states, call.gates, heads=call.heads, **call.named())


def _idle(module: VideoSparseAttention, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
    router = () if module.router is None else module.router()
    return *module.gates(hidden_states[:, :0]), *router  # of no token


def _cells(config: VSAConfig, grid: VideoGrid | None) -> SummaryCells:
    return SummaryCells(
        keep=keep_cell(ratio_cell(config.keep_ratio) if config.topk is None else f"top {config.topk}", config),
        blocks=blocks_cell(cube_cell(config, grid), config.precision),
    )


def cube_cell(config: VSAConfig, grid: VideoGrid | None) -> str:
    """The cell of the cube's sides, or of what chooses them where there is no grid."""
    tile = config.tile if grid is None else resolve_tile(config, grid)
    return tile if isinstance(tile, str) else "x".join(map(str, tile))


def _key_blocks(config: VSAConfig, grid: VideoGrid) -> tuple[int, str]:
    return grid.num_cubes(resolve_tile(config, grid)), cube_cell(config, grid)


def _kept_blocks(config: VSAConfig, grid: VideoGrid, packed: bool) -> tuple[int, int] | None:
    if not known_on_host(config):
        return None
    cubes, _ = _key_blocks(config, grid)
    return mean_kept(picked_by_head(config, cubes, packed=packed), cubes), cubes


def _kept(config: VSAConfig) -> str:
    return "keep_ratio" if config.topk is None else "topk"


def _keep(config: VSAConfig, amount: float) -> VSAConfig:
    if config.topk is not None:
        return config.replace(topk=round(amount))
    ratio = scaled(config.keep_ratio, amount)
    most = config.max_keep_ratio if config.keep_mass is None else max(*ratios_of(ratio), config.max_keep_ratio)
    return config.replace(keep_ratio=ratio, max_keep_ratio=most)


VSA = Method(
    name="vsa",
    config_type=VSAConfig,
    module_type=VideoSparseAttention,
    build=_build,
    run=_run,
    idle=_idle,
    cost=cost_parts,
    cells=_cells,
    key_blocks=_key_blocks,
    kept_blocks=_kept_blocks,
    precision=lambda config: config.precision,
    gates=_gates,
    plan=plan,
    needs_grid=True,
    schedule=Schedule(kept=_kept, keep=_keep),
    presets={"VSA": VSAConfig()},
    bench_cases=CASES,
)
