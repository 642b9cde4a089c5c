"""Policies: what a step, a timestep or a layer runs, where the step is read, and what it costs to know."""

import copy
import gc
import json
import pickle

import diffusers
import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, inputs, randomize, run, tiny_pipeline, tiny_transformer

import foveal
from foveal import Policy, SLAConfig, dense, densify, get_policy, set_policy, sparsify, summary
from foveal.lab.inspect.capture import capture_selections
from foveal.models.policy import PolicyClock
from foveal.models.processor import sparse_processors, state_of
from foveal.models.state import Phase

CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])


def sparse(config=SPARSE_SLA, **kwargs):
    model = sparsify(tiny_transformer(**kwargs), config)
    randomize(model)
    return model


def at(model, *timesteps):
    return run(model, **inputs() | {"timestep": torch.tensor(timesteps if len(timesteps) == 2 else timesteps * 2)})


def record(model) -> list[tuple[str, float]]:
    """(layer, keep_ratio) of every sparse call to come."""
    calls = []
    for name, processor in sparse_processors(model).items():
        processor.attention.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, kwargs["config"].keep_ratio)), with_kwargs=True
        )
    return calls


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"dense_first_steps": 1.5}, TypeError, r"dense_first_steps must be an int, got 1\.5"),
        ({"dense_first_steps": True}, TypeError, "dense_first_steps must be an int, got True"),
        ({"dense_last_steps": -1}, ValueError, "dense_last_steps must be at least 0, got -1"),
        ({"dense_above": "900"}, TypeError, "dense_above must be a timestep, got '900'"),
        ({"dense_below": float("nan")}, ValueError, "dense_below must be a timestep, finite"),
        ({"dense_layers": "blocks.0.attn1"}, TypeError, "dense_layers must be an iterable"),
        ({"dense_layers": 0}, TypeError, "dense_layers must be an iterable"),
        ({"keep_ratio": 0.1}, TypeError, r"keep_ratio must be a table \{timestep: ratio\} or a function"),
        ({"keep_ratio": {}}, ValueError, "keep_ratio is an empty table"),
        ({"keep_ratio": {0: 1.5}}, ValueError, r"keep_ratio at timestep 0 must be in \[0, 1\], got 1\.5"),
        ({"keep_ratio": {-1: 0.5}}, ValueError, "keep_ratio entry must be a timestep"),
        ({"keep_ratio": [(0, 0.1), (0, 0.2)]}, ValueError, r"keep_ratio has a timestep twice, got \[0\]"),
        ({"drop_ratio": lambda timestep: None}, TypeError, "drop_ratio at timestep 0 must be a number"),
        ({"drop_ratio": lambda timestep: 2 * timestep}, ValueError, "drop_ratio at timestep 1 must be in"),
    ],
)
def test_wrong_fields(fields, error, match):
    with pytest.raises(error, match=match):
        Policy(**fields)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(dense_first_steps=2, dense_last_steps=1, dense_layers=[0, "blocks.1.attn1"]),
        Policy(dense_above=900, dense_below=100.5, keep_ratio={800: 0.3, 0: 0.1}, drop_ratio={0: 0}),
        Policy(keep_ratio=lambda timestep: 0.2 if timestep < 500 else 0.4),
    ],
    ids=str,
)
def test_dict_round_trip(policy):
    again = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_tables():
    assert Policy().to_dict() == {}
    assert Policy(keep_ratio={800: 0.3, 0: 0.1, 400: 0.1}).keep_ratio == ((0.0, 0.1), (800.0, 0.3))
    assert Policy(keep_ratio=lambda timestep: 0.2 if timestep < 500 else 0.4).keep_ratio == ((0.0, 0.2), (500.0, 0.4))
    with pytest.raises(ValueError, match=r"unknown Policy fields \['dense_steps'\]"):
        Policy.from_dict({"dense_steps": 2})


