"""`precision="int8"` in plain PyTorch: the rounding, by loops; the reference; and every call that takes it."""

import dataclasses
import math

import pytest
import torch

from foveal import (
    SLA2Config,
    SLAConfig,
    SLAVSAConfig,
    TokenLayout,
    VideoGrid,
    VSAConfig,
    block_sparse_attention,
    explain,
    select_blocks,
    sla2_attention,
    sla_attention,
    sla_vsa_attention,
    vsa_attention,
)
from foveal.kernels import api, int8
from foveal.kernels.hopper import support
from foveal.testing import (
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    random_selection,
    relative_error,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
IMPLS = pytest.mark.parametrize("impl", ["reference", "torch"])
SHAPES = {
    "one token": (1, 1, 1, 1, 8, 4, 4),
    "partial blocks": (2, 2, 67, 83, 16, 8, 16),
    "one key short": (1, 3, 15, 63, 8, 16, 16),
    "head dim 128": (1, 1, 70, 70, 128, 32, 16),
}


def case(shape, **selection):
    batch, heads, query_length, key_length, head_dim, block_q, block_k = shape
    lengths = {"batch": batch, "heads": heads, "query_length": query_length, "key_length": key_length}
    chosen = random_selection(**lengths, block_q=block_q, block_k=block_k, **selection)
    return make_inputs(**lengths, head_dim=head_dim), chosen


def with_lse(selection, impl, precision="int8"):
    options = {"impl": impl, "return_lse": True, "precision": precision}
    return lambda *qkv: block_sparse_attention(*qkv, selection, **options)


def rounded_by_loops(query, key, selection):
    """Q and K - m through int8, block by block, and m."""
    valid, query, key = selection.key_valid(), query.clone(), key.clone()
    mean = torch.zeros_like(key[:, :, :1])
    for b in range(key.shape[0]):
        counts = valid[b % len(valid)]
        for h in range(key.shape[1]):
            if counts.any():
                mean[b, h] = key[b, h, counts].mean(0)
            key[b, h] = torch.where(counts[:, None], key[b, h] - mean[b, h], 0)
            for x, block in ((query[b, h], selection.block_q), (key[b, h], selection.block_k)):
                for start in range(0, len(x), block):
                    part = x[start : start + block]
                    step = part.abs().max() / 127
                    if step > 0:
                        part.copy_((part / step).round().clamp(-127, 127) * step)
    return query, key, mean


@pytest.mark.parametrize("lengths", [None, (83, 33)])
def test_rounding_is_the_definition(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    (query, key, _), selection = case(SHAPES["partial blocks"], kv_lengths=lengths)
    key += 5
    if lengths is not None:
        key[1, :, 33:] = math.nan
    expected = rounded_by_loops(query, key, selection)
    ours = int8.dequantized(query, key, selection)
    for x, y in zip(ours, expected, strict=False):
        torch.testing.assert_close(x, y, **TIGHT)
    shift = int8.lse_shift(query, key, selection, 0.25)
    torch.testing.assert_close(shift, 0.25 * (query * expected[2]).sum(-1), **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@IMPLS
def test_attention_of_what_was_rounded(shape, impl):
    (query, key, value), selection = case(shape)
    query_8, key_8, mean = rounded_by_loops(query, key, selection)
    output, lse = with_lse(selection, impl)(query, key, value)
    expected, expected_lse = with_lse(selection, "reference", "input")(query_8, key_8, value)
    torch.testing.assert_close(output, expected, **TIGHT)
    shift = (query * mean).sum(-1) * query.shape[-1] ** -0.5
    torch.testing.assert_close(lse, expected_lse + shift, **TIGHT)


@IMPLS
def test_gradients_pass_straight_through(impl):
    (query, key, value), selection = case(SHAPES["partial blocks"])
    key += 2
    query_8, key_8, mean = rounded_by_loops(query, key, selection)
    ours = output_and_gradients(with_lse(selection, impl), (query, key, value))

    def attention(query_8, key_8, value, query):
        output, lse = with_lse(selection, "reference", "input")(query_8, key_8, value)
        return output, lse + (query * mean).sum(-1) / 4

    *expected, shifted = output_and_gradients(attention, (query_8, key_8, value, query))
    expected[2] += shifted
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


OFFSETS = {
    "plain": lambda key, value: (key, value),
    "a channel of K 50 times the rest": lambda key, value: (key * (1 + 49 * (torch.arange(64) == 7)), value),
    "K with a large mean": lambda key, value: (key + 20 * torch.randn(64, generator=torch.Generator()), value),
    "V with a large mean": lambda key, value: (key, value + 16),
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_pytorch(offset, dtype):
    sizes = {"query_length": 300, "key_length": 350}
    selection = random_selection(**sizes, critical=0.5)
    query, key, value = make_inputs(**sizes, dtype=dtype)
    inputs = query, *(x.to(dtype) for x in OFFSETS[offset](key, value))
    exact_inputs = [x.double() for x in inputs]
    exact = output_and_gradients(with_lse(selection, "reference"), exact_inputs)
    plain = output_and_gradients(with_lse(selection, "reference"), inputs)
    ours = output_and_gradients(with_lse(selection, "torch"), inputs)
    for name, x, y, z in zip(("output", "lse", "grad_q", "grad_k", "grad_v"), ours, exact, plain, strict=True):
        assert_close_to_reference(x, y, z, name=name)
    unrounded = with_lse(selection, "reference", "input")(*exact_inputs)
    for x, y, z in zip(ours, plain, unrounded, strict=False):
        x, y, z = (t.masked_fill(t.isinf(), 0) for t in (x, y, z))
        assert relative_error(x, z) <= 1.1 * relative_error(y, z)


def test_a_mean_of_the_keys_costs_nothing():
    """With one the LSE grows, and neither it nor the output is less accurate; without centering they would be."""
    (query, key, value), selection = case((1, 2, 128, 256, 64, 64, 64), critical=0.6)
    errors = {}
    for offset in (0, 30):
        exact = with_lse(selection, "reference", "input")(query, key + offset, value)
        ours = with_lse(selection, "torch")(query, key + offset, value)
        errors[offset] = [relative_error(x, y) for x, y in zip(ours, exact, strict=True)]
    assert errors[0][0] < 0.02
    torch.testing.assert_close(errors[30][0], errors[0][0], rtol=1e-3, atol=0)
    assert errors[30][1] <= errors[0][1]
    tokens = torch.arange(256) // 64
    uncentered = int8.through_int8(key + 30, tokens, 4)
    worse, _ = with_lse(selection, "reference", "input")(query, uncentered, value)
    assert relative_error(worse, with_lse(selection, "reference", "input")(query, key, value)[0]) > 5 * errors[0][0]


@IMPLS
@pytest.mark.parametrize("padding", [1e4, math.nan])
def test_padding_keys_never_count(impl, padding):
    lengths = torch.tensor([83, 40, 0])
    inputs, selection = case((3, 2, 67, 83, 16, 8, 16), critical=0.5, kv_lengths=lengths)
    expected = output_and_gradients(with_lse(selection, impl), inputs)
    assert (expected[0][2] == 0).all()
    for sample, length in enumerate(lengths):
        for x in inputs[1:]:
            x[sample, :, length:] = padding
    for x, y in zip(output_and_gradients(with_lse(selection, impl), inputs), expected, strict=True):
        assert torch.equal(x, y)


SLA_CONFIGS = {
    "marginal": SLAConfig(keep_ratio=0.3, drop_ratio=0.2, block_q=16, block_k=8),
    "all, tiles": SLAConfig(keep_ratio=0.3, drop_ratio=0.0, linear_scope="all", token_order="tile"),
    "sparse only": SLAConfig(keep_ratio=0.3, linear_scope="none", block_q=16, block_k=16),
    "pooled tail": SLAConfig(keep_ratio=0.3, linear_scope="none", tail="pooled", block_q=16, block_k=16),
}
WHERE = {
    "a grid": {"grid": VideoGrid(3, 5, 6)},
    "a packed sequence": {"layout": TokenLayout(VideoGrid(3, 5, 6), before=(7,), after=(20, 1))},
}


def run_everywhere(attention, inputs):
    """The outputs and gradients of the implementation in PyTorch and of the reference, which must agree."""
    ours, expected = (
        output_and_gradients(lambda *x, impl=impl: attention(*x, impl=impl), inputs) for impl in ("torch", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    return ours


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("config", SLA_CONFIGS)
def test_sla(config, where):
    config, where = SLA_CONFIGS[config].replace(precision="int8"), WHERE[where]
    length = 90 if "grid" in where else where["layout"].num_tokens
    query, key, value = make_inputs(batch=2, query_length=length, head_dim=8)
    options = where | {"config": config}
    ours = run_everywhere(lambda *x, impl: sla_attention(*x, impl=impl, **options), (query, key + 1, value))
    options["config"] = config.replace(precision="input")
    exact = output_and_gradients(lambda *x: sla_attention(*x, **options), (query, key + 1, value))
    for x, y in zip(ours, exact, strict=True):
        assert 1e-5 < relative_error(x, y) < 0.05


def test_sla_with_text_and_lengths():
    grid, config = VideoGrid(3, 5, 6), SLAConfig(keep_ratio=0.3, block_q=16, block_k=16, precision="int8")
    inputs = make_inputs(batch=2, query_length=90, key_length=101, head_dim=8)
    options = {"grid": grid, "protected_keys": (90, 101), "kv_lengths": torch.tensor([101, 93]), "config": config}
    run_everywhere(lambda *x, impl: sla_attention(*x, impl=impl, **options), inputs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("text", [0, 19])
@pytest.mark.parametrize("tile", [(2, 2, 4), (4, 4, 4)])
def test_vsa(tile, text, gated):
    config = VSAConfig(keep_ratio=0.4, tile=tile, precision="int8")
    inputs = make_inputs(batch=2, query_length=90, key_length=90 + text, head_dim=8)
    gates = make_inputs(batch=2, query_length=90, head_dim=8, seed=5)[:2] if gated else ()
    where = {"grid": VideoGrid(3, 5, 6), "kv_lengths": torch.tensor([90 + text, 90 + text // 2]) if text else None}

    def attention(query, key, value, coarse=None, fine=None, *, impl, config=config):
        return vsa_attention(query, key, value, gate_coarse=coarse, gate_fine=fine, config=config, impl=impl, **where)

    ours = run_everywhere(attention, (*inputs, *gates))
    exact = attention(*inputs, *gates, impl="reference", config=config.replace(precision="input"))
    assert 1e-5 < relative_error(ours[0], exact) < 0.05


def test_vsa_over_a_packed_sequence():
    layout, config = WHERE["a packed sequence"]["layout"], VSAConfig(keep_ratio=0.3, tile=(2, 2, 2), precision="int8")
    inputs = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    run_everywhere(lambda *x, impl: vsa_attention(*x, impl=impl, layout=layout, config=config), inputs)


def test_the_choice_of_blocks_stays_that_of_the_inputs():
    grid, config = VideoGrid(3, 5, 6), SLAConfig(keep_ratio=0.3, block_q=16, block_k=16, precision="int8")
    query, key, value = make_inputs(query_length=90, head_dim=8)
    blocks = {"block_q": 16, "block_k": 16, "keep_ratio": 0.3, "drop_ratio": 0.1}
    given = sla_attention(query, key, value, config=config, selection=select_blocks(query, key, **blocks))
    assert torch.equal(sla_attention(query, key, value, config=config, grid=grid), given)


def test_compiles_without_graph_break():
    inputs, selection = case(SHAPES["partial blocks"])
    compiled = torch.compile(with_lse(selection, "torch"), backend="aot_eager", fullgraph=True)
    ours, expected = (output_and_gradients(run, inputs) for run in (compiled, with_lse(selection, "torch")))
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


def test_configurations_hold_it():
    for kind in (SLAConfig, VSAConfig, SLA2Config, SLAVSAConfig):
        config = kind(precision="int8")
        assert type(config).from_dict(config.to_dict()) == config
        older = {name: value for name, value in config.to_dict().items() if name != "precision"}
        assert type(config).from_dict(older) == dataclasses.replace(config, precision="input")
        with pytest.raises(ValueError, match="unknown precision 'int4'"):
            config.replace(precision="int4")


def test_unknown_precision():
    inputs, selection = case(SHAPES["one token"])
    with pytest.raises(ValueError, match=r"unknown precision 'fp8'; expected one of \('input', 'int8'\)"):
        block_sparse_attention(*inputs, selection, precision="fp8")


@pytest.mark.parametrize("config", [x(precision="int8") for x in (SLAConfig, VSAConfig, SLA2Config, SLAVSAConfig)])
def test_hopper_kernels_refuse_it(config, monkeypatch):
    monkeypatch.setattr(support, "why_not", lambda *_: None)
    monkeypatch.setattr(support, "written_for", lambda device: True)
    monkeypatch.setattr(support, "unverified_release", lambda: None)
    monkeypatch.setattr(api, "_why_no_triton", lambda *_: None)
    inputs = make_inputs(query_length=128, dtype=torch.bfloat16)
    reason = 'it has no kernels for precision="int8"'
    found = explain(*inputs, config, VideoGrid(2, 8, 8))
    assert (found.impl, found.refused) == ("triton", (("gluon", reason),))
    assert api.choose_impl("auto", *inputs, 64, 64, "int8") == api.Ran("triton", f"not gluon: {reason}")
    assert api.choose_impl("auto", *inputs, 64, 64) == api.Ran("gluon")
    with pytest.raises(ValueError, match='impl="gluon" cannot run here: it has no kernels for precision="int8"'):
        api.choose_impl("gluon", *inputs, 64, 64, "int8")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("linear_scope", ["noncritical", "none"])
def test_sla_vsa(linear_scope, where):
    config = SLAVSAConfig(keep_ratio=0.3, tile=(2, 2, 2), linear_scope=linear_scope, precision="int8")
    length = 90 if "grid" in WHERE[where] else WHERE[where]["layout"].num_tokens
    query, key, value = make_inputs(batch=2, query_length=length, head_dim=8)
    options = WHERE[where] | {"config": config}
    ours = run_everywhere(lambda *x, impl: sla_vsa_attention(*x, impl=impl, **options), (query, key + 1, value))
    options["config"] = config.replace(precision="input")
    exact = sla_vsa_attention(query, key + 1, value, **options)
    assert 1e-5 < relative_error(ours[0], exact) < 0.05


@pytest.mark.parametrize("where", WHERE)
def test_sla2(where):
    config = SLA2Config(keep_ratio=0.3, block_q=16, block_k=8, precision="int8")
    length = 90 if "grid" in WHERE[where] else WHERE[where]["layout"].num_tokens
    inputs = make_inputs(batch=2, query_length=length, head_dim=8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]

    def attention(query, key, value, proj_query, proj_key, *, impl, config=config):
        named = {"proj_query": proj_query, "proj_key": proj_key, **WHERE[where]}
        return sla2_attention(query, key + 1, value, config=config, impl=impl, **named)

    ours = run_everywhere(attention, (*inputs, *weights))
    exact = attention(*inputs, *weights, impl="reference", config=config.replace(precision="input"))
    assert 1e-5 < relative_error(ours[0], exact) < 0.05
    assert all(x.any() for x in ours[4:])
