"""The calls of VSA that `foveal bench` checks and times."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.kernels.api import block_sparse_attention
from foveal.layout import VideoGrid
from foveal.methods.bench import BenchCase
from foveal.methods.vsa.attention import select_cubes, vsa_attention
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.layout import resolve_tile


def _fine(precision: str) -> Callable[..., Tensor]:
    return functools.partial(block_sparse_attention, impl="reference", precision=precision)


def _head(
    in_chunks: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    gate_coarse: Tensor,
    gate_fine: Tensor | None = None,
    config: VSAConfig,
    grid: VideoGrid,
    selection: BlockSelection,
    dtype: torch.dtype,
) -> Tensor:
    """The method as on paper (VSA, arXiv 2505.13389, section 2), with only its fine stage in chunks."""
    tile, slot, sizes = resolve_tile(config, grid), selection.block_q, selection.key_block_sizes
    query, key, value = (grid.to_tile_order(x, tile, slot=slot) for x in inputs)
    query_c, key_c, value_c = (pool_blocks(x.to(dtype), slot, sizes) for x in (query, key, value))
    coarse = pooled_scores(query_c, key_c, query.shape[-1] ** -0.5).softmax(-1) @ value_c
    coarse = coarse.double().repeat_interleave(slot, 2)
    fine = in_chunks(_fine(config.precision), query, key, value, selection, dtype)
    branches = (grid.to_raster_order(x, tile, slot=slot) for x in (coarse, fine))
    gates = (gate_coarse, gate_fine)
    return sum(x if gate is None else x * gate for x, gate in zip(branches, gates, strict=True))


def _routed(query: Tensor, key: Tensor, value: Tensor, *, config: VSAConfig, impl: str, **rest) -> Tensor:
    """With the projections that training starts from; the router learns where the inputs have gradients."""
    eye = torch.eye(query.shape[-1], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    learns = query.requires_grad and impl != "reference"  # which has none for projections, only for the inputs
    eye = eye.repeat(query.shape[1], 1, 1).requires_grad_(learns)
    return vsa_attention(query, key, value, config=config, impl=impl, proj_query=eye, proj_key=eye, **rest)


def _case(name: str, config: VSAConfig) -> BenchCase:
    extras = {"gate_coarse": "BHLD"} | ({"gate_fine": "BHLD"} if config.fine_gate else {})
    call = vsa_attention if config.router == "none" else _routed
    # The gates' projections belong to the model around.
    return BenchCase(name, config, call, select_cubes, extras, _head, left_out=("gates",))


CASES = (
    _case("VSA 12.5 %", VSAConfig(keep_ratio=0.125)),
    _case("VSA 12.5 %, int8", VSAConfig(keep_ratio=0.125, precision="int8")),
    # The cube that wastes least: at Wan's grids (3, 5, 4), where (4, 4, 4) computes a fifth for nothing.
    _case("VSA 12.5 %, auto tile", VSAConfig(keep_ratio=0.125, tile="auto")),
    _case("VSA 12.5 %, auto tile, router", VSAConfig(keep_ratio=0.125, tile="auto", router="per_head")),
    # Half the memory traffic for a coarser choice.
    _case("VSA 12.5 %, wide tile", VSAConfig(keep_ratio=0.125, tile="wide")),
    _case("VSA 12.5 %, both gates", VSAConfig(keep_ratio=0.125, fine_gate=True)),
)
