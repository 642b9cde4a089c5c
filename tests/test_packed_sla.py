"""SLA over packed sequences, against plain loops in float64 whose blocks never hold tokens of two segments."""

import functools

import pytest
import torch
import torch.nn.functional as F
from packed_loops import sla_loops

from foveal import SLAConfig, SparseLinearAttention, TokenLayout, VideoGrid, sla_attention
from foveal.testing import make_inputs, output_and_gradients

GRID = VideoGrid(3, 5, 6)  # 90 tokens: the last block of 16 has 10
LAYOUTS = {
    "both sides": TokenLayout(GRID, before=(7, 1), after=(20, 1)),
    "one token before": TokenLayout(GRID, before=(1,)),
    "after": TokenLayout(GRID, after=(33,)),
    "whole blocks, after": TokenLayout(VideoGrid(4, 4, 5), after=(3, 14)),
}
CONFIG = SLAConfig(keep_ratio=0.35, drop_ratio=0.2, block_q=16, block_k=16, feature_map="elu")
RASTER_AND_TILE = pytest.mark.parametrize("token_order", ["raster", "tile"])


def packed_inputs(layout, **options):
    query, key, value = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8, **options)
    return query, key, value + 1


def weights():
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 8), (8,)))


def same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("linear_scope", "impl"),
    [
        ("marginal", "torch"),
        ("noncritical", "torch"),
        ("all", "torch"),
        ("marginal", "reference"),
        ("all", "reference"),
    ],
)
@RASTER_AND_TILE
def test_every_scope(token_order, linear_scope, impl):
    layout = LAYOUTS["both sides"]
    config = CONFIG.replace(token_order=token_order, linear_scope=linear_scope, block_k=24)
    tile = config.tile_for(GRID)

    def ours(query, key, value, weight, bias):
        return sla_attention(
            query, key, value, config=config, layout=layout, proj_weight=weight, proj_bias=bias, impl=impl
        )

    def expected(query, key, value, weight, bias):
        return sla_loops(query, key, value, layout, config, tile, weight, bias)

    inputs = *packed_inputs(layout), *weights()
    same(output_and_gradients(ours, inputs), output_and_gradients(expected, inputs))


@pytest.mark.parametrize("name", LAYOUTS)
@RASTER_AND_TILE
def test_every_layout(name, token_order):
    layout, config = LAYOUTS[name], CONFIG.replace(token_order=token_order)
    tile, inputs = config.tile_for(layout.grid), packed_inputs(layout)
    ours = output_and_gradients(lambda *x: sla_attention(*x, config=config, layout=layout), inputs)
    same(ours, output_and_gradients(lambda *x: sla_loops(*x, layout, config, tile), inputs))


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_ratio": 0.0},
        {"linear_scope": "none", "keep_ratio": 0.01},
        {"drop_ratio": 0.0},
        {"keep_ratio": 0.9, "drop_ratio": 0.1},
    ],
    ids=str,
)
def test_extremes(changes):
    layout, config = LAYOUTS["both sides"], CONFIG.replace(**changes)
    inputs = packed_inputs(layout)
    ours = output_and_gradients(lambda *x: sla_attention(*x, config=config, layout=layout), inputs)
    same(ours, output_and_gradients(lambda *x: sla_loops(*x, layout, config), inputs))


@pytest.mark.parametrize("linear_scope", ["marginal", "all"])
@pytest.mark.parametrize("name", ["both sides", "whole blocks, after"])
@RASTER_AND_TILE
def test_padding_at_the_end(name, token_order, linear_scope):
    """The padding may hold anything, and enters no sum."""
    layout, config = LAYOUTS[name], CONFIG.replace(token_order=token_order, linear_scope=linear_scope)
    tile, lengths = config.tile_for(layout.grid), torch.tensor([layout.num_tokens - 3, layout.video.stop])
    inputs = packed_inputs(layout)

    def attention(query, key, value):
        return sla_attention(query, key, value, config=config, layout=layout, kv_lengths=lengths)

    expected = output_and_gradients(lambda *x: sla_loops(*x, layout, config, tile, lengths=lengths), inputs)
    padding = (torch.arange(layout.num_tokens) >= lengths[:, None])[:, None, :, None]
    poisoned = inputs[0], *(x.masked_fill(padding, torch.nan) for x in inputs[1:])
    same(output_and_gradients(attention, poisoned), expected)


def test_blocks_of_the_selection():
    """Video blocks as in the loops, then protected ones, critical everywhere, of which none is marginal."""
    layout, picked = LAYOUTS["both sides"], []
    inputs = packed_inputs(layout)
    module = SparseLinearAttention(8, CONFIG.replace(projection=False)).double()
    selection = module.select(*inputs[:2], layout=layout)
    sla_loops(*inputs, layout, CONFIG, picked=picked)
    labels = selection.labels()
    assert labels.shape == (2, 2, 6, 6 + 2)
    assert (labels[..., 6:] == 1).all()
    assert selection.key_block_sizes.tolist() == [[16, 16, 16, 16, 16, 10, 16, 13]]
    for row, (critical, marginal) in zip(labels[..., :6].flatten(0, 2), picked, strict=True):
        assert (row == 1).nonzero().flatten().tolist() == critical
        assert (row == 0).nonzero().flatten().tolist() == marginal
    reused = module(*inputs, layout=layout, selection=selection)
    assert torch.equal(reused, module(*inputs, layout=layout))
    assert torch.equal(reused, sla_attention(*inputs, config=module.config, layout=layout))


