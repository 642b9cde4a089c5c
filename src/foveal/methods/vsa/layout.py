"""Where the tokens of one VSA call stand: cubes in slots of equal size, in tile order, then blocks of text."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import cached_constant
from foveal.fixed_blocks import fixed_blocks
from foveal.kernels.api import validate_selection
from foveal.kernels.backend import Cubes
from foveal.kernels.choice import append_blocks, choose_from_scores
from foveal.kernels.spans import PARTS, Spans
from foveal.layout import VideoGrid
from foveal.methods.choosing import choosing_of, fixes_blocks
from foveal.methods.vsa.config import VSAConfig
from foveal.rules import FixedBlocks, SelectionRule, check_heads, num_critical, ratios_of, rule_of
from foveal.symbols import ceil_div
from foveal.token_order import TileOrder, of_any_length, tile_indices, tile_order


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


WIDE = 128  # the largest slot of the kernels


def kernel_slot(config: VSAConfig, slot: int) -> int:
    """Tokens per slot for the kernels: those of a cube's slot, or half of them where that is twice their largest.

    Kernels rank such cubes by their means only.
    """
    return WIDE if slot == PARTS * WIDE and config.ranks_means else slot


def picked_by_head(config: VSAConfig, cubes: int, *, packed: bool = False) -> list[int]:
    """How many of a video's cubes the cubes of each head pick; one number for all heads if they are alike.

    packed: whether the video is part of a packed sequence, where a ratio always rounds up.
    """
    ratios = (0.0,) if config.keep_ratio is None else ratios_of(config.keep_ratio)
    return [num_critical(cubes, ratio, config.topk, packed or config.rounding == "up") for ratio in ratios]


def cube_order(config: VSAConfig, grid: VideoGrid, device: torch.device) -> TileOrder:
    """Where the video's tokens stand, each cube in a slot."""

    def find() -> TileOrder:
        tile = resolve_tile(config, grid)
        return grid.tile_order(tile, slot_size(tile), device)

    return grid.answer(("vsa", config.tile, device), find)


def fixed_of(config: VSAConfig, grid: VideoGrid, device: torch.device) -> FixedBlocks | None:
    """What each cube keeps whatever the scores; None for a configuration without such cubes."""
    if not fixes_blocks(config):
        return None
    rule = None, config.sink_frames, config.window, device
    question = "vsa, fixed blocks", config.tile, *rule
    return grid.answer(question, lambda: fixed_blocks(grid.shape, resolve_tile(config, grid), *rule))


def split_cubes(config: VSAConfig, grid: VideoGrid, device: torch.device) -> SplitCubes:
    """Where the video's tokens stand if each cube takes two slots, or one if its tokens fit."""
    question = "vsa, split", config.tile, device
    return grid.answer(question, lambda: SplitCubes.of(grid.shape, (), (), resolve_tile(config, grid), device))


def plan(config: VSAConfig, grid: VideoGrid, device: torch.device) -> None:
    """Asks a grid for all that layers of this configuration will ask for."""
    slot = cube_order(config, grid, device).slot
    if kernel_slot(config, slot) != slot:
        split_cubes(config, grid, device)
    fixed_of(config, grid, device)


def token_places(config: VSAConfig, grid: VideoGrid) -> Tensor:
    """int64 [L]: where each token, in raster order, stands in the slotted tile order."""
    tile = resolve_tile(config, grid)
    return tile_indices(grid.shape, tile, slot_size(tile), torch.device("cpu"))[1]


