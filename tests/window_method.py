"""A third method as someone outside of foveal would write it: each block of tokens attends to the blocks around it."""

from dataclasses import dataclass

import torch

from foveal import BlockSelection, block_sparse_attention
from foveal.methods.base import Method, MethodConfig, Schedule, SummaryCells
from foveal.methods.bench import BenchCase
from foveal.methods.cost import CostPart


@dataclass(frozen=True)
class WindowConfig(MethodConfig):
    reach: int = 1
    block: int = 64


def select(query, key, *, config, grid, kv_lengths=None):
    index = torch.arange(-(-key.shape[2] // config.block), device=key.device)
    labels = torch.where((index[:, None] - index).abs() <= config.reach, 1, -1).expand(*key.shape[:2], -1, -1)
    lengths = {"query_length": query.shape[2], "key_length": key.shape[2]}
    return BlockSelection.from_labels(labels, block_q=config.block, block_k=config.block, **lengths)


def window_attention(query, key, value, *, selection=None, impl="auto", **chosen):
    return block_sparse_attention(query, key, value, selection or select(query, key, **chosen), impl=impl)


class WindowAttention(torch.nn.Module):
    def __init__(self, config, hidden_dim, num_heads, head_dim, impl):
        super().__init__()
        self.config, self.impl, self.gain = config, impl, torch.nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, query, key, value, *, grid, kv_lengths=None, config=None):
        return self.gain * window_attention(query, key, value, config=config or self.config, grid=grid, impl=self.impl)

    def select(self, query, key, *, config=None, **rest):
        return select(query, key, config=config or self.config, **rest)

    def token_places(self, grid):
        return torch.arange(grid.num_tokens)


def cost(config, shape):
    flops = 4 * shape.pairs * shape.query_length * (2 * config.reach + 1) * config.block * shape.head_dim
    return (CostPart("window", flops, 4 * shape.pairs * shape.query_length * shape.head_dim * shape.dtype_bytes, 2.5),)


WINDOW = Method(
    name="window",
    config_type=WindowConfig,
    module_type=WindowAttention,
    build=WindowAttention,
    cost=cost,
    cells=lambda config, grid: SummaryCells(keep=f"reach {config.reach}", blocks=str(config.block)),
    key_blocks=lambda config, grid: (-(-grid.num_tokens // config.block), str(config.block)),
    schedule=Schedule((), kept=lambda config: "reach", keep=lambda config, n: config.replace(reach=round(n))),
    bench_cases=(BenchCase("window", WindowConfig(), window_attention, select),),
)
