"""The nodes in ComfyUI itself: its loaders, graphs, executor, and samplers, on the CPU, with tiny random Wan models.

    pytest tests/test_comfyui.py --comfyui FOLDER

Skipped where there is no ComfyUI. It is loaded into this process, in a Python that has what ComfyUI requires.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import foveal
from foveal import SLAConfig, VideoGrid, VSAConfig
from foveal.hosts.comfyui.attention import OVERRIDE, SparseAttention
from foveal.hosts.comfyui.layers import build_layers, parse_ratios
from foveal.models.files.parts import read_sparse_parameters

PACK = Path(__file__).parent.parent / "integrations_comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
GRID = VideoGrid(5, 12, 12)
STEPS, LAYERS = 3, 3


class ReferenceAttention:
    """A node for these tests: what `attend(layer, query, key, value, hidden states)` gives as the self-attention.

    It finds layers and hidden states in its own way: it counts the calls, and hooks stay for good.
    """

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    attend = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def apply(self, model):
        model, attend, state = model.clone(), type(self).attend, {"calls": 0, "hidden": None}
        blocks = model.model.diffusion_model.blocks
        for block in blocks:
            block.self_attn.register_forward_pre_hook(lambda module, args: state.update(hidden=args[0]))

        def override(function, q, k, v, heads, **kwargs):
            if q.shape[1] != k.shape[1]:
                return function(q, k, v, heads, **kwargs)
            layer, state["calls"] = state["calls"] % len(blocks), state["calls"] + 1
            query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            return attend(layer, query, key, value, state["hidden"]).transpose(1, 2).flatten(2)

        model.model_options["transformer_options"][OVERRIDE] = override
        return (model,)


@pytest.fixture(scope="module")
def host(pytestconfig, tmp_path_factory):
    folder = pytestconfig.getoption("--comfyui")
    if folder is None and importlib.util.find_spec("comfy") is None:
        pytest.skip("needs ComfyUI: --comfyui FOLDER, or one that can be imported")
    before = list(sys.path)
    sys.path.insert(0, str(PACK))
    import try_it

    host = try_it.Host(folder, tmp_path_factory.mktemp("comfyui"))
    host.nodes.NODE_CLASS_MAPPINGS["ReferenceAttention"] = ReferenceAttention
    yield host
    sys.path[:] = before


@pytest.fixture
def prompt_of(host):
    """An example workflow as a prompt for tiny models, with widgets changed by the type of their node."""

    def make(name, **changes):
        workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
        prompt = host.small(host.prompt_of(workflow))
        for node in prompt.values():
            for kind, widgets in changes.items():
                if node["class_type"] == kind:
                    node["inputs"] |= widgets
        return prompt

    return make


def ids_of(prompt, kind):
    return [name for name, node in prompt.items() if node["class_type"] == kind]


def latents(host, prompt, sampler=-1):
    """What a sampler of the prompt returned."""
    name = ids_of(prompt, "KSampler")[sampler]
    return host.run(prompt)[name][0]["samples"]


def in_place_of(prompt, kind, replacement):
    """The prompt with each node of a kind replaced by one that takes its model; what read its other output is gone."""
    prompt = copy.deepcopy(prompt)
    gone = ids_of(prompt, kind)
    for name in gone:
        prompt[name] = {"class_type": replacement, "inputs": {"model": prompt[name]["inputs"]["model"]}}
    for name in [*ids_of(prompt, "FovealPreview"), *ids_of(prompt, "PreviewImage"), *ids_of(prompt, "PreviewAny")]:
        del prompt[name]
    prompt["save"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [ids_of(prompt, "KSampler")[-1], 0], "filename_prefix": "test"},
    }
    return prompt


def assert_equal(got, expected):
    assert float((got - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_the_example_workflows_run(host, prompt_of, path):
    prompt = prompt_of(path.stem)
    results = host.run(prompt)
    image, report = results[ids_of(prompt, "FovealPreview")[0]]
    assert image.shape[0] == 1
    assert image.std() > 0.05
    dense_first = "FovealPolicy" in {node["class_type"] for node in prompt.values()}
    calls = (STEPS - dense_first) * LAYERS
    assert f"foveal: {calls} of {STEPS * LAYERS} calls of {LAYERS} self-attention layers ran sparse" in report
    assert "tokens: 5x12x12 = 720 tokens" in report


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_training_free_equals_the_function(host, prompt_of, order):
    changes = {"FovealTrainingFree": {"token_order": order}, "FovealPolicy": {"dense_first_steps": 0}}
    prompt = prompt_of("wan_training_free", **changes)
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, linear_scope="none", projection=False, token_order=order)
    ReferenceAttention.attend = lambda layer, query, key, value, hidden: foveal.sla_attention(
        query, key, value, config=config, grid=GRID, impl="reference"
    )
    got = latents(host, prompt)
    assert_equal(got, latents(host, in_place_of(prompt, "FovealTrainingFree", "ReferenceAttention")))
    kept = prompt_of("wan_training_free", **changes | {"FovealTrainingFree": {"keep_ratio": 1.0}})
    dense = latents(host, kept)
    assert float((got - dense).norm() / dense.norm()) > 1e-3


def test_turbowan_runs_its_linear_branch_and_its_projections(host, prompt_of):
    prompt = prompt_of("turbowan_sla")
    got = latents(host, prompt)
    parameters = read_sparse_parameters(host.models / "tiny_turbowan.pth")
    assert parameters.configs[0] == SLAConfig(keep_ratio=0.1, drop_ratio=0.0, linear_scope="all")

    def attend(layer, query, key, value, hidden):
        weights = {name.replace(".", "_"): weight for name, weight in parameters.layers[layer].items()}
        return foveal.sla_attention(query, key, value, config=parameters.configs[0], impl="reference", **weights)

    ReferenceAttention.attend = attend
    assert_equal(got, latents(host, in_place_of(prompt, "FovealTrained", "ReferenceAttention")))


def test_fastwan_runs_its_gates(host, prompt_of):
    prompt = prompt_of("fastwan_vsa")
    got = latents(host, prompt)
    parameters = read_sparse_parameters(host.models / "tiny_fastwan.safetensors")
    assert parameters.configs[0] == VSAConfig(keep_ratio=0.2, tile=(4, 4, 4))

    def attend(layer, query, key, value, hidden):
        weights = parameters.layers[layer]
        gate = torch.nn.functional.linear(hidden, weights["to_gate_coarse.weight"], weights["to_gate_coarse.bias"])
        gate = gate.unflatten(2, (query.shape[1], -1)).transpose(1, 2)
        return foveal.vsa_attention(
            query, key, value, config=parameters.configs[0], grid=GRID, gate_coarse=gate, impl="reference"
        )

    ReferenceAttention.attend = attend
    assert_equal(got, latents(host, in_place_of(prompt, "FovealTrained", "ReferenceAttention")))


def test_a_model_that_was_trained_with_foveal(host, prompt_of):
    """Its routers and gates from models/foveal, its LoRA in the base model, its dense layer, and its policy."""
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    prompt = prompt_of("wan_training_free")
    weights = load_file(host.models / "tiny_wan.safetensors")
    width = weights["blocks.0.self_attn.q.weight"].shape[0]
    sizes = {"num_attention_heads": width // 128, "attention_head_dim": 128, "num_layers": LAYERS, "ffn_dim": 256}
    model = diffusers.WanTransformer3DModel(**sizes)
    config = VSAConfig(keep_ratio=0.2, tile=(2, 4, 4), router="per_head")
    foveal.sparsify(model, config, layers={2: None})
    generator = torch.Generator().manual_seed(5)
    for parameter in foveal.sparse_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 16
    foveal.set_policy(model, foveal.Policy(dense_layers=("blocks.1.attn1",)))
    folder = host.models.parent / "foveal" / "mine"
    foveal.save(model, folder / "sparse")
    (folder / "lora").mkdir()
    down, up = (torch.randn(shape, generator=generator) / 16 for shape in ((4, width), (width, 4)))
    lora = {"transformer.blocks.0.attn1.to_q.lora_A.weight": down, "transformer.blocks.0.attn1.to_q.lora_B.weight": up}
    said = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    save_file(lora, folder / "lora" / "pytorch_lora_weights.safetensors", said)
    (sparse,), (loader,) = ids_of(prompt, "FovealTrainingFree"), ids_of(prompt, "UNETLoader")
    inputs = {"folder": "mine", "component": "transformer", "strength": 1.0, "model": [loader, 0]}
    prompt["trained"] = {"class_type": "FovealLoadTrained", "inputs": inputs}
    kept = {name: x for name, x in prompt[sparse]["inputs"].items() if name in ("min_tokens", "preview_step", "impl")}
    links = {"model": ["trained", 0], "parameters": ["trained", 1], "policy": ["trained", 2]}
    prompt[sparse] = {"class_type": "FovealTrained", "inputs": {**kept, **links, "keep_ratio": 0.0, "strict": True}}
    results = host.run(prompt)
    _, report = results[ids_of(prompt, "FovealPreview")[0]]
    assert f"foveal: {STEPS} of {STEPS * LAYERS} calls" in report
    assert "it was trained dense" in report
    assert "the policy's dense_layers" in report

    own = {
        name.partition("attention.")[2]: x
        for name, x in foveal.sparse_parameters(model).items()
        if name.startswith("blocks.0.")
    }

    def attend(layer, query, key, value, hidden):
        if layer:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)
        gate = torch.nn.functional.linear(hidden, own["to_gate_coarse.weight"], own["to_gate_coarse.bias"])
        return foveal.vsa_attention(
            query,
            key,
            value,
            config=config,
            grid=GRID,
            gate_coarse=gate.unflatten(2, (query.shape[1], -1)).transpose(1, 2),
            proj_query=own["router.proj_query"],
            proj_key=own["router.proj_key"],
            impl="reference",
        )

    weights["blocks.0.self_attn.q.weight"] += 2 * up @ down
    save_file(weights, host.models / "tuned.safetensors")
    ReferenceAttention.attend = attend
    expected = in_place_of(prompt, "FovealTrained", "ReferenceAttention")
    expected[loader]["inputs"]["unet_name"] = "tuned.safetensors"
    (replaced,) = ids_of(expected, "ReferenceAttention")
    expected[replaced]["inputs"]["model"] = [loader, 0]
    del expected["trained"]
    got = results[ids_of(prompt, "KSampler")[-1]][0]["samples"]
    assert_equal(got, latents(host, expected))

    prompt["trained"]["inputs"].pop("model")
    with pytest.raises(RuntimeError, match="mine has no weights of a model: connect the one that it was trained from"):
        host.run(prompt)
    dense = diffusers.WanTransformer3DModel(**sizes)
    dense.save_pretrained(folder / "transformer")
    prompt["trained"]["inputs"]["model"] = [loader, 0]
    with pytest.raises(RuntimeError, match="mine has weights of its own: leave model unconnected"):
        host.run(prompt)


def test_parameters_load_on_their_own(host, prompt_of):
    """The same as both from one node: the model by ComfyUI's loader, the sparse parameters by ours."""
    prompt = prompt_of("turbowan_sla")
    got = latents(host, prompt)
    loader = ids_of(prompt, "FovealLoadModel")[0]
    host.tiny_file("wan")
    prompt["dense"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"},
    }
    prompt[loader] = {"class_type": "FovealLoadParameters", "inputs": {"file": "tiny_turbowan.pth"}}
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if value == [loader, 0] and key == "model":
                node["inputs"][key] = ["dense", 0]
            elif value == [loader, 1]:
                node["inputs"][key] = [loader, 0]
    torch.testing.assert_close(latents(host, prompt), got, rtol=0, atol=0)