class CubeLayout:
    """The blocks of one call.

    Args:
        key: [B, H, L + text, D].
        kv_lengths: int [B], valid keys of each sample; None for all.

    Attributes:
        config, grid: the configuration and the video's grid.
        order, slot: where the video's tokens stand, and how many each cube takes up.
        text_length: keys past the video's; their blocks are as long as a slot, the last may be partial.
        cube_sizes: int32 [1, C], valid tokens of each cube.
        key_sizes: int32 [B or 1, C + text blocks], valid keys of each block.
        text_counts: int32 [B or 1], blocks of text that hold a valid key; None without text.
        kernel_slot: tokens of a slot for the kernels, see `kernel_slot`.
    """

    def __init__(self, config: VSAConfig, grid: VideoGrid, key: Tensor, kv_lengths: Tensor | None) -> None:
        check_heads(config.keep_ratio, key.shape[1])
        self.config, self.grid, self.order = config, grid, cube_order(config, grid, key.device)
        # index() changes nothing in plain Python. Under torch.compile it makes the slot a constant of the graph.
        self.slot = operator.index(self.order.slot)
        self.cube_sizes = self.key_sizes = self.order.cube_sizes[None]
        self.text_length, self.text_counts = key.shape[2] - grid.num_tokens, None
        self.kernel_slot, self._lengths = kernel_slot(config, self.slot), kv_lengths
        if not self.text_length:
            return
        if torch.compiler.is_compiling():  # where text ends in split slots would be a constant of the graph
            self.kernel_slot = self.slot
        sizes = _sizes_op if torch.compiler.is_compiling() else _sizes_with_text
        self.key_sizes, self.text_counts = sizes(
            self.cube_sizes, kv_lengths, grid.num_tokens, self.text_length, self.slot
        )

    @property
    def tile(self) -> tuple[int, int, int]:
        return resolve_tile(self.config, self.grid)

    @property
    def num_cubes(self) -> int:
        return self.cube_sizes.shape[1]

    @property
    def ranked_cubes(self) -> int:
        """How many of the cubes are chosen from."""
        return self.num_cubes

    def rule(self) -> SelectionRule:
        """How to choose among the cubes. Lists to which text is appended have no room but where rows differ."""
        config = self.config
        fixed = fixed_of(config, self.grid, self.cube_sizes.device)
        choosing = choosing_of(config, fixed, topk=config.topk, round_up=config.rounding == "up")
        rule = rule_of(self.num_cubes, self.cube_sizes.device, (self.slot, self.slot), choosing)
        return rule if rule.ragged() or self.text_counts is None else rule._replace(width=rule.critical)

    def cubes(self) -> Cubes:
        """The same for the kernels."""
        whole, length = self.order.whole.shape[0], self.order.to_raster.shape[0]
        if self.kernel_slot != self.slot:
            return self._split(length)
        return Cubes(self.order.to_tile, self.cube_sizes, self.key_sizes, self.slot, whole, length)

    def split(self, device: torch.device) -> SplitCubes:
        """Where tokens stand in slots for the kernels, if these are smaller than `slot`."""
        return split_cubes(self.config, self.grid, device)

    def _split(self, length: int) -> Cubes:
        """Cubes of two slots each, and text in blocks of one."""
        split, slot = self.split(self.cube_sizes.device), self.kernel_slot
        sizes = split.sizes[None]
        key_sizes, slots, counts = sizes, split.slots, split.counts[None]
        if self.text_length:
            key_sizes, _ = _sizes_with_text(sizes, self._lengths, self.grid.num_tokens, self.text_length, slot)
            text = self.key_sizes[:, self.num_cubes :]
            counts = torch.cat([counts.expand(text.shape[0], -1), ceil_div(text, slot)], 1)
            first = sizes.shape[1] + PARTS * torch.arange(text.shape[1], device=text.device)
            slots = torch.cat([slots, first[:, None] + torch.arange(PARTS, device=text.device)])
        spans = Spans(split.owner, slots, counts, split.shares, self.num_cubes)
        return Cubes(split.places, sizes, key_sizes, slot, slot, length, spans)

    def to_cubes(self, x: Tensor) -> Tensor:
        """[B, H, L, D] in raster order to [B, H, C * slot, D]."""
        return self.order.sort(x)

    def to_raster(self, x: Tensor) -> Tensor:
        """The inverse of `to_cubes`."""
        return self.order.unsort(x)

    def add_text(self, cubes: Tensor, raster: Tensor) -> Tensor:
        """[B, H, C * slot, D] and [B, H, L + text, D] to [B, H, C * slot + text, D]."""
        return torch.cat([cubes, raster[:, :, self.grid.num_tokens :]], 2) if self.text_length else cubes

    def pick(self, scores: Tensor) -> BlockSelection:
        """Scores of cubes [B, H, C, C] to the selection."""
        rule = self.rule()
        return self.selection(*choose_from_scores(scores, rule), rule.ragged())

    def selection(self, critical: Tensor, counts: Tensor, ragged: bool) -> BlockSelection:
        """Lists of cubes by `rule`, int32 [B, H, C, W] and [B, H, C], to a selection that names all text as well."""
        if self.text_counts is not None:
            ends = self.num_cubes, self.key_sizes.shape[1]
            critical, counts = append_blocks(critical, counts, *ends, self.text_counts, ragged=ragged)
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


