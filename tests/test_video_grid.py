"""Token orders: raster to tile order and back, compact and slotted, against plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal import VideoGrid

sides = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


def cubes_by_hand(grid, tile):
    """Raster positions of each cube's tokens, both in (t, h, w) order."""
    frames, height, width = grid.shape
    cubes = []
    starts = (range(0, side, edge) for side, edge in zip(grid.shape, tile, strict=True))
    for t0, h0, w0 in itertools.product(*starts):
        tokens = itertools.product(
            range(t0, min(t0 + tile[0], frames)),
            range(h0, min(h0 + tile[1], height)),
            range(w0, min(w0 + tile[2], width)),
        )
        cubes.append([(t * height + h) * width + w for t, h, w in tokens])
    return cubes


@given(sides=sides, tile=tiles)
def test_compact_order_is_cube_by_cube(sides, tile):
    grid = VideoGrid(*sides)
    cubes = cubes_by_hand(grid, tile)
    raster = torch.arange(grid.num_tokens, dtype=torch.float64)
    tiled = grid.to_tile_order(raster, tile, dim=0)
    assert tiled.tolist() == list(itertools.chain(*cubes))
    assert torch.equal(grid.to_raster_order(tiled, tile, dim=0), raster)


@given(sides=sides, tile=tiles, spare=st.integers(0, 5))
def test_slotted_order_puts_each_cube_at_the_front_of_its_slot(sides, tile, spare):
    grid = VideoGrid(*sides)
    slot = math.prod(tile) + spare
    raster = torch.arange(1, grid.num_tokens + 1, dtype=torch.float64)
    tiled = grid.to_tile_order(raster, tile, slot=slot, dim=0)
    expected = [[1 + p for p in cube] + [0] * (slot - len(cube)) for cube in cubes_by_hand(grid, tile)]
    assert tiled.tolist() == list(itertools.chain(*expected))
    assert torch.equal(grid.to_raster_order(tiled, tile, slot=slot, dim=0), raster)


@given(sides=sides, tile=tiles)
def test_cube_sizes(sides, tile):
    grid = VideoGrid(*sides)
    sizes = grid.cube_sizes(tile)
    assert sizes.dtype == torch.int32
    assert sizes.tolist() == [len(cube) for cube in cubes_by_hand(grid, tile)]
    assert sizes.sum() == grid.num_tokens
    assert len(sizes) == grid.num_cubes(tile)


@given(sides=sides, max_tokens=st.sampled_from([1, 4, 16, 64, 128]), max_aspect=st.sampled_from([1, 2, 3]))
def test_auto_tile_is_compact_and_wastes_least(sides, max_tokens, max_aspect):
    grid = VideoGrid(*sides)

    def compact(tile):
        free = [edge for edge, side in zip(tile, grid.shape, strict=True) if edge < side]
        return math.prod(tile) <= max_tokens and (not free or max(tile) <= max_aspect * min(free))

    tile = grid.auto_tile(max_tokens, max_aspect)
    assert compact(tile)
    within = itertools.product(*(range(1, side + 1) for side in grid.shape))
    assert grid.num_cubes(tile) == min(grid.num_cubes(other) for other in within if compact(other))


def test_auto_tile_of_wan_480p():
    grid = VideoGrid(21, 30, 52)
    assert grid.num_tokens == 32760
    assert grid.auto_tile() == (3, 5, 4)

    def waste(tile):
        return grid.num_cubes(tile) * 64 / grid.num_tokens - 1

    # Cubes of 128: the one that divides the grid, though another needs 270 slots to its 273.
    assert grid.auto_tile(max_tokens=128, max_aspect=4) == (7, 6, 3)
    assert grid.auto_tile(max_tokens=128, max_aspect=4, prefer_whole=True) == (3, 10, 4)
    assert [grid.num_cubes(tile) for tile in ((7, 6, 3), (3, 10, 4))] == [270, 273]
    assert waste((4, 4, 4)) == pytest.approx(0.219, abs=1e-3)
    assert waste((3, 5, 4)) == pytest.approx(0.067, abs=1e-3)


