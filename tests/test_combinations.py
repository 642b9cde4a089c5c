"""Sparse attention beside what diffusers, PEFT and quantizers do to a model; `test_wan`, `test_processor` have more."""

import contextlib
import copy
import logging

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, inputs, randomize, run, tiny_pipeline, tiny_transformer
from torch import nn

import foveal
from foveal import Policy, dense, densify, load, save, set_policy, sparse_parameters, sparsify, unfreeze
from foveal.models import quantizable
from foveal.models.processor import sparse_processors

HEDGEHOG = SPARSE_SLA.replace(feature_map="hedgehog")
CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA, HEDGEHOG, SPARSE_VSA], ids=["sla", "hedgehog", "vsa"])
CPU = torch.device("cpu")


def sparse(config, **kwargs):
    model = sparsify(tiny_transformer(**kwargs), config)
    randomize(model)
    return model


@pytest.mark.wrapper("group offloading")
@CONFIGS
@pytest.mark.parametrize("offload", ["block", "leaf", "leaf to disk"])
@torch.no_grad()
def test_group_offload(config, offload, tmp_path):
    model = sparse(config)
    expected = run(model)
    settings = {"offload_type": "block_level", "num_blocks_per_group": 1}
    if offload != "block":
        settings = {"offload_type": "leaf_level"}
    if offload == "leaf to disk":
        # What is not on the device holds garbage then: it shows whether a parameter is there when it is used.
        settings["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **settings)
    for _ in range(2):
        assert torch.equal(run(model), expected)


@torch.no_grad()
def test_the_projection_outlives_the_call_that_reads_it(tmp_path):
    """Group offloading empties a module's parameters at the end of its call."""
    model = sparse(SPARSE_SLA, num_layers=1)
    expected = {name: p.clone() for name, p in sparse_parameters(model).items()}
    model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    for given, former in zip(model.blocks[0].attn1.processor.attention.proj(), expected.values(), strict=True):
        assert torch.equal(given, former)


@pytest.mark.wrapper("model and sequential offloading")
@CONFIGS
@torch.no_grad()
def test_model_offload_of_a_pipeline(config):
    pytest.importorskip("accelerate")
    pipeline = sparsify(tiny_pipeline(), config)
    set_policy(pipeline, Policy(dense_first_steps=1))
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipeline), expected)
    pipeline.remove_all_hooks()
    assert torch.equal(generate(pipeline), expected)


