"""What SLA2 answers to models, tables and the lab: its `Method`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Method, SummaryCells
from foveal.methods.sla.order import token_order
from foveal.methods.sla2.attention import RoutedSparseLinearAttention
from foveal.methods.sla2.bench import CASES
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.cost import cost_parts
from foveal.rules import num_critical
from foveal.token_order import TileOrder


def _build(
    config: SLA2Config, hidden_dim: int, num_heads: int, head_dim: int, impl: str
) -> RoutedSparseLinearAttention:
    return RoutedSparseLinearAttention(num_heads, head_dim, config, impl=impl)


def _gates(module: RoutedSparseLinearAttention, hidden_states: Tensor) -> tuple[Tensor]:
    return (module.token_gates(hidden_states),)


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    grid: VideoGrid | TokenLayout,
    kv_lengths: Tensor | None = None,
    config: SLA2Config | None = None,
    gates: tuple[Tensor] | None = None,
) -> Tensor:
    logits = None if gates is None else module.logits_of(gates[0])
    rest = {"kv_lengths": kv_lengths, "config": config}
    if isinstance(grid, TokenLayout):
        return module(query, key, value, logits, layout=grid, **rest)
    text = (query.shape[2], key.shape[2]) if key.shape[2] > query.shape[2] else None
    return module(query, key, value, logits, grid=grid, protected_keys=text, **rest)


def _idle(module: RoutedSparseLinearAttention, hidden_states: Tensor) -> tuple[Tensor, ...]:
    return *module.mixing(), *module.router()


def _cells(config: SLA2Config, grid: VideoGrid | None) -> SummaryCells:
    blocks = f"{config.block_q}x{config.block_k}" + (" tile" if config.token_order == "tile" else "")
    return SummaryCells(keep=f"{config.keep_ratio:g}", linear="noncritical", blocks=blocks)


def _key_blocks(config: SLA2Config, grid: VideoGrid) -> tuple[int, str]:
    return -(-grid.num_tokens // config.block_k), str(config.block_k)


def _kept_blocks(config: SLA2Config, grid: VideoGrid, packed: bool) -> tuple[int, int]:
    blocks, _ = _key_blocks(config, grid)
    return num_critical(blocks, config.keep_ratio, None), blocks


def _plan(config: SLA2Config, grid: VideoGrid, device: torch.device) -> TileOrder | None:
    return token_order(config.branches, grid, device)


SLA2 = Method(
    name="sla2",
    config_type=SLA2Config,
    module_type=RoutedSparseLinearAttention,
    build=_build,
    run=_run,
    idle=_idle,
    cost=cost_parts,
    cells=_cells,
    key_blocks=_key_blocks,
    kept_blocks=_kept_blocks,
    gates=_gates,
    plan=_plan,
    presets={"SLA2": SLA2Config()},
    bench_cases=CASES,
)