@pytest.mark.parametrize("slot", [None, 32])
def test_along_any_dimension_and_stride(slot):
    grid, tile = VideoGrid(3, 4, 5), (2, 3, 4)
    x = torch.randn(2, grid.num_tokens, 3, 4).transpose(1, 2)
    assert not x.is_contiguous()
    tiled = grid.to_tile_order(x, tile, slot=slot)
    assert tiled.shape == (2, 3, 60 if slot is None else 8 * 32, 4)
    assert torch.equal(grid.to_tile_order(x.transpose(2, 3), tile, slot=slot, dim=-1), tiled.transpose(2, 3))
    assert torch.equal(grid.to_raster_order(tiled, tile, slot=slot), x)


@pytest.mark.parametrize("slot", [None, 16])
def test_gradients_travel_both_ways(slot):
    grid, tile = VideoGrid(2, 3, 3), (2, 2, 2)
    x = torch.randn(1, 1, grid.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: grid.to_tile_order(x, tile, slot=slot), x)
    tiled = grid.to_tile_order(x.detach(), tile, slot=slot).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grid.to_raster_order(x, tile, slot=slot), tiled)
    assert torch.autograd.gradgradcheck(lambda x: grid.to_tile_order(x, tile, slot=slot), x)


@pytest.mark.parametrize("slot", [None, 27])
def test_a_first_call_in_inference_mode_leaves_training_alone(slot):
    """What is cached there must still be good for autograd."""
    grid, tile = VideoGrid(5, 3, 4), (3, 3, 3)
    x = torch.randn(1, 1, grid.num_tokens, 2)
    with torch.inference_mode():
        grid.to_tile_order(x, tile, slot=slot)
        grid.cube_sizes(tile)
    x.requires_grad_()
    grid.to_tile_order(x, tile, slot=slot).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not grid.cube_sizes(tile).is_inference()


def test_padding_keeps_nothing_of_the_input():
    """A slot's padding gathers some token first: not even its NaN may stay."""
    grid = VideoGrid(1, 1, 3)
    tiled = grid.to_tile_order(torch.full((1, 1, 3, 1), math.nan), (1, 1, 2), slot=4)
    assert torch.isnan(tiled).flatten().tolist() == [True, True, False, False, True, False, False, False]


class TestErrors:
    def test_sides(self):
        with pytest.raises(ValueError, match=r"frames must be at least 1, got 0"):
            VideoGrid(0, 4, 4)
        with pytest.raises(TypeError, match=r"height must be an int, got 4\.0 \(float\)"):
            VideoGrid(4, 4.0, 4)
        with pytest.raises(TypeError, match=r"width must be an int, got True \(bool\)"):
            VideoGrid(4, 4, True)

    def test_length(self):
        with pytest.raises(ValueError, match=r"grid 2x3x4 has 24 tokens, but the tensors have 23"):
            VideoGrid(2, 3, 4).to_tile_order(torch.zeros(1, 1, 23, 2), (2, 2, 2))
        with pytest.raises(ValueError, match=r"x must have 32 entries along dim 2 in this tile order, got 24"):
            VideoGrid(2, 3, 4).to_raster_order(torch.zeros(1, 1, 24, 2), (2, 2, 2), slot=8)

    @pytest.mark.parametrize(
        "call",
        [
            lambda grid, tile: grid.to_tile_order(torch.zeros(1, 1, 24, 2), tile),
            lambda grid, tile: grid.cube_sizes(tile),
            lambda grid, tile: grid.num_cubes(tile),
        ],
        ids=["to_tile_order", "cube_sizes", "num_cubes"],
    )
    def test_tile(self, call):
        with pytest.raises(TypeError, match=r"tile must be a tuple of three ints \(frames, height, width\), got 64"):
            call(VideoGrid(2, 3, 4), 64)
        with pytest.raises(ValueError, match=r"tile height must be at least 1, got 0"):
            call(VideoGrid(2, 3, 4), (2, 0, 2))

    def test_slot_that_is_too_small(self):
        with pytest.raises(ValueError, match=r"slot must hold the 8 tokens of a \(2, 2, 2\) cube, got 7"):
            VideoGrid(2, 3, 4).to_tile_order(torch.zeros(1, 1, 24, 2), (2, 2, 2), slot=7)

    def test_max_tokens(self):
        with pytest.raises(ValueError, match=r"max_tokens must be at least 1, got 0"):
            VideoGrid(2, 3, 4).auto_tile(0)
