"""For each kind of fault that users reported of libraries like this one, further cases that nobody has reported yet."""

import contextlib
import copy
import functools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import diffusers
import numpy
import peft
import pytest
import test_cogvideox
import test_flux
import test_ltx_video
import torch
from diffusers.training_utils import EMAModel, cast_training_params
from test_policy_steps import letters
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, inputs, randomize, run, tiny_pipeline, tiny_transformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import foveal
from foveal import Policy, VideoGrid, dense, set_policy, sparse_parameters, sparsify
from foveal.checks import clear_constants

CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA.replace(token_order="tile"), SPARSE_VSA], ids=["sla", "vsa"])
FAMILIES = {
    "cogvideox": test_cogvideox.TestCogVideoX,
    "flux": test_flux.TestFlux,
    "ltx_video": test_ltx_video.TestLTXVideo,
}


def sparse(config, model=None):
    model = sparsify(tiny_transformer() if model is None else model, config)
    randomize(model)
    return model


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerances)


# State belongs to a call.


@CONFIGS
@torch.no_grad()
def test_a_copy_made_inside_a_forward(config):
    """By a hook, as callbacks take snapshots: the copy runs at once, on other shapes, and the forward goes on."""
    model = sparse(config)
    expected, other = run(model), run(model, **inputs(latent=(2, 6, 8)))
    copies = []

    def snapshot(module, args, output):
        copies.append(copy.deepcopy(model))
        copies[-1].blocks[0]._forward_hooks.clear()
        copies.append(run(copies[-1], **inputs(latent=(2, 6, 8))))

    handle = model.blocks[0].register_forward_hook(snapshot)
    assert torch.equal(run(model), expected)
    handle.remove()
    assert torch.equal(copies[1], other)
    assert torch.equal(run(copies[0]), expected)


@pytest.mark.parametrize("family", FAMILIES)
@CONFIGS
@torch.no_grad()
def test_threads_of_other_families(family, config):
    """One thread dense, one sparse, which meet inside of the first block."""
    if config is not SPARSE_VSA:
        config = SPARSE_SLA
    checks = FAMILIES[family]()
    model, fed = sparse(config, checks.model()), checks.inputs()
    call = lambda: model(**fed, return_dict=False)[0]  # noqa: E731
    expected = call()
    with dense(model):
        original = call()
    assert not torch.equal(original, expected)
    barrier = threading.Barrier(2, timeout=60)
    block = next(iter(foveal.models.processor.sparse_processors(model))).rpartition(".")[0]

    def wait(module, args):
        barrier.wait()

    handle = model.get_submodule(block).register_forward_pre_hook(wait)

    @torch.no_grad()
    def run_dense():
        with dense(model):
            return call()

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(function).result for function in (run_dense, torch.no_grad()(call))]
        found = [result(timeout=60) for result in found]
    handle.remove()
    assert torch.equal(found[0], original)
    assert torch.equal(found[1], expected)


@CONFIGS
def test_functional_call(config):
    """With parameters of somebody else's, dense or sparse, and gradients with respect to them."""
    model = sparse(config)
    other = {name: (p * 1.1).detach().requires_grad_() for name, p in model.named_parameters()}
    output = torch.func.functional_call(model, other, kwargs=inputs()).sample
    found = torch.autograd.grad(output.square().mean(), list(other.values()), allow_unused=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(other[name])
    expected = gradients(run(twin).square().mean(), twin)
    same({name: g for name, g in zip(other, found, strict=True) if g is not None}, expected)
    with dense(model), dense(twin):
        again = torch.func.functional_call(model, other, kwargs=inputs()).sample
        torch.testing.assert_close(again, run(twin))


# A policy decides by the timestep of a call.


def image_to_image():
    """Flux: its pipeline divides timesteps by 1000, and begins after the schedule does."""
    pipeline = diffusers.FluxImg2ImgPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=test_flux.TestFlux().model(),
    )
    fed = {
        "image": torch.zeros(1, 3, 128, 160),
        "latents": torch.zeros(1, 80, 4),
        "prompt_embeds": torch.ones(1, 7, 16),
        "pooled_prompt_embeds": torch.ones(1, 8),
    }
    return pipeline, fed | {"height": 128, "width": 160}


