"""Key blocks that a video's queries keep whatever their scores: its first frames, and a window around their own cube.

A sink is what every query keeps, as StreamingLLM has it for first tokens (arXiv 2309.17453), here the first frames. A
window of cubes is that of sliding tile attention (arXiv 2502.04507): centered on the query's cube, and shifted inward
at the borders of the video, so that every cube has as many neighbors.

Shape legend: C cubes, Tq query blocks, P the most cubes that a query block holds tokens of, R ranges of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.checks import cached_constant
from foveal.rules import FixedBlocks
from foveal.symbols import ceil_div
from foveal.token_order import cube_sizes, of_any_size

Triple = tuple[int, int, int]


def fixed_blocks(
    shape: Triple,
    tile: Triple | None,
    blocks: tuple[int, int] | None,
    sink_frames: int,
    window: Triple | None,
    device: torch.device,
) -> FixedBlocks:
    """What each query block of a video keeps beside what it picks, for a number of frames, a window, or both.

    Args:
        shape: frames, height, and width of the video.
        tile: the cube that its tokens are sorted by; None for raster order, which has no windows.
        blocks: tokens of the query and key blocks that the sorted tokens are cut into; None where each cube is one.
        sink_frames: every query keeps the key blocks of these first frames; in tile order those of all cubes that hold
            a token of them.
        window: cubes (frames, height, width) around the query's own whose key blocks it keeps. A query block that
            holds tokens of several cubes keeps the windows of all of them.
    """
    ranges = _ranges(shape, tile, blocks, sink_frames, window, device)
    size = _most(shape, tile, blocks, sink_frames, window) + 1
    if torch.compiler.is_compiling():
        return FixedBlocks(ranges, torch.empty(size, dtype=torch.int8, device=device))
    return FixedBlocks(ranges, of_any_size(size, device))


@cached_constant
def _ranges(
    shape: Triple,
    tile: Triple | None,
    blocks: tuple[int, int] | None,
    sink_frames: int,
    window: Triple | None,
    device: torch.device,
) -> Tensor:
    """int32 [Tq, R, 2], as `FixedBlocks` has it."""
    places = _Places(shape, tile, blocks)
    runs = []
    if sink_frames:
        runs.append(torch.tensor([[0, places.sink_blocks(sink_frames)]]).expand(places.rows, 1, 2))
    if window is not None:
        runs.append(places.windows(window))
    ranges = _merged(torch.cat(runs, 1)).to(device=device, dtype=torch.int32).contiguous()
    ranges._dynamo_weak_dynamic_indices = {0, 1}  # as `foveal.token_order` marks sizes: a graph takes any of them
    return ranges


@cached_constant
def _most(
    shape: Triple, tile: Triple | None, blocks: tuple[int, int] | None, sink_frames: int, window: Triple | None
) -> int:
    """How many blocks a row's ranges hold at most."""
    ranges = _ranges(shape, tile, blocks, sink_frames, window, torch.device("cpu"))
    return int((ranges[..., 1] - ranges[..., 0]).sum(1).max())


class _Places:
    """Where a video's blocks stand among its tokens.

    Attributes:
        rows: Tq.
    """

    def __init__(self, shape: Triple, tile: Triple | None, blocks: tuple[int, int] | None) -> None:
        self.shape, self.tile, self.blocks = shape, tile, blocks
        length = math.prod(shape)
        if tile is None:
            self.rows = ceil_div(length, blocks[0])
            return
        self.sides = tuple(ceil_div(side, edge) for side, edge in zip(shape, tile, strict=True))
        # A cube that is a block stands for one token of it.
        sizes = cube_sizes(shape, tile, torch.device("cpu")).long()
        sizes = torch.ones_like(sizes) if blocks is None else sizes
        block_q, block_k = (1, 1) if blocks is None else blocks
        stops = sizes.cumsum(0)
        self.first_block, self.last_block = (stops - sizes) // block_k, (stops - 1) // block_k
        length = int(stops[-1])
        self.rows = ceil_div(length, block_q)
        first = torch.arange(self.rows) * block_q
        last = (first + block_q).clamp(max=length) - 1
        self.cubes = torch.searchsorted(stops, torch.stack((first, last)), right=True)  # first and last of each row

    def sink_blocks(self, frames: int) -> int:
        """How many leading key blocks hold the first frames."""
        side, *others = self.shape
        if self.tile is None:
            return ceil_div(min(frames, side) * math.prod(others), self.blocks[1])
        layers = min(ceil_div(frames, self.tile[0]), self.sides[0])
        return int(self.last_block[layers * self.sides[1] * self.sides[2] - 1]) + 1

    def windows(self, window: Triple) -> Tensor:
        """int64 [Tq, R, 2]: ranges of key blocks, which may overlap or be empty."""
        first, last = self.cubes
        cube = first[:, None] + torch.arange(int((last - first).max()) + 1)  # [Tq, P]
        held = cube <= last[:, None]
        cube = cube.minimum(last[:, None])
        across, along = self.sides[1] * self.sides[2], self.sides[2]
        place = cube // across, cube // along % self.sides[1], cube % along
        edges = [min(edge, side) for edge, side in zip(window, self.sides, strict=True)]
        t, h, w = (
            (x - edge // 2).clamp(min=0).clamp(max=side - edge)
            for x, edge, side in zip(place, edges, self.sides, strict=True)
        )
        t = t[..., None, None] + torch.arange(edges[0])[:, None]
        h = h[..., None, None] + torch.arange(edges[1])
        start = t * across + h * along + w[..., None, None]  # [Tq, P, edge in frames, edge in height]
        runs = torch.stack((self.first_block[start], self.last_block[start + edges[2] - 1] + 1), -1)
        return torch.where(held[..., None, None, None], runs, 0).flatten(1, 3)


def _merged(ranges: Tensor) -> Tensor:
    """Ranges [Tq, R, 2], R two at least, that ascend and do not touch, of the same blocks; behind them [0, 0)."""
    far = int(ranges.max()) + 1
    empty = ranges[..., 0] >= ranges[..., 1]
    starts, order = torch.where(empty, far, ranges[..., 0]).sort(1)
    stops = torch.where(empty, far, ranges[..., 1]).gather(1, order)
    reached = stops.cummax(1).values
    begins = starts > torch.nn.functional.pad(reached[:, :-1], (1, 0), value=-1)
    run = begins.cumsum(1) - 1
    shape = starts.shape[0], max(2, int(run.max()) + 1)
    first = torch.full(shape, far).scatter_reduce(1, run, starts, "amin")
    last = torch.zeros(shape, dtype=torch.int64).scatter_reduce(1, run, stops, "amax")
    merged = torch.where((first < far)[..., None], torch.stack((first, last), -1), 0)
    return merged[:, : max(2, int((merged[..., 1] > 0).sum(1).max()))]
