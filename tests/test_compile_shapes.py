"""Compiled models and functions over many shapes: lengths and counts are no constants of a graph.

The cases with Triton's kernels run interpreted, in a process of their own: this file, started as a script.
"""

import sys

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted
from tiny_wan import SPARSE_SLA, SPARSE_VSA, inputs, randomize, run, tiny_transformer

import foveal
from foveal import SLA2Config, SLAConfig, VideoGrid, VSAConfig, sla_attention, vsa_attention
from foveal.layout import PlannedGrid
from foveal.methods.base import LayerCall, method_of
from foveal.rules import count, num_critical
from foveal.testing import make_inputs, output_and_gradients

TILED_SLA = SPARSE_SLA.replace(token_order="tile")
CONFIGS = {
    "sla": SPARSE_SLA,
    "sla tile order": TILED_SLA,
    "vsa": SPARSE_VSA,
}
# Aspect-ratio buckets, more than Dynamo compiles again for. Grids are of whole and of partial cubes, and the first two
# have as many cubes of (2, 2, 4). One frame is left to itself: for it diffusers' rotary embedding has another layout.
BUCKETS = [(3, 10, 14), (3, 12, 16), (2, 8, 16), (5, 12, 8), (3, 16, 8), (4, 8, 8), (2, 24, 6), (7, 6, 6), (3, 20, 10)]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def start() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def one_layer(config):
    model = foveal.sparsify(tiny_transformer(num_layers=1), config)
    randomize(model)
    return model


@pytest.mark.wrapper("torch.compile, dynamic shapes")
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_nine_buckets_are_two_graphs(name):
    model = one_layer(CONFIGS[name])
    data = [inputs(batch=1, latent=latent) for latent in BUCKETS]
    expected = [run(model, **one) for one in data]
    start()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for one, output in zip(data, expected, strict=True):
        torch.testing.assert_close(run(model, **one), output, rtol=0, atol=1e-5)
    assert graphs() == 2


@pytest.mark.wrapper("torch.compile, dynamic shapes")
@pytest.mark.parametrize("name", ["sla tile order", "vsa"])
@torch.no_grad()
def test_dynamic_blocks_are_two_graphs_at_most(name):
    model = one_layer(CONFIGS[name])
    data = [inputs(batch=1, latent=latent) for latent in BUCKETS[:3]]
    expected = [run(model, **one) for one in data]
    start()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for one, output in zip(data, expected, strict=True):
        torch.testing.assert_close(run(model, **one), output, rtol=0, atol=1e-5)
    assert graphs() <= 2


@pytest.mark.wrapper("torch.compile, dynamic shapes")
@pytest.mark.parametrize("name", ["sla tile order", "vsa"])
@torch.no_grad()
def test_a_whole_dynamic_model_is_two_graphs_at_most(name):
    model = one_layer(CONFIGS[name])
    data = [inputs(batch=1, latent=latent) for latent in BUCKETS[:3]]
    expected = [run(model, **one) for one in data]
    start()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    for one, output in zip(data, expected, strict=True):
        torch.testing.assert_close(run(compiled, **one), output, rtol=0, atol=1e-5)
    assert graphs() <= 2


