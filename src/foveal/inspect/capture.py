"""Catch the block selections that a converted model makes while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from foveal.selection import select_blocks
from foveal.sla.attention import SparseLinearAttention
from foveal.types import BlockSelection
from foveal.video_grid import VideoGrid
from foveal.vsa.attention import VideoSparseAttention, resolve_tile, select_cubes, slot_size


@contextlib.contextmanager
def capture_selections(model: nn.Module) -> Iterator[dict[str, BlockSelection]]:
    """Selections of every converted layer at its latest call inside the context, by module name.

    The modules run unchanged; the selection is made once more from the same query and key.
    """
    found: dict[str, BlockSelection] = {}
    handles = []

    def hook(name: str):
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            query, key, grid = args[0].detach(), args[1].detach(), kwargs.get("grid")
            if isinstance(module, VideoSparseAttention):
                found[name] = select_cubes(query, key, config=module.config, grid=grid)
            else:
                config = module.config
                tile = config.tile_for(grid)
                if tile is not None:
                    query, key = (grid.to_tile_order(x, tile) for x in (query, key))
                found[name] = select_blocks(
                    query,
                    key,
                    block_q=config.block_q,
                    block_k=config.block_k,
                    keep_ratio=config.keep_ratio,
                    drop_ratio=config.drop_ratio,
                )

        return record

    for name, module in model.named_modules():
        if isinstance(module, SparseLinearAttention | VideoSparseAttention):
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_labels(
    selection: BlockSelection, attention: nn.Module, grid: VideoGrid, *, token: tuple[int, int, int], head: int
) -> Tensor:
    """What one query token sees: int8 [frames, height, width] of +1 critical, 0 marginal, -1 negligible.

    Args:
        selection: of the layer `attention`, from `capture_selections`.
        attention: the layer's SparseLinearAttention or VideoSparseAttention.
        grid: the video in tokens.
        token: the query token (frame, row, column).
        head: which head.
    """
    index = (token[0] * grid.height + token[1]) * grid.width + token[2]
    raster = torch.arange(grid.num_tokens)[None, None, :, None]
    if isinstance(attention, VideoSparseAttention):
        tile = resolve_tile(attention.config, grid)
        order = {"tile": tile, "slot": slot_size(tile)}
        place = torch.arange(grid.num_cubes(tile) * order["slot"])[None, None, :, None]
        place = grid.to_raster_order(place, tile, slot=order["slot"])
    else:
        tile = attention.config.tile_for(grid)
        place = raster if tile is None else grid.to_raster_order(raster, tile)
    place = place.flatten()
    row = selection.labels()[0, head, place[index] // selection.block_q]
    return row.cpu()[place // selection.block_k].view(grid.shape)