def test_phases():
    policy = Policy(dense_first_steps=2, dense_last_steps=1, dense_above=900, dense_below=100, keep_ratio={300: 0.5})
    dense_at = [policy.phase(step, 5, 500.0).dense for step in range(5)]
    assert dense_at == [True, True, False, False, True]
    assert [policy.phase(None, None, float(t)).dense for t in (901, 900, 500, 100, 99)] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert [policy.phase(2, 5, float(t)).keep_ratio for t in (200, 300, 800)] == [None, 0.5, 0.5]
    # More dense steps than there are.
    assert all(Policy(dense_first_steps=9).phase(step, 5, None).dense for step in range(5))
    assert Policy().phase(0, 5, None) == Phase()


def test_ratios_of_a_phase():
    assert Phase(False, 0.5, 0.2).apply(SPARSE_SLA) == SPARSE_SLA.replace(keep_ratio=0.5, drop_ratio=0.2)
    assert Phase(False, None, 0.2).apply(SPARSE_VSA) == SPARSE_VSA
    top = foveal.VSAConfig(topk=3)
    assert Phase(False, 0.5).apply(top) == foveal.VSAConfig(keep_ratio=0.5)
    assert Phase().apply(top) is top


@CONFIGS
@torch.no_grad()
def test_a_transformer_alone_goes_by_its_timestep(config):
    model = sparse(config)
    with dense(model):
        original = at(model, 950)
    base, other = at(model, 500), sparse(config.replace(keep_ratio=0.6))
    set_policy(model, Policy(dense_above=900, dense_below=50, keep_ratio={600: 0.6}))
    assert torch.equal(at(model, 950), original)
    assert torch.equal(at(model, 500), base)
    assert torch.equal(at(model, 700), at(other, 700))
    # Several timesteps, of samples or of tokens: the highest.
    assert state_of(model).phase == Phase(False, 0.6, None)
    at(model, 10, 950)
    assert state_of(model).phase.dense
    at(model, 10, 700)
    assert state_of(model).phase == Phase(False, 0.6, None)
    at(model, 10, 10)
    assert state_of(model).phase.dense
    set_policy(model, None)
    assert torch.equal(at(model, 500), base)
    assert get_policy(model) is None


@torch.no_grad()
def test_dense_layers():
    model = sparse(num_layers=3)
    calls = record(model)
    set_policy(model, Policy(dense_layers=[0, "blocks.2.attn1"]))
    run(model)
    assert calls == [("blocks.1.attn1", 0.3)]
    set_policy(model, Policy(dense_layers=range(3)))
    original = run(densify(copy.deepcopy(model)))
    assert torch.equal(run(model), original)
    set_policy(model, None)
    calls.clear()
    run(model)
    assert len(calls) == 3


@torch.no_grad()
def test_layers_that_are_converted_later_follow_the_policy():
    model = sparsify(tiny_transformer(), SPARSE_SLA, layers=[0])
    set_policy(model, Policy(dense_layers=[1], dense_above=900))
    sparsify(model, SPARSE_VSA, layers=[1])
    calls = record(model)
    at(model, 500)
    assert [name for name, _ in calls] == ["blocks.0.attn1"]
    at(model, 950)
    assert len(calls) == 1


