"""What foveal does in ComfyUI, without ComfyUI: layers, budgets, layouts, fallbacks, records, previews, files."""

import copy
import functools
import types

import pytest
import torch
from comfyui_modules import HEADS, LAYERS, Ltx, MiniMaxH3, Patcher, Wan, dense_attention

import foveal
from foveal import Policy, SLAConfig, TokenLayout, VideoGrid, VSAConfig
from foveal.hosts.comfyui.attention import (
    BY_POLICY,
    COMPILED,
    NOT_CALLED,
    OVERRIDE,
    UNPACKED,
    SparseAttention,
    _Forward,
)
from foveal.hosts.comfyui.layers import (
    build_layers,
    gates_in_model,
    host_family,
    layout_of,
    parse_ratios,
    write_budgets,
)
from foveal.hosts.comfyui.preview import preview
from foveal.hosts.comfyui.record import Record
from foveal.lab.inspect.budgets import BudgetCalibration
from foveal.models.files.parts import SparseParameters
from foveal.models.state import Phase

LATENT = (2, 4, 3, 12, 16)
GRID = VideoGrid(3, 6, 8)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.0])
SPARSE = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none", projection=False)
TRAINED = SLAConfig(keep_ratio=0.3, drop_ratio=0.1, block_q=16, block_k=16)
CUBES = VSAConfig(keep_ratio=0.3, tile=(2, 2, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Wan().requires_grad_(False)


@pytest.fixture
def latent():
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def context():
    return torch.randn(2, 5, 64 * HEADS, generator=torch.Generator().manual_seed(2))


def drawn(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / shape[0] ** 0.5 for name, shape in shapes.items()}


def parameters_of(config, layers=LAYERS, head_dim=64):
    shapes = {"proj.weight": (head_dim, head_dim), "proj.bias": (head_dim,)}
    if isinstance(config, VSAConfig):
        width = head_dim * HEADS
        shapes = {"to_gate_coarse.weight": (width, width), "to_gate_coarse.bias": (width,)}
    states = tuple(drawn(shapes, seed) for seed in range(layers))
    return SparseParameters("file", "a-format", "someone", (config,) * layers, False, states)


def sparse(model, config=SPARSE, *, parameters=None, budgets=None, **settings):
    """The attention, and a patcher whose model runs it."""
    modules, held = build_layers(model, None if parameters else config, parameters=parameters, budgets=budgets)
    attention = SparseAttention(modules, held, **settings)
    return attention, attention.attach(Patcher(model))


def hooks_of(model):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def by_hand(model, latent, context, attend):
    """The model's forward, with `attend(layer index, query, key, value, hidden_states)` as its self-attention."""

    def run(x, options):
        tokens = model.patch_embedding(x)
        grid, tokens = tokens.shape[2:], tokens.flatten(2).transpose(1, 2)
        for index, block in enumerate(model.blocks):
            layer = block.self_attn
            heads = (linear(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for linear in (layer.q, layer.k, layer.v))
            tokens = tokens + attend(index, *heads, tokens).transpose(1, 2).flatten(2)
            tokens = tokens + block.cross_attn(tokens, context)
        out = model.head(tokens).transpose(1, 2).unflatten(2, grid)
        return torch.nn.functional.interpolate(out, x.shape[2:], mode="nearest")

    return run(latent, None)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_training_free_equals_the_function_in_every_self_attention_and_nowhere_else(latent, head_dim):
    torch.manual_seed(0)
    model = Wan(head_dim)
    context = torch.randn(2, 5, head_dim * HEADS)
    attention, patcher = sparse(model)
    outputs = patcher.sample(latent, context, SIGMAS)

    def attend(index, query, key, value, hidden_states):
        return foveal.sla_attention(query, key, value, config=SPARSE, impl="reference")

    expected = by_hand(model, latent, context, attend)
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert attention.record.sparse_calls == 3 * LAYERS
    assert attention.record.dense_calls == 0
    assert attention.record.layouts == [GRID]


def test_ltx_video_has_other_names_sizes_and_timesteps(context):
    torch.manual_seed(0)
    model, latent = Ltx(), torch.randn(1, 4, 3, 6, 8)
    attention, patcher = sparse(model, policy=Policy(dense_above=900, dense_layers=("transformer_blocks.1.attn1",)))
    options = {"wrappers": patcher.wrappers, **patcher.model_options["transformer_options"]}
    for timestep in (1.0, 0.5):
        model(latent, torch.tensor([timestep]), context[:1], options)
    assert attention.record.layouts == [GRID]
    layers = attention.record.layers
    assert [sum(layer.sparse.values()) for layer in layers.values()] == [1, 0, 1]
    assert dict(layers["transformer_blocks.0.attn1"].dense) == {f"{BY_POLICY} dense_above": 1}
    with pytest.raises(ValueError, match="is for Wan, got a model of LTX-Video"):
        build_layers(model, parameters=parameters_of(TRAINED))


WORDS, SOUND = 5, 7
SEGMENTS = [(0, 3, "text"), (3, 5, "cond"), (5, 19, "audio"), (19, 19 + GRID.num_tokens, "video")]
H3_LAYOUT = TokenLayout(GRID, before=(3, 2, 14))


@pytest.fixture
def h3():
    """A model, what its wrapped forward gets but for the transformer options, and its payload."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(size, generator=generator) for size in ((1, 4, 3, 12, 16), (1, 3, 2, SOUND))]
    inputs = latents, torch.tensor([700.0]), torch.randn(1, WORDS, 48, generator=generator)
    return MiniMaxH3().requires_grad_(False), inputs, {"layout": types.SimpleNamespace(segments=SEGMENTS)}


def run_h3(model, patcher, inputs, **more):
    options = {"wrappers": patcher.wrappers, **patcher.model_options["transformer_options"]} | more.pop("options", {})
    return model(*inputs, options, **more)


def h3_by_hand(model, inputs, attend):
    latents, _, context = inputs
    h = model.packed(latents, context, None)
    for index, block in enumerate(model.blocks):
        attended = attend(index, *block.attn.qkv(h), h[None])[0].transpose(0, 1).flatten(1)
        h = h + block.attn.out_proj(attended)
        h = h + block.mlp(h)
    return model.head(h)


@pytest.mark.parametrize("told", ["options", "payload"])
def test_minimax_h3_keeps_text_conditions_and_sound_exact(h3, told):
    model, inputs, payload = h3
    attention, patcher = sparse(model)
    more = {"minimax_payload": payload} if told == "payload" else {"options": {"minimax_h3_layout": payload["layout"]}}
    output = run_h3(model, patcher, inputs, **more)

    def attend(index, query, key, value, hidden_states):
        return foveal.sla_attention(query, key, value, config=SPARSE, layout=H3_LAYOUT, impl="reference")

    torch.testing.assert_close(output, h3_by_hand(model, inputs, attend), rtol=1e-4, atol=1e-5)
    assert attention.record.layouts == [H3_LAYOUT]
    assert (attention.record.sparse_calls, attention.record.dense_calls) == (LAYERS, 0)  # and not the token refiner


@pytest.mark.parametrize("router", ["none", "per_head"])
def test_minimax_h3_runs_trained_gates_and_routers(h3, router):
    model, inputs, payload = h3
    config = CUBES.replace(router=router, coarse=router == "none")
    shapes = {"to_gate_coarse.weight": (64 * HEADS, 48), "to_gate_coarse.bias": (64 * HEADS,)}
    if router != "none":
        shapes = dict.fromkeys(("router.proj_query", "router.proj_key"), (HEADS, 64, 64))
    states = tuple(drawn(shapes, seed) for seed in range(LAYERS))
    parameters = SparseParameters("file", "foveal", "foveal", (config,) * LAYERS, True, states, "minimax_h3")
    _, patcher = sparse(model, config, parameters=parameters)
    output = run_h3(model, patcher, inputs, minimax_payload=payload)

    def attend(index, query, key, value, hidden_states):
        state, named = states[index], {}
        if router == "none":
            gate = torch.nn.functional.linear(hidden_states, *state.values())
            named["gate_coarse"] = gate.unflatten(2, (HEADS, -1)).transpose(1, 2)
        else:
            named = {name.removeprefix("router."): x for name, x in state.items()}
        return foveal.vsa_attention(query, key, value, config=config, layout=H3_LAYOUT, impl="torch", **named)

    torch.testing.assert_close(output, h3_by_hand(model, inputs, attend), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is for MiniMax-H3, got a model of Wan"):
        build_layers(Wan(), parameters=parameters)


class QuantizedGate(torch.nn.Module):
    """A layer as ComfyUI quantizes them: int8 with a scale for each row, for two dimensions only."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("values", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scales", torch.full((outputs, 1), 2e-3))

    def forward(self, x):
        assert x.dim() == 2
        return x @ (self.values * self.scales).T


@pytest.mark.parametrize("gate", [QuantizedGate, functools.partial(torch.nn.Linear, bias=False)])
def test_minimax_h3_takes_the_gates_that_it_was_loaded_with(h3, gate):
    _, inputs, payload = h3
    torch.manual_seed(2)
    model = MiniMaxH3(gate=gate).requires_grad_(False)
    parameters = gates_in_model(model, 0.3)
    config = foveal.VSAConfig(keep_ratio=0.3, tile=(4, 4, 4))
    assert (parameters.configs, parameters.format) == ((config,) * LAYERS, "fasth3-vsa-comfyui")
    attention, patcher = sparse(model, parameters=parameters, gate="to_gate_compress")
    assert not list(attention.parameters().parameters())
    output = run_h3(model, patcher, inputs, minimax_payload=payload)

    def attend(index, query, key, value, hidden_states):
        made = model.blocks[index].attn.to_gate_compress(hidden_states[0])[None]
        named = {"gate_coarse": made.unflatten(2, (HEADS, -1)).transpose(1, 2), "layout": H3_LAYOUT}
        return foveal.vsa_attention(query, key, value, config=config, impl="torch", **named)

    torch.testing.assert_close(output, h3_by_hand(model, inputs, attend), rtol=1e-4, atol=1e-5)
    assert (attention.record.sparse_calls, attention.record.dense_calls) == (LAYERS, 0)
    sparser, _ = build_layers(model, parameters=parameters.following(keep_ratio=0.1))
    assert {module.config.keep_ratio for module in sparser.values()} == {0.1}


def test_models_without_gates(h3):
    with pytest.raises(ValueError, match=r"blocks\.0\.attn of this MiniMax-H3 has none"):
        gates_in_model(h3[0], 0.1)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn of this MiniMax-H3 has none"):
        build_layers(h3[0], parameters=gates_in_model(MiniMaxH3(gate=QuantizedGate), 0.1))
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn of this Wan has none"):
        gates_in_model(Wan(), 0.1)
    with pytest.raises(ValueError, match=r"keep_ratio must be .*, got 1\.5"):
        gates_in_model(MiniMaxH3(gate=QuantizedGate), 1.5)


def test_minimax_h3_stays_dense_where_its_sequence_is_not_known(h3):
    model, inputs, payload = h3
    dense = run_h3(model, Patcher(model), inputs)
    attention, patcher = sparse(model)
    torch.testing.assert_close(run_h3(model, patcher, inputs), dense)
    assert set(attention.record.layers["blocks.0.attn"].dense) == {UNPACKED}
    for segments in ([*SEGMENTS[:2], SEGMENTS[3], SEGMENTS[2]], [(0, 19, "text"), (19, 162, "video")]):
        attention, patcher = sparse(model)
        payload = {"layout": types.SimpleNamespace(segments=segments)}
        torch.testing.assert_close(run_h3(model, patcher, inputs, minimax_payload=payload), dense)
        (reason,) = attention.record.layers["blocks.0.attn"].dense
        assert "do not fit a latent of (1, 4, 3, 12, 16)" in reason


def test_trained_sla_runs_its_linear_branch_and_each_layers_projection(model, latent, context):
    parameters = parameters_of(TRAINED)
    _, patcher = sparse(model, TRAINED, parameters=parameters)

    def attend(index, query, key, value, hidden_states):
        weights = {name.replace(".", "_"): value for name, value in parameters.layers[index].items()}
        return foveal.sla_attention(query, key, value, config=TRAINED, impl="reference", **weights)

    expected = by_hand(model, latent, context, attend)
    torch.testing.assert_close(patcher.sample(latent, context, SIGMAS)[0], expected, rtol=1e-4, atol=1e-5)


def test_trained_vsa_reads_its_gates_from_the_layers_hidden_states(model, latent, context):
    parameters = parameters_of(CUBES)
    _, patcher = sparse(model, CUBES, parameters=parameters)

    def attend(index, query, key, value, hidden_states):
        gate = torch.nn.functional.linear(hidden_states, *parameters.layers[index].values())
        gate = gate.unflatten(2, (HEADS, -1)).transpose(1, 2)
        return foveal.vsa_attention(query, key, value, config=CUBES, grid=GRID, gate_coarse=gate, impl="reference")

    expected = by_hand(model, latent, context, attend)
    torch.testing.assert_close(patcher.sample(latent, context, SIGMAS)[0], expected, rtol=1e-4, atol=1e-5)


def test_everything_kept_equals_dense(model, latent, context):
    dense = Patcher(model).sample(latent, context, SIGMAS)[0]
    _, patcher = sparse(model, SPARSE.replace(keep_ratio=1.0))
    torch.testing.assert_close(patcher.sample(latent, context, SIGMAS)[0], dense, rtol=1e-4, atol=1e-5)


def test_a_clone_is_changed_and_nothing_is_left_behind(model, latent, context):
    original = Patcher(model)
    before = original.sample(latent, context, SIGMAS)[0]
    attention = SparseAttention(*build_layers(model, SPARSE))
    patcher = attention.attach(original)
    changed = patcher.sample(latent, context, SIGMAS)[0]
    assert not torch.allclose(before, changed)
    assert (original.wrappers, original.model_options) == ({}, {"transformer_options": {}})
    assert hooks_of(model) == 0
    torch.testing.assert_close(original.sample(latent, context, SIGMAS)[0], before, rtol=0, atol=0)


def test_hooks_are_gone_after_an_error(model, latent, context):
    _, patcher = sparse(model)
    with pytest.raises(RuntimeError):
        patcher.sample(latent, context[..., :3], SIGMAS)
    assert hooks_of(model) == 0


def test_clones_of_the_clone_share_its_parameters_and_its_record(model, latent, context):
    attention, patcher = sparse(model, TRAINED, parameters=parameters_of(TRAINED))
    further = patcher.clone()
    assert copy.deepcopy(attention) is attention
    further.sample(latent, context, SIGMAS)
    assert attention.record.sparse_calls == 3 * LAYERS


def test_the_nodes_do_not_stack(model):
    _, patcher = sparse(model)
    with pytest.raises(ValueError, match="already"):
        SparseAttention(*build_layers(model, SPARSE)).attach(patcher)


def test_what_stays_dense_goes_to_the_override_that_was_there(model, latent, context):
    called = []

    def theirs(function, *args, **kwargs):
        called.append(function)
        return function(*args, **kwargs)

    original = Patcher(model)
    original.model_options["transformer_options"][OVERRIDE] = theirs
    attention = SparseAttention(*build_layers(model, SPARSE), policy=Policy(dense_layers=(1,)))
    attention.attach(original).sample(latent, context, SIGMAS)
    # Of each step: the cross-attention of all layers, and the self-attention of one.
    assert called == [dense_attention] * (3 * (LAYERS + 1))


def test_policies_count_the_samplers_steps(model, latent, context):
    policy = Policy(dense_first_steps=1, dense_last_steps=1, dense_layers=(0, "blocks.2.self_attn"))
    attention, patcher = sparse(model, policy=policy)
    outputs = patcher.sample(latent, context, SIGMAS)
    dense = Patcher(model).sample(latent, context, SIGMAS)
    for step, same in enumerate((True, False, True)):
        assert torch.equal(outputs[step], dense[step]) is same
    layers = attention.record.layers
    assert dict(layers["blocks.1.self_attn"].dense) == {
        f"{BY_POLICY} dense_first_steps": 1,
        f"{BY_POLICY} dense_last_steps": 1,
    }
    assert dict(layers["blocks.0.self_attn"].dense) == {f"{BY_POLICY} dense_layers": 3}
    assert layers["blocks.1.self_attn"].step == 1


def test_a_second_evaluation_between_two_sigmas_belongs_to_the_step_before(model, latent, context):
    attention, patcher = sparse(model, policy=Policy(dense_first_steps=1))
    options = {"sample_sigmas": SIGMAS, "wrappers": patcher.wrappers, **patcher.model_options["transformer_options"]}
    for sigma in (0.9, 0.79):
        model(latent, torch.tensor([1000 * sigma]), context, options | {"sigmas": torch.tensor([sigma])})
    record = attention.record.of("blocks.0.self_attn")
    assert (sum(record.dense.values()), sum(record.sparse.values())) == (1, 1)


def test_a_policy_of_steps_needs_a_schedule(model, latent, context):
    _, patcher = sparse(model, policy=Policy(dense_first_steps=1))
    options = {"wrappers": patcher.wrappers, **patcher.model_options["transformer_options"]}
    with pytest.raises(ValueError, match="sample_sigmas"):
        model(latent, torch.tensor([900.0]), context, options)


def test_policies_read_the_timestep(model, latent, context):
    attention, patcher = sparse(model, policy=Policy(dense_above=900, keep_ratio={0: 0.5, 700: 0.2}))
    patcher.sample(latent, context, SIGMAS)
    layer = attention.record.layers["blocks.0.self_attn"]
    assert {key[:2]: times for key, times in layer.sparse.items()} == {("torch", "0.2"): 1, ("torch", "0.5"): 1}


def test_budgets_give_layers_their_own_ratio(model, latent, context):
    budgets = parse_ratios("budgets", "0: 1\n1-1: 0.5, 2: 0.2")
    attention, patcher = sparse(model, budgets=budgets)
    patcher.sample(latent, context, SIGMAS)
    layers = attention.record.layers
    assert set(layers["blocks.0.self_attn"].dense) == {"its budget keeps everything"}
    assert [key[1] for name in (1, 2) for key in layers[f"blocks.{name}.self_attn"].sparse] == ["0.5", "0.2"]


def test_ratios_as_text():
    text = "0: 0.5, 1-3: 0.1,\n blocks.4.self_attn: 1"
    assert parse_ratios("budgets", text) == {0: 0.5, range(1, 4): 0.1, "blocks.4.self_attn": 1.0}
    found = {"blocks.0.self_attn": 0.05, "blocks.1.self_attn": 1.0}
    assert parse_ratios("budgets", write_budgets(found)) == found
    assert parse_ratios("budgets", "  ") == {}


@pytest.mark.parametrize("text", ["0.5", "0 = 0.5", "0: much", ": 0.3", "1: 0.1, 1: 0.2"])
def test_ratios_that_are_none(text):
    with pytest.raises(ValueError, match="budgets"):
        parse_ratios("budgets", text)


@pytest.mark.parametrize(
    ("budgets", "message"), [({0: 1.5}, "budgets"), ({7: 0.5}, "0..2"), ({"blocks.9.self_attn": 0.5}, "unknown layer")]
)
def test_budgets_that_do_not_fit(model, budgets, message):
    with pytest.raises(ValueError, match=message):
        build_layers(model, SPARSE, budgets=budgets)


def test_models_and_files_that_do_not_fit(model):
    with pytest.raises(TypeError, match="Wan or LTX-Video or MiniMax-H3 as ComfyUI has it, got Linear"):
        host_family(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="5 layers, but the model has 3"):
        build_layers(model, parameters=parameters_of(TRAINED, layers=5))
    with pytest.raises(ValueError, match=r"proj.weight \(16, 16\), expected \(64, 64\)"):
        build_layers(model, parameters=parameters_of(TRAINED, head_dim=16))
    with pytest.raises(ValueError, match=r"needs proj\.weight, proj\.bias"):
        build_layers(model, TRAINED)
    with pytest.raises(ValueError, match="give either a config or parameters"):
        build_layers(model, TRAINED, parameters=parameters_of(TRAINED))


def test_each_layer_has_the_configuration_that_it_was_trained_with(model):
    """One stays dense, and budgets and another share of blocks leave the rest of a configuration alone."""
    plain = SLAConfig(keep_ratio=0.2, drop_ratio=0.0, linear_scope="none", projection=False)
    first = parameters_of(TRAINED).layers[0]
    parameters = SparseParameters("folder", "foveal", "foveal", (TRAINED, None, plain), True, (first, {}, {}))
    modules, held = build_layers(model, parameters=parameters, budgets={2: 0.5})
    assert held == {"blocks.1.self_attn": "it was trained dense"}
    assert [module.config for module in modules.values()] == [TRAINED, plain.replace(keep_ratio=0.5)]
    modules, _ = build_layers(model, parameters=parameters.following(keep_ratio=0.4))
    assert [module.config.keep_ratio for module in modules.values()] == [0.4, 0.4]


def test_layers_without_parameters_stay_dense(model, latent, context):
    model.vace_blocks = torch.nn.ModuleList([type(model.blocks[0])(64 * HEADS)])
    modules, held = build_layers(model, parameters=parameters_of(TRAINED))
    assert list(held) == ["vace_blocks.0.self_attn"]
    assert len(modules) == LAYERS


def test_every_fallback_is_named(model, latent, context):
    attention, patcher = sparse(model, min_tokens=1000)
    patcher.sample(latent, context, SIGMAS)
    assert "144 tokens, fewer than 1,000" in str(attention.record)
    attention, patcher = sparse(model)
    model.blocks[1].self_attn.mask = torch.zeros(144, 144)
    patcher.sample(latent, context, SIGMAS)
    assert set(attention.record.layers["blocks.1.self_attn"].dense) == {"it has an attention mask"}
    model.blocks[1].self_attn.mask = None
    patcher.model_options["transformer_options"][OVERRIDE] = dense_override
    patcher.sample(latent, context, SIGMAS)
    assert set(attention.record.layers["blocks.0.self_attn"].dense) == {NOT_CALLED}


def dense_override(function, *args, **kwargs):
    return function(*args, **kwargs)


def test_compiled_blocks_stay_dense_and_say_so(model, latent, context):
    dense = Patcher(model).sample(latent, context, SIGMAS)[0]
    attention, patcher = sparse(model)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    torch.testing.assert_close(patcher.sample(latent, context, SIGMAS)[0], dense)
    assert {reason for layer in attention.record.layers.values() for reason in layer.dense} == {COMPILED}
    assert attention.record.sparse_calls == 0


def test_a_model_compiled_as_a_whole_stays_dense(model, latent, context):
    dense = Patcher(model).sample(latent, context, SIGMAS)[0]
    attention, patcher = sparse(model)
    patcher.model = torch.compile(model, backend="eager")
    torch.testing.assert_close(patcher.sample(latent, context, SIGMAS)[0], dense)
    assert "compiled as a whole" in str(attention.record)


def test_a_scale_of_the_models_own_stays_dense(model):
    attention, _ = sparse(model)
    query = torch.randn(1, 144, 64 * HEADS)
    for scale, reason in ((64**-0.5, None), (0.5, "its softmax scale is 0.5")):
        given = {"scale": scale}
        x = query.unflatten(2, (HEADS, -1)).transpose(1, 2)
        forward = forward_of(LATENT)
        assert attention._why_dense(forward, x, x, given) == reason


def forward_of(latent):
    return _Forward(latent, (1, 2, 2), False, False, None, Phase(), None, None, layer="blocks.0.self_attn")


def test_strict_turns_a_fallback_into_an_error_but_not_a_choice(model, latent, context):
    _, patcher = sparse(model, min_tokens=1000, strict=True)
    with pytest.raises(RuntimeError, match=r"blocks.0.self_attn would run dense.*fewer than"):
        patcher.sample(latent, context, SIGMAS)
    chosen = {"policy": Policy(dense_first_steps=1, dense_layers=(0,)), "budgets": {1: 1.0}}
    _, patcher = sparse(model, strict=True, **chosen)
    patcher.sample(latent, context, SIGMAS)


@pytest.mark.parametrize(
    ("latent", "tokens", "first", "expected"),
    [
        ((1, 4, 3, 12, 16), 144, False, GRID),
        ((1, 4, 3, 11, 15), 144, False, GRID),
        ((1, 4, 3, 12, 16), 192, True, TokenLayout(GRID, before=(48,))),
        ((1, 4, 3, 12, 16), 202, True, TokenLayout(GRID, before=(48,), after=(10,))),
        ((1, 4, 3, 12, 16), 202, False, TokenLayout(GRID, after=(58,))),
        ((1, 4, 3, 12, 16), 143, False, None),
        ((1, 4, 3, 12, 16), 150, True, None),
        ((1, 4, 12, 16), 48, False, None),
    ],
)
def test_where_tokens_stand(latent, tokens, first, expected):
    assert layout_of(latent, (1, 2, 2), tokens, reference_first=first) == expected


@pytest.mark.parametrize("config", [SPARSE, CUBES])
def test_a_reference_frame_is_read_by_all(model, latent, context, config):
    """What a model adds to the video's tokens is protected: its queries are exact."""
    model.ref_conv = object()
    parameters = parameters_of(config) if config is CUBES else None
    attention, patcher = sparse(model, config, parameters=parameters)
    seen = []
    run = SparseAttention._run_method

    def spy(self, forward, query, key, value):
        output = run(self, forward, query, key, value)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        seen.append((output[:, :, :48], dense[:, :, :48]))
        return output

    attention._run_method = spy.__get__(attention)
    patcher.sample(latent, context, SIGMAS, reference_latent=latent[:, :, :1])
    assert attention.record.layouts == [TokenLayout(GRID, before=(48,))]
    if config is SPARSE:
        for output, dense in seen:
            torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3 * LAYERS


def explain_why(latent):
    """Why no kernel runs such a layer here."""
    module = foveal.SparseLinearAttention(64, SPARSE)
    x = torch.randn(2, HEADS, GRID.num_tokens, 64)
    module(x, x, x)
    return module.ran.why


def test_the_record_groups_layers_that_did_the_same(model, latent, context):
    attention, patcher = sparse(model, policy=Policy(dense_layers=(0,)))
    patcher.sample(latent, context, SIGMAS)
    why = explain_why(latent)
    assert str(attention.record).splitlines() == [
        "foveal: 6 of 9 calls of 3 self-attention layers ran sparse, in 3 forwards of the model",
        "tokens: 3x6x8 = 144 tokens",
        "layer                                     sparse                    dense or slower, and why",
        "blocks.0.self_attn                        -                         3 calls dense: the policy's dense_layers",
        f"blocks.1.self_attn to blocks.2.self_attn  3 calls: torch, keep 0.3  torch: {why}",
    ]
    assert "no self-attention layer has run" in str(Record())


def test_a_run_begins_a_new_record(model, latent, context):
    attention, patcher = sparse(model)
    patcher.sample(latent, context, SIGMAS)
    first = attention.record
    patcher.sample(latent, context, SIGMAS)
    assert attention.record is not first
    assert (first.complete, first.sparse_calls) == (True, attention.record.sparse_calls)


@pytest.mark.parametrize("config", [SPARSE, TRAINED, CUBES])
def test_the_preview_shows_the_selection(model, latent, context, config):
    pytest.importorskip("PIL")
    parameters = None if config is SPARSE else parameters_of(config)
    attention, patcher = sparse(model, config, parameters=parameters, preview_step=1)
    patcher.sample(latent, context, SIGMAS)
    layer = attention.record.layers["blocks.0.self_attn"]
    tokens = model.patch_embedding(latent).flatten(2).transpose(1, 2)
    own = model.blocks[0].self_attn
    query, key = (linear(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for linear in (own.q, own.k))
    selection = attention.modules["blocks.0.self_attn"].select(query[-1:], key[-1:], layout=GRID)
    torch.testing.assert_close(layer.kept, selection.critical_mask()[0].float().mean(0))
    assert layer.step == 1
    image = preview(attention.record, size=64)
    assert (image.dtype, image.shape[0], image.shape[-1]) == (torch.float32, 1, 3)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    # The map of the first layer, below its caption: as bright as what it keeps.
    shown = image[0, 22:86, 6:70].mean(-1)
    kept = torch.nn.functional.interpolate(layer.kept[None, None], (64, 64), mode="nearest")[0, 0]
    assert float(torch.corrcoef(torch.stack((shown.flatten(), kept.flatten())))[0, 1]) > 0.9


def test_a_preview_of_nothing():
    pytest.importorskip("PIL")
    assert preview(Record()).shape[0] == 1


def test_calibrated_budgets_follow_the_measured_error():
    """Keys in one direction for each block: a layer with sharp attention needs few blocks, one without all."""
    generator = torch.Generator().manual_seed(0)
    grid, length, block = VideoGrid(4, 8, 8), 256, 16
    directions = torch.eye(16).repeat_interleave(block, 0)[None, None]
    value = torch.randn(1, 1, length, 16, generator=generator)
    calibration = BudgetCalibration(0.1, block_q=block, block_k=block, steps=2, keep_ratios=(0.0625, 0.25, 0.5))
    for name, sharpness in (("sharp", 60.0), ("flat", 0.0)):
        for step in range(5):
            calibration.look(name, step, 5, sharpness * directions, directions, value, grid)
    assert [len(errors) for errors in calibration.errors.values()] == [2, 2]
    assert calibration.budgets() == {"sharp": 0.0625, "flat": 1.0}
    with pytest.raises(ValueError, match="run the model"):
        BudgetCalibration().budgets()


def test_calibration_runs_the_model_dense_and_its_budgets_fit(model, latent, context):
    calibration = BudgetCalibration(0.5, block_q=16, block_k=16, steps=2, keep_ratios=(0.1, 0.5))
    _, patcher = sparse(model, look=calibration.look)
    outputs = patcher.sample(latent, context, SIGMAS)
    for output, dense in zip(outputs, Patcher(model).sample(latent, context, SIGMAS), strict=True):
        assert torch.equal(output, dense)
    budgets = parse_ratios("budgets", write_budgets(calibration.budgets()))
    assert set(budgets) == set(host_family(model).layers(model))
    sparse(model, budgets=budgets)[1].sample(latent, context, SIGMAS)


def test_calibration_in_tile_order_around_a_reference():
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout(VideoGrid(4, 4, 4), before=(10,), after=(6,))
    tensors = [torch.randn(2, 2, 80, 16, generator=generator) for _ in range(3)]
    calibration = BudgetCalibration(0.1, block_q=16, block_k=16, token_order="tile", keep_ratios=(0.5, 1.0))
    calibration.look("layer", None, None, *tensors, layout)
    worst = calibration.errors["layer"][0].tolist()
    assert worst[1] < 1e-3 < worst[0]
