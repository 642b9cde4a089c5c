"""The only place that knows where tokens stand: raster order, tile order, the way between them, and packed sequences.

Raster order flattens (t, h, w). Tile order goes cube by cube, with the cubes and the tokens inside each cube in
(t, h, w) order. Cubes at the edges of the grid may be partial. Tile order has two layouts: *compact* (a permutation of
the tokens) and *slotted*, which block kernels use (each cube at the front of a slot of equal size, the rest zero).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from foveal.checks import cached_constant, check_positive_int, check_triple
from foveal.symbols import ceil_div
from foveal.token_order import TileOrder, cube_sizes, of_any_size, tile_order

Answer = TypeVar("Answer")


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
        return self.frames * self.height * self.width

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
        return math.prod(ceil_div(side, edge) for side, edge in zip(self.shape, tile, strict=True))

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
        return self.tile_order(tile, slot, x.device).sort(x, dim)

    def to_raster_order(
        self, x: Tensor, tile: tuple[int, int, int], *, slot: int | None = None, dim: int = 2
    ) -> Tensor:
        """Invert `to_tile_order` with the same `tile` and `slot`, and drop padding."""
        order = self.tile_order(tile, slot, x.device)
        if x.shape[dim] != order.to_tile.shape[0]:
            raise ValueError(
                f"x must have {order.to_tile.shape[0]} entries along dim {dim} in this tile order, got {x.shape[dim]}"
            )
        return order.unsort(x, dim)

    def tile_order(self, tile: tuple[int, int, int], slot: int | None, device: torch.device) -> TileOrder:
        """The tensors behind `to_tile_order` and `to_raster_order`."""
        return tile_order((self.frames, self.height, self.width), (), (), tile, slot, device)

    def answer(self, question: tuple[Hashable, ...], find: Callable[[], Answer]) -> Answer:
        """`find()`, which a `PlannedGrid` keeps for whoever has the same question."""
        return find()

    def cube_sizes(self, tile: tuple[int, int, int], device: torch.device | str = "cpu") -> Tensor:
        """int32 [num_cubes], valid tokens of each cube, in tile order."""
        return cube_sizes(self.shape, tile, torch.device(device))


@dataclass(frozen=True, eq=False)
class PlannedGrid(VideoGrid):
    """A grid with the answers that the layers of one forward will want, found beforehand.

    A compiled block that has a question finds tensors and their sizes here, and no side of the grid: it runs as it is
    at any other. A question that it is the first to ask would make the sides a part of its graph.

    Args:
        tokens: int8 [L], for its size.
    """

    tokens: Tensor = field(repr=False)
    _answers: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, repr=False)

    def __eq__(self, other: object) -> bool:
        return self.shape == other.shape if isinstance(other, VideoGrid) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.shape)

    @classmethod
    def of(cls, grid: VideoGrid, device: torch.device) -> PlannedGrid:
        """The same grid, with tensors on this device, and no answer yet."""
        sides = grid.frames, grid.height, grid.width
        if torch.compiler.is_compiling():
            return cls(*sides, torch.empty(math.prod(sides), dtype=torch.int8, device=device))
        return cls(*sides, of_any_size(math.prod(sides), device))

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    def answer(self, question: tuple[Hashable, ...], find: Callable[[], Answer]) -> Answer:
        if question not in self._answers:
            self._answers[question] = find()
        return self._answers[question]


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
        return sum(self.before), self.grid.num_tokens, sum(self.after)

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
        """The inverse of `split`. Where a [B, H, L, D] video has its heads inside of tokens in memory, so has this."""
        before, _, after = self.lengths
        before, after = protected.split((before, after), dim)
        parts = before, video, after
        if dim == 2 and video.dim() == 4 and video.stride(1) < video.stride(2):
            return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)
        return torch.cat(parts, dim)

    def tile_order(self, tile: tuple[int, int, int], slot: int, device: torch.device) -> TileOrder:
        """Tiles in slots: the video's cubes, then chunks of at most as many tokens of each segment, in order."""
        sides = self.grid.frames, self.grid.height, self.grid.width
        return tile_order(sides, self.before, self.after, tile, slot, device)

    def num_chunks(self, size: int) -> int:
        """How many chunks of at most `size` tokens the protected segments are cut into; no chunk has tokens of two."""
        return sum(ceil_div(length, size) for length in (*self.before, *self.after))

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid.shape))
        return f"layout {grid} with before={self.before}, after={self.after}"


class Where(NamedTuple):
    """Where the tokens of a call stand, by the arguments of a method's function (see `sla_attention`)."""

    grid: VideoGrid | None = None
    layout: TokenLayout | VideoGrid | None = None
    protected_keys: tuple[int, int] | None = None
    kv_lengths: Tensor | None = None


NOWHERE = Where()


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
