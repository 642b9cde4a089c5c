"""SLA2: the reference and plain PyTorch against loops in float64, all gradients, and the module."""

import pytest
import torch
import torch.nn.functional as F
from routed_loops import routed_loops
from torch.utils.checkpoint import checkpoint

from foveal import (
    RoutedSparseLinearAttention,
    SLA2Config,
    TokenLayout,
    VideoGrid,
    attention_cost,
    sla2_attention,
    sla_attention,
)
from foveal.kernels import api
from foveal.layout import Where
from foveal.methods import routing
from foveal.methods.sla2 import attention as sla2
from foveal.methods.sla2.attention import select_routed
from foveal.testing import (
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    poison_empty,
    random_selection,
    relative_error,
)

GRID = VideoGrid(3, 5, 6)  # 90 tokens: the last block of 16 has 10
LAYOUTS = {
    "video": TokenLayout(GRID),
    "both sides": TokenLayout(GRID, before=(7, 1), after=(20, 1)),
    "whole blocks, after": TokenLayout(VideoGrid(4, 4, 5), after=(3, 14)),
}
CONFIG = SLA2Config(keep_ratio=0.35, block_q=16, block_k=16, feature_map="elu", alpha_rows=2)
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_alpha", "grad_proj_query", "grad_proj_key")
BOTH = pytest.mark.parametrize("impl", ["torch", "reference"])


