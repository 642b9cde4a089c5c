"""Where the tokens of one VSA call stand: cubes in slots of equal size, in tile order, then blocks of text."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, append_blocks, count, pick_blocks
from foveal.kernels.api import validate_selection
from foveal.kernels.backend import Cubes
from foveal.layout import VideoGrid, tile_indices
from foveal.methods.vsa.config import VSAConfig


def resolve_tile(config: VSAConfig, grid: VideoGrid) -> tuple[int, int, int]:
    """The cube that `config` means on this grid."""
    match config.tile:
        case "auto":
            return grid.auto_tile()
        case "wide":  # of so many tokens few cubes divide a grid: longer ones are let in
            return grid.auto_tile(max_tokens=128, max_aspect=4, prefer_whole=True)
        case tile:
            return tile


def slot_size(tile: tuple[int, int, int]) -> int:
    """Tokens per slot in the slotted tile order: the power of two that holds a cube, at least 16 (a matrix tile)."""
    return max(16, 1 << (math.prod(tile) - 1).bit_length())


def kept_cubes(config: VSAConfig, cubes: int) -> int:
    """How many of a video's cubes each cube attends to."""
    return min(config.topk, cubes) if config.topk is not None else max(1, count(config.keep_ratio, cubes))


def kept_video_cubes(config: VSAConfig, cubes: int) -> int:
    """The same in a packed sequence, where a ratio rounds up, as in the released checkpoints for MiniMax-H3."""
    if config.topk is not None:
        return min(config.topk, cubes)
    return max(1, min(math.ceil(config.keep_ratio * cubes - 1e-6), cubes))


class CubeLayout:
    """The blocks of one call.

    Args:
        key: [B, H, L + text, D].
        kv_lengths: int [B], valid keys of each sample; None for all.

    Attributes:
        grid, tile, slot: the video, the cube, and the tokens that each cube takes up.
        text_length: keys past the video's; their blocks are as long as a slot, the last may be partial.
        cube_sizes: int32 [1, C], valid tokens of each cube.
        key_sizes: int32 [B or 1, C + text blocks], valid keys of each block.
        text_counts: int32 [B or 1], blocks of text that hold a valid key; None without text.
    """

    def __init__(self, config: VSAConfig, grid: VideoGrid, key: Tensor, kv_lengths: Tensor | None) -> None:
        self.config, self.grid, self.tile = config, grid, resolve_tile(config, grid)
        self.slot = slot_size(self.tile)
        self.cube_sizes = self.key_sizes = grid.cube_sizes(self.tile, key.device)[None]
        self.text_length, self.text_counts = key.shape[2] - grid.num_tokens, None
        if not self.text_length:
            return
        starts = torch.arange(self.text_blocks, device=key.device) * self.slot
        lengths = torch.full((1,), key.shape[2], device=key.device) if kv_lengths is None else kv_lengths.to(key.device)
        text = (lengths[:, None] - grid.num_tokens).clamp(max=self.text_length)
        text_sizes = (text - starts).clamp(0, self.slot).to(torch.int32)
        self.key_sizes = torch.cat([self.cube_sizes.expand(text_sizes.shape[0], -1), text_sizes], 1)
        self.text_counts = (text_sizes > 0).sum(1, dtype=torch.int32)

    @property
    def num_cubes(self) -> int:
        return self.cube_sizes.shape[1]

    @property
    def text_blocks(self) -> int:
        return -(-self.text_length // self.slot)

    @property
    def kept(self) -> int:
        """Cubes that each cube attends to."""
        return kept_cubes(self.config, self.num_cubes)

    @property
    def uniform_size(self) -> int | None:
        """The tokens of every block, where all blocks are cubes and no cube is partial; else None."""
        whole = all(side % edge == 0 for side, edge in zip(self.grid.shape, self.tile, strict=True))
        return self.tile[0] * self.tile[1] * self.tile[2] if whole and not self.text_length else None

    def cubes(self, device: torch.device) -> Cubes:
        """The same for the kernels."""
        return Cubes(self.places(device), self.cube_sizes, self.key_sizes, self.slot, self.uniform_size or 0)

    def places(self, device: torch.device) -> Tensor:
        """int64 [C * slot]: the token, in raster order, that stands at each place; -1 where none does."""
        return tile_indices(self.grid.shape, self.tile, self.slot, device)[0]

    def to_cubes(self, x: Tensor) -> Tensor:
        """[B, H, L, D] in raster order to [B, H, C * slot, D]."""
        return self.grid.to_tile_order(x, self.tile, slot=self.slot)

    def to_raster(self, x: Tensor) -> Tensor:
        """The inverse of `to_cubes`."""
        return self.grid.to_raster_order(x, self.tile, slot=self.slot)

    def add_text(self, cubes: Tensor, raster: Tensor) -> Tensor:
        """[B, H, C * slot, D] and [B, H, L + text, D] to [B, H, C * slot + text, D]."""
        return torch.cat([cubes, raster[:, :, self.grid.num_tokens :]], 2) if self.text_length else cubes

    def pick(self, scores: Tensor) -> BlockSelection:
        """Scores of cubes [B, H, C, C] to the selection."""
        critical, counts, _ = pick_blocks(scores, keep_ratio=self.config.keep_ratio, topk=self.config.topk)
        return self.selection(critical, counts)

    def selection(self, critical: Tensor, counts: Tensor) -> BlockSelection:
        """Lists of cubes, int32 [B, H, C, W] and their counts [B, H, C], to a selection that names all text as well."""
        if self.text_counts is not None:
            text = range(self.num_cubes, self.key_sizes.shape[1])
            critical, counts = append_blocks(critical, counts, text, self.text_counts)
        query_length = self.num_cubes * self.slot
        return BlockSelection(
            critical=critical,
            critical_count=counts,
            marginal=None,
            block_q=self.slot,
            block_k=self.slot,
            query_length=query_length,
            key_length=query_length + self.text_length,
            key_block_sizes=self.key_sizes,
        )

    def checked(self, selection: BlockSelection, query: Tensor) -> BlockSelection:
        """`selection` with this call's block sizes; a TypeError or ValueError unless it was made for such a call."""
        length = self.num_cubes * self.slot
        shapes = (query[:, :, :1].expand(-1, -1, size, -1) for size in (length, length + self.text_length))
        validate_selection(selection, *shapes)
        self.check_blocks(selection)
        return dataclasses.replace(selection, key_block_sizes=self.key_sizes)

    def check_blocks(self, selection: BlockSelection) -> None:
        """Raise a ValueError unless the selection's blocks are slots of this tile."""
        if (selection.block_q, selection.block_k) != (self.slot, self.slot):
            raise ValueError(
                f"selection must have blocks of {self.slot}x{self.slot} for tile {self.tile}, "
                f"got {selection.block_q}x{selection.block_k}"
            )
