"""Constants that are computed once: none is kept that was made for a trace, and none is handed to one."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from foveal import VideoGrid
from foveal.checks import cached_constant, clear_constants


def test_a_fake_mode_leaves_the_cache_alone():
    made = []

    @cached_constant
    def numbers(count: int):
        made.append(count)
        return torch.arange(count)

    with FakeTensorMode():
        assert isinstance(numbers(3), FakeTensor)
    first = numbers(3)
    assert type(first) is torch.Tensor
    assert numbers(3) is first
    with FakeTensorMode():
        assert isinstance(numbers(3), FakeTensor)
    assert made == [3, 3, 3]
    clear_constants()
    assert torch.equal(numbers(3), first)
    assert numbers(3) is not first


def test_a_grid_works_after_a_trace_with_fakes():
    grid, x = VideoGrid(3, 4, 5), torch.randn(1, 1, 60, 4)
    with FakeTensorMode() as mode:
        grid.to_tile_order(mode.from_tensor(x), (2, 2, 2))
    assert torch.equal(grid.to_raster_order(grid.to_tile_order(x, (2, 2, 2)), (2, 2, 2)), x)


def test_constants_do_not_pile_up():
    calls = []

    @cached_constant
    def double(x: int) -> int:
        calls.append(x)
        return 2 * x

    for x in range(200):
        assert double(x) == 2 * x
        assert double(x) == 2 * x
    assert len(calls) == 200


def test_nothing_is_kept_of_a_transform():
    """A tensor made inside of torch.func is a wrapper, whose memory cannot be looked at when that has ended."""
    clear_constants()
    grid, x = VideoGrid(3, 4, 5), torch.randn(1, 1, 60, 4)
    torch.func.grad(lambda x: grid.to_tile_order(x, (2, 2, 2)).square().sum())(x)
    order = grid.to_tile_order(x, (2, 2, 2))
    compiled = torch.compile(lambda x: grid.to_tile_order(x, (2, 2, 2)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), order)