SCHEDULERS = {
    "flow match": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "no step index": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@torch.no_grad()
def test_first_and_last_steps_in_a_loop_of_ones_own(scheduler):
    model, scheduler = sparse(num_layers=1), SCHEDULERS[scheduler]()
    set_policy(model, Policy(dense_first_steps=2, dense_last_steps=1, keep_ratio={400: 0.6}), scheduler=scheduler)
    for steps in (6, 4):
        scheduler.set_timesteps(steps)
        calls, phases = inputs(), []
        for timestep in scheduler.timesteps:
            # Twice a step, as guidance does.
            for _ in range(2):
                output = run(model, **calls | {"timestep": timestep.expand(2)})
                phases.append(state_of(model).phase)
            calls["hidden_states"] = scheduler.step(output, timestep, calls["hidden_states"]).prev_sample
        assert [phase.dense for phase in phases] == [True] * 4 + [False] * 2 * (steps - 3) + [True] * 2
        for timestep, phase in zip(scheduler.timesteps[2:-1], phases[4:-2:2], strict=True):
            assert phase.keep_ratio == (0.6 if timestep >= 400 else None)


@torch.no_grad()
def test_a_loop_that_begins_late():
    """Image to image: the first step of such a generation is not the first of the schedule."""
    model, scheduler = sparse(num_layers=1), SCHEDULERS["flow match"]()
    set_policy(model, Policy(dense_first_steps=1, dense_last_steps=1), scheduler=scheduler)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    latents, found = inputs()["hidden_states"], []
    for timestep in scheduler.timesteps[2:]:
        output = run(model, **inputs() | {"hidden_states": latents, "timestep": timestep.expand(2)})
        found.append(state_of(model).phase.dense)
        latents = scheduler.step(output, timestep, latents).prev_sample
    assert found == [True, False, False, True]


def steps_of(pipeline, num_steps=5):
    """(component, dense) of each forward of a generation, without guidance."""
    found, handles = [], []
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipeline, name)
        hook = lambda module, args, output, name=name: found.append((name, state_of(module).phase.dense))  # noqa: E731
        handles.append(transformer.register_forward_hook(hook))
    try:
        generate(pipeline, num_inference_steps=num_steps, guidance_scale=1.0)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def test_first_and_last_steps_of_a_pipeline(monkeypatch):
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    set_policy(pipeline, Policy(dense_first_steps=2, dense_last_steps=1))
    expected = [True, True, False, False, True]
    found = steps_of(pipeline)
    assert [is_dense for _, is_dense in found] == expected
    # The steps are those of the generation, whichever of the two transformers runs.
    assert {name for name, _ in found} == {"transformer", "transformer_2"}
    # Most pipelines of diffusers do not say the step by cache_context: then it is the scheduler's, also a new one's.
    cache_context = diffusers.models.cache_utils.CacheMixin.cache_context
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        monkeypatch.setattr(
            transformer, "cache_context", lambda name, t=transformer, **kwargs: cache_context(t, name), raising=False
        )
    assert [is_dense for _, is_dense in steps_of(pipeline)] == expected
    pipeline.scheduler = SCHEDULERS["unipc"]()
    assert [is_dense for _, is_dense in steps_of(pipeline)] == expected
    with dense(pipeline):
        output = generate(pipeline)
    set_policy(pipeline, Policy(dense_first_steps=2))
    assert torch.equal(generate(pipeline), output)


def test_a_timestep_of_the_schedule_is_not_read(monkeypatch):
    """On a GPU that would make the host wait: a view of the schedule's own tensor says its place by itself."""
    model, scheduler = sparse(num_layers=1), SCHEDULERS["flow match"]()
    scheduler.set_timesteps(4)
    clock = PolicyClock(Policy(dense_first_steps=1, dense_last_steps=1), scheduler=scheduler)
    monkeypatch.setattr(torch.Tensor, "max", lambda *_: pytest.fail("the timestep was read"))
    found = [clock.phase(model, timestep.expand(2)).dense for timestep in scheduler.timesteps]
    assert found == [True, False, False, True]


def test_timesteps_of_flux_are_those_of_its_schedule():
    """Its pipelines divide by 1000 before they call the transformer."""

    class FluxTransformer2DModel(torch.nn.Module):
        pass

    clock = PolicyClock(Policy(dense_above=900))
    assert clock.phase(FluxTransformer2DModel(), torch.tensor([0.95])).dense
    assert not clock.phase(FluxTransformer2DModel(), torch.tensor([0.85])).dense
    assert not clock.phase(tiny_transformer(), 0.95).dense