class SplitCubes(NamedTuple):
    """Where tokens stand in slots of half a cube; slots without a token are left out.

    places: int64 [S * slot], the token, in raster order, at each place; -1 for padding.
    sizes: int32 [S], tokens of each slot.
    owner, slots, counts, shares: as in `Spans`, of cubes only: [S], [C, 2], [C], and [S, 1].
    """

    places: Tensor
    sizes: Tensor
    owner: Tensor
    slots: Tensor
    counts: Tensor
    shares: Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int],
        before: tuple[int, ...],
        after: tuple[int, ...],
        tile: tuple[int, int, int],
        device: torch.device,
    ) -> SplitCubes:
        """Of the tiles of `tile_order`; see there."""
        if torch.compiler.is_compiling():
            return cls(*_split_cubes_op(*map(list, (shape, before, after, tile)), device))
        return cls(*_split_cubes(shape, before, after, tile, device))


@cached_constant
def _split_cubes(
    shape: tuple[int, int, int],
    before: tuple[int, ...],
    after: tuple[int, ...],
    tile: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, ...]:
    tokens = tile_order(shape, before, after, tile, PARTS * WIDE, torch.device("cpu")).to_tile.view(-1, PARTS, WIDE)
    sizes = (tokens >= 0).sum(2)
    held = sizes > 0  # the first slot of a cube always is
    counts, owner = held.sum(1), held.nonzero()[:, 0]
    first = counts.cumsum(0) - counts
    slots = torch.stack([first, first + counts - 1], 1)
    shares = (sizes / sizes.sum(1, keepdim=True))[held].float()[:, None]
    found = tokens[held].flatten(), sizes[held].int(), owner, slots, counts.int(), shares
    return tuple(of_any_length(x.to(device)) for x in found)


@torch.library.custom_op("foveal::vsa_split_cubes", mutates_args=())
def _split_cubes_op(
    shape: list[int], before: list[int], after: list[int], tile: list[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_split_cubes`, new: an op may not return what others hold."""
    return tuple(x.clone() for x in _split_cubes(*map(tuple, (shape, before, after, tile)), device))


@_split_cubes_op.register_fake
def _(shape, before, after, tile, device):
    # How many pieces of which length a side is cut into: whole ones, and the rest, of length 0 if there is none.
    sides = [((side // edge, edge), (1, side % edge)) for side, edge in zip(shape, tile, strict=True)]
    segments = [
        ((length // math.prod(tile), math.prod(tile)), (1, length % math.prod(tile))) for length in (*before, *after)
    ]
    pieces = [*itertools.product(*sides), *((piece,) for segment in segments for piece in segment)]
    slots = sum(math.prod(n for n, _ in piece) * ceil_div(math.prod(x for _, x in piece), WIDE) for piece in pieces)
    cubes = math.prod(ceil_div(side, edge) for side, edge in zip(shape, tile, strict=True))
    cubes += sum(ceil_div(length, math.prod(tile)) for length in (*before, *after))
    whole = torch.empty(slots, dtype=torch.int64, device=device)
    of_cubes = whole.new_empty((cubes, PARTS)), whole.new_empty(cubes, dtype=torch.int32)
    sizes, shares = whole.new_empty(slots, dtype=torch.int32), whole.new_empty((slots, 1), dtype=torch.float32)
    return whole.new_empty(slots * WIDE), sizes, whole, *of_cubes, shares


def _sizes_with_text(
    cube_sizes: Tensor, kv_lengths: Tensor | None, video: int, text: int, slot: int
) -> tuple[Tensor, Tensor]:
    """`key_sizes` and `text_counts` of a `CubeLayout` for so many tokens of video and text."""
    device = cube_sizes.device
    starts = torch.arange(ceil_div(text, slot), device=device) * slot
    lengths = torch.full((1,), video + text, device=device) if kv_lengths is None else kv_lengths.to(device)
    valid = (lengths[:, None] - video).clamp(max=text)
    text_sizes = (valid - starts).clamp(0, slot).to(torch.int32)
    key_sizes = torch.cat([cube_sizes.expand(text_sizes.shape[0], -1), text_sizes], 1)
    return key_sizes, (text_sizes > 0).sum(1, dtype=torch.int32)


@torch.library.custom_op("foveal::vsa_sizes_with_text", mutates_args=())
def _sizes_op(cube_sizes: Tensor, kv_lengths: Tensor | None, video: int, text: int, slot: int) -> tuple[Tensor, Tensor]:
    """One node in a compiled graph, where one block of text would be another graph than several."""
    return _sizes_with_text(cube_sizes, kv_lengths, video, text, slot)


@_sizes_op.register_fake
def _(cube_sizes, kv_lengths, video, text, slot):
    counts = cube_sizes.new_empty(1 if kv_lengths is None else kv_lengths.shape[0])
    return counts.new_empty((counts.shape[0], cube_sizes.shape[1] + ceil_div(text, slot))), counts