@RASTER_AND_TILE
def test_keeping_everything_is_dense_attention(token_order):
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout)
    config = CONFIG.replace(keep_ratio=1.0, drop_ratio=0.0, token_order=token_order)
    torch.testing.assert_close(
        sla_attention(*inputs, config=config, layout=layout), F.scaled_dot_product_attention(*inputs)
    )


@RASTER_AND_TILE
def test_a_layout_without_segments_is_its_grid(token_order):
    inputs = make_inputs(query_length=90, head_dim=8)
    config = CONFIG.replace(token_order=token_order)
    expected = sla_attention(*inputs, config=config, grid=GRID)
    for layout in (GRID, TokenLayout(GRID)):
        assert torch.equal(sla_attention(*inputs, config=config, layout=layout), expected)
    module = SparseLinearAttention(8, config)
    by_grid, by_layout = module.select(*inputs[:2], grid=GRID), module.select(*inputs[:2], layout=TokenLayout(GRID))
    assert torch.equal(by_grid.labels(), by_layout.labels())


@RASTER_AND_TILE
def test_one_compiled_function_takes_several_layouts(token_order):
    config = CONFIG.replace(token_order=token_order)

    def attention(layout):
        return lambda *inputs: sla_attention(*inputs, config=config, layout=layout)

    compiled = torch.compile(lambda *x, layout: attention(layout)(*x), backend="aot_eager", fullgraph=True)
    layout = LAYOUTS["both sides"]
    inputs = packed_inputs(layout)
    ours = output_and_gradients(functools.partial(compiled, layout=layout), inputs)
    same(ours, output_and_gradients(attention(layout), inputs))
    layout = TokenLayout(VideoGrid(3, 5, 7), (9, 2), (31, 1))  # its lengths are symbols of another graph
    inputs = packed_inputs(layout)
    torch.testing.assert_close(compiled(*inputs, layout=layout), attention(layout)(*inputs))


def test_transforms():
    layout = LAYOUTS["both sides"]
    inputs, tangents = packed_inputs(layout), packed_inputs(layout, seed=5)

    def attention(*inputs):
        return sla_attention(*inputs, config=CONFIG, layout=layout)

    primal, tangent = torch.func.jvp(attention, inputs, tangents)
    torch.testing.assert_close(primal, attention(*inputs))
    plus, minus = (attention(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (1e-6, -1e-6))
    expected = (plus - minus) / 2e-6
    assert (tangent - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"grid": GRID}, ValueError, "give grid or layout, not both"),
        ({"layout": (3, 5, 6)}, TypeError, r"layout must be a VideoGrid or a TokenLayout, got \(3, 5, 6\)"),
        ({"layout": TokenLayout(GRID, (7,))}, ValueError, r"before=\(7,\), after=\(\) has 97 tokens.* have 119"),
        ({"protected_keys": (90, 119)}, ValueError, "a layout names the protected keys"),
        ({"kv_lengths": torch.tensor([97, 119])}, ValueError, r"kv_lengths must be in \[98, 119\], got \[97, 119\]"),
        ({"kv_lengths": [98, 119]}, TypeError, "kv_lengths must be an integer tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(options, error, match):
    options = {"layout": LAYOUTS["both sides"]} | options
    with pytest.raises(error, match=match):
        sla_attention(*packed_inputs(LAYOUTS["both sides"]), config=CONFIG, **options)


def test_a_selection_of_another_layout():
    module = SparseLinearAttention(8, CONFIG.replace(projection=False))
    layout, other = LAYOUTS["both sides"], TokenLayout(GRID, (7, 1), (21,))
    inputs = packed_inputs(layout)
    selection = module.select(*packed_inputs(TokenLayout(GRID, (7, 1), (22,)))[:2], layout=TokenLayout(GRID, (29, 1)))
    with pytest.raises(ValueError, match=r"selection was made for .* 90, 126\), but query and key have .* 90, 125"):
        sla_attention(*inputs, config=CONFIG, layout=other, selection=selection)


@RASTER_AND_TILE
def test_inductor_compiles_partial_blocks(token_order):
    layout = TokenLayout(VideoGrid(3, 5, 7), (9,), (31,))
    inputs = packed_inputs(layout)
    config = CONFIG.replace(token_order=token_order)

    def attention(*x):
        return sla_attention(*(1.0 * each for each in x), config=config, layout=layout)

    torch.testing.assert_close(torch.compile(attention, fullgraph=True)(*inputs), attention(*inputs))
