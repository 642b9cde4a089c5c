"""VSA on GPUs as users meet it: numerics, determinism, host waits, graphs, torch.compile, recompilation."""

import pytest
import torch
from test_vsa_triton import CASES, check_case, make_case
from torch.utils.checkpoint import checkpoint

from foveal import VideoGrid, VSAConfig, vsa_attention
from foveal.kernels.hopper.support import why_not
from foveal.methods.vsa.attention import select_cubes
from foveal.testing import make_inputs, output_and_gradients

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "gluon"])
def impl(request):
    if request.param == "gluon":
        reason = why_not(*(torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda"),) * 3, 64, 64)
        if reason is not None:
            pytest.skip(f"gluon: {reason}")
    return request.param


def attend(impl, config, grid, lengths=None, selection=None):
    """A function of query, key, value and up to two gates."""

    def function(query, key, value, gate_coarse=None, gate_fine=None):
        gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
        options = {"config": config, "grid": grid, "kv_lengths": lengths, "selection": selection, "impl": impl}
        return vsa_attention(query, key, value, **gates, **options)

    return function


def arguments(grid, head_dim=128, dtype=torch.bfloat16, heads=2, spread=1.0):
    """Query, key, value and two gates."""
    sizes = {"heads": heads, "query_length": grid.num_tokens, "head_dim": head_dim, "dtype": dtype, "device": "cuda"}
    qkv = make_inputs(layout="BLHD", **sizes)
    return (qkv[0] * spread, *qkv[1:], *make_inputs(layout="BLHD", seed=5, **sizes)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, dtype, impl):
    def run(query, key, value, gates, grid, config, selection, lengths):
        return attend(impl, config, grid, lengths, selection)(query, key, value, *gates)

    check_case(name, dtype, "cuda", run)


# grid, tile, topk, D
LARGER = {
    "partial cubes": ((9, 14, 22), (4, 4, 4), 9, 128),
    "whole cubes in slots": ((9, 15, 20), "auto", 7, 128),
    "cubes of 40": ((8, 10, 16), (4, 2, 5), 5, 128),
    "one row of cubes": ((1, 40, 64), (1, 8, 8), 6, 64),
    "cubes of 56": ((7, 10, 12), (7, 2, 4), 4, 128),
    "wide slots": ((8, 10, 24), (4, 5, 6), 3, 128),
    "wide cubes": ((9, 20, 24), "wide", 5, 128),
    "full wide cubes": ((8, 12, 16), (4, 4, 8), 4, 128),
    "partial wide cubes": ((9, 14, 22), (7, 6, 3), 5, 64),
    "cubes in two slots": ((9, 14, 22), (4, 8, 8), 3, 128),
    "whole cubes in two slots": ((8, 16, 24), (4, 8, 8), 4, 64),
    "one cube": ((2, 3, 4), (4, 4, 4), 3, 128),
    "all cubes": ((6, 10, 8), "auto", 100, 64),
}


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("case", LARGER.values(), ids=LARGER)
def test_larger_grids(case, spread, impl):
    from foveal.testing import assert_close_to_reference, poison_empty

    sides, tile, topk, head_dim = case
    grid, config = VideoGrid(*sides), VSAConfig(topk=topk, tile=tile)
    inputs = arguments(grid, head_dim, spread=spread)
    selection = select_cubes(*inputs[:2], config=config, grid=grid)
    with poison_empty():
        ours = output_and_gradients(attend(impl, config, grid), inputs)
    reference = attend("reference", config, grid, selection=selection)
    exact = output_and_gradients(reference, [x.double() for x in inputs])
    plain = output_and_gradients(reference, inputs)
    names = ("output", "query", "key", "value", "gate_coarse", "gate_fine")
    for name, *results in zip(names, ours, exact, plain, strict=True):
        assert_close_to_reference(*results, name=name)


def test_selection_agrees_with_float64():
    grid, config = VideoGrid(13, 30, 40), VSAConfig(tile="auto")
    query, key, *_ = arguments(grid)
    ours = select_cubes(query, key, config=config, grid=grid)
    exact = select_cubes(query.double().cpu(), key.double().cpu(), config=config, grid=grid)
    assert torch.equal(ours.critical_count.cpu(), exact.critical_count)
    assert (ours.labels().cpu() == exact.labels()).double().mean() > 0.9999


def test_a_selection_given_is_the_one_made_inside(impl):
    grid, config = VideoGrid(9, 14, 22), VSAConfig(tile="auto")
    inputs = arguments(grid)
    selection = select_cubes(*inputs[:2], config=config, grid=grid)
    inside = output_and_gradients(attend(impl, config, grid), inputs)
    given = output_and_gradients(attend(impl, config, grid, selection=selection), inputs)
    assert all(torch.equal(x, y) for x, y in zip(inside, given, strict=True))


def test_deterministic_without_host_waits(impl):
    grid, config = VideoGrid(9, 14, 22), VSAConfig(topk=9)
    leaves = [x.requires_grad_() for x in arguments(grid)]
    function = attend(impl, config, grid)

    def run():
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output.float().square().mean(), leaves)

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_cuda_graph(impl):
    (query, key, value), gates, grid, config, lengths = make_case("text with padding", torch.bfloat16, "cuda")
    leaves = [x.detach().requires_grad_() for x in (query, key, value, *gates)]
    function = attend(impl, config, grid, lengths)

    def run():
        output = function(*leaves)
        return output, *torch.autograd.grad(output.float().square().mean(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, run(), strict=True))


@pytest.mark.parametrize("name", ["partial cubes", "text with padding"])
def test_compiles_whole(name, impl):
    qkv, gates, grid, config, lengths = make_case(name, torch.bfloat16, "cuda")
    function = attend(impl, config, grid, lengths)

    def loss(query, *rest):
        return function(query * 2, *rest).float().square().mean()

    leaves = [x.detach().requires_grad_() for x in (*qkv, *gates)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for x, y in zip(compiled, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-5)


def test_activation_checkpointing(impl):
    grid, config = VideoGrid(9, 15, 20), VSAConfig(tile="auto")
    function, inputs = attend(impl, config, grid), arguments(grid)
    again = output_and_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs)
    assert all(torch.equal(x, y) for x, y in zip(again, output_and_gradients(function, inputs), strict=True))


def test_inference_is_the_training_forward(impl):
    grid, config = VideoGrid(9, 15, 20), VSAConfig(tile="auto")
    inputs = [x.requires_grad_() for x in arguments(grid)]
    with torch.no_grad():
        inference = attend(impl, config, grid)(*inputs)
    assert torch.equal(inference, attend(impl, config, grid)(*inputs))


def test_one_compilation_over_grids(impl):
    from foveal.kernels.hopper import cubes_kernel, cubes_wide_kernel
    from foveal.kernels.triton import cube_gradients, cubes, pooled

    kernels = [
        kernel
        for module in (cubes, cube_gradients, pooled, cubes_kernel, cubes_wide_kernel)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "device_caches")
    ]
    assert len(kernels) == 9
    compiled = None
    for sides in ((5, 9, 13), (4, 4, 7), (1, 30, 30), (3, 33, 17), (8, 8, 9), (17, 5, 33)):
        grid = VideoGrid(*sides)
        leaves = [x.requires_grad_() for x in arguments(grid)]
        attend(impl, VSAConfig(topk=3), grid)(*leaves).float().sum().backward()
        sizes = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        compiled = compiled or sizes
        assert sizes == compiled, f"grid {sides} compiled again"