def video_to_video():
    """CogVideoX: integer timesteps of a diffusion schedule."""
    pipeline = diffusers.CogVideoXVideoToVideoPipeline(
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        text_encoder=None,
        tokenizer=None,
        transformer=test_cogvideox.TestCogVideoX().model(),
    )
    embeds = {name: torch.ones(1, 7, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipeline, embeds | {"latents": torch.zeros(1, 3, 4, 10, 12), "height": 80, "width": 96}


@pytest.mark.parametrize("make", [image_to_image, video_to_video])
@torch.no_grad()
def test_strength_in_other_families(make):
    """Six steps of ten: the first one that runs is the first, and the last one the last."""
    pipeline, fed = make()
    pipeline.set_progress_bar_config(disable=True)
    sparsify(pipeline, SPARSE_SLA)
    set_policy(pipeline, Policy(dense_first_steps=2, dense_last_steps=1))
    log = []
    letters(pipeline.transformer, log)
    for _ in range(2):
        log.clear()
        pipeline(**fed, num_inference_steps=10, strength=0.6, guidance_scale=1.0, output_type="latent")
        assert "".join(log) == "DDsssD"


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@torch.no_grad()
def test_multistep_schedulers_and_two_generations_in_turn(scheduler):
    """Two pipelines share a transformer and go through their schedules step by step in turn."""
    pipeline = tiny_pipeline()
    model = sparsify(pipeline.transformer, SPARSE_SLA)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=pipeline.vae, scheduler=scheduler, transformer=model
    )
    other = copy.copy(pipeline)
    other.scheduler = type(scheduler).from_config(scheduler.config)
    set_policy(pipeline, Policy(dense_first_steps=2, dense_last_steps=1))
    logs, turn = {4: [], 6: []}, threading.local()

    def note(*_):
        logs[turn.steps].append("D" if foveal.models.processor.state_of(model).phase.dense else "s")

    model.register_forward_pre_hook(note)
    barrier = threading.Barrier(2, timeout=60)

    @torch.no_grad()
    def run_one(pipe, steps):
        turn.steps = steps

        def wait(pipeline, step, timestep, tensors):
            if step < 3:
                barrier.wait()
            return tensors

        generate(pipe, num_inference_steps=steps, guidance_scale=1.0, callback_on_step_end=wait)

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(run_one, *each) for each in ((pipeline, 4), (other, 6))]:
            result.result(timeout=60)
    assert {steps: "".join(log) for steps, log in logs.items()} == {4: "DDsD", 6: "DDsssD"}


# Gradients are those of the forward.


@CONFIGS
@pytest.mark.parametrize(
    "how",
    [
        "saved on cpu",
        pytest.param("wrapper", marks=pytest.mark.wrapper("checkpointing, non-reentrant")),
        "reentrant wrapper",
        pytest.param("selective", marks=pytest.mark.wrapper("checkpointing, non-reentrant")),
        pytest.param("without rng", marks=pytest.mark.wrapper("checkpointing, reentrant")),
    ],
)
def test_activations_kept_or_made_elsewhere(config, how):
    """Without an error, or with one where nothing that a checkpoint keeps tells which forward it was."""
    model = sparse(config).train()
    set_policy(model, Policy(dense_above=900))
    data = inputs(batch=1) | {"timestep": torch.tensor([500])}
    data["hidden_states"].requires_grad_()
    expected = gradients(run(model, **data).square().mean(), model)
    twin, context = copy.deepcopy(model), contextlib.nullcontext()
    if how == "saved on cpu":
        context = torch.autograd.graph.save_on_cpu()
    elif how == "selective":

        def keep(ctx, op, *args, **kwargs):
            kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        make = functools.partial(create_selective_checkpoint_contexts, keep)
        twin.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=make)
        )
    elif how == "without rng":
        twin.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=True, preserve_rng_state=False)
        )
    else:
        implementation = CheckpointImpl.REENTRANT if how.startswith("reentrant") else CheckpointImpl.NO_REENTRANT
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
        blocks = set(twin.blocks)
        apply_activation_checkpointing(twin, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks)
    with context:
        loss = run(twin, **data).square().mean()
    with torch.no_grad():
        run(twin, **inputs(batch=1, latent=(2, 6, 8)) | {"timestep": torch.tensor([950])})
    if how == "reentrant wrapper":
        with pytest.raises(ValueError, match="enable_gradient_checkpointing"):
            loss.backward()
        return
    found = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(loss, twin).items()}
    same(found, expected, rtol=1e-4, atol=1e-7)


