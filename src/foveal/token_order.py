"""Where tokens stand in tile order, as tensors: for one grid, and for a packed sequence around it.

Compiled code reads tensors and their sizes where the sides of a grid would be constants of its graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.checks import cached_constant, check_triple, is_transformed
from foveal.symbols import ceil_div


class TileOrder(NamedTuple):
    """Where tokens stand in one tile order. What compiled code reads here is no constant of its graph.

    to_tile: int64 [L], or [C * slot] in the slotted layout: the token, in raster order, at each place in tile order; -1
        for a slot's padding.
    to_raster: int64 [L], the place in tile order of each token in raster order.
    cube_sizes: int32 [C], valid tokens of each cube; of a packed sequence the cubes are followed by chunks of the
        segments around the video, and raster order is the sequence's.
    whole: int8 [tokens of a whole cube], for its size.
    slot: tokens that each cube takes up; None in the compact layout.
    """

    to_tile: Tensor
    to_raster: Tensor
    cube_sizes: Tensor
    whole: Tensor
    slot: int | None

    def sort(self, x: Tensor, dim: int = 2) -> Tensor:
        """A tensor in raster order along `dim`, to tile order; padding is zero. Differentiable."""
        return _permuted(x, self.to_tile, self.to_raster, dim, self.slot is not None, False)

    def unsort(self, x: Tensor, dim: int = 2) -> Tensor:
        """The inverse of `sort`."""
        return _permuted(x, self.to_raster, self.to_tile, dim, False, self.slot is not None)


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
def cube_sizes(shape: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device) -> Tensor:
    """int32 [C], valid tokens of each cube."""
    check_triple("tile", tile)
    edges = [
        (side - torch.arange(-(-side // edge)) * edge).clamp(max=edge) for side, edge in zip(shape, tile, strict=True)
    ]
    sizes = edges[0][:, None, None] * edges[1][:, None] * edges[2]
    return sizes.flatten().to(device=device, dtype=torch.int32)


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


def tile_order(
    shape: tuple[int, int, int],
    before: tuple[int, ...],
    after: tuple[int, ...],
    tile: tuple[int, int, int],
    slot: int | None,
    device: torch.device,
) -> TileOrder:
    """The order of a grid's tokens, or of a packed sequence: the cubes, then chunks of the segments around the video.

    Args:
        shape: the grid's sides.
        before, after: lengths of the segments, which need slots. A chunk has at most as many tokens as a cube.
        tile, slot: the cube, and the tokens that each takes up; None for the compact layout.
    """
    if torch.compiler.is_compiling():
        return TileOrder(*_tile_order_op(*map(list, (shape, before, after, tile)), slot, device), slot)
    return _tile_order(shape, before, after, tile, slot, device)


@cached_constant
def _tile_order(shape, before, after, tile, slot, device) -> TileOrder:
    if before or after:
        order = _packed_indices(shape, before, after, tile, slot, device)
    else:
        order = *tile_indices(shape, tile, slot, device), cube_sizes(shape, tile, device)
    return TileOrder(*map(of_any_length, order), of_any_size(math.prod(tile), device), slot)


@cached_constant
def of_any_size(size: int, device: torch.device) -> Tensor:
    """int8 [size], for its size: what compiled code reads instead of a number that would be a part of its graph."""
    return of_any_length(torch.zeros(size, dtype=torch.int8, device=device))


def of_any_length(x: Tensor) -> Tensor:
    """x [N, ...], marked so that a graph that takes it takes any N.

    As `torch._dynamo.maybe_mark_dynamic` does it, which would import torch._dynamo, and Triton with it. Without a mark,
    a graph takes other sizes only where one was seen to change, and sizes that do not change together would cost a
    graph each.
    """
    x._dynamo_weak_dynamic_indices = {0}
    return x


@torch.library.custom_op("foveal::tile_order", mutates_args=())
def _tile_order_op(
    shape: list[int],
    before: list[int],
    after: list[int],
    tile: list[int],
    slot: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `TileOrder`, new: an op may not return what others hold."""
    return tuple(x.clone() for x in _tile_order(*map(tuple, (shape, before, after, tile)), slot, device)[:4])


@_tile_order_op.register_fake
def _(shape, before, after, tile, slot, device):
    size, length = math.prod(tile), math.prod(shape) + sum((*before, *after))
    tiles = math.prod(ceil_div(side, edge) for side, edge in zip(shape, tile, strict=True))
    tiles += sum(ceil_div(segment, size) for segment in (*before, *after))
    to_raster = torch.empty(length, dtype=torch.int64, device=device)
    to_tile = torch.empty_like(to_raster) if slot is None else to_raster.new_empty(tiles * slot)
    whole = to_raster.new_empty(size, dtype=torch.int8)
    return to_tile, to_raster, to_raster.new_empty(tiles, dtype=torch.int32), whole


class _Gather(torch.autograd.Function):
    """`_gather`. Each entry is used at most once, so the backward is a deterministic gather too.

    index_select's own backward adds with atomics.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, dim: int, padded: bool, padded_back: bool) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.options = dim, padded, padded_back
        return _gather(x, index, dim, padded)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, inverse = ctx.saved_tensors
        dim, padded, padded_back = ctx.options
        return _Gather.apply(grad, inverse, index, dim, padded_back, padded), *[None] * 5


def _permuted(x: Tensor, index: Tensor, inverse: Tensor, dim: int, padded: bool, padded_back: bool) -> Tensor:
    """`_Gather`; inside of a transform of `torch.func` the same in operations that it knows."""
    if is_transformed(x):
        return _gather(x, index, dim, padded)
    return _Gather.apply(x, index, inverse, dim, padded, padded_back)


def _gather(x: Tensor, index: Tensor, dim: int, padded: bool) -> Tensor:
    """x[index] along `dim`; where `padded`, the index may be -1, and the entry is 0."""
    # A compiled graph is for any grid, also for one whose cubes leave slots empty.
    if not padded or (not torch.compiler.is_compiling() and index.shape[0] == x.shape[dim]):
        return x.index_select(dim, index)
    out = x.index_select(dim, index.clamp(min=0))
    return out.masked_fill((index < 0).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]), 0)
