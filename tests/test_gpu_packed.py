"""On a GPU: both methods over packed sequences, against the reference in float64, which loops hold on a CPU."""

import pytest
import torch

from foveal import SLAConfig, TokenLayout, VideoGrid, VSAConfig, sla_attention, vsa_attention
from foveal.kernels.hopper.support import why_not
from foveal.methods.sla.attention import SparseLinearAttention
from foveal.methods.vsa.attention import select_cubes
from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients, relative_error

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "both sides": TokenLayout(VideoGrid(5, 11, 18), before=(77, 1), after=(130, 40)),
    "whole blocks": TokenLayout(VideoGrid(4, 8, 16), before=(64,), after=(128,)),
}
SLA = SLAConfig(keep_ratio=0.2, drop_ratio=0.2)
CONFIGS = {
    "sla": SLA,
    "sla, tile order": SLA.replace(token_order="tile", block_q=128),
    "sla, all keys": SLA.replace(linear_scope="all", feature_map="elu"),
    "vsa": VSAConfig(keep_ratio=0.25),
    "vsa, auto tile": VSAConfig(topk=3, tile="auto"),
    "vsa, wide": VSAConfig(topk=2, tile="wide"),
}
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_weight or grad_coarse", "grad_bias or grad_fine")


@pytest.fixture(params=["triton", "gluon"])
def impl(request):
    if request.param == "gluon":
        reason = why_not(*(torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda"),) * 3, 64, 64)
        if reason is not None:
            pytest.skip(f"gluon: {reason}")
    return request.param


def inputs_of(config, layout, head_dim):
    """Query, key and value, and what else has a gradient: SLA's weight and bias, or VSA's gates."""
    sizes = {"batch": 2, "query_length": layout.num_tokens, "head_dim": head_dim, "dtype": torch.bfloat16}
    query, key, value = make_inputs(layout="BLHD", device="cuda", **sizes)
    if isinstance(config, VSAConfig):
        return query, key, value + 1, *make_inputs(layout="BLHD", device="cuda", seed=3, **sizes)[:2]
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(*shape, generator=generator).div(8) for shape in ((head_dim, head_dim), (head_dim,)))
    return query, key, value + 1, *(x.to("cuda", torch.bfloat16) for x in weights)


def attention_of(config, layout, selection, impl):
    def attention(query, key, value, first, second):
        options = {"config": config, "layout": layout, "selection": selection, "impl": impl}
        if isinstance(config, VSAConfig):
            return vsa_attention(query, key, value, gate_coarse=first, gate_fine=second, **options)
        return sla_attention(query, key, value, proj_weight=first, proj_bias=second, **options)

    return attention


def selection_of(config, layout, query, key):
    if isinstance(config, VSAConfig):
        return select_cubes(query, key, config=config, layout=layout)
    return SparseLinearAttention(query.shape[-1], config).select(query, key, layout=layout)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matches_the_reference(config, layout, head_dim, impl):
    inputs = inputs_of(config, layout, head_dim)
    selection = selection_of(config, layout, *inputs[:2])
    ours = output_and_gradients(attention_of(config, layout, selection, impl), inputs)
    reference = attention_of(config, layout, selection, "reference")
    exact = output_and_gradients(reference, [x.double() for x in inputs])
    for name, *tensors in zip(NAMES, ours, exact, output_and_gradients(reference, inputs), strict=True):
        assert_close_to_reference(*tensors, name=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_makes_the_selection_on_the_way_and_never_waits(config, impl):
    """The same output as with the selection made before, compiled as well, and no look at the device's values.

    Gradients differ a little from run to run: those of dense rows are PyTorch's, which adds with atomics.
    """
    torch._dynamo.reset()
    layout = LAYOUTS["both sides"]
    inputs = inputs_of(config, layout, 128)
    selection = selection_of(config, layout, *inputs[:2])
    attention = attention_of(config, layout, None, impl)
    expected = output_and_gradients(attention_of(config, layout, selection, impl), inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = attention(*leaves)
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for run in (attention, compiled):
        results = output_and_gradients(run, inputs)
        assert torch.equal(results[0], expected[0])
        for one, other in zip(results[1:], expected[1:], strict=True):
            assert relative_error(one, other) < 5e-3


@pytest.mark.parametrize("name", ["sla", "sla, tile order", "vsa"])
def test_inductor_compiles_partial_blocks(name, impl):
    torch._dynamo.reset()
    layout, config = LAYOUTS["both sides"], CONFIGS[name]
    inputs = inputs_of(config, layout, 128)
    attention = attention_of(config, layout, None, impl)

    def scaled(*tensors):
        return attention(*(2 * x for x in tensors))  # exact, and something to fuse

    # Inductor keeps VSA's pooled means and gates in float32 where eager PyTorch rounds them.
    with torch.no_grad():
        assert relative_error(torch.compile(scaled, fullgraph=True)(*inputs), scaled(*inputs)) < 5e-3


@torch.inference_mode()
def test_heads_in_groups_make_the_same_bits(impl, monkeypatch):
    from foveal.methods.vsa import gpu

    layout, config = LAYOUTS["both sides"], CONFIGS["vsa"]
    inputs, attention = inputs_of(config, layout, 128), attention_of(config, layout, None, impl)
    whole = attention(*inputs)
    monkeypatch.setattr(gpu, "COPIES_BYTES", 1)
    assert torch.equal(attention(*inputs), whole)
