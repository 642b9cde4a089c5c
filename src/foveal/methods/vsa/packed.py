"""Where the tokens of VSA stand in a packed sequence: the video's cubes in slots, then chunks of protected segments.

Every tile takes part in the coarse stage. In the fine stage a cube reads cubes that it picks and all protected chunks.
Protected chunks have no lists: their queries read everything, so they run dense (`with_protected_queries`).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.api import validate_selection
from foveal.kernels.choice import append_blocks
from foveal.kernels.dense import dense_attention
from foveal.layout import TokenLayout
from foveal.methods.choosing import rows_alike
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.layout import CubeLayout, SplitCubes, kernel_slot, picked_by_head, slot_size


class PackedTiles(CubeLayout):
    """The tiles of one call, all of them cubes to the coarse and the fine stage.

    Attributes:
        layout: the layout of the sequence.
        video_cubes: how many of the tiles are the video's; they come first.
    """

    def __init__(self, config: VSAConfig, layout: TokenLayout, device: torch.device) -> None:
        self.config, self.layout, self.grid = config, layout, layout.grid
        self.slot = slot_size(self.tile)
        self.order = layout.tile_order(self.tile, self.slot, device)
        self.cube_sizes = self.key_sizes = self.order.cube_sizes[None]
        self.kernel_slot = kernel_slot(config, self.slot)
        self.video_cubes = self.num_cubes - layout.num_chunks(math.prod(self.tile))
        self.text_length, self.text_counts = 0, None

    @property
    def ranked_cubes(self) -> int:
        return self.video_cubes

    def split(self, device: torch.device) -> SplitCubes:
        layout = self.layout
        return SplitCubes.of(layout.grid.shape, layout.before, layout.after, self.tile, device)

    def with_protected(self, selection: BlockSelection) -> BlockSelection:
        """A selection of the video's cubes among each other, with all protected chunks beside those picked."""
        alike = rows_alike(self.config)
        kept = picked_by_head(self.config, self.video_cubes, packed=True)[0] if alike else None
        ends = self.video_cubes, self.num_cubes
        lists = selection.critical[..., :kept], selection.critical_count
        critical, counts = append_blocks(*lists, *ends, self.num_cubes - self.video_cubes, ragged=not alike)
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

    def with_protected_queries(
        self, output: Tensor, inputs: tuple[Tensor, Tensor, Tensor], gate_fine: Tensor | None, scale: float
    ) -> Tensor:
        """The output of the whole sequence, from one that has no more of the protected tokens than the coarse branch.

        Args:
            output: [B, H, L, D], over `with_all_rows`. inputs: query, key, and value.
        """
        video, coarse = self.layout.split(output)
        query, key, value = inputs
        fine = dense_attention(self.layout.split(query)[1], key, value, scale=scale)
        if gate_fine is not None:
            fine = fine * self.layout.split(gate_fine)[1]
        return self.layout.join(video, (coarse + fine).to(output.dtype))
