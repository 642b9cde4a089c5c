"""SLA and VSA in one: the reference and plain PyTorch against loops in float64, the module, and its models."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from packed_loops import cubes_of, cut, place, segments, softmax_over
from tiny_wan import randomize, run, tiny_transformer
from torch.utils.checkpoint import checkpoint

import foveal
from foveal import (
    SLAVSAConfig,
    SparseLinearVideoAttention,
    TokenLayout,
    VideoGrid,
    attention_cost,
    block_sparse_attention,
    sla_vsa_attention,
    vsa_attention,
)
from foveal.lab.bench.run import BenchSettings, run_bench
from foveal.methods.base import METHODS
from foveal.methods.vsa.attention import select_cubes
from foveal.models.processor import sparse_processors
from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients, poison_empty

GRID = VideoGrid(3, 5, 6)
LAYOUTS = {"video": TokenLayout(GRID), "both sides": TokenLayout(GRID, before=(7, 1), after=(20,))}
CONFIG = SLAVSAConfig(topk=2, tile=(2, 4, 4), feature_map="elu", fine_gate=True)
WITHOUT = {
    "every branch": {},
    "all keys": {"linear_scope": "all"},
    "no coarse branch": {"coarse": False},
    "no linear branch": {"linear_scope": "none"},
    "only cubes": {"coarse": False, "linear_scope": "none"},
}


def loops(query, key, value, *given, layout, config):
    """[B, H, L, D] with the feature map "elu"; it shares no code with the package but `VideoGrid` and `TokenLayout`."""
    named = dict(zip(names_of(config), given, strict=True))
    before, _, after = segments(layout)
    cubes, size = cubes_of(layout, config.tile), math.prod(config.tile)
    chunks = [chunk for segment in before + after for chunk in cut(segment, size)]
    text = [token for chunk in chunks for token in chunk]
    scale, length = query.shape[-1] ** -0.5, layout.num_tokens
    samples = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            q, k, v = (x[b, h] for x in (query, key, value))
            gate = {name: x[b, h] for name, x in named.items() if name.startswith("gate")}
            mean_q, mean_k, mean_v = (torch.stack([x[tile].mean(0) for tile in cubes + chunks]) for x in (q, k, v))
            coarse = torch.softmax(mean_q @ mean_k.T * scale, 1) @ mean_v
            parts = []
            for i, tile in enumerate(cubes + chunks):
                order = sorted(range(len(cubes)), key=lambda j, i=i: (-(mean_q[i] @ mean_k[j]).item(), j))
                picked = order[: config.topk] if i < len(cubes) else order
                read = [token for j in picked for token in cubes[j]] + text
                output = softmax_over(q, k, v, tile, read, scale)
                if config.linear_scope != "none" and i < len(cubes):
                    every = [token for cube in cubes for token in cube] + text
                    summed = every if config.linear_scope == "all" else [token for token in every if token not in read]
                    weights = (F.elu(q[tile]) + 1) @ (F.elu(k[summed]) + 1).T
                    linear = weights @ v[summed] / (weights.sum(1, keepdim=True) + 1e-5)
                    output = output + linear @ named["proj_weight"].T + named["proj_bias"]
                if "gate_fine" in gate:
                    output = output * gate["gate_fine"][tile]
                if config.coarse:
                    output = output + coarse[i] * gate["gate_coarse"][tile]
                parts.append((tile, output))
            heads.append(place(parts, length))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def names_of(config):
    return (
        *(["gate_coarse"] if config.coarse else []),
        *(["gate_fine"] if config.fine_gate else []),
        *(["proj_weight", "proj_bias"] if config.linear_scope != "none" else []),
    )


def inputs_of(config, length, key_length=None, shift=1.0, dtype=torch.float64, head_dim=8):
    sizes = {"batch": 2, "head_dim": head_dim, "dtype": dtype}
    query, key, value = make_inputs(query_length=length, key_length=key_length, **sizes)
    gates = dict(zip(("gate_coarse", "gate_fine"), make_inputs(query_length=length, seed=4, **sizes), strict=False))
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((head_dim, head_dim), (head_dim,)))
    rest = gates | {"proj_weight": weight / head_dim**0.5, "proj_bias": bias}
    return (query, key, value + shift, *(rest[name] for name in names_of(config)))


def attention(impl="torch", *, config, **options):
    def function(query, key, value, *given):
        named = dict(zip(names_of(config), given, strict=True))
        return sla_vsa_attention(query, key, value, config=config, impl=impl, **named, **options)

    return function


def same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("branches", WITHOUT)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loops(name, branches, impl):
    layout, config = LAYOUTS[name], CONFIG.replace(**WITHOUT[branches])
    inputs = inputs_of(config, layout.num_tokens, shift=4.0)
    options = {"config": config, "layout": layout}
    with poison_empty():
        ours = output_and_gradients(attention(impl, **options), inputs)
    same(ours, output_and_gradients(lambda *x: loops(*x, **options), inputs))
    assert all(x.abs().max() > 1e-4 for x in ours)


@pytest.mark.parametrize("branches", WITHOUT)
def test_text_and_padding(branches):
    config, lengths = CONFIG.replace(**WITHOUT[branches]), torch.tensor([123, 101])
    inputs = inputs_of(config, 90, 123)
    padding = (torch.arange(123) >= lengths[:, None])[:, None, :, None]
    poisoned = inputs[0], *(x.masked_fill(padding, torch.nan) for x in inputs[1:3]), *inputs[3:]
    options = {"config": config, "grid": GRID, "kv_lengths": lengths}
    ours = output_and_gradients(attention("torch", **options), poisoned)
    same(ours, output_and_gradients(attention("reference", **options), poisoned))
    assert all(torch.isfinite(x).all() for x in ours)


def test_it_is_vsa_without_a_linear_branch():
    config = CONFIG.replace(linear_scope="none")
    inputs = inputs_of(config, 90)
    expected = vsa_attention(*inputs[:3], config=config.cubes, grid=GRID, gate_coarse=inputs[3], gate_fine=inputs[4])
    assert torch.equal(attention(config=config, grid=GRID)(*inputs), expected)


def test_starts_as_block_sparse_attention():
    module = SparseLinearVideoAttention(12, 2, 8, SLAVSAConfig(topk=2, tile=(2, 4, 4))).double()
    inputs = make_inputs(batch=2, query_length=90, head_dim=8)
    hidden = torch.randn(2, 90, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = module(*inputs, hidden, grid=GRID)
    selection = module.select(*inputs[:2], grid=GRID)
    slotted = (GRID.to_tile_order(x, (2, 4, 4), slot=32) for x in inputs)
    fine = block_sparse_attention(*slotted, selection)
    torch.testing.assert_close(output, GRID.to_raster_order(fine, (2, 4, 4), slot=32))
    output.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters()), "it cannot grow"


def test_holds_only_what_its_configuration_uses():
    def parts(**fields):
        module = SparseLinearVideoAttention(12, 2, 8, SLAVSAConfig(**fields))
        return {name.split(".")[0] for name, _ in module.named_parameters()}

    assert parts() == {"to_gate_coarse", "proj"}
    assert parts(coarse=False, linear_scope="none") == set()
    assert parts(fine_gate=True, linear_scope="none") == {"to_gate_coarse", "to_gate_fine"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_against_float64(dtype):
    config = CONFIG.replace(tile=(4, 4, 4), feature_map="softmax")
    grid = VideoGrid(3, 9, 10)
    inputs = inputs_of(config, grid.num_tokens, dtype=dtype, head_dim=64)
    selection = select_cubes(*inputs[:2], config=config.cubes, grid=grid)
    options = {"config": config, "grid": grid, "selection": selection}
    ours = output_and_gradients(attention("torch", **options), inputs)
    exact = output_and_gradients(attention("reference", **options), [x.double() for x in inputs])
    plain = output_and_gradients(attention("reference", **options), inputs)
    for index, tensors in enumerate(zip(ours, exact, plain, strict=True)):
        assert_close_to_reference(*tensors, name=str(index))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiles_without_graph_break_and_checkpoints(layout):
    torch._dynamo.reset()
    module = SparseLinearVideoAttention(12, 2, 8, CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = make_inputs(query_length=layout.num_tokens, head_dim=8, dtype=torch.float32)
    hidden = torch.randn(1, layout.num_tokens, 12)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    parameters = tuple(module.parameters())

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = attend(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), (*leaves, *parameters))

    expected = gradients(lambda *x: module(*x, hidden, layout=layout))
    for way in (
        lambda *x: compiled(*x, hidden, layout=layout),
        lambda *x: checkpoint(lambda *y: module(*y, hidden, layout=layout), *x, use_reentrant=False),
    ):
        for one, other in zip(gradients(way), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_a_model(tmp_path):
    """Converted, saved, loaded and described; keeping everything, with the branches at zero, is the dense model."""
    dense = tiny_transformer()
    randomize(dense)
    expected = run(dense)
    torch.testing.assert_close(run(foveal.sparsify(dense, SLAVSAConfig(keep_ratio=1.0, tile=(2, 4, 4)))), expected)
    config = SLAVSAConfig(topk=2, tile=(2, 4, 4))
    model = foveal.sparsify(tiny_transformer(), config)
    randomize(model)
    foveal.save(model, tmp_path)
    saved = json.loads((tmp_path / "foveal.json").read_text())["components"]["transformer"]["layers"]
    assert saved["blocks.1.attn1"] == {"method": "sla_vsa", "config": config.to_dict()}
    other = foveal.load(tiny_transformer(), tmp_path)
    assert sparse_processors(other)["blocks.1.attn1"].config == config
    assert torch.equal(run(other), run(model))
    row = str(foveal.summary(model)).splitlines()[-1].split()
    assert row[:6] == ["blocks.1.attn1", "sla_vsa", "top", "2", "noncritical", "2x4x4"]


def test_cost():
    shape = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}
    cost, cubes = attention_cost(SLAVSAConfig(), **shape), attention_cost(SLAVSAConfig().cubes, **shape)
    names = [part.name for part in cubes.parts]
    linear = ["state build", "mask GEMM", "apply", "projection"]
    assert [part.name for part in cost.parts] == [*names[:4], *linear, *names[4:]]
    slots = 624 * 64
    assert cost.part("state build").flops == 12 * slots * 128 * 257
    assert cost.flops == cubes.flops + sum(cost.part(name).flops for name in linear)
    assert "mask GEMM" not in [part.name for part in attention_cost(SLAVSAConfig(linear_scope="all"), **shape).parts]
    alone = attention_cost(SLAVSAConfig(coarse=False, linear_scope="none"), **shape)
    assert "gates" not in [part.name for part in alone.parts]


def test_explained():
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    explanation = foveal.explain(*inputs, SLAVSAConfig(), GRID)
    assert (explanation.impl, explanation.blocks) == ("torch", (64, 64))
    with pytest.raises(ValueError, match="layout is required for an SLAVSAConfig"):
        foveal.explain(*inputs, SLAVSAConfig())


@pytest.fixture
def only_sla_vsa():
    before = dict(METHODS)
    for other in set(METHODS) - {"sla_vsa"}:
        del METHODS[other]
    yield
    METHODS.clear()
    METHODS.update(before)


def test_bench(only_sla_vsa):
    settings = BenchSettings(device="cpu", length=150, quick=True, only="methods", gate_grid=VideoGrid(3, 8, 9))
    found = {entry["name"]: entry for entry in run_bench(settings)["results"]}
    ours = [name for name in found if name != "SDPA"]
    assert len(ours) == 2 * len(METHODS["sla_vsa"].bench_cases)
    for name in ours:
        assert (found[name]["status"], found[name]["reason"]) == ("ok", None)


def test_wrong_arguments():
    inputs, no_linear = inputs_of(CONFIG, 90), CONFIG.replace(linear_scope="none")
    for message, fields in {
        "unknown linear_scope 'marginal'": {"linear_scope": "marginal"},
        "unknown feature_map 'hedgehog'": {"feature_map": "hedgehog"},
        "keep_ratio must be above 0": {"topk": None, "keep_ratio": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            SLAVSAConfig(**fields)
    with pytest.raises(TypeError, match="coarse must be a bool, got 1"):
        SLAVSAConfig(coarse=1)
    with pytest.raises(TypeError, match="config must be an SLAVSAConfig, got VSAConfig"):
        sla_vsa_attention(*inputs[:3], config=CONFIG.cubes, grid=GRID)
    with pytest.raises(ValueError, match="gate_coarse was given, but config has coarse=False"):
        sla_vsa_attention(*inputs[:3], config=CONFIG.replace(coarse=False), grid=GRID, gate_coarse=inputs[3])
    with pytest.raises(ValueError, match='proj_weight was given, but config has linear_scope="none"'):
        sla_vsa_attention(*inputs[:3], config=no_linear, grid=GRID, proj_weight=inputs[5])
    with pytest.raises(ValueError, match="grid is required"):
        sla_vsa_attention(*inputs[:3], config=CONFIG)