def weights(heads=2, head_dim=8, rows=2, dtype=torch.float64):
    """Log-odds of alpha, and projections that rank blocks unlike the identity."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(heads, rows, generator=generator).to(dtype)
    return logits, *(torch.randn(head_dim, head_dim, generator=generator).to(dtype) / 2 for _ in range(2))


def attention(impl="torch", **options):
    def function(query, key, value, alpha_logits, proj_query, proj_key):
        named = {"alpha_logits": alpha_logits, "proj_query": proj_query, "proj_key": proj_key}
        return sla2_attention(query, key, value, impl=impl, **named, **options)

    return function


def same(ours, expected):
    for name, one, other in zip(NAMES, ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "token_order", "impl", "shifts"),
    [
        ("video", "tile", "torch", (0.0, 0.0)),
        ("both sides", "raster", "torch", (2.0, 4.0)),
        ("both sides", "raster", "reference", (2.0, 4.0)),
        ("both sides", "tile", "torch", (0.0, 16.0)),
        ("whole blocks, after", "tile", "reference", (0.0, 1.0)),
    ],
)
def test_loops(name, token_order, impl, shifts):
    layout, config = LAYOUTS[name], CONFIG.replace(token_order=token_order)
    query, key, value = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    inputs = query, key + shifts[0], value + shifts[1], *weights()
    options = {"config": config, "layout": layout}
    tile = config.tile_for(layout.grid)
    with poison_empty():
        ours = output_and_gradients(attention(impl, **options), inputs)
    same(ours, output_and_gradients(lambda *x: routed_loops(*x, tile=tile, **options), inputs))
    assert all(x.abs().max() > 1e-4 for x in ours)


SOFT = CONFIG.replace(routing="soft", temperature=0.5)


@BOTH
@pytest.mark.parametrize(("name", "token_order"), [("video", "tile"), ("both sides", "raster")])
def test_soft_routing_in_loops(name, token_order, impl):
    layout, config = LAYOUTS[name], SOFT.replace(token_order=token_order)
    query, key, value = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    inputs = query, key + 1, value + 2, *weights()
    options = {"config": config, "layout": layout}
    with poison_empty():
        ours = output_and_gradients(attention(impl, **options), inputs)
    same(ours, output_and_gradients(lambda *x: routed_loops(*x, tile=config.tile_for(layout.grid), **options), inputs))
    assert all(x.abs().max() > 1e-4 for x in ours)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_soft_routing_with_text_and_padding(feature_map):
    config = SOFT.replace(feature_map=feature_map)
    query, key, value = make_inputs(batch=2, query_length=90, key_length=123, head_dim=8)
    lengths = torch.tensor([123, 101])
    padding = (torch.arange(123) >= lengths[:, None])[:, None, :, None]
    inputs = query, *(x.masked_fill(padding, torch.nan) for x in (key + 1, value + 1)), *weights()
    options = {"config": config, "grid": GRID, "protected_keys": (90, 123), "kv_lengths": lengths}
    ours = output_and_gradients(attention("torch", **options), inputs)
    same(ours, output_and_gradients(attention("reference", **options), inputs))
    assert all(torch.isfinite(x).all() for x in ours)


@BOTH
def test_gradients_of_soft_routing_are_those_of_its_output(impl):
    """Unlike straight-through ones: the difference quotients of the loss, in the projections too."""
    query, key, value = make_inputs(query_length=48, heads=1, head_dim=4)
    inputs = [x.requires_grad_() for x in weights(heads=1, head_dim=4)]
    soft = attention(impl, config=SOFT)
    assert torch.autograd.gradcheck(lambda *x: soft(query, key, value, *x), inputs, atol=1e-6)


def test_soft_routing_gets_hard_as_it_cools():
    inputs = *make_inputs(query_length=90, head_dim=8), *weights()
    hard = attention(config=CONFIG)(*inputs)
    errors = [relative_error(attention(config=SOFT.replace(temperature=t))(*inputs), hard) for t in (1.0, 1e-2, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
    everything = attention(config=SOFT.replace(keep_ratio=1.0))(*inputs)
    torch.testing.assert_close(everything, F.scaled_dot_product_attention(*inputs[:3]))


@BOTH
def test_soft_routing_of_the_same_parameters(impl):
    module = RoutedSparseLinearAttention(2, 8, CONFIG, impl=impl).double()
    inputs = make_inputs(query_length=90, head_dim=8)
    with torch.no_grad():
        soft = module(*inputs, config=SOFT)
        assert relative_error(soft, module(*inputs)) > 1e-3
    learned = module(*inputs, config=SOFT)
    torch.testing.assert_close(learned, soft)
    learned.square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in module.parameters())


def test_on_kernels_soft_routing_is_named(monkeypatch):
    monkeypatch.setattr(sla2, "choose_impl", lambda *_: api.Ran("triton"))
    module = RoutedSparseLinearAttention(2, 8, SOFT)
    module(*make_inputs(query_length=90, head_dim=8, dtype=torch.float32))
    assert module.ran == api.Ran("triton", f"{sla2.SLOW_ROUTING}; {api.SLOW_SELECTION}")


def test_soft_routing_costs_what_dense_attention_does():
    sizes = {"batch": 1, "heads": 2, "head_dim": 64, "query_length": 4096}
    dense, soft, hard = (attention_cost(x, **sizes).flops for x in (None, SLA2Config(routing="soft"), SLA2Config()))
    assert soft > dense > hard


def test_blocks_of_the_router():
    layout, picked = LAYOUTS["both sides"], []
    inputs = *make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8), *weights()
    routed_loops(*inputs, layout=layout, config=CONFIG, picked=picked)
    module = RoutedSparseLinearAttention(2, 8, CONFIG).double()
    by_means = module.select(*inputs[:2], layout=layout).labels()
    for parameter, weight in zip(module.router.parameters(), inputs[4:], strict=True):
        parameter.data.copy_(weight)
    labels = module.select(*inputs[:2], layout=layout).labels()
    assert (labels[..., 6:] == 1).all()
    for row, critical in zip(labels[..., :6].flatten(0, 2), picked, strict=True):
        assert (row == 1).nonzero().flatten().tolist() == critical
    assert not torch.equal(labels, by_means)


def test_padding_of_a_packed_sequence():
    layout = LAYOUTS["both sides"]
    lengths = torch.tensor([layout.num_tokens - 3, layout.video.stop])
    inputs = *make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8), *weights()
    expected = output_and_gradients(lambda *x: routed_loops(*x, layout=layout, config=CONFIG, lengths=lengths), inputs)
    padding = (torch.arange(layout.num_tokens) >= lengths[:, None])[:, None, :, None]
    poisoned = inputs[0], *(x.masked_fill(padding, torch.nan) for x in inputs[1:3]), *inputs[3:]
    same(output_and_gradients(attention("torch", config=CONFIG, layout=layout, kv_lengths=lengths), poisoned), expected)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_text_and_padding(feature_map):
    """Text keys behind the video, and samples of different lengths: the text's blocks are read, and no one's choice."""
    config = CONFIG.replace(feature_map=feature_map)
    query, key, value = make_inputs(batch=2, query_length=90, key_length=123, head_dim=8)
    lengths = torch.tensor([123, 101])
    padding = (torch.arange(123) >= lengths[:, None])[:, None, :, None]
    inputs = query, *(x.masked_fill(padding, torch.nan) for x in (key + 1, value + 1)), *weights()
    options = {"config": config, "grid": GRID, "protected_keys": (90, 123), "kv_lengths": lengths}
    ours = output_and_gradients(attention("torch", **options), inputs)
    same(ours, output_and_gradients(attention("reference", **options), inputs))
    assert all(torch.isfinite(x).all() for x in ours)
    selection = select_routed(*inputs[:2], config, routing.Router(*inputs[4:]), Where(GRID, None, (90, 123), lengths))
    fixed = sla2_attention(*inputs[:3], config=config, selection=selection, alpha_logits=inputs[3])
    torch.testing.assert_close(fixed, ours[0])
    assert (selection.labels()[0, ..., 5:] == 1).all()
    assert (selection.labels()[1, ..., 7:] != 1).all(), "a block of padding is read"


def test_given_blocks():
    """Rows without one of the branches leave it no weight; the projections get the gradient of the given choice."""
    shape = {"batch": 2, "query_length": 67, "key_length": 83}
    selection = random_selection(**shape, block_q=16, block_k=16)
    query, key, value = make_inputs(**shape, head_dim=8)
    ours = output_and_gradients(
        attention("torch", config=CONFIG, selection=selection), (query, key, value + 1, *weights())
    )
    expected = output_and_gradients(
        attention("reference", config=CONFIG, selection=selection), (query, key, value + 1, *weights())
    )
    same(ours, expected)
    counts = selection.labels()
    without = ((counts == 1).any(-1) != (counts == 0).any(-1)).repeat_interleave(16, 2)[:, :, :67]
    assert without.any()
    single = sla_attention(query, key, value + 1, config=CONFIG.branches, selection=selection)
    torch.testing.assert_close(ours[0][without], single[without])


def test_soft_top_k_sums_to_what_is_kept():
    scores = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    scores[1, 4:] = -torch.inf
    kept = torch.tensor([[3], [2], [9]])
    soft = routing.soft_top_k(scores, kept, 0.1)
    torch.testing.assert_close(soft.sum(-1, keepdim=True), kept.double(), rtol=0, atol=1e-9)
    assert (soft[1, 4:] == 0).all()
    grad = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = routing.soft_top_k_gradient(scores, kept, 0.1, grad)
    assert (got[2] == 0).all(), "what keeps everything has no choice"
    step = 1e-6
    for row, column in ((0, 2), (0, 5), (1, 1)):
        moved = [scores.clone(), scores.clone()]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        up, down = ((routing.soft_top_k(x, kept, 0.1) * grad).sum() for x in moved)
        assert abs((up - down) / (2 * step) - got[row, column]) < 1e-5


def test_router_learns():
    """Descent on the projections gets nearer to dense attention than alpha by itself."""
    query, key, value = make_inputs(query_length=64, head_dim=8, heads=1)
    config = CONFIG.replace(keep_ratio=0.25, alpha_rows=1)
    dense = F.scaled_dot_product_attention(query, key, value)
    module = RoutedSparseLinearAttention(1, 8, config).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (module(query, key, value) - dense).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frozen = RoutedSparseLinearAttention(1, 8, config.replace(routing="fixed")).double()
    optimizer = torch.optim.Adam(frozen.mixing.parameters(), lr=0.02)
    for _ in range(60):
        loss = (frozen(query, key, value) - dense).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert losses[-1] < loss.item(), "no better than alpha by itself"


def test_fixed_routing_has_the_same_output_and_trains_no_router():
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    modules = [RoutedSparseLinearAttention(2, 8, CONFIG.replace(routing=r)) for r in ("straight_through", "fixed")]
    outputs = [module(*inputs) for module in modules]
    assert torch.equal(*outputs)
    for module, output in zip(modules, outputs, strict=True):
        output.square().sum().backward()
        assert module.mixing.alpha_logits.grad.abs().min() > 0
    assert modules[0].router.proj_query.grad.abs().max() > 0
    assert modules[1].router.proj_query.grad is None


@BOTH
def test_keeping_everything_is_dense_attention(impl):
    inputs = make_inputs(query_length=90, head_dim=8)
    output = sla2_attention(*inputs, config=CONFIG.replace(keep_ratio=1.0), impl=impl)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_against_float64(dtype):
    config = SLA2Config(keep_ratio=0.2, block_q=64)
    query, key, value = make_inputs(batch=2, query_length=300, head_dim=64, dtype=dtype)
    inputs = query, key, value + 1, *weights(head_dim=64, dtype=torch.float32)
    selection = select_routed(query, key, config, routing.Router(*inputs[4:]))
    ours = output_and_gradients(attention("torch", config=config, selection=selection), inputs)
    reference = attention("reference", config=config, selection=selection)
    exact = output_and_gradients(reference, [x.double() for x in inputs])
    for name, *tensors in zip(NAMES, ours, exact, output_and_gradients(reference, inputs), strict=True):
        # Those of the parameters are sums over all rows, whose parts cancel.
        assert_close_to_reference(*tensors, name=name, factor=4.0 if name in NAMES[4:] else 2.0)


@pytest.mark.parametrize("layout", [LAYOUTS["video"], LAYOUTS["both sides"]], ids=["video", "packed"])
def test_compiles_without_graph_break_and_checkpoints(layout):
    torch._dynamo.reset()
    module = RoutedSparseLinearAttention(2, 8, CONFIG.replace(token_order="tile"))
    inputs = make_inputs(query_length=layout.num_tokens, head_dim=8, dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    parameters = tuple(module.parameters())

    def run(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = attend(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), (*leaves, *parameters))

    expected = run(lambda *x: module(*x, layout=layout))
    for way in (
        lambda *x: compiled(*x, layout=layout),
        lambda *x: checkpoint(lambda *y: module(*y, layout=layout), *x, use_reentrant=False),
    ):
        for one, other in zip(run(way), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("router", ["shared", "per_head"])
def test_some_heads_have_their_own_parameters(router):
    """As a rank has them under context parallelism."""
    module = RoutedSparseLinearAttention(4, 8, CONFIG.replace(alpha_rows=3, router=router))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    inputs = make_inputs(heads=4, query_length=90, head_dim=8, dtype=torch.float32)
    expected = module(*inputs)
    part = module(*(x[:, 2:] for x in inputs), heads=range(2, 4))
    torch.testing.assert_close(part, expected[:, 2:])
    part.square().sum().backward()
    for name, parameter in module.named_parameters():
        of_heads = parameter.grad.flatten(1).abs().sum(1) > 0
        expected = [False, False, True, True] if len(of_heads) == 4 else [True] * len(of_heads)
        assert of_heads.tolist() == expected, name
    with pytest.raises(ValueError, match="query must have 4 heads, got 2; `heads` says which some are"):
        module(*(x[:, 2:] for x in inputs))


def test_parameters_stay_in_float32():
    module = RoutedSparseLinearAttention(2, 8, CONFIG).to(torch.bfloat16)
    assert {x.dtype for x in module.parameters()} == {torch.float32}
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.bfloat16)
    assert module(*inputs).dtype == torch.bfloat16
    assert module.ran.impl == "torch"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio must be above 0"),
        ({"alpha": 1.0}, "alpha must be between 0 and 1, got 1.0"),
        ({"alpha_rows": 0}, "alpha_rows must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"routing": "hard"}, "unknown routing 'hard'"),
        ({"routing": "soft", "precision": "int8"}, "needs precision=\"input\", got precision='int8'"),
        ({"feature_map": "hedgehog"}, "unknown feature_map 'hedgehog'"),
        ({"token_order": "zigzag"}, "unknown token_order 'zigzag'"),
    ],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        SLA2Config(**fields)


def test_wrong_arguments():
    inputs = make_inputs(query_length=90, head_dim=8)
    selection = select_routed(*inputs[:2], CONFIG)
    for message, options in {
        r"alpha_logits must have shape \[2, rows\] for 2 heads, got \(3, 1\)": {"alpha_logits": torch.zeros(3, 1)},
        r"proj_key must have shape \(8, 8\) or \(2, 8, 8\) for 2 heads of 8, got \(8, 4\)": {
            "proj_key": torch.zeros(8, 4)
        },
        "give kv_lengths or selection, not both": {"selection": selection, "kv_lengths": torch.tensor([80])},
        "selection has blocks of 16x16, but config asks for 32x16": {
            "selection": selection,
            "config": CONFIG.replace(block_q=32),
        },
        'grid is required for token_order="tile"': {"config": CONFIG.replace(token_order="tile")},
    }.items():
        with pytest.raises(ValueError, match=message):
            sla2_attention(*inputs, **{"config": CONFIG, **options})
    with pytest.raises(TypeError, match="config must be an SLA2Config, got SLAConfig"):
        sla2_attention(*inputs, config=CONFIG.branches)
    with pytest.raises(ValueError, match="query must have head_dim 4, got 8"):
        RoutedSparseLinearAttention(2, 4, CONFIG)(*inputs)
