"""Converted models on a GPU, with its kernels: what moves weights between devices, and Inductor's compiled blocks."""

import copy

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
tiny_wan = pytest.importorskip("tiny_wan")

from foveal import SLAConfig, VSAConfig, sparsify  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        SLAConfig(keep_ratio=0.3, drop_ratio=0.1),
        SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=128, linear_scope="all"),
        SLAConfig(keep_ratio=0.3, drop_ratio=0.1, feature_map="hedgehog"),
        VSAConfig(keep_ratio=0.3, tile="auto"),
    ],
    ids=["sla", "sla-all", "sla-hedgehog", "vsa"],
)


def sparse_model(config):
    """A transformer of two heads of 64, bfloat16, on the CPU."""
    model = sparsify(tiny_wan.tiny_transformer(attention_head_dim=64), config)
    tiny_wan.randomize(model)
    return model.to(torch.bfloat16)


def fed():
    """448 tokens a sample."""
    given = tiny_wan.inputs(latent=(4, 16, 28), dtype=torch.bfloat16)
    return {name: x.to(DEVICE) for name, x in given.items()}


def on_the_device(model):
    with torch.no_grad():
        return tiny_wan.run(copy.deepcopy(model).to(DEVICE), **fed())


@CONFIGS
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("use_stream", [False, True])
@torch.no_grad()
def test_group_offload(config, kind, use_stream):
    model = sparse_model(config)
    expected = on_the_device(model)
    settings = {"offload_type": kind, "use_stream": use_stream}
    if kind == "block_level":
        settings["num_blocks_per_group"] = 1
    model.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), **settings)
    for _ in range(2):
        assert torch.equal(tiny_wan.run(model, **fed()), expected)
    assert {p.device.type for p in model.blocks.parameters()} == {"cpu"}


@CONFIGS
@torch.no_grad()
def test_sequential_offload(config):
    model = sparse_model(config)
    expected = on_the_device(model)
    accelerate.cpu_offload(model, execution_device=DEVICE)
    for _ in range(2):
        assert torch.equal(tiny_wan.run(model, **fed()), expected)


@CONFIGS
@torch.no_grad()
def test_model_offload_of_a_pipeline(config):
    pipeline = tiny_wan.tiny_pipeline()
    for name in ("transformer", "transformer_2"):
        setattr(pipeline, name, sparse_model(config))
    expected = tiny_wan.generate(pipeline.to(DEVICE))
    pipeline.to("cpu")
    pipeline.enable_model_cpu_offload(device=DEVICE)
    assert torch.equal(tiny_wan.generate(pipeline), expected)
    assert {p.device.type for p in pipeline.transformer.parameters()} == {"cpu"}


@CONFIGS
@pytest.mark.parametrize("train", [False, True])
def test_compiled_blocks(config, train):
    """Inductor's code around the kernels, without a graph break.

    Its fused arithmetic rounds less often, which may move a block in or out of a selection: norms are compared.
    """
    model = sparse_model(config).to(DEVICE).train(train)
    compiled = copy.deepcopy(model)
    compiled.compile_repeated_blocks(fullgraph=True)
    with torch.set_grad_enabled(train):
        outputs = [tiny_wan.run(x, **fed()) for x in (model, compiled)]
    expected, given = (output.float() for output in outputs)
    assert (given - expected).norm() <= 0.03 * expected.norm()
    if train:
        for output in outputs:
            output.float().square().mean().backward()
        for (name, expected), given in zip(model.named_parameters(), compiled.parameters(), strict=True):
            error = (given.grad.float() - expected.grad.float()).norm()
            assert error <= 0.1 * expected.grad.float().norm() + 1e-6, name


def test_blocks_compiled_for_training_have_every_gradient():
    """Several norms take slices of one table; how large it is decides how Inductor makes its gradient."""
    from foveal.lab.train.model import build_wan, compile_blocks, velocity
    from foveal.lab.train.settings import WanArchitecture

    torch.manual_seed(0)
    sizes = WanArchitecture(num_layers=2, num_heads=12, ffn_dim=256, text_dim=64)
    model = sparsify(build_wan(sizes), SLAConfig(keep_ratio=0.1, drop_ratio=0.1)).to(DEVICE)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    noisy, sigmas = torch.randn(1, 16, 2, 60, 104, device=DEVICE), torch.full((1,), 0.5, device=DEVICE)
    text = {"prompt_embeds": torch.randn(1, 8, 64, device=DEVICE)}
    for trained in (model, compiled):
        with torch.autocast("cuda", torch.bfloat16):
            velocity(trained, noisy, sigmas, text).square().mean().backward()
    for (name, expected), given in zip(model.named_parameters(), compiled.parameters(), strict=True):
        error = (given.grad - expected.grad).norm()
        assert error <= 0.1 * expected.grad.norm() + 1e-6, name


def test_a_training_run_is_that_of_the_cpu(tmp_path):
    """Samples and noise come from threads, in pinned memory."""
    from tiny_training import config, metrics, write_data

    from foveal.lab.train.trainer import run_training

    losses = []
    for device in ("cpu", "auto"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / device
        write_data(folder / "data")
        assert run_training(config(folder, device=device, data__workers=2, batch_size=4, steps=4)).finished
        losses.append(metrics(folder))
    assert losses[0].keys() == losses[1].keys() == set(range(1, 5))
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-2)
