"""Which step a forward is: where a schedule begins late or ends early, is shared, or has two evaluations a step."""

import copy

import diffusers
import pytest
import torch
from test_calls import ltx_pipeline, ltx_transformer
from tiny_wan import SPARSE_SLA, inputs, run, tiny_transformer

from foveal import Policy, set_policy, sparsify
from foveal.models.processor import state_of
from foveal.models.schedules import TimestepScale, place_in


def letters(model, log):
    """Notes D for every dense forward and s for every sparse one."""
    return model.register_forward_pre_hook(lambda *_: log.append("D" if state_of(model).phase.dense else "s"))


@pytest.fixture
def ltx():
    """(pipeline, its steps of the generations to come)."""
    pipeline, log = ltx_pipeline(sparsify(ltx_transformer(), SPARSE_SLA)), []
    letters(pipeline.transformer, log)
    return pipeline, log


@torch.no_grad()
def generate(pipeline, log, steps=4, **arguments):
    log.clear()
    pipeline(
        prompt_embeds=torch.ones(1, 7, 16),
        prompt_attention_mask=torch.ones(1, 7),
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        **arguments,
    )
    return "".join(log)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_pipeline_is_followed_whatever_mode_the_model_is_in(ltx, mode):
    pipeline, log = ltx
    getattr(pipeline.transformer, mode)()
    set_policy(pipeline, Policy(dense_first_steps=2, dense_last_steps=1))
    assert generate(pipeline, log, 5) == "DDssD"


def test_pipelines_that_share_a_transformer(ltx):
    """By each one's own scheduler, not by the one that the policy came with."""
    pipeline, log = ltx
    set_policy(pipeline, Policy(dense_first_steps=1, dense_last_steps=1))
    recipe = diffusers.LTXPipeline(**pipeline.components | {"scheduler": copy.deepcopy(pipeline.scheduler)})
    recipe.set_progress_bar_config(disable=True)
    scoped = copy.copy(pipeline)
    scoped.scheduler = copy.deepcopy(pipeline.scheduler)
    for other in (pipeline, recipe, scoped):
        assert generate(other, log) == "DssD"
        assert generate(other, log, 6) == "DssssD"


def test_a_compiled_transformer_is_its_pipelines(ltx):
    pipeline, log = ltx
    model = pipeline.transformer
    set_policy(pipeline, Policy(dense_first_steps=1))
    pipeline.transformer = torch.compile(model, backend="eager", disable=True)
    assert generate(pipeline, log) == "Dsss"


@torch.no_grad()
def test_a_loop_that_starts_in_the_middle():
    """Video to video: nothing but the first timestep itself says where it starts."""
    model, scheduler, log = sparsify(tiny_transformer(num_layers=1), SPARSE_SLA), flow_match(), []
    letters(model, log)
    set_policy(model, Policy(dense_first_steps=2, dense_last_steps=1), scheduler=scheduler)
    for _ in range(2):
        scheduler.set_timesteps(10)
        walk(model, scheduler, scheduler.timesteps[5:])
    assert "".join(log) == "DDssD" * 2


def flow_match(cls=diffusers.FlowMatchEulerDiscreteScheduler):
    return cls(shift=3.0)


def walk(model, scheduler, timesteps, dtype=None):
    latents = inputs(batch=1)["hidden_states"]
    for timestep in timesteps:
        given = timestep.expand(1) if dtype is None else timestep.expand(1).to(dtype)
        output = run(model, **inputs(batch=1) | {"hidden_states": latents, "timestep": given})
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_second_order_steps_have_two_evaluations(dtype):
    model, log = sparsify(tiny_transformer(num_layers=1), SPARSE_SLA), []
    scheduler = flow_match(diffusers.FlowMatchHeunDiscreteScheduler)
    letters(model, log)
    set_policy(model, Policy(dense_first_steps=2, dense_last_steps=1), scheduler=scheduler)
    scheduler.set_timesteps(4)
    walk(model, scheduler, scheduler.timesteps, dtype)
    assert "".join(log) == "DDDDssD"


def test_a_last_sigma_of_zero_is_no_step():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.0])
    places = [place_in(scheduler, timestep.expand(2), TimestepScale()) for timestep in scheduler.timesteps[:-1]]
    assert places == [(0, 3), (1, 3), (2, 3)]


def test_a_pipeline_that_leaves_out_the_last_timestep():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)

    class LTXI2VLongMultiPromptPipeline:
        _num_timesteps = 5

    sliding = LTXI2VLongMultiPromptPipeline()
    places = [
        place_in(scheduler, timestep[None], TimestepScale(), pipeline=sliding) for timestep in scheduler.timesteps[:-1]
    ]
    assert places == [(step, 4) for step in range(4)]


@torch.no_grad()
def test_a_timestep_of_no_schedule_is_said_aloud():
    model, scheduler = sparsify(tiny_transformer(num_layers=1), SPARSE_SLA), flow_match()
    set_policy(model, Policy(dense_first_steps=1), scheduler=scheduler)
    scheduler.set_timesteps(4)
    with pytest.warns(UserWarning, match="the schedule does not have the timestep of this forward"):
        run(model, **inputs() | {"timestep": torch.tensor([431.0, 431.0])})
    assert not state_of(model).phase.dense


@pytest.mark.parametrize("divisor", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_that_were_cast_and_divided(dtype, divisor):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        assert place_in(scheduler, (timestep.expand(2).to(dtype) / divisor), TimestepScale(divisor)) == (step, 8)