def test_gates_that_the_model_was_loaded_with(host):
    """Through the nodes and ComfyUI's patcher; the model is a stand-in, since this ComfyUI may have no MiniMax-H3."""
    from comfy.model_patcher import ModelPatcher
    from comfyui_modules import MiniMaxH3

    nodes = host.nodes.NODE_CLASS_MAPPINGS
    outer = torch.nn.Module()
    outer.diffusion_model = MiniMaxH3(gate=torch.nn.Linear)
    patcher = ModelPatcher(outer, torch.device("cpu"), torch.device("cpu"))
    (parameters,) = nodes["FovealModelGates"]().take(patcher, keep_ratio=0.2)
    model, run = nodes["FovealTrained"]().apply(patcher, parameters, 0.0)
    assert model.model_options["transformer_options"][OVERRIDE] == run.attend
    assert (run.gate, {module.config.keep_ratio for module in run.modules.values()}) == ("to_gate_compress", {0.2})
    assert not model.get_additional_models()  # the gates are managed with the model


def test_unplugged_the_model_is_what_it_was(host, prompt_of):
    prompt = prompt_of("wan_training_free")

    def dense(seed):
        """The workflow with the node's model bypassed. The seed is new to the executor's cache."""
        bypassed = in_place_of(prompt, "FovealTrainingFree", "ReferenceAttention")
        node = ids_of(bypassed, "ReferenceAttention")[0]
        model = bypassed.pop(node)["inputs"]["model"]
        for sampler in ids_of(bypassed, "KSampler"):
            bypassed[sampler]["inputs"] |= {"model": model, "seed": seed}
        return bypassed

    before = latents(host, dense(7))
    model_of = host.run(prompt)[ids_of(prompt, "UNETLoader")[0]][0]
    assert OVERRIDE not in model_of.model_options["transformer_options"]
    assert not model_of.wrappers
    layers = [block.self_attn for block in model_of.model.diffusion_model.blocks]
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    latents(host, dense(8))
    assert torch.equal(latents(host, dense(7)), before)