@torch.no_grad()
def test_a_step_that_nothing_tells():
    model = sparse(num_layers=1)
    policy = Policy(dense_first_steps=1)
    with pytest.raises(ValueError, match="dense_first_steps and dense_last_steps need a schedule: pass the pipeline"):
        set_policy(model, policy)
    assert get_policy(model) is None
    pipeline = tiny_pipeline()
    pipeline.transformer, pipeline.transformer_2 = model, None
    set_policy(pipeline, policy)
    # Before the first generation nothing is a step, and the layers run as they are configured.
    run(model)
    assert state_of(model).phase == Phase()

    clone = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"nothing says which one this is: give set_policy the pipeline"):
        run(clone)
    with clone.cache_context("cond", step_index=0, num_inference_steps=3):
        run(clone)
    assert state_of(clone).phase.dense
    with clone.cache_context("cond", step_index=1, num_inference_steps=3):
        run(clone)
    assert not state_of(clone).phase.dense
    with dense(clone):
        run(clone)
    run(clone.train())
    assert not state_of(clone).phase.dense

    assert get_policy(pickle.loads(pickle.dumps(model))) == policy
    del pipeline
    gc.collect()
    with pytest.raises(ValueError, match="nothing says which one this is"):
        run(model.eval())


@torch.no_grad()
def test_after_a_generation_training_goes_by_timesteps_alone():
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    set_policy(pipeline, Policy(dense_first_steps=1, dense_last_steps=1, dense_above=900))
    generate(pipeline)
    model = pipeline.transformer.train()
    at(model, 500)
    assert not state_of(model).phase.dense
    at(model, 950)
    assert state_of(model).phase.dense


def test_gradient_checkpointing_recomputes_the_phase_of_its_forward():
    model = sparse().train()
    set_policy(model, Policy(dense_above=900, keep_ratio={0: 0.6, 500: 0.3}))
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    for timestep in (100, 600, 950):
        for each in (model, checkpointed):
            each.zero_grad()
        at(model, timestep).square().sum().backward()
        loss = at(checkpointed, timestep).square().sum()
        # Another forward in another phase, before the backward.
        with torch.no_grad():
            at(checkpointed, 950 if timestep < 900 else 100)
        loss.backward()
        for (name, expected), given in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
            assert (expected.grad is None) == (given.grad is None), name
            assert expected.grad is None or torch.equal(expected.grad, given.grad), name


