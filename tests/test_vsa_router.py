"""VSA with a learned router: against plain loops in float64, its module, what is saved of it, and what it refuses."""

import functools

import pytest
import torch
from packed_loops import cubes_of, place, segments, softmax_over
from routed_loops import change_by, soft_top_k
from tiny_wan import inputs as wan_inputs
from tiny_wan import randomize, run, tiny_transformer

import foveal
from foveal import SLA2Config, TokenLayout, VideoGrid, VideoSparseAttention, VSAConfig, attention_cost, vsa_attention
from foveal.lab.inspect.capture import capture_selections
from foveal.methods.base import method_of
from foveal.methods.vsa.attention import select_cubes
from foveal.methods.vsa.router import CubeRouter
from foveal.testing import make_inputs, output_and_gradients, poison_empty

GRID = VideoGrid(3, 5, 6)
TILE = (2, 2, 4)  # cubes of 16, 8, 4, and 2 tokens at the borders
LAYOUTS = {"video": TokenLayout(GRID), "packed": TokenLayout(GRID, before=(7, 1), after=(20, 1))}
CONFIG = VSAConfig(keep_ratio=0.3, tile=TILE, router="shared")
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_gate", "grad_proj_query", "grad_proj_key")


def projections(router, heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(3)
    shape = (heads,) * (router == "per_head") + (head_dim, head_dim)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for _ in range(2))


def fine_loops(query, key, value, gate_fine, proj_query, proj_key, *, layout):
    """Gf * Of, [B, H, L, D], with the straight-through gradient of the projections."""
    before, _, after = segments(layout)
    cubes, scale = cubes_of(layout, TILE), query.shape[-1] ** -0.5
    text = [token for segment in before + after for token in segment]
    everything = sorted([*text, *(token for cube in cubes for token in cube)])
    kept = -(-len(cubes) * 3 // 10)
    samples = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            q, k, v = (x[b, h] for x in (query, key, value))
            of_query, of_key = (x if x.dim() == 2 else x[h] for x in (proj_query, proj_key))
            parts = [(text, softmax_over(q, k, v, text, everything, scale))] if text else []
            means = [k[cube].mean(0).detach() for cube in cubes]
            for row in cubes:
                mean = of_query @ q[row].mean(0).detach()
                scores = torch.stack([mean @ (of_key @ other) * scale for other in means])
                order = sorted(range(len(cubes)), key=lambda j, scores=scores: (-scores[j].item(), j))
                critical, others = order[:kept], order[kept:]
                read = [token for j in critical for token in cubes[j]] + text
                output, soft = softmax_over(q, k, v, row, read, scale), soft_top_k(scores, kept, CONFIG.temperature)
                for j in range(len(cubes)):
                    with torch.no_grad():
                        change = change_by(q, k, v, row, cubes, critical, others, text, 1.0, scale, j)
                    output = output + (soft[j] - soft[j].detach()) * change
                parts.append((row, output))
            heads.append(place(parts, layout.num_tokens))
        samples.append(torch.stack(heads))
    return torch.stack(samples) * gate_fine


def zeros_and(gate):
    """The gates, of which the coarse one is 0."""
    return {"gate_coarse": torch.zeros_like(gate), "gate_fine": gate}


@pytest.mark.parametrize("router", ["shared", "per_head"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_loops(name, router):
    layout, config = LAYOUTS[name], CONFIG.replace(router=router, fine_gate=True)
    query, key, value = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    gate = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8, seed=1)[0]
    inputs = query, key + 1, value + 2, gate, *projections(router)

    def attend(query, key, value, gate, proj_query, proj_key):
        named = {"proj_query": proj_query, "proj_key": proj_key, **zeros_and(gate)}
        return vsa_attention(query, key, value, config=config, layout=layout, impl="torch", **named)

    with poison_empty():
        ours = output_and_gradients(attend, inputs)
    theirs = output_and_gradients(functools.partial(fine_loops, layout=layout), inputs)
    for label, one, other in zip(NAMES, ours, theirs, strict=True):
        assert other.abs().sum() > 0, label
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, label=label: f"{label}: {text}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_output_is_that_of_the_chosen_cubes(name):
    """The coarse branch stays as it is, and so do all implementations."""
    layout, (proj_query, proj_key) = LAYOUTS[name], projections("shared")
    inputs = make_inputs(batch=2, query_length=layout.num_tokens, head_dim=8)
    named = {"config": CONFIG, "layout": layout}
    weights = {"proj_query": proj_query, "proj_key": proj_key}
    chosen = select_cubes(*inputs[:2], **named, router=CubeRouter(proj_query, proj_key, 0.1))
    assert not torch.equal(chosen.critical, select_cubes(*inputs[:2], **named).critical)
    for impl in ("torch", "reference"):
        output = vsa_attention(*inputs, impl=impl, **named, **weights)
        torch.testing.assert_close(output, vsa_attention(*inputs, selection=chosen, **named))


def test_one_projection_beside_the_identity():
    inputs, (_, proj_key) = make_inputs(query_length=90, head_dim=8), projections("shared")
    named = {"config": CONFIG, "grid": GRID, "proj_key": proj_key}
    both = vsa_attention(*inputs, proj_query=torch.eye(8, dtype=torch.float64), **named)
    assert torch.equal(vsa_attention(*inputs, **named), both)


def test_text_is_read_in_any_case():
    """As the video's rows of a packed sequence read it."""
    layout, (proj_query, proj_key) = TokenLayout(GRID, after=(20,)), projections("per_head")
    query, key, value = make_inputs(batch=2, query_length=110, head_dim=8)
    weights = {"proj_query": proj_query, "proj_key": proj_key, "config": CONFIG.replace(fine_gate=True)}
    packed = vsa_attention(query, key, value, layout=layout, **zeros_and(torch.ones_like(query)), **weights)
    video = query[:, :, :90]
    output = vsa_attention(video, key, value, grid=GRID, **zeros_and(torch.ones_like(video)), **weights)
    torch.testing.assert_close(output, packed[:, :, :90])


@pytest.mark.parametrize("router", ["shared", "per_head"])
def test_the_module_starts_with_the_coarse_choice_and_learns(router):
    layer = VideoSparseAttention(12, 2, 8, CONFIG.replace(router=router))
    plain = VideoSparseAttention(12, 2, 8, CONFIG.replace(router="none"))
    query, key, value = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    hidden = torch.randn(1, 90, 12, generator=torch.Generator().manual_seed(0))
    output = layer(query, key, value, hidden, grid=GRID)
    torch.testing.assert_close(output, plain(query, key, value, hidden, grid=GRID))
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.router.parameters())
    torch.nn.init.normal_(layer.router.proj_query)
    whole, gates = layer(query, key, value, hidden, grid=GRID), layer.gates(hidden)
    own = [x[:, 1:] for x in (query, key, value)]
    gates = tuple(None if gate is None else gate[:, 1:] for gate in gates)
    torch.testing.assert_close(layer(*own, None, gates, grid=GRID, heads=range(1, 2)), whole[:, 1:])
    selection = layer.select(query, key, grid=GRID)
    given = layer(query, key, value, hidden, grid=GRID, selection=selection)
    torch.testing.assert_close(given, whole)


def test_compiles_and_checkpoints():
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    layer = VideoSparseAttention(12, 2, 8, CONFIG.replace(router="per_head"))
    inputs = make_inputs(query_length=90, head_dim=8, dtype=torch.float32)
    hidden = torch.randn(1, 90, 12, generator=torch.Generator().manual_seed(0))
    parameters = tuple(layer.parameters())

    def run(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = attend(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), (*leaves, *parameters))

    def call(*x):
        return layer(*x, hidden, grid=GRID)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = run(call)
    for way in (compiled, lambda *x: checkpoint(call, *x, use_reentrant=False)):
        for one, other in zip(run(way), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_models_of_it_are_saved_and_loaded(tmp_path):
    config = VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), router="per_head")
    model = foveal.sparsify(tiny_transformer(), config)
    for parameter in foveal.sparse_parameters(model).values():
        parameter.data += 0.1
    foveal.save(model, tmp_path)
    again = foveal.sparse_parameters(foveal.load(tiny_transformer(), tmp_path))
    assert any("router.proj_query" in name for name in again)
    assert all(torch.equal(again[name], parameter) for name, parameter in foveal.sparse_parameters(model).items())
    with pytest.raises(ValueError, match=r"would need .*router"):
        foveal.reconfigure(foveal.sparsify(tiny_transformer(), config.replace(router="none")), config)