@CONFIGS
@torch.no_grad()
def test_fusing_projections_after_the_conversion(config):
    model = sparse(config)
    expected = run(model)
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_compiled_blocks_of_several_kinds():
    """Blocks share their code, so each kind of layer is compiled once, whatever their number."""
    kinds = {0: SPARSE_SLA, 1: SPARSE_VSA, 3: SPARSE_SLA.replace(keep_ratio=0.5), range(4, 6): SPARSE_SLA}
    model = sparsify(tiny_transformer(num_layers=6), layers=kinds)
    randomize(model)
    expected = run(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_blocks_with_gradient_checkpointing():
    model = sparse(SPARSE_SLA).train()
    plain = copy.deepcopy(model)
    run(plain).square().sum().backward()
    torch._dynamo.reset()
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    run(model).square().sum().backward()
    for (name, expected), given in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            given.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@CONFIGS
@torch.no_grad()
def test_guidance_in_one_batch(config):
    """Each sample selects for itself: a batch of two, text and no text, is the two runs."""
    model = sparse(config)
    both = inputs() | {"timestep": torch.tensor([500, 500])}
    alone = [run(model, **{name: x[i : i + 1] for name, x in both.items()}) for i in range(2)]
    torch.testing.assert_close(run(model, **both), torch.cat(alone), rtol=0, atol=1e-5)


@CONFIGS
@torch.no_grad()
def test_first_block_cache(config):
    model = sparse(config, num_layers=4)
    expected, calls = run(model), []
    for name, processor in sparse_processors(model).items():
        processor.attention.register_forward_pre_hook(lambda *args, name=name: calls.append(name))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with model.cache_context("cond"):
        assert torch.equal(run(model), expected)
        assert len(calls) == 4
        # The same input again: the first block runs, and the others are taken from the cache.
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert calls[4:] == ["blocks.0.attn1"]
    model.disable_cache()
    assert torch.equal(run(model), expected)


def test_first_block_cache_and_a_policy():
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    set_policy(pipeline, Policy(dense_first_steps=1))
    with dense(pipeline):
        expected = generate(pipeline, num_inference_steps=1)
    for part in (pipeline.transformer, pipeline.transformer_2):
        part.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    assert torch.equal(generate(pipeline, num_inference_steps=1), expected)


@CONFIGS
def test_a_copy_as_a_dense_teacher(config):
    model = sparse(config).train()
    teacher = densify(copy.deepcopy(model)).requires_grad_(False).eval()
    with torch.no_grad():
        target = run(teacher)
        with dense(model):
            assert torch.equal(run(model), target)
    loss = (run(model) - target).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert torch.equal(run(teacher), target)
        assert (run(model) - target).square().mean() < loss
    assert all(p.grad is not None for p in sparse_parameters(model).values())


def test_an_average_of_the_weights():
    from diffusers.training_utils import EMAModel

    model = sparse(SPARSE_SLA)
    former = {name: p.clone() for name, p in sparse_parameters(model).items()}
    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    average.step(model.parameters())
    with torch.no_grad():
        for parameter in sparse_parameters(model).values():
            parameter.add_(2)
    average.step(model.parameters())
    average.copy_to(model.parameters())
    for name, parameter in sparse_parameters(model).items():
        torch.testing.assert_close(parameter, former[name] + 1, rtol=0, atol=1e-6)


def lora(**settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, **{"target_modules": ["to_q", "to_v"], "init_lora_weights": False} | settings)


LORA_FILE = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None}


@CONFIGS
def test_lora_freezes_and_unfreeze_thaws(config):
    model = sparse(config).train()
    model.add_adapter(lora())
    assert not any(p.requires_grad for p in sparse_parameters(model).values())
    assert unfreeze(model) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert trained == adapters | set(sparse_parameters(model))
    former = {name: model.get_parameter(name).clone() for name in trained}
    run(model).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    for name, parameter in former.items():
        assert not torch.equal(model.get_parameter(name), parameter), name


@CONFIGS
@pytest.mark.parametrize("first", ["adapter", "sparse"])
@torch.no_grad()
def test_lora_and_sparse_parameters_are_saved_apart(config, first, tmp_path):
    model = sparse(config)
    model.add_adapter(lora())
    expected = run(model)
    model.save_lora_adapter(tmp_path / "lora")
    save(model, tmp_path / "sparse")
    other = tiny_transformer()
    if first == "sparse":
        load(other, tmp_path / "sparse")
    other.load_lora_adapter(tmp_path / "lora", **LORA_FILE)
    if first == "adapter":
        load(other, tmp_path / "sparse")
    assert torch.equal(run(other), expected)
    other.disable_lora()
    assert torch.equal(run(other), run(sparse(config)))


@torch.no_grad()
def test_lora_on_our_own_layers(tmp_path):
    """target_modules="all-linear" adapts the gates too: ours are then what is below the adapter."""
    model = sparse(SPARSE_VSA)
    bare = {name: p.clone() for name, p in sparse_parameters(model).items()}
    model.add_adapter(lora(target_modules="all-linear"))
    gates = model.blocks[0].attn1.processor.attention.to_gate_coarse
    assert hasattr(gates, "lora_A")
    ours = sparse_parameters(model)
    assert [name.replace(".base_layer", "") for name in ours] == list(bare)
    assert all(torch.equal(ours[name], bare[name.replace(".base_layer", "")]) for name in ours)
    expected = run(model)
    model.save_lora_adapter(tmp_path / "lora")
    save(model, tmp_path / "sparse")
    other = load(tiny_transformer(), tmp_path / "sparse")
    other.load_lora_adapter(tmp_path / "lora", **LORA_FILE)
    assert torch.equal(run(other), expected)
    foveal.reconfigure(model, SPARSE_VSA.replace(keep_ratio=0.9))
    assert not torch.equal(run(model), expected)


