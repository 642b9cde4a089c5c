"""The only place that knows where tokens stand: raster order, tile order, the way between them, and packed sequences.

Raster order flattens (t, h, w). Tile order goes cube by cube, with the cubes and the tokens inside each cube in
(t, h, w) order. Cubes at the edges of the grid may be partial. Tile order has two layouts: *compact* (a permutation of
the tokens) and *slotted*, which block kernels use (each cube at the front of a slot of equal size, the rest zero).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.checks import cached_constant, check_positive_int, check_triple, is_transformed


@dataclass(frozen=True)
class VideoGrid:
    """The shape of a video in tokens; an image is `frames=1`.

    Raises:
        TypeError, ValueError: for sides that are not positive ints.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            check_positive_int(name, getattr(self, name))

    @property
    def shape(self) -> tuple[int, int, int]:
        # index() changes nothing in plain Python. Under torch.compile it makes the sides constants of the graph.
        return (operator.index(self.frames), operator.index(self.height), operator.index(self.width))

    @property
    def num_tokens(self) -> int:
        return math.prod(self.shape)

    def check_length(self, length: int) -> None:
        """Raise a ValueError unless the grid has `length` tokens."""
        if length != self.num_tokens:
            raise ValueError(
                f"grid {self.frames}x{self.height}x{self.width} has {self.num_tokens} tokens, "
                f"but the tensors have {length}"
            )

    def num_cubes(self, tile: tuple[int, int, int]) -> int:
        """How many cubes, full and partial, cover the grid."""
        check_triple("tile", tile)
        return math.prod(-(-side // edge) for side, edge in zip(self.shape, tile, strict=True))

    def auto_tile(
        self, max_tokens: int = 64, max_aspect: int = 2, *, prefer_whole: bool = False
    ) -> tuple[int, int, int]:
        """The compact cube of at most `max_tokens` tokens that covers the grid with the fewest slots.

        Compact means that no edge is over `max_aspect` times another, unless the grid itself is thinner than that.
        Ties go to the cube with the smaller surface, then to the one with larger edges in time. With `prefer_whole`,
        the slots of a cube that does not divide the grid count a sixteenth more, which is what masks cost in the
        kernels for wide cubes.
        """
        return _auto_tile(self.shape, max_tokens, max_aspect, prefer_whole)

    def to_tile_order(self, x: Tensor, tile: tuple[int, int, int], *, slot: int | None = None, dim: int = 2) -> Tensor:
        """Convert raster to tile order along `dim`.

        Args:
            x: any tensor with `num_tokens` entries along `dim`, any strides.
            tile: the cube (frames, height, width).
            slot: None for the compact layout (same length), or the slot size for the slotted layout
                (`num_cubes(tile) * slot` entries, padding zero).
            dim: the token dimension; 2 in [B, H, L, D].
        """
        self.check_length(x.shape[dim])
        to_tile, to_raster = tile_indices(self.shape, tile, slot, x.device)
        return _permuted(x, to_tile, to_raster, dim)

    def to_raster_order(
        self, x: Tensor, tile: tuple[int, int, int], *, slot: int | None = None, dim: int = 2
    ) -> Tensor:
        """Invert `to_tile_order` with the same `tile` and `slot`, and drop padding."""
        to_tile, to_raster = tile_indices(self.shape, tile, slot, x.device)
        if x.shape[dim] != to_tile.numel():
            raise ValueError(
                f"x must have {to_tile.numel()} entries along dim {dim} in this tile order, got {x.shape[dim]}"
            )
        return _permuted(x, to_raster, to_tile, dim)

    def cube_sizes(self, tile: tuple[int, int, int], device: torch.device | str = "cpu") -> Tensor:
        """int32 [num_cubes], valid tokens of each cube, in tile order."""
        return _cube_sizes(self.shape, tile, torch.device(device))


@cached_constant
def _auto_tile(
    shape: tuple[int, int, int], max_tokens: int, max_aspect: int, prefer_whole: bool
) -> tuple[int, int, int]:
    check_positive_int("max_tokens", max_tokens)
    check_positive_int("max_aspect", max_aspect)
    best = None
    for t in range(1, min(shape[0], max_tokens) + 1):
        for h in range(1, min(shape[1], max_tokens // t) + 1):
            for w in range(1, min(shape[2], max_tokens // (t * h)) + 1):
                edges = (t, h, w)
                free = [edge for edge, side in zip(edges, shape, strict=True) if edge < side]
                if free and max(edges) > max_aspect * min(free):
                    continue
                slots = math.prod(-(-side // edge) for side, edge in zip(shape, edges, strict=True))
                whole = all(side % edge == 0 for side, edge in zip(shape, edges, strict=True))
                rank = (slots * (17 if prefer_whole and not whole else 16), t * h + h * w + t * w, -t, -h)
                if best is None or rank < best[0]:
                    best = (rank, edges)
    return best[1]


@cached_constant
def tile_indices(
    shape: tuple[int, int, int], tile: tuple[int, int, int], slot: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Gather indices (int64) raster -> tile order and back; -1 marks a slot's padding."""
    check_triple("tile", tile)
    if slot is not None and slot < math.prod(tile):
        raise ValueError(f"slot must hold the {math.prod(tile)} tokens of a {tile} cube, got {slot}")
    position = [torch.arange(side) for side in shape]
    cubes = [-(-side // edge) for side, edge in zip(shape, tile, strict=True)]
    cube = [p // edge for p, edge in zip(position, tile, strict=True)]
    inside = [p % edge for p, edge in zip(position, tile, strict=True)]
    extent = [
        torch.minimum(torch.tensor(edge), side - c * edge) for c, edge, side in zip(cube, tile, shape, strict=True)
    ]
    cube_id = (cube[0][:, None, None] * cubes[1] + cube[1][:, None]) * cubes[2] + cube[2]
    inside_id = (inside[0][:, None, None] * extent[1][:, None] + inside[1][:, None]) * extent[2] + inside[2]
    if slot is None:
        key = cube_id.flatten() * math.prod(tile) + inside_id.flatten()
        to_tile = key.argsort()
        to_raster = torch.empty_like(to_tile)
        to_raster[to_tile] = torch.arange(to_tile.numel())
    else:
        to_raster = (cube_id * slot + inside_id).flatten()
        to_tile = torch.full((math.prod(cubes) * slot,), -1)
        to_tile[to_raster] = torch.arange(to_raster.numel())
    return to_tile.to(device), to_raster.to(device)


@cached_constant
def _cube_sizes(shape: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device) -> Tensor:
    check_triple("tile", tile)
    edges = [
        (side - torch.arange(-(-side // edge)) * edge).clamp(max=edge) for side, edge in zip(shape, tile, strict=True)
    ]
    sizes = edges[0][:, None, None] * edges[1][:, None] * edges[2]
    return sizes.flatten().to(device=device, dtype=torch.int32)


@dataclass(frozen=True)
class TokenLayout:
    """What a packed sequence is made of: protected segments, then the video, then more protected segments.

    A protected segment is text, audio, or condition frames. Every query reads its keys, and its queries read every key.
    A `VideoGrid` stands for a layout without protected segments.

    Args:
        grid: the video's shape in tokens.
        before, after: the lengths in tokens of the protected segments before and after the video, in order.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    grid: VideoGrid
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.grid, VideoGrid):
            raise TypeError(f"grid must be a VideoGrid, got {self.grid!r}")
        for name in ("before", "after"):
            lengths = getattr(self, name)
            if not isinstance(lengths, tuple):
                raise TypeError(f"{name} must be a tuple of lengths in tokens, got {lengths!r}")
            for index, length in enumerate(lengths):
                check_positive_int(f"{name}[{index}]", length)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """The tokens before the video, of the video, and after it."""
        # index() for the reason in `VideoGrid.shape`.
        return operator.index(sum(self.before)), self.grid.num_tokens, operator.index(sum(self.after))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_protected(self) -> int:
        """The tokens of all protected segments."""
        before, _, after = self.lengths
        return before + after

    @property
    def video(self) -> slice:
        """Where the video's tokens stand in the sequence."""
        before, video, _ = self.lengths
        return slice(before, before + video)

    def check_length(self, length: int) -> None:
        """Raise a ValueError unless the sequence has `length` tokens."""
        if length != self.num_tokens:
            raise ValueError(f"{self} has {self.num_tokens} tokens, but the tensors have {length}")

    def split(self, x: Tensor, dim: int = 2) -> tuple[Tensor, Tensor]:
        """The video's tokens, which are a view, and the protected ones, those before the video first, along `dim`."""
        before, video, after = x.split(self.lengths, dim)
        if not (self.before and self.after):
            return video, before if self.before else after
        return video, torch.cat((before, after), dim)

    def join(self, video: Tensor, protected: Tensor, dim: int = 2) -> Tensor:
        """The inverse of `split`."""
        before, _, after = self.lengths
        before, after = protected.split((before, after), dim)
        return torch.cat((before, video, after), dim)

    def to_tile_order(self, x: Tensor, tile: tuple[int, int, int], slot: int) -> Tensor:
        """[B, H, num_tokens, D] to [B, H, tiles * slot, D]: each tile at the front of a slot, the rest zero.

        Tiles are the video's cubes, then chunks of at most as many tokens of each protected segment, in order.
        """
        to_tile, to_sequence, _ = self.tile_indices(tile, slot, x.device)
        return _permuted(x, to_tile, to_sequence, 2)

    def to_sequence_order(self, x: Tensor, tile: tuple[int, int, int], slot: int) -> Tensor:
        """The inverse of `to_tile_order`."""
        to_tile, to_sequence, _ = self.tile_indices(tile, slot, x.device)
        return _permuted(x, to_sequence, to_tile, 2)

    def tile_indices(
        self, tile: tuple[int, int, int], slot: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens stand in `to_tile_order`.

        Returns:
            The token at each place, int64 [tiles * slot], -1 for none; the place of each token, int64 [num_tokens]; and
            the tokens of each tile, int32 [tiles].
        """
        return _packed_indices(self.grid.shape, self.before, self.after, tile, slot, device)

    def num_chunks(self, size: int) -> int:
        """How many chunks of at most `size` tokens the protected segments are cut into; no chunk has tokens of two."""
        return sum(-(-length // size) for length in (*self.before, *self.after))

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid.shape))
        return f"layout {grid} with before={self.before}, after={self.after}"


def resolve_layout(
    grid: VideoGrid | None, layout: TokenLayout | VideoGrid | None
) -> tuple[VideoGrid | None, TokenLayout | None]:
    """What a call's arguments `grid` and `layout` mean, of which it gives one at most.

    Returns:
        The video's grid, None if neither is given; and the layout, None if it has no protected segments.

    Raises:
        TypeError: for anything else than a `VideoGrid` or a `TokenLayout`.
        ValueError: if both are given.
    """
    if grid is not None and not isinstance(grid, VideoGrid):
        hint = "; a TokenLayout goes to layout" if isinstance(grid, TokenLayout) else ""
        raise TypeError(f"grid must be a VideoGrid, got {grid!r}{hint}")
    if layout is None:
        return grid, None
    if not isinstance(layout, VideoGrid | TokenLayout):
        raise TypeError(f"layout must be a VideoGrid or a TokenLayout, got {layout!r}")
    if grid is not None:
        raise ValueError(f"give grid or layout, not both, got {grid} and {layout}")
    if isinstance(layout, VideoGrid):
        return layout, None
    return layout.grid, layout if layout.num_protected else None


@cached_constant
def _packed_indices(
    shape: tuple[int, int, int],
    before: tuple[int, ...],
    after: tuple[int, ...],
    tile: tuple[int, int, int],
    slot: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    cpu, start, size = torch.device("cpu"), 0, math.prod(tile)
    chunks, video = [], None
    for index, length in enumerate((*before, math.prod(shape), *after)):
        if index == len(before):
            cubes = tile_indices(shape, tile, slot, cpu)[0]
            video = torch.where(cubes < 0, -1, cubes + start)
        else:
            chunks.extend((first, min(first + size, start + length)) for first in range(start, start + length, size))
        start += length
    places = torch.full((len(chunks), slot), -1)
    for row, (first, stop) in zip(places, chunks, strict=True):
        row[: stop - first] = torch.arange(first, stop)
    to_tile = torch.cat((video, places.flatten()))
    taken = (to_tile >= 0).nonzero().flatten()
    to_sequence = torch.empty(start, dtype=torch.int64)
    to_sequence[to_tile[taken]] = taken
    sizes = (to_tile.view(-1, slot) >= 0).sum(1, dtype=torch.int32)
    return to_tile.to(device), to_sequence.to(device), sizes.to(device)


class _Gather(torch.autograd.Function):
    """out = x[index] along `dim`, zero where index is -1.

    Each entry is used at most once, so the backward is a deterministic gather too. index_select's own backward adds
    with atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.dim = dim
        return _gather(x, index, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, index, ctx.dim), None, None, None


def _permuted(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """`_Gather`; inside of a transform of `torch.func` the same in operations that it knows."""
    return _gather(x, index, dim) if is_transformed(x) else _Gather.apply(x, index, inverse, dim)


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    if index.numel() == x.shape[dim]:
        return x.index_select(dim, index)
    out = x.index_select(dim, index.clamp(min=0))
    if index.numel() > x.shape[dim]:
        padding = (index < 0).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
        out = out.masked_fill(padding, 0)
    return out
