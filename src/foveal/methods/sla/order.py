"""The order of tokens that SLA's blocks are cut from: raster order, or cube by cube."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.fixed_blocks import fixed_blocks
from foveal.kernels.order import sort_tokens
from foveal.layout import VideoGrid
from foveal.methods.choosing import fixes_blocks
from foveal.methods.sla.config import SLAConfig
from foveal.rules import FixedBlocks, num_critical, ratios_of
from foveal.token_order import TileOrder, tile_indices


def token_order(config: SLAConfig, grid: VideoGrid | None, device: torch.device) -> TileOrder | None:
    """The order that blocks are cut from; None for raster order."""
    if config.token_order == "raster":
        return None
    return grid.answer(("sla", device), lambda: grid.tile_order(config.tile_for(grid), None, device))


def fixed_of(config: SLAConfig, grid: VideoGrid | None, device: torch.device) -> FixedBlocks | None:
    """What each query block of a video keeps whatever the scores; None for a configuration without such blocks."""
    if not fixes_blocks(config):
        return None
    if grid is None:
        raise ValueError("grid is required for sink_frames and window: VideoGrid(frames, height, width) in tokens")
    rule = (config.block_q, config.block_k), config.sink_frames, config.window, device
    question = "sla, fixed blocks", config.token_order, *rule
    return grid.answer(question, lambda: fixed_blocks(grid.shape, config.tile_for(grid), *rule))


def picked_by_head(config: SLAConfig, blocks: int) -> list[int]:
    """How many of so many key blocks the rows of each head pick; one number for all heads if they are alike."""
    return [num_critical(blocks, ratio, None) for ratio in ratios_of(config.keep_ratio)]


def plan(config: SLAConfig, grid: VideoGrid, device: torch.device) -> None:
    """Asks a grid for all that layers of this configuration will ask for."""
    token_order(config, grid, device)
    fixed_of(config, grid, device)


def video_sorted(x: Tensor, order: TileOrder, on_kernels: bool = False) -> Tensor:
    """[B, H, L, D], the video's tokens to tile order; those after them (text) stay. See `sort_tokens`."""
    video = order.to_raster.shape[0]
    if x.shape[2] == video:
        return sort_tokens(x, order, on_kernels)
    return torch.cat((sort_tokens(x[:, :, :video], order, on_kernels), x[:, :, video:]), 2)


def validate_tile_order(
    grid: VideoGrid, key: Tensor, protected_keys: tuple[int, int] | None, kv_lengths: Tensor | None
) -> None:
    """Raise a ValueError unless the keys past the video's are protected, and the video's all valid."""
    video, length = grid.num_tokens, key.shape[2]
    if length != video and (length < video or protected_keys is None):
        grid.check_length(length)
    if protected_keys is not None and tuple(protected_keys) != (video, length):
        raise ValueError(
            f'protected_keys must be all keys after the video\'s, ({video}, {length}), for token_order="tile", '
            f"got {protected_keys!r}"
        )
    # Elsewhere a look at the values would make the host wait for the device.
    on_host = kv_lengths is not None and kv_lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and (kv_lengths < video).any():
        raise ValueError(
            f'kv_lengths must be at least the grid\'s {video} tokens for token_order="tile", got {kv_lengths.tolist()}'
        )


def token_places(config: SLAConfig, grid: VideoGrid) -> Tensor:
    """int64 [L]: where each token, in raster order, stands in the order that blocks are cut from."""
    tile = config.tile_for(grid)
    if tile is None:
        return torch.arange(grid.num_tokens)
    return tile_indices(grid.shape, tile, None, torch.device("cpu"))[1]