@pytest.mark.parametrize(
    "config",
    [
        VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), router="per_head"),
        SLA2Config(keep_ratio=0.3, block_q=16, block_k=16, router="per_head"),
    ],
    ids=["vsa", "sla2"],
)
@torch.no_grad()
def test_selections_are_captured(config):
    """Made a second time by the projections of the layer."""
    model = foveal.sparsify(tiny_transformer(num_layers=1), config)
    randomize(model)
    (layer,) = (x for x in model.modules() if isinstance(x, method_of(config).module_type))
    calls = []
    layer.register_forward_pre_hook(lambda module, args, named: calls.append((args, named)), with_kwargs=True)
    with capture_selections(model) as found:
        run(model, **wan_inputs())
    (selection,), ((args, named),) = found.values(), calls
    torch.testing.assert_close(layer(*args, **named, selection=selection), layer(*args, **named))


def test_it_costs_the_projections_and_their_products():
    shape = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}
    plain, routed = (attention_cost(VSAConfig(router=router), **shape) for router in ("none", "per_head"))
    (part,) = (part for part in routed.parts if part.name == "router")
    assert routed.flops - plain.flops == part.flops > 0
    assert part.backward > 2
    assert [x.name for x in plain.parts] == [x.name for x in routed.parts if x.name != "router"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "own"}, "unknown router 'own'"),
        ({"router": "shared", "score": "log_sum_exp"}, "score must be \"mean\" beside it, got 'log_sum_exp'"),
        (
            {"router": "shared", "tile": (4, 8, 8)},
            r"tile must have at most 128 tokens beside a router, got \(4, 8, 8\)",
        ),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
    ],
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VSAConfig(**fields)


def test_calls_that_are_refused():
    inputs, eye = make_inputs(query_length=90, head_dim=8), torch.eye(8)
    with pytest.raises(ValueError, match='config has router="none"'):
        vsa_attention(*inputs, config=CONFIG.replace(router="none"), grid=GRID, proj_query=eye)
    with pytest.raises(ValueError, match=r"proj_key must have shape \(8, 8\) or \(2, 8, 8\) for 2 heads of 8, got"):
        vsa_attention(*inputs, config=CONFIG, grid=GRID, proj_key=torch.eye(4))
    with pytest.raises(ValueError, match='impl="reference" has no gradient for proj_query and proj_key'):
        vsa_attention(*inputs, config=CONFIG, grid=GRID, proj_key=torch.eye(8).requires_grad_(), impl="reference")
    with pytest.raises(TypeError, match="temperature must be a number, got 'cold'"):
        VSAConfig(temperature="cold")
