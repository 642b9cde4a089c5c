"""Where the tokens of VSA stand in a packed sequence: the video's cubes in slots, then chunks of protected segments.

Every tile takes part in the coarse stage. In the fine stage a cube reads cubes that it picks and all protected chunks.
Protected chunks have no lists: their queries read everything, so they run dense (`vsa_attention` adds that).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection, append_blocks
from foveal.kernels.api import validate_selection
from foveal.layout import TokenLayout
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.layout import CubeLayout, resolve_tile, slot_size


class PackedTiles(CubeLayout):
    """The tiles of one call, all of them cubes to the coarse and the fine stage.

    Attributes:
        layout: of the sequence.
        video_cubes: how many of the tiles are the video's; they come first.
    """

    def __init__(self, config: VSAConfig, layout: TokenLayout, device: torch.device) -> None:
        self.config, self.layout, self.grid = config, layout, layout.grid
        self.tile = resolve_tile(config, layout.grid)
        self.slot = slot_size(self.tile)
        self.cube_sizes = self.key_sizes = layout.tile_indices(self.tile, self.slot, device)[2][None]
        self.video_cubes = self.num_cubes - layout.num_chunks(math.prod(self.tile))
        self.text_length, self.text_counts = 0, None

    @property
    def uniform_size(self) -> int | None:
        size = math.prod(self.tile)
        whole = all(length % size == 0 for length in (*self.layout.before, *self.layout.after))
        return super().uniform_size if whole else None

    def places(self, device: torch.device) -> Tensor:
        """int64 [tiles * slot]: the token of the sequence that stands at each place; -1 where none does."""
        return self.layout.tile_indices(self.tile, self.slot, device)[0]

    def to_cubes(self, x: Tensor) -> Tensor:
        """[B, H, L, D] in sequence order to [B, H, tiles * slot, D]."""
        return self.layout.to_tile_order(x, self.tile, self.slot)

    def to_raster(self, x: Tensor) -> Tensor:
        """The inverse of `to_cubes`."""
        return self.layout.to_sequence_order(x, self.tile, self.slot)

    def with_protected(self, selection: BlockSelection) -> BlockSelection:
        """A selection of the video's cubes among each other, with all protected chunks beside those picked."""
        chunks = range(self.video_cubes, self.num_cubes)
        critical, counts = append_blocks(selection.critical, selection.critical_count, chunks, len(chunks))
        return dataclasses.replace(
            selection,
            critical=critical,
            critical_count=counts,
            key_length=self.num_cubes * self.slot,
            key_block_sizes=self.key_sizes,
        )

    def checked(self, selection: BlockSelection, query: Tensor) -> BlockSelection:
        """`selection` with this call's tile sizes; a TypeError or ValueError unless it was made for such a call."""
        shapes = (query[:, :, :1].expand(-1, -1, n * self.slot, -1) for n in (self.video_cubes, self.num_cubes))
        validate_selection(selection, *shapes)
        self.check_blocks(selection)
        return dataclasses.replace(selection, key_block_sizes=self.key_sizes)

    def with_all_rows(self, selection: BlockSelection) -> BlockSelection:
        """A selection with rows for all tiles, those of the protected chunks empty."""
        more = self.num_cubes - self.video_cubes
        return dataclasses.replace(
            selection,
            critical=F.pad(selection.critical, (0, 0, 0, more)),
            critical_count=F.pad(selection.critical_count, (0, more)),
            query_length=self.num_cubes * self.slot,
        )