@pytest.mark.wrapper("torch.compile, dynamic shapes")
@pytest.mark.parametrize(("name", "buckets"), [("sla tile order", BUCKETS[:3]), ("vsa", BUCKETS)])
def test_training_over_buckets_is_two_graphs(name, buckets):
    model = one_layer(CONFIGS[name]).train()

    def gradients(latent):
        model.zero_grad()
        run(model, **inputs(batch=1, latent=latent)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = [gradients(latent) for latent in buckets]
    start()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for latent, ones in zip(buckets, expected, strict=True):
        for ours, exact in zip(gradients(latent), ones, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert graphs() == 2


def test_an_automatic_tile_is_no_part_of_a_graph():
    """Only the tokens that a cube takes up are: 64 at all but tiny grids."""
    module = foveal.VideoSparseAttention(32, 2, 16, VSAConfig(tile="auto", keep_ratio=0.3))
    start()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    tiles = set()
    for sides in ((5, 8, 10), (6, 9, 7), (4, 12, 8), (9, 5, 5), (7, 7, 7)):
        grid = PlannedGrid.of(VideoGrid(*sides), torch.device("cpu"))
        method_of(module.config).plan(module.config, grid, torch.device("cpu"))
        query, key, value = make_inputs(query_length=grid.num_tokens, head_dim=16)
        hidden_states = torch.randn(*query.shape[::2], 32)
        torch.testing.assert_close(
            compiled(query, key, value, hidden_states, grid=grid), module(query, key, value, hidden_states, grid=grid)
        )
        tiles.add(VideoGrid(*sides).auto_tile())
    assert len(tiles) > 2
    assert graphs() == 2


@pytest.mark.parametrize("family", ["hunyuan_video", "flux"])
@torch.no_grad()
def test_text_of_many_lengths_costs_no_graph_more_than_dense(family):
    """One block of text and several; in HunyuanVideo a mask, and in Flux text and image as one sequence."""
    pytest.importorskip("diffusers")
    import test_flux
    import test_hunyuan_video

    case = {"flux": test_flux.TestFlux, "hunyuan_video": test_hunyuan_video.TestHunyuanVideo}[family]()
    latents = ((1, 8, 10), (1, 9, 13), (1, 10, 11)) if family == "flux" else ((3, 10, 12), (3, 12, 14), (5, 8, 12))

    def compiled_graphs(config) -> int:
        model, data = case.model(num_layers=1, num_single_layers=1), []
        if config is not None:
            foveal.sparsify(model, config)
            randomize(model)
        for latent, case.TEXT in zip(latents, (9, 12, 30), strict=True):
            data.append(case.inputs(latent=latent))
        expected = [case.run(model, **one) for one in data]
        start()
        blocks = model.single_transformer_blocks if family == "flux" else model.transformer_blocks
        blocks[0].compile(fullgraph=True, backend="eager")
        for one, output in zip(data, expected, strict=True):
            torch.testing.assert_close(case.run(model, **one), output, rtol=0, atol=1e-5)
        return graphs()

    assert compiled_graphs(SPARSE_VSA) <= compiled_graphs(None)


class Attention(torch.nn.Module):
    def __init__(self, function, config):
        super().__init__()
        self.function, self.config = function, config

    def forward(self, video):
        grid = VideoGrid(*video.shape[1:4])
        query = video.flatten(1, 3).unflatten(-1, (2, 16)).transpose(1, 2)
        return self.function(query, query.flip(2), query, config=self.config, grid=grid)


@pytest.mark.wrapper("torch.export")
@pytest.mark.parametrize("name", ["sla", "sla tile order", "vsa"])
def test_export_with_dynamic_sides(name):
    config = CONFIGS[name]
    module = Attention(vsa_attention if name == "vsa" else sla_attention, config)
    sides = {axis: torch.export.Dim(side, min=2, max=64) for axis, side in enumerate(("t", "h", "w"), 1)}
    exported = torch.export.export(module, (torch.randn(1, 3, 6, 8, 32),), dynamic_shapes=(sides,)).module()
    for shape in ((3, 6, 8), (5, 4, 10), (2, 9, 7), (4, 8, 8)):
        video = torch.randn(1, *shape, 32)
        torch.testing.assert_close(exported(video), module(video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.29, 1 / 3, 0.125, 0.95, 1e-3])
def test_counts_of_symbols_are_those_of_numbers(ratio):
    """0.29 * 100 is 28.999..., for which the rule is made."""

    def counted(x):
        total = x.shape[0]
        sizes = num_critical(total, ratio, None), count(ratio, total) + 2, num_critical(total, None, 7)
        return torch.empty(sizes, device="meta")

    start()
    compiled = torch.compile(counted, backend="eager", dynamic=True, fullgraph=True)
    for total in (*range(2, 300), *range(300, 10_001, 100), 16_384, 75_600):
        x = torch.zeros(total, dtype=torch.int8)
        assert compiled(x).shape == counted(x).shape, total
    assert graphs() == 1
    whole = range(200_000)
    integers = [(total * round(ratio * 10**12) + 10**6) // 10**12 for total in whole]
    assert integers == [count(ratio, total) for total in whole]


def run_kernels(name: str) -> None:
    """Forward and backward of Triton's kernels as custom ops, at three grids and lengths of text."""
    from foveal.kernels import api
    from foveal.methods.sla import attention as sla
    from foveal.methods.sla2 import attention as sla2
    from foveal.methods.sla2 import blocks
    from foveal.methods.vsa import attention as vsa

    for module in (api, sla, sla2, vsa):
        module.choose_impl = lambda *_: api.Ran("triton")
    api.fits_kernel = sla.fits_kernel = blocks.fits_kernel = lambda *_: True
    tile_order = "tile" if name == "sla tile order" else "raster"
    config = {
        "vsa": VSAConfig(keep_ratio=0.3),
        "vsa router": VSAConfig(keep_ratio=0.3, router="per_head"),
        "sla2 router": SLA2Config(keep_ratio=0.3, block_q=64, linear_scope="none", router="per_head"),
    }.get(name, SLAConfig(keep_ratio=0.3, token_order=tile_order))
    method, device = method_of(config), torch.device("cpu")
    module = method.build(config, 16, 1, 64, "triton")

    def attention(query, key, value, hidden_states, grid):
        return method.run(module, LayerCall(query, key, value, hidden_states, grid))

    start()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    # Of whole cubes, and not; one block is kept, and several.
    for sides, text in (((4, 4, 8), 20), ((5, 4, 4), 33), ((4, 4, 12), 40)):
        grid = PlannedGrid.of(VideoGrid(*sides), device)
        method.plan(config, grid, device)
        query, key, value = make_inputs(
            heads=1, query_length=grid.num_tokens, key_length=grid.num_tokens + text, dtype=torch.bfloat16
        )
        hidden_states = torch.randn(query.shape[0], query.shape[2], 16).bfloat16()
        tensors = query, key, value, hidden_states
        ways = (output_and_gradients(lambda *x, f=f, grid=grid: f(*x, grid), tensors) for f in (compiled, attention))
        for ours, exact in zip(*ways, strict=True):
            assert (ours is None and exact is None) or torch.equal(ours, exact), (name, sides)
    assert graphs() == 2, graphs()


@pytest.mark.parametrize("name", ["sla tile order", "vsa", "vsa router", "sla2 router"])
def test_kernels_are_two_graphs(name):
    pytest.importorskip("triton")
    run_interpreted(__file__, [name])


if __name__ == "__main__":
    mend_interpreter()
    for each in sys.argv[1:]:
        run_kernels(each)
