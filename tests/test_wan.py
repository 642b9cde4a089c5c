"""Sparse attention in a tiny random `WanTransformer3DModel` and in a pipeline around it."""

import copy
import subprocess
import sys

import pytest
import torch
from tiny_wan import (
    DENSE_SLA,
    DENSE_VSA,
    SPARSE_SLA,
    SPARSE_VSA,
    generate,
    inputs,
    randomize,
    run,
    tiny_pipeline,
    tiny_transformer,
)

import foveal
from foveal import SLAConfig, VideoGrid
from foveal.models import dense, densify, sparsify, summary
from foveal.models.processor import SparseAttentionProcessor


def test_import_needs_no_diffusers():
    code = "import sys, foveal.models; sys.exit('diffusers' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    "config", [DENSE_SLA, DENSE_SLA.replace(token_order="tile"), DENSE_VSA], ids=["sla", "sla tile order", "vsa"]
)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@torch.no_grad()
def test_keeping_everything_equals_dense(config, fused):
    model = tiny_transformer().double()
    if fused:
        model.fuse_qkv_projections()
    data = inputs(dtype=torch.float64)
    expected = run(model, **data)
    sparsify(model, config)
    torch.testing.assert_close(run(model, **data), expected, rtol=0, atol=1e-6)
    assert model.blocks[0].attn1.processor.state.grid == VideoGrid(3, 5, 7)


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@torch.no_grad()
def test_layer_runs_the_method(config):
    """One layer against the method's reference on query, key and value from the layer's own projections."""
    model = sparsify(tiny_transformer(), config, impl="torch")
    randomize(model)
    attn = model.blocks[0].attn1
    grid, seen = VideoGrid(3, 5, 7), {}
    method = attn.processor.attention.register_forward_hook(
        lambda module, args, output: seen.update(args=args, output=output)
    )
    attn.register_forward_hook(lambda module, args, output: seen.update(x=args[0], layer=output))
    run(model)
    method.remove()
    x, output = seen["x"], seen["layer"]
    query, key, value = seen["args"][:3]
    dense_output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with dense(model):
        run(model)
    torch.testing.assert_close(
        attn.to_out[0](dense_output.transpose(1, 2).flatten(2)), seen["layer"], rtol=0, atol=1e-5
    )
    module = attn.processor.attention
    if isinstance(config, SLAConfig):
        expected = foveal.sla_attention(
            query.double(),
            key.double(),
            value.double(),
            config=config,
            proj_weight=module.proj.weight.double(),
            proj_bias=module.proj.bias.double(),
            impl="reference",
        )
    else:
        gate = module.to_gate_coarse(x).unflatten(-1, (2, 16)).transpose(1, 2)
        expected = foveal.vsa_attention(
            query.double(),
            key.double(),
            value.double(),
            config=config,
            grid=grid,
            gate_coarse=gate.double(),
            impl="reference",
        )
    torch.testing.assert_close(seen["output"].double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(output, attn.to_out[0](seen["output"].transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)
    assert (seen["output"] - dense_output).abs().max() > 1e-2


def test_query_key_value_are_views():
    model = sparsify(tiny_transformer(num_layers=1), SPARSE_SLA)
    strides = []
    attention = model.blocks[0].attn1.processor.attention
    attention.register_forward_pre_hook(lambda module, args: strides.extend(x.stride() for x in args[:3]))
    with torch.no_grad():
        run(model)
    tokens, hidden, head_dim = 3 * 5 * 7, 32, 16
    assert strides == [(tokens * hidden, head_dim, hidden, 1)] * 3


def test_only_self_attention_is_replaced():
    model = tiny_transformer()
    cross = [block.attn2.processor for block in model.blocks]
    parameters = set(model.state_dict())
    sparsify(model, SPARSE_SLA)
    assert all(isinstance(block.attn1.processor, SparseAttentionProcessor) for block in model.blocks)
    assert [block.attn2.processor for block in model.blocks] == cross
    added = set(model.state_dict()) - parameters
    assert added == {f"blocks.{i}.attn1.processor.attention.proj.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert set(model.attn_processors) == {f"blocks.{i}.attn{j}.processor" for i in (0, 1) for j in (1, 2)}


@torch.no_grad()
def test_grid_changes_between_calls():
    model = sparsify(tiny_transformer(), SPARSE_VSA)
    randomize(model)
    state = model.blocks[0].attn1.processor.state
    outputs = {}
    for latent in ((3, 10, 14), (3, 14, 10), (1, 6, 8), (3, 10, 14)):
        outputs.setdefault(latent, []).append(run(model, **inputs(latent=latent)))
        assert state.grid == VideoGrid(latent[0], latent[1] // 2, latent[2] // 2)
    assert torch.equal(*outputs[3, 10, 14])
    fresh = sparsify(tiny_transformer(), SPARSE_VSA)
    randomize(fresh)
    assert torch.equal(run(fresh, **inputs(latent=(3, 14, 10))), outputs[3, 14, 10][0])


def test_block_without_a_forward_knows_no_grid():
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    with pytest.raises(ValueError, match="no grid"):
        model.blocks[0].attn1(torch.randn(1, 105, 32))


def test_autocast_matches_dense():
    model = tiny_transformer()
    # As CUDA's autocast does to some norms: query and key in float32 beside a value in bfloat16.
    for block in model.blocks:
        block.attn1.norm_q.register_forward_hook(lambda module, args, output: output.float())
        block.attn1.norm_k.register_forward_hook(lambda module, args, output: output.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        sparsify(model, DENSE_SLA)
        output = run(model)
    with torch.no_grad():
        exact = run(densify(copy.deepcopy(model)))
    assert (output - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-3


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA.replace(fine_gate=True)], ids=["sla", "vsa"])
def test_gradients_reach_the_new_parameters(config):
    model = sparsify(tiny_transformer(), config)
    run(model).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".processor." in name}
    assert len(gradients) == (4 if isinstance(config, SLAConfig) else 8)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_gradient_checkpointing_gives_the_same_gradients(config):
    model = sparsify(tiny_transformer(), config).train()
    randomize(model)
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    run(model).square().sum().backward()
    loss = run(checkpointed).square().sum()
    # The recomputation must use the grid of its own forward: the same number of tokens in another shape comes between.
    with torch.no_grad():
        run(checkpointed, **inputs(latent=(3, 14, 10)))
    loss.backward()
    for (name, expected), given in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(expected.grad, given.grad), name


def test_gradient_checkpointing_of_a_dense_forward():
    model = sparsify(tiny_transformer(), SPARSE_SLA).train()
    teacher = densify(copy.deepcopy(model))
    model.enable_gradient_checkpointing()
    run(teacher).square().sum().backward()
    with dense(model):
        loss = run(model).square().sum()
    loss.backward()
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name
    assert all(p.grad is None for name, p in model.named_parameters() if ".processor." in name)


@pytest.mark.wrapper("torch.compile, static shapes")
@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@torch.no_grad()
def test_compiled_blocks(config):
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    expected = [run(model, **inputs(latent=latent)) for latent in ((3, 10, 14), (2, 6, 8))]
    with dense(model):
        expected_dense = run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for latent, output in zip(((3, 10, 14), (2, 6, 8)), expected, strict=True):
        torch.testing.assert_close(run(model, **inputs(latent=latent)), output, rtol=0, atol=1e-6)
    with dense(model):
        torch.testing.assert_close(run(model), expected_dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@torch.no_grad()
def test_layerwise_casting_leaves_the_new_parameters(config):
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    former = {name: p.clone() for name, p in model.named_parameters() if ".processor." in name}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    run(model)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    for name, parameter in former.items():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_sparsify_after_layerwise_casting_takes_the_compute_dtype():
    model = tiny_transformer()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    sparsify(model, SPARSE_VSA)
    assert model.blocks[0].attn1.processor.attention.to_gate_coarse.weight.dtype == torch.float32
    with torch.no_grad():
        assert run(model).isfinite().all()


def test_peft_adapter_beside_sparse_attention():
    peft = pytest.importorskip("peft")
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    with torch.no_grad():
        expected = run(model)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)


def test_pipeline_end_to_end():
    pipeline = tiny_pipeline()
    expected = generate(pipeline)
    assert sparsify(pipeline, DENSE_SLA) is pipeline
    torch.testing.assert_close(generate(pipeline), expected, rtol=0, atol=1e-4)
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        assert transformer.blocks[0].attn1.processor.state.grid == VideoGrid(3, 5, 7)
    assert pipeline.transformer.blocks[0].attn1.processor.state is not (
        pipeline.transformer_2.blocks[0].attn1.processor.state
    )
    densify(pipeline)
    sparsify(pipeline, SPARSE_SLA)
    assert (generate(pipeline) - expected).abs().max() > 1e-3
    with dense(pipeline):
        assert torch.equal(generate(pipeline), expected)
    assert [row.layer for row in summary(pipeline).rows] == [
        f"{part}.blocks.{i}.attn1" for part in ("transformer", "transformer_2") for i in (0, 1)
    ]
    assert torch.equal(generate(densify(pipeline)), expected)