@CONFIGS
@torch.no_grad()
def test_each_phase_compiles_once(config):
    model = sparse(config)
    set_policy(model, Policy(dense_above=900, keep_ratio={0: 0.6, 500: 0.3}))
    timesteps = [950, 100, 600, 950, 600, 100]
    expected = [at(model, timestep) for timestep in timesteps]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for timestep, output in zip(timesteps, expected, strict=True):
        torch.testing.assert_close(at(model, timestep), output, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_a_model_that_is_compiled_as_a_whole():
    model, scheduler = sparse(), SCHEDULERS["flow match"]()
    set_policy(model, Policy(dense_first_steps=2), scheduler=scheduler)
    scheduler.set_timesteps(9)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        output = at(compiled, timestep)
        assert state_of(model).phase.dense == (step < 2)
        torch.testing.assert_close(output, at(model, timestep), rtol=0, atol=1e-6)
    # Dense and sparse, and not one graph a step.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@CONFIGS
@torch.no_grad()
def test_captured_selections_are_those_of_the_phase(config):
    model = sparse(config, num_layers=1)
    set_policy(model, Policy(keep_ratio={600: 0.6}))
    counts = []
    for timestep in (500, 700):
        with capture_selections(model) as found:
            at(model, timestep)
        counts.append(int(next(iter(found.values())).critical_count.float().mean()))
    assert counts[1] >= 1.8 * counts[0]


def test_set_policy_refuses():
    model = sparse()
    for policy, error, match in (
        ({"dense_first_steps": 1}, TypeError, "policy must be a Policy or None, got {'dense_first_steps': 1}"),
        (Policy(dense_layers=[2]), ValueError, r"dense_layers must be in 0\.\.1, got 2"),
        (Policy(dense_layers=["blocks.0.attn2"]), ValueError, "unknown layer 'blocks.0.attn2'"),
        (Policy(dense_layers=[0.5]), TypeError, r"dense_layers must hold indices or names, got 0\.5"),
        (
            Policy(keep_ratio={0: 0.3, 700: 0.95}),
            ValueError,
            r"layer blocks\.0\.attn1 from timestep 700: keep_ratio \+",
        ),
    ):
        with pytest.raises(error, match=match):
            set_policy(model, policy)
        assert get_policy(model) is None
    with pytest.raises(TypeError, match="scheduler must be a scheduler of diffusers, with timesteps, got 'euler'"):
        set_policy(model, Policy(dense_first_steps=1), scheduler="euler")
    pipeline = tiny_pipeline()
    pipeline.scheduler = None
    with pytest.raises(ValueError, match="need a schedule"):
        set_policy(sparsify(pipeline, SPARSE_SLA), Policy(dense_first_steps=1))
    with pytest.raises(ValueError, match="no sparse layer for a policy; call sparsify first"):
        set_policy(tiny_transformer(), Policy(dense_above=900))
    with pytest.raises(TypeError, match="transformer, transformer_2 or transformer_ref, got str"):
        set_policy("wan", Policy())
    with pytest.raises(ValueError, match="keep_ratio must be above 0 for VSA"):
        set_policy(sparse(SPARSE_VSA), Policy(keep_ratio={0: 0.0}))
    # Fits once the other ratio makes room.
    set_policy(model, Policy(keep_ratio={0: 0.3, 700: 0.95}, drop_ratio={0: 0.1, 700: 0.05}))


def test_get_policy():
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    assert get_policy(pipeline) is None
    set_policy(pipeline, Policy(dense_above=900))
    assert get_policy(pipeline) == Policy(dense_above=900)
    set_policy(pipeline.transformer_2, Policy(dense_below=100))
    assert get_policy(pipeline.transformer_2) == Policy(dense_below=100)
    with pytest.raises(ValueError, match="different policies in transformer and transformer_2"):
        get_policy(pipeline)
    with pytest.raises(TypeError, match="got Linear"):
        get_policy(torch.nn.Linear(2, 2))
    assert get_policy(densify(pipeline)) is None


def test_summary_shows_the_policy():
    model = sparsify(tiny_transformer(num_layers=3), SPARSE_SLA, layers=[0, 1])
    assert "policy" not in str(summary(model))
    set_policy(model, Policy(dense_layers=[1], dense_above=900, keep_ratio={0: 0.5}))
    table = summary(model, foveal.VideoGrid(8, 16, 16))
    assert table.policies == {"transformer": get_policy(model)}
    assert table.title().splitlines()[1] == (
        "policy: timesteps dense: above 900; layers dense: 1; keep_ratio: 0.5 from 0"
    )
    assert [row.held_dense for row in table.rows] == [False, True, False]
    assert [row.cells()[1] for row in table.rows] == ["sla", "(sla)", "dense"]
    assert table.rows[0].reduction > 1
    assert table.rows[1].reduction == 1.0
    assert table.rows[1].config == SPARSE_SLA

    pipeline = sparsify(tiny_pipeline(), SLAConfig())
    set_policy(pipeline.transformer, Policy(dense_above=900))
    set_policy(pipeline.transformer_2, Policy(dense_below=100))
    lines = summary(pipeline).title().splitlines()
    assert lines[1:] == [
        "policy of transformer: timesteps dense: above 900",
        "policy of transformer_2: timesteps dense: below 100",
    ]


def test_policies_in_words():
    policy = Policy(dense_first_steps=2, dense_last_steps=1, keep_ratio={0: 0.1, 200: 0.2, 400: 0.3, 600: 0.4})
    assert str(policy) == (
        "steps dense: first 2, last 1; keep_ratio: 0.1 from 0, 0.2 from 200, 0.3 from 400, and 1 more"
    )
    assert str(Policy()) == "none"