@CONFIGS
def test_two_forwards_before_their_backwards(config):
    """Of two shapes, one of them dense, in the order of accumulation and against it."""
    model = sparse(config).train()
    fed = [inputs(batch=1), inputs(batch=1, latent=(2, 6, 8))]
    alone = []
    for switch, data in zip((contextlib.nullcontext(), dense(model)), fed, strict=True):
        with switch:
            alone.append(gradients(run(model, **data).square().mean(), model))
    model.enable_gradient_checkpointing()
    for order in ((0, 1), (1, 0)):
        losses = [run(model, **fed[0]).square().mean()]
        with dense(model):
            losses.append(run(model, **fed[1]).square().mean())
        for index in order:
            same(gradients(losses[index], model), alone[index], rtol=1e-4, atol=1e-7)


# No cache outlives its maker.

GRID = VideoGrid(2, 4, 6)


def plain_calls():
    query, key, value = torch.randn(3, 1, 2, 48, 16, generator=torch.Generator().manual_seed(0)).unbind()
    sla = foveal.sla_attention(query, key, value, config=SPARSE_SLA.replace(token_order="tile"), grid=GRID)
    vsa = foveal.vsa_attention(query, key, value, config=SPARSE_VSA, grid=GRID)
    lengths = torch.tensor([40])
    chosen = foveal.select_blocks(
        query, key, block_q=16, block_k=16, keep_ratio=0.4, drop_ratio=0.2, kv_lengths=lengths
    )
    return sla, vsa, chosen.critical


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "float64": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_first_calls_in_a_mode(mode):
    """What functions keep from a first call serves a second one outside of the mode, with gradients."""
    clear_constants()
    expected = plain_calls()
    clear_constants()
    with MODES[mode]():
        generator = None if mode == "meta" else torch.Generator().manual_seed(0)
        tensors = torch.randn(3, 1, 2, 48, 16, generator=generator, dtype=torch.float32)
        query, key, value = tensors.unbind()
        foveal.sla_attention(query, key, value, config=SPARSE_SLA.replace(token_order="tile"), grid=GRID)
        foveal.vsa_attention(query, key, value, config=SPARSE_VSA, grid=GRID)
        lengths = torch.tensor([40])
        foveal.select_blocks(query, key, block_q=16, block_k=16, keep_ratio=0.4, drop_ratio=0.2, kv_lengths=lengths)
    for found, one in zip(plain_calls(), expected, strict=True):
        assert torch.equal(found, one)
    query = torch.randn(1, 2, 48, 16, requires_grad=True)
    foveal.vsa_attention(query, query, query, config=SPARSE_VSA, grid=GRID).sum().backward()
    assert query.grad.isfinite().all()


@CONFIGS
def test_training_after_a_generation_in_inference_mode(config):
    clear_constants()
    model = sparse(config)
    with torch.inference_mode():
        run(model)
    found = gradients(run(model).square().mean(), model)
    clear_constants()
    fresh = sparse(config)
    same(found, gradients(run(fresh).square().mean(), fresh))


