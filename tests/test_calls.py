"""Grid, phase and dense switch belong to one forward; threads, pipelines, copies and recomputations share none."""

import asyncio
import contextlib
import copy
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, inputs, randomize, run, tiny_transformer
from torch.utils.checkpoint import checkpoint

from foveal import Policy, dense, set_policy, sparsify
from foveal.models.processor import state_of

CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
LANDSCAPE, PORTRAIT, SHORT = (3, 10, 14), (3, 14, 10), (2, 6, 8)


def sparse(config=SPARSE_SLA, **kwargs):
    model = sparsify(tiny_transformer(**kwargs), config)
    randomize(model)
    return model


def at_once(*functions):
    """The results of functions that run in threads, and that wait for each other inside of the first block."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(function) for function in functions]]


def meet_inside(model, parties):
    """Threads that run a model meet between its first block and its second."""
    barrier = threading.Barrier(parties, timeout=60)

    def wait(module, args):
        barrier.wait()

    return model.blocks[1].register_forward_pre_hook(wait)


@CONFIGS
@torch.no_grad()
def test_two_threads_two_grids_of_as_many_tokens(config):
    model = sparse(config)
    expected = [run(model, **inputs(latent=latent)) for latent in (LANDSCAPE, PORTRAIT)]
    handle = meet_inside(model, 2)
    calls = [functools.partial(torch.no_grad()(run), model, **inputs(latent=x)) for x in (LANDSCAPE, PORTRAIT)]
    found = at_once(*calls)
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_dense_thread_beside_a_sparse_one():
    model = sparse()
    with dense(model):
        original = run(model)
    expected = run(model)
    handle = meet_inside(model, 2)

    @torch.no_grad()
    def run_dense():
        with dense(model):
            return run(model)

    found = at_once(run_dense, functools.partial(torch.no_grad()(run), model))
    handle.remove()
    assert torch.equal(found[0], original)
    assert torch.equal(found[1], expected)


@torch.no_grad()
def test_a_dense_task_beside_a_sparse_one():
    """Tasks of asyncio share a thread; what a task hands to a thread of its own goes along with it."""
    model = sparse()
    with dense(model):
        original = run(model)
    expected = run(model)

    async def generate(switch):
        if not switch:
            await asyncio.sleep(0)
            return run(model)
        with dense(model):
            await asyncio.sleep(0.01)
            return await asyncio.to_thread(torch.no_grad()(run), model)

    async def both():
        return await asyncio.gather(generate(True), generate(False))

    found = asyncio.run(both())
    assert torch.equal(found[0], original)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_a_copy_made_inside_dense_is_sparse(copied):
    model = sparse()
    expected = run(model)
    with dense(model):
        clone = copied(model)
    assert torch.equal(run(clone), expected)
    assert not any("call" in name or "dense" in name for name in vars(state_of(clone)))


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing_behind():
    model = sparse()
    with pytest.raises(RuntimeError):
        model(**inputs() | {"encoder_hidden_states": torch.zeros(2, 7, 5)})
    assert state_of(model).current() is None
    with pytest.raises(ValueError, match="no grid is known"):
        model.blocks[0].attn1(torch.zeros(1, 105, 32))


class Offloaded(torch.autograd.Function):
    """A checkpoint that keeps its input elsewhere, as unsloth's and diffusion-pipe's do."""

    @staticmethod
    def forward(ctx, function, hidden_states, *args):
        ctx.save_for_backward(hidden_states.clone())
        ctx.function = function
        ctx.args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        with torch.no_grad():
            return function(hidden_states, *args)

    @staticmethod
    def backward(ctx, gradient):
        (hidden_states,) = ctx.saved_tensors
        hidden_states = hidden_states.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden_states, *ctx.args)
        torch.autograd.backward(output, gradient)
        return None, hidden_states.grad, *[None] * len(ctx.args)


CHECKPOINTERS = {
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "offloaded": Offloaded.apply,
}


def gradients(config, checkpointer, policy=None):
    """Of a loss whose backward comes after a forward of another shape, at another timestep, dense."""
    model = sparse(config).train()
    set_policy(model, policy)
    if checkpointer is not None:
        model.enable_gradient_checkpointing(lambda block, *args: checkpointer(block.__call__, *args))
    # What is recomputed needs an input with a gradient.
    data = inputs(batch=1) | {"timestep": torch.tensor([950])}
    data["hidden_states"].requires_grad_()
    loss = run(model, **data).square().mean()
    with torch.no_grad(), dense(model):
        run(model, **inputs(batch=1, latent=PORTRAIT))
    with torch.no_grad():
        run(model, **inputs(batch=1, latent=PORTRAIT) | {"timestep": torch.tensor([100])})
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name.startswith("blocks")}


@pytest.mark.parametrize(
    "checkpointer",
    [
        pytest.param("non-reentrant", marks=pytest.mark.wrapper("checkpointing, non-reentrant")),
        pytest.param("reentrant", marks=pytest.mark.wrapper("checkpointing, reentrant")),
        "offloaded",
    ],
)
@pytest.mark.parametrize(
    ("config", "policy"), [(SPARSE_VSA, None), (SPARSE_SLA, Policy(dense_above=900))], ids=["grid", "policy"]
)
def test_checkpoints_recompute_their_own_forward(config, policy, checkpointer):
    # Of the second block and of the first one's input, whatever the checkpoint does with the other arguments.
    expected, found = (gradients(config, how, policy) for how in (None, CHECKPOINTERS[checkpointer]))
    for name in expected:
        if name.startswith("blocks.1.attn1.to_") or ("attn1" in name and checkpointer != "offloaded"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_a_checkpoint_that_hides_its_forward_is_refused():
    """Reentrant, around a block's forward and not by the transformer's own means: nothing tells which one it was."""
    model = sparse().train()
    block, forward = model.blocks[1], model.blocks[1].forward
    block.forward = functools.partial(checkpoint, forward, use_reentrant=True)
    loss = run(model).square().mean()
    with pytest.raises(ValueError, match="enable_gradient_checkpointing"):
        loss.backward()


REQUESTS = 200


def ltx_pipeline(transformer):
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    pipeline = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ltx_transformer():
    torch.manual_seed(0)
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    ).eval()


@torch.no_grad()
def test_a_server():
    """8 threads, 2 pipelines, 3 resolutions, policy or not, dense or not: every request as it would be alone."""
    transformers = [ltx_transformer(), ltx_transformer()]
    for transformer, config in zip(transformers, (SPARSE_SLA, SPARSE_VSA), strict=True):
        randomize(sparsify(transformer, config))
    pipelines = [ltx_pipeline(transformer) for transformer in transformers]
    set_policy(pipelines[0], Policy(dense_first_steps=1, keep_ratio={0: 0.2, 700: 0.5}))

    def request(number):
        # A request has a scheduler of its own, and shares the rest.
        served = copy.copy(pipelines[number % 2])
        served.scheduler = copy.deepcopy(served.scheduler)
        height, width = ((64, 96), (96, 64), (64, 64))[number % 3]
        with torch.no_grad(), dense(served) if number % 5 == 0 else contextlib.nullcontext():
            return served(
                prompt_embeds=torch.ones(1, 7, 16),
                prompt_attention_mask=torch.ones(1, 7),
                height=height,
                width=width,
                num_frames=17,
                num_inference_steps=2 + number % 2,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(number % 30),
                output_type="latent",
            )[0]

    alone = [request(number) for number in range(30)]
    with ThreadPoolExecutor(8) as pool:
        for number, output in enumerate(pool.map(request, range(REQUESTS))):
            assert torch.equal(output, alone[number % 30]), number
    assert len({tuple(output.flatten()[:2].tolist()) for output in alone}) > 20
