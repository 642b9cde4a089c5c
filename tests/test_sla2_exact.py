"""SLA2 without its linear branch, in plain PyTorch: what it is the limit of, its module, and models of it."""

import pytest
import torch
from tiny_wan import tiny_transformer

import foveal
from foveal import (
    RoutedSparseLinearAttention,
    SLA2Config,
    TokenLayout,
    VideoGrid,
    attention_cost,
    block_sparse_attention,
    sla2_attention,
)
from foveal.methods.routing import Router
from foveal.methods.sla2.attention import select_routed
from foveal.methods.sla2.mixing import LARGEST_LOGIT
from foveal.testing import make_inputs, output_and_gradients, poison_empty

GRID = VideoGrid(3, 5, 6)  # 90 tokens: the last block of 16 has 10
LAYOUTS = {"video": TokenLayout(GRID), "both sides": TokenLayout(GRID, before=(7, 1), after=(20, 1))}
CONFIG = SLA2Config(keep_ratio=0.35, block_q=16, block_k=16, linear_scope="none")
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_proj_query", "grad_proj_key")


def projections(head_dim=8):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64) / 2 for _ in range(2))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("routing", ["straight_through", "soft"])
@pytest.mark.parametrize(("name", "token_order"), [("video", "tile"), ("both sides", "raster"), ("both sides", "tile")])
def test_it_is_the_limit_of_a_ratio_of_one(name, token_order, routing, impl):
    layout, config = LAYOUTS[name], CONFIG.replace(token_order=token_order, routing=routing)
    query, key, value = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    inputs = query, key + 1, value + 4, *projections()

    def attend(config, **options):
        def function(query, key, value, proj_query, proj_key):
            named = {"proj_query": proj_query, "proj_key": proj_key, "layout": layout, **options}
            return sla2_attention(query, key, value, config=config, **named)

        return function

    logits = torch.full((2, 1), LARGEST_LOGIT, dtype=torch.float64)
    with poison_empty():
        ours = output_and_gradients(attend(config, impl=impl), inputs)
    both = config.replace(linear_scope="noncritical")
    limit = output_and_gradients(attend(both, impl="reference", alpha_logits=logits), inputs)
    for label, one, other in zip(NAMES, ours, limit, strict=True):
        assert other.abs().sum() > 0, label
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, label=label: f"{label}: {text}")


def test_the_output_is_that_of_the_chosen_blocks():
    inputs = make_inputs(batch=2, query_length=90, key_length=100, head_dim=8)
    router = Router(*projections())
    selection = select_routed(*inputs[:2], CONFIG, router)
    named = {"proj_query": router.query, "proj_key": router.key}
    expected = block_sparse_attention(*inputs, selection)
    assert torch.equal(sla2_attention(*inputs, config=CONFIG, **named), expected)
    assert torch.equal(sla2_attention(*inputs, config=CONFIG, selection=selection), expected)


def test_keys_may_have_lengths():
    query, key, value = make_inputs(batch=2, query_length=90, key_length=100, head_dim=8)
    lengths = torch.tensor([100, 37])
    valid = (torch.arange(100) < lengths[:, None])[:, None, :, None]
    key, value = (x.masked_fill(~valid, torch.nan) for x in (key, value))

    def attend(impl):
        def function(*x):
            named = dict(zip(("proj_query", "proj_key"), x[3:], strict=True))
            return sla2_attention(*x[:3], config=CONFIG, kv_lengths=lengths, impl=impl, **named)

        return output_and_gradients(function, (query, key, value, *projections()))

    for one, other in zip(attend("torch"), attend("reference"), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_the_module_has_only_a_router():
    layer = RoutedSparseLinearAttention(2, 8, CONFIG.replace(alpha_rows=3))
    assert [name for name, _ in layer.named_parameters()] == ["router.proj_query", "router.proj_key"]
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    layer(*inputs).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    with pytest.raises(ValueError, match='alpha_logits weigh the linear branch, which linear_scope="none" does not'):
        sla2_attention(*inputs, config=CONFIG, alpha_logits=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="unknown linear_scope 'all'"):
        CONFIG.replace(linear_scope="all")


def test_models_of_it_are_saved_loaded_and_described(tmp_path):
    config = SLA2Config(keep_ratio=0.4, block_q=16, block_k=16, linear_scope="none")
    model = foveal.sparsify(tiny_transformer(), config)
    for parameter in foveal.sparse_parameters(model).values():
        parameter.data += 0.1
    foveal.save(model, tmp_path)
    other = foveal.load(tiny_transformer(), tmp_path)
    again = foveal.sparse_parameters(other)
    assert all(torch.equal(again[name], parameter) for name, parameter in foveal.sparse_parameters(model).items())
    assert " none " in str(foveal.summary(model, VideoGrid(3, 4, 6)))
    with pytest.raises(ValueError, match=r"would need .*alpha_logits"):
        foveal.reconfigure(model, config.replace(linear_scope="noncritical"))


def test_it_costs_no_linear_branch():
    shape = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}
    exact, both = (attention_cost(SLA2Config(linear_scope=scope), **shape) for scope in ("none", "noncritical"))
    assert exact.flops < both.flops
    assert exact.backward_flops < both.backward_flops
    parts = {part.name for part in exact.parts}
    assert {"router", "sparse"} <= parts
    assert not parts & {"state build", "mask GEMM", "apply", "combine"}


def by_head(heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(heads, head_dim, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("linear_scope", ["none", "noncritical"])
@pytest.mark.parametrize("routing", ["straight_through", "soft"])
def test_each_head_may_have_a_router_of_its_own(linear_scope, routing):
    config = CONFIG.replace(linear_scope=linear_scope, routing=routing)
    query, key, value = make_inputs(batch=2, query_length=90, key_length=100, head_dim=8)

    def attend(impl):
        def function(query, key, value, proj_query, proj_key):
            named = {"proj_query": proj_query, "proj_key": proj_key}
            return sla2_attention(query, key, value, config=config, impl=impl, **named)

        return function

    inputs = query, key, value, *by_head()
    ours, exact = (output_and_gradients(attend(impl), inputs) for impl in ("torch", "reference"))
    for label, one, other in zip(NAMES, ours, exact, strict=True):
        assert other.abs().sum() > 0, label
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, label=label: f"{label}: {text}")
    for h in range(2):
        single = attend("torch")(*(x[:, [h]] for x in inputs[:3]), *(x[h] for x in inputs[3:]))
        torch.testing.assert_close(ours[0][:, [h]], single)


def test_a_module_with_a_router_for_each_head():
    layer = RoutedSparseLinearAttention(2, 8, CONFIG.replace(router="per_head"))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "router.proj_query": (2, 8, 8),
        "router.proj_key": (2, 8, 8),
    }
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    shared = RoutedSparseLinearAttention(2, 8, CONFIG)
    assert torch.equal(layer(*inputs), shared(*inputs))
    layer(*inputs).square().sum().backward()
    assert all(p.grad.flatten(1).abs().sum(1).min() > 0 for p in layer.parameters())
    with pytest.raises(ValueError, match="query must have 2 heads, got 1"):
        layer(*(x[:, :1] for x in inputs))
    with pytest.raises(ValueError, match=r"proj_query must have shape \(8, 8\) or \(2, 8, 8\) for 2 heads of 8, got"):
        sla2_attention(*inputs, config=CONFIG, proj_query=torch.zeros(3, 8, 8))
