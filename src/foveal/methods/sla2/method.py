"""What SLA2 answers to models, tables and the lab: its `Method`."""

from __future__ import annotations

from torch import Tensor

from foveal.layout import VideoGrid
from foveal.methods.base import LayerCall, Method, SummaryCells, blocks_cell
from foveal.methods.sla.method import key_blocks, token_blocks
from foveal.methods.sla.order import token_order
from foveal.methods.sla2.attention import RoutedSparseLinearAttention
from foveal.methods.sla2.bench import CASES
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.cost import cost_parts
from foveal.rules import num_critical


def _build(
    config: SLA2Config, hidden_dim: int, num_heads: int, head_dim: int, impl: str
) -> RoutedSparseLinearAttention:
    return RoutedSparseLinearAttention(num_heads, head_dim, config, impl=impl)


def _run(module: RoutedSparseLinearAttention, call: LayerCall) -> Tensor:
    return module(*call[:3], heads=call.heads, protected_keys=call.text(), **call.named())


def _idle(module: RoutedSparseLinearAttention, hidden_states: Tensor) -> tuple[Tensor, ...]:
    mixing = () if module.mixing is None else module.mixing()
    return *mixing, *module.router()


def _cells(config: SLA2Config, grid: VideoGrid | None) -> SummaryCells:
    blocks = blocks_cell(token_blocks(config), config.precision)
    return SummaryCells(keep=f"{config.keep_ratio:g}", linear=config.linear_scope, blocks=blocks)


def _kept_blocks(config: SLA2Config, grid: VideoGrid, packed: bool) -> tuple[int, int]:
    blocks, _ = key_blocks(config, grid)
    return num_critical(blocks, config.keep_ratio, None), blocks


SLA2 = Method(
    name="sla2",
    config_type=SLA2Config,
    module_type=RoutedSparseLinearAttention,
    build=_build,
    run=_run,
    idle=_idle,
    cost=cost_parts,
    cells=_cells,
    key_blocks=key_blocks,
    kept_blocks=_kept_blocks,
    plan=lambda config, grid, device: token_order(config.branches, grid, device),
    precision=lambda config: config.precision,
    presets={"SLA2": SLA2Config()},
    bench_cases=CASES,
)
