"""A user's program, which type checkers must understand without a guess. `pyright` checks it in strict mode."""

from typing import assert_type

import torch
from torch import Tensor, nn

import foveal
from foveal import BlockSelection, SLAConfig, TokenLayout, VideoGrid, VSAConfig


def functions(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The functions, with their configurations and layouts."""
    grid = VideoGrid(4, 8, 8)
    layout = TokenLayout(grid, before=(77,))
    sla, vsa = SLAConfig(keep_ratio=0.1), VSAConfig(topk=8)
    assert_type(sla.replace(keep_ratio=0.2), SLAConfig)
    assert_type(VSAConfig.from_dict(vsa.to_dict()), VSAConfig)
    assert_type(grid.num_tokens, int)
    selection = foveal.select_blocks(query, key, block_q=64, block_k=64, keep_ratio=0.1)
    assert_type(selection, BlockSelection)
    assert_type(selection.labels(), Tensor)
    assert_type(foveal.block_sparse_attention(query, key, value, selection), Tensor)
    both = foveal.block_sparse_attention(query, key, value, selection, return_lse=True)
    assert_type(both, tuple[Tensor, Tensor])
    assert_type(foveal.sla_attention(query, key, value, config=sla, selection=selection), Tensor)
    assert_type(foveal.vsa_attention(query, key, value, config=vsa, layout=layout), Tensor)
    assert_type(foveal.explain(query, key, value, vsa, grid), foveal.Explanation)


def modules(hidden: Tensor, query: Tensor) -> None:
    """The modules, and their parameters."""
    module = foveal.SparseLinearAttention(64, SLAConfig())
    projection = module.proj
    if projection is not None:
        assert_type(projection.weight, nn.Parameter)
    video = foveal.VideoSparseAttention(128, 2, 64, VSAConfig())
    assert_type(video.to_gate_coarse, nn.Linear | None)
    assert_type(video.config, VSAConfig)
    assert_type(video.gates(hidden), tuple[Tensor | None, Tensor | None])


def models(transformer: nn.Sequential, folder: str) -> None:
    """Conversions give back what they get."""
    assert_type(foveal.sparsify(transformer, SLAConfig(), on_fallback="error"), nn.Sequential)
    with foveal.dense(transformer):
        transformer(torch.zeros(1))
    assert_type(foveal.report(transformer), foveal.Report)
    foveal.save(transformer, folder)
    assert_type(foveal.load(transformer, folder), nn.Sequential)
    with foveal.patch("fastvideo", impl="triton") as patch:
        patch.undo()
