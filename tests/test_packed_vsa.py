"""VSA over packed sequences, against plain loops in float64 whose tiles never hold tokens of two segments."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from packed_loops import vsa_loops

from foveal import TokenLayout, VideoGrid, VideoSparseAttention, VSAConfig, vsa_attention
from foveal.methods.vsa.attention import select_cubes
from foveal.testing import make_inputs, output_and_gradients

GRID = VideoGrid(3, 5, 6)  # 2 x 3 x 3 cubes of (2, 2, 2), many of them partial
LAYOUTS = {
    "both sides": TokenLayout(GRID, before=(7, 1), after=(20, 1)),
    "one token before": TokenLayout(GRID, before=(1,)),
    "after": TokenLayout(GRID, after=(33,)),
    "whole tiles": TokenLayout(VideoGrid(2, 4, 6), before=(8,), after=(16,)),
}
TILE = (2, 2, 2)
CONFIG = VSAConfig(keep_ratio=0.2, tile=TILE)
IMPLS = pytest.mark.parametrize("impl", ["torch", "reference"])


def packed_inputs(layout, count=3, **options):
    sizes = {"batch": 2, "query_length": layout.num_tokens, "head_dim": 8}
    query, key, value = make_inputs(**sizes, **options)
    gates = make_inputs(**sizes, seed=7)
    return (query, key, value + 1, *gates)[:count]


def kept(layout, ratio=0.2):
    return math.ceil(ratio * layout.grid.num_cubes(TILE))


def same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gates", [0, 1, 2])
@IMPLS
def test_gates(gates, impl):
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout, 3 + gates)

    def ours(query, key, value, coarse=None, fine=None):
        gates = {"gate_coarse": coarse, "gate_fine": fine}
        return vsa_attention(query, key, value, config=CONFIG, layout=layout, impl=impl, **gates)

    expected = output_and_gradients(lambda q, k, v, *gates: vsa_loops(q, k, v, layout, TILE, 4, *gates), inputs)
    same(output_and_gradients(ours, inputs), expected)


@pytest.mark.parametrize("name", LAYOUTS)
@IMPLS
def test_every_layout(name, impl):
    layout = LAYOUTS[name]
    inputs = packed_inputs(layout)
    ours = output_and_gradients(lambda *x: vsa_attention(*x, config=CONFIG, layout=layout, impl=impl), inputs)
    same(ours, output_and_gradients(lambda *x: vsa_loops(*x, layout, TILE, kept(layout)), inputs))


@pytest.mark.parametrize(("config", "count"), [({"topk": 3}, 3), ({"topk": 99}, 18), ({"keep_ratio": 0.01}, 1)])
def test_how_many_cubes_a_cube_reads(config, count):
    layout, config = LAYOUTS["both sides"], VSAConfig(tile=TILE, **config)
    inputs = packed_inputs(layout)
    torch.testing.assert_close(
        vsa_attention(*inputs, config=config, layout=layout), vsa_loops(*inputs, layout, TILE, count)
    )
    selection = select_cubes(*inputs[:2], config=config, layout=layout)
    assert selection.critical_count.unique().tolist() == [count + 6]


def test_a_ratio_rounds_up_but_not_for_an_error_of_rounding():
    inputs = make_inputs(query_length=101, head_dim=8)
    layout = TokenLayout(VideoGrid(1, 10, 10), before=(1,))
    for ratio, expected in ((0.07, 7), (0.29, 29), (0.071, 8), (1.0, 100)):
        selection = select_cubes(*inputs[:2], config=VSAConfig(keep_ratio=ratio, tile=(1, 1, 1)), layout=layout)
        assert selection.critical_count.unique().tolist() == [expected + 1], ratio


def test_an_auto_tile_cuts_chunks_of_its_size():
    layout = TokenLayout(GRID, before=(70,), after=(3,))
    tile = GRID.auto_tile()
    assert math.prod(tile) < 64
    inputs = packed_inputs(layout)
    config = VSAConfig(topk=1, tile="auto")
    torch.testing.assert_close(
        vsa_attention(*inputs, config=config, layout=layout), vsa_loops(*inputs, layout, tile, 1)
    )


def test_tiles_of_the_selection():
    """The video's cubes as in the loops, then all chunks; the same selection gives the same output."""
    layout, picked = LAYOUTS["both sides"], []
    inputs = packed_inputs(layout)
    selection = select_cubes(*inputs[:2], config=CONFIG, layout=layout)
    vsa_loops(*inputs, layout, TILE, 4, picked=picked)
    mask = selection.critical_mask()
    assert mask.shape == (2, 2, 18, 18 + 6)
    assert mask[..., 18:].all()
    assert selection.key_block_sizes[0, 18:].tolist() == [7, 1, 8, 8, 4, 1]
    for row, cubes in zip(mask[..., :18].flatten(0, 2), picked, strict=True):
        assert row.nonzero().flatten().tolist() == cubes
    for impl in ("torch", "reference"):
        reused = vsa_attention(*inputs, config=CONFIG, layout=layout, selection=selection, impl=impl)
        assert torch.equal(reused, vsa_attention(*inputs, config=CONFIG, layout=layout, impl=impl))