@pytest.mark.wrapper("torch.export")
@CONFIGS
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(config, strict):
    """A whole transformer, as the first thing that the process does with these shapes."""
    clear_constants()
    model = sparse(config)
    exported = torch.export.export(model, (), kwargs=inputs(), strict=strict).module()
    assert torch.equal(exported(**inputs()).sample, run(model))
    with torch.enable_grad():
        assert gradients(run(model).square().mean(), model)


# Mixed precision.


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_float32_under_autocast(config, dtype):
    """As diffusers' scripts train: low-precision weights, float32 adapters and sparse parameters, backward inside."""
    model = sparse(config, tiny_transformer().to(dtype))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    foveal.unfreeze(model)
    cast_training_params(model, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        loss = run(model, **inputs(dtype=dtype)).float().square().mean()
        loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    assert sparse_parameters(model).keys() <= trained.keys()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        before = run(model, **inputs(dtype=dtype)).float()
        model.fuse_lora()
        fused = run(model, **inputs(dtype=dtype)).float()
        model.unfuse_lora()
        after = run(model, **inputs(dtype=dtype)).float()
    torch.testing.assert_close(fused, before, rtol=0.05, atol=0.05)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


@CONFIGS
def test_moving_averages_of_diffusers(config, tmp_path):
    model = sparse(config)
    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5, model_cls=type(model), model_config=model.config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.step(model.parameters())  # the first one only copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.step(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    for name, parameter in sparse_parameters(model).items():
        assert (parameter > before[name]).all()
        assert (parameter < before[name] + 1).all()
    average.restore(model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 1)


@CONFIGS
def test_layerwise_casting_trains_and_generates(config):
    model = sparse(config, tiny_transformer().to(torch.bfloat16))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".processor." in name)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, **inputs(dtype=torch.bfloat16)).float().square().mean().backward()
    for parameter in sparse_parameters(model).values():
        assert parameter.itemsize >= 2
        assert parameter.grad.isfinite().all()


# Sharding and offloading.


@pytest.mark.wrapper("accelerate offloading")
@CONFIGS
@pytest.mark.parametrize("how", ["cpu_offload", "cpu_offload_with_hook", "disk_offload", "dispatch"])
@torch.no_grad()
def test_offloading_of_accelerate(config, how, tmp_path):
    model = sparse(config)
    set_policy(model, Policy(dense_above=900))
    expected = [run(model, **inputs() | {"timestep": torch.tensor([t, t])}) for t in (500, 950)]
    device = torch.device("cpu")
    if how == "cpu_offload":
        accelerate.cpu_offload(model, device)
    elif how == "cpu_offload_with_hook":
        accelerate.cpu_offload_with_hook(model, device)
    elif how == "disk_offload":
        accelerate.disk_offload(model, tmp_path, device)
    else:
        model = accelerate.dispatch_model(
            model, {"": "cpu", "blocks.0": "disk"}, offload_dir=tmp_path, main_device="cpu", force_hooks=True
        )
    for t, one in zip((500, 950), expected, strict=True):
        torch.testing.assert_close(run(model, **inputs() | {"timestep": torch.tensor([t, t])}), one)


# Random state.


@CONFIGS
def test_nothing_draws_from_the_global_generators(config, tmp_path):
    model = tiny_transformer()
    before = torch.random.get_rng_state(), random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
    sparsify(model, config)
    set_policy(model, Policy(dense_above=900))
    run(model)
    foveal.reconfigure(model, config.replace(keep_ratio=0.5))
    foveal.summary(model)
    foveal.save(model, tmp_path)
    copy.deepcopy(model)
    with dense(model):
        run(model)
    foveal.densify(model)
    foveal.load(model, tmp_path)
    after = torch.random.get_rng_state(), random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


@CONFIGS
def test_dropout_around_sparse_layers(config):
    """Checkpoints restore the state of the generator for it, and sparse layers draw nothing in between."""
    model = sparse(config).train()
    for block in model.blocks:
        block.ffn.net.insert(1, torch.nn.Dropout(0.3))
    results = []
    for enabled in (False, True):
        (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            results.append(gradients(run(model).square().mean(), model))
    same(*results, rtol=1e-4, atol=1e-7)