@CONFIGS
@torch.no_grad()
def test_modules_to_save_of_peft(config, tmp_path):
    """PEFT may train and keep a copy of ours beside the adapter; the copy in use is what counts."""
    model = sparse(config)
    expected = run(model)
    model.add_adapter(lora(target_modules=["to_q"], init_lora_weights=True, modules_to_save=["processor.attention"]))
    assert torch.equal(run(model), expected)
    ours = sparse_parameters(model)
    assert all(parameter.requires_grad and ".modules_to_save.default." in name for name, parameter in ours.items())
    for parameter in ours.values():
        parameter.add_(1)
    save(model, tmp_path)
    other = load(tiny_transformer(), tmp_path)
    assert torch.equal(run(other), run(model))
    assert [p.config for p in sparse_processors(model).values()] == [config] * 2


@CONFIGS
@torch.no_grad()
def test_an_adapter_before_the_conversion(config):
    model = tiny_transformer()
    model.add_adapter(lora())
    sparsify(model, config)
    assert all(p.requires_grad for p in sparse_parameters(model).values())
    with dense(model):
        expected = run(model)
    assert (run(model) - expected).abs().max() > 1e-3
    assert torch.equal(run(densify(model)), expected)


def test_names_of_sparse_parameters():
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA, layers=[1])
    names = [f"blocks.1.attn1.processor.attention.proj.{name}" for name in ("weight", "bias")]
    assert list(sparse_parameters(pipeline.transformer)) == names
    assert list(sparse_parameters(pipeline)) == [f"{p}.{n}" for p in ("transformer", "transformer_2") for n in names]
    assert sparse_parameters(tiny_transformer()) == {}
    assert sparse_parameters(sparsify(tiny_transformer(), SPARSE_SLA.replace(linear_scope="none"))) == {}


def test_quantizers_pass_our_layers_by():
    model = sparse(SPARSE_VSA)
    chosen = {name for name, module in model.named_modules() if quantizable(module, name)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - chosen == {f"blocks.{i}.attn1.processor.attention.to_gate_coarse" for i in (0, 1)}
    # Quantisers of diffusers leave out what a class keeps in float32, by these parts of names.
    kept = set(type(model)._keep_in_fp32_modules)
    assert all(kept & set(name.split(".")) for name in linear - chosen)


@contextlib.contextmanager
def quiet():
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quantized_layers(model) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor
    }


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@pytest.mark.parametrize("order", ["quantized first", "sparse first", "loaded"])
@torch.no_grad()
def test_torchao(config, order, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    eight_bits = torchao.Int8WeightOnlyConfig()
    expected = run(sparse(config))
    if order == "quantized first":
        model = tiny_transformer()
        torchao.quantize_(model, eight_bits)
        sparsify(model, config)
        randomize(model)
    elif order == "sparse first":
        model = sparse(config)
        torchao.quantize_(model, eight_bits, filter_fn=quantizable)
    else:
        sparse(config).save_pretrained(tmp_path)
        with quiet():
            model = foveal.models.WanTransformer3DModel.from_pretrained(
                tmp_path, quantization_config=diffusers.TorchAoConfig(eight_bits), dtype=torch.float32
            )
    found = quantized_layers(model)
    assert {"blocks.0.attn1.to_q", "blocks.1.ffn.net.2"} <= found
    assert not any("processor" in name for name in found)
    assert {p.dtype for p in sparse_parameters(model).values()} == {torch.float32}
    error = (run(model) - expected).abs().max()
    assert 0 < error < 0.05 * expected.abs().max()


@torch.no_grad()
def test_bitsandbytes_replaces_none_of_our_layers():
    """Its kernels need a GPU; which layers it takes does not."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    model = sparse(SPARSE_VSA)
    settings = diffusers.BitsAndBytesConfig(load_in_4bit=True)
    replace_with_bnb_linear(
        model, modules_to_not_convert=list(type(model)._keep_in_fp32_modules), quantization_config=settings
    )
    assert isinstance(model.blocks[0].attn1.to_q, bitsandbytes.nn.Linear4bit)
    assert type(model.blocks[0].attn1.processor.attention.to_gate_coarse) is nn.Linear