def test_keeping_everything_is_dense_attention():
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout)
    closed = torch.zeros_like(inputs[0])
    output = vsa_attention(*inputs, config=CONFIG.replace(keep_ratio=1.0), layout=layout, gate_coarse=closed)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*inputs))


def test_a_layout_without_segments_is_its_grid():
    """Without protected segments a ratio may round down."""
    inputs = make_inputs(query_length=90, head_dim=8)
    for rounding, kept in (("up", 4), ("down", 3)):
        config = CONFIG.replace(rounding=rounding)
        expected = vsa_attention(*inputs, config=config, grid=GRID)
        for layout in (GRID, TokenLayout(GRID)):
            assert torch.equal(vsa_attention(*inputs, config=config, layout=layout), expected)
        torch.testing.assert_close(expected, vsa_loops(*inputs, TokenLayout(GRID), TILE, kept))


def test_the_module_gates_all_tokens():
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout)
    module = VideoSparseAttention(12, 2, 8, CONFIG.replace(fine_gate=True)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(2, layout.num_tokens, 12, dtype=torch.float64)
    output = module(*inputs, hidden, layout=layout)
    torch.testing.assert_close(output, vsa_loops(*inputs, layout, TILE, 4, *module.gates(hidden)))
    assert module.ran.impl == "torch"
    selection = module.select(*inputs[:2], layout=layout)
    assert torch.equal(module(*inputs, hidden, layout=layout, selection=selection), output)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(2, 119, 12\)"):
        module(*inputs, hidden[:, layout.video], layout=layout)


def test_one_compiled_function_takes_several_layouts():
    def attention(layout):
        def call(query, key, value, coarse, fine):
            gates = {"gate_coarse": coarse, "gate_fine": fine}
            return vsa_attention(query, key, value, config=CONFIG, layout=layout, **gates)

        return call

    compiled = torch.compile(lambda *x, layout: attention(layout)(*x), backend="aot_eager", fullgraph=True)
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout, 5)
    ours = output_and_gradients(functools.partial(compiled, layout=layout), inputs)
    same(ours, output_and_gradients(attention(layout), inputs))
    layout = TokenLayout(VideoGrid(3, 5, 7), (9, 2), (31, 1))  # its lengths are symbols of another graph
    inputs = packed_inputs(layout, 5)
    torch.testing.assert_close(compiled(*inputs, layout=layout), attention(layout)(*inputs))


def test_forward_mode():
    layout = LAYOUTS["both sides"]
    inputs, tangents = packed_inputs(layout), packed_inputs(layout, seed=5)

    def attention(*inputs):
        return vsa_attention(*inputs, config=CONFIG, layout=layout)

    primal, tangent = torch.func.jvp(attention, inputs, tangents)
    torch.testing.assert_close(primal, attention(*inputs))
    plus, minus = (attention(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (1e-6, -1e-6))
    expected = (plus - minus) / 2e-6
    assert (tangent - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"grid": GRID}, ValueError, "give grid or layout, not both"),
        ({"layout": None}, ValueError, r"grid is required for VSA: VideoGrid\(frames, height, width\)"),
        ({"layout": (3, 5, 6)}, TypeError, r"layout must be a VideoGrid or a TokenLayout, got \(3, 5, 6\)"),
        ({"layout": TokenLayout(GRID, (7,))}, ValueError, r"before=\(7,\), after=\(\) has 97 tokens.* have 119"),
        ({"kv_lengths": torch.tensor([98, 119])}, ValueError, "kv_lengths must be None with a layout's protected"),
        ({"gate_coarse": torch.ones(2, 2, 90, 8)}, ValueError, r"gate_coarse must have the shape of query"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(options, error, match):
    options = {"layout": LAYOUTS["both sides"]} | options
    with pytest.raises(error, match=match):
        vsa_attention(*packed_inputs(LAYOUTS["both sides"]), config=CONFIG, **options)


def test_a_selection_of_other_tiles():
    layout, inputs = LAYOUTS["both sides"], packed_inputs(LAYOUTS["both sides"])
    other = select_cubes(*inputs[:2], config=CONFIG, layout=TokenLayout(GRID, (8,), (21,)))
    with pytest.raises(ValueError, match=r"selection was made for .* 288, 352\), but query and key have .* 288, 384"):
        vsa_attention(*inputs, config=CONFIG, layout=layout, selection=other)