def test_calibrated_budgets_reach_the_sparse_model(host, prompt_of):
    prompt = prompt_of("wan_calibrated_budgets", FovealCalibrate={"error": 0.005})
    results = host.run(prompt)
    budgets, text = results[ids_of(prompt, "FovealReadBudgets")[0]]
    assert parse_ratios("budgets", text) == budgets
    _, report = results[ids_of(prompt, "FovealPreview")[0]]
    for name, ratio in budgets.items():
        assert (f"keep {ratio:g}" if ratio < 1 else "its budget keeps everything") in report, (name, report)


def test_a_mistake_reaches_the_user(host, prompt_of):
    prompt = prompt_of("wan_training_free", FovealPolicy={"dense_layers": "0, 99"})
    with pytest.raises(RuntimeError, match=r"dense_layers must be in 0..2, got 99"):
        host.run(prompt)
    prompt = prompt_of("wan_training_free", FovealTrainingFree={"strict": True, "min_tokens": 100000})
    with pytest.raises(RuntimeError, match="strict forbids it"):
        host.run(prompt)


def test_ltx_video(host):
    """ComfyUI's LTX-Video, whose head dimension is 64, called without a sampler."""
    import comfy.ops
    from comfy.ldm.lightricks.model import LTXVModel

    torch.manual_seed(0)
    sizes = {"in_channels": 8, "cross_attention_dim": 128, "num_attention_heads": 2, "num_layers": 2}
    made = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.manual_cast}
    model = LTXVModel(**sizes, attention_head_dim=64, caption_channels=16, **made).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none", projection=False)
    latent, text = torch.randn(1, 8, 3, 6, 8), torch.randn(1, 5, 16)

    def run(options):
        return model(latent, torch.tensor([0.5]), text, None, transformer_options=options)

    outputs = {}
    for ratio in (0.3, 1.0):
        attention = SparseAttention(*build_layers(model, config.replace(keep_ratio=ratio)))
        outputs[ratio] = run(
            {OVERRIDE: attention.attend, "wrappers": {"diffusion_model": {"foveal": [attention.run_forward]}}}
        )
        assert (attention.record.sparse_calls, attention.record.layouts) == (2, [VideoGrid(3, 6, 8)])
    dense = run({})
    torch.testing.assert_close(outputs[1.0], dense, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs[0.3], dense, atol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("reference", [False, True])
def test_head_dimensions_and_reference_frames_in_comfyuis_model(host, head_dim, reference):
    """ComfyUI's Wan with its wrappers, called without a sampler: the layers that ComfyUI's loader does not make."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    torch.manual_seed(0)
    sizes = {"dim": 2 * head_dim, "num_heads": 2, "ffn_dim": 64, "num_layers": 2, "in_dim": 4, "out_dim": 4}
    more = {"in_dim_ref_conv": 4} if reference else {}
    made = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.manual_cast}
    model = WanModel(**sizes, **more, text_dim=8, freq_dim=16, **made).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none", projection=False)
    attention = SparseAttention(*build_layers(model, config))
    options = {OVERRIDE: attention.attend, "wrappers": {"diffusion_model": {"foveal": [attention.run_forward]}}}
    latent, text = torch.randn(1, 4, 3, 11, 16), torch.randn(1, 5, 8)
    given = {"reference_latent": torch.randn(1, 4, 12, 16)} if reference else {}
    output = model(latent, torch.tensor([500.0]), text, transformer_options=options, **given)
    assert output.shape == latent.shape
    assert attention.record.sparse_calls == 2
    grid = VideoGrid(3, 6, 8)
    assert attention.record.layouts == [foveal.TokenLayout(grid, before=(48,)) if reference else grid]
    dense = model(latent, torch.tensor([500.0]), text, transformer_options={}, **given)
    assert not torch.allclose(output, dense, atol=1e-3)
    everything = SparseAttention(*build_layers(model, config.replace(keep_ratio=1.0)))
    options = {OVERRIDE: everything.attend, "wrappers": {"diffusion_model": {"foveal": [everything.run_forward]}}}
    output = model(latent, torch.tensor([500.0]), text, transformer_options=options, **given)
    torch.testing.assert_close(output, dense, rtol=1e-3, atol=1e-3)
