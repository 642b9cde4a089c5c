"""The parts of a released Wan checkpoint, read without a model: the sparse parameters, and the rest by Wan's names."""

import json

import pytest
import torch
from checkpoint_files import LAYERS, fastvideo_folder, gates, projections, trained, wan_state, write
from peft import LoraConfig

import foveal
from foveal import Policy, SLAConfig, VSAConfig, densify, set_policy, sparse_parameters, sparsify
from foveal.lab.train.export import _save_lora
from foveal.models.files.checkpoints import export_checkpoint, load_checkpoint
from foveal.models.files.h3_names import native
from foveal.models.files.parts import (
    read_base_weights,
    read_exported_lora,
    read_exported_weights,
    read_saved_parameters,
    read_sparse_parameters,
)
from foveal.models.processor import sparse_processors

TURBO = SLAConfig(keep_ratio=0.1, drop_ratio=0.0, linear_scope="all")


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_turbodiffusion(tmp_path, prefix, suffix):
    sparse, base = projections(), wan_state(trained())
    path = write(tmp_path / f"turbo{suffix}", {prefix + name: value for name, value in (sparse | base).items()})
    parameters = read_sparse_parameters(path)
    assert (parameters.format, parameters.configs[0], parameters.from_file) == ("turbodiffusion-sla", TURBO, False)
    assert "as TurboDiffusion's weights were made" in str(parameters)
    for index, layer in enumerate(parameters.layers):
        key = f"blocks.{index}.self_attn.attn_op.local_attn.proj_l."
        same(layer, {"proj.weight": sparse[key + "weight"], "proj.bias": sparse[key + "bias"]})
    # A matrix of patches becomes the convolution that it stands for.
    same(read_base_weights(path), wan_state(trained(), flat_patches=False))


def test_fastvideo(tmp_path):
    model, sparse = trained(), gates()
    path = fastvideo_folder(tmp_path / "fastwan", model.state_dict() | sparse)
    parameters = read_sparse_parameters(path)
    assert (parameters.format, parameters.configs[0]) == ("fastvideo-vsa", VSAConfig(keep_ratio=0.2, tile=(4, 4, 4)))
    for index, layer in enumerate(parameters.layers):
        key = f"blocks.{index}.to_gate_compress."
        same(layer, {"to_gate_coarse.weight": sparse[key + "weight"], "to_gate_coarse.bias": sparse[key + "bias"]})
    same(read_base_weights(path), wan_state(model, flat_patches=False))


def test_changes_and_a_header_say_the_configuration(tmp_path):
    path = write(tmp_path / "turbo.pth", projections())
    assert read_sparse_parameters(path, keep_ratio=0.2).configs[0] == TURBO.replace(keep_ratio=0.2)
    with pytest.raises(ValueError, match="stands for linear_scope='all'"):
        read_sparse_parameters(path, linear_scope="none")
    model = trained()
    load_checkpoint(model, path, keep_ratio=0.3, block_q=16, block_k=16)
    config = next(iter(sparse_processors(model).values())).config
    written = tmp_path / "exported.safetensors"
    export_checkpoint(model, written, format="turbodiffusion-sla")
    parameters = read_sparse_parameters(written)
    assert (parameters.configs[0], parameters.from_file, len(parameters.layers)) == (config, True, LAYERS)


def test_files_that_have_no_such_parts(tmp_path):
    path = write(tmp_path / "only.pth", projections())
    with pytest.raises(ValueError, match="only sparse parameters"):
        read_base_weights(path)
    lacking = {name: value for name, value in projections().items() if "blocks.1" not in name}
    with pytest.raises(ValueError, match=r"lacks blocks.1.self_attn"):
        read_sparse_parameters(write(tmp_path / "lacking.pth", lacking))
    with pytest.raises(ValueError, match="dense checkpoint"):
        read_sparse_parameters(write(tmp_path / "dense.pth", wan_state(trained())))
    h3 = write(tmp_path / "h3.safetensors", {"transformer_blocks.0.attn.to_gate_compress.weight": torch.zeros(4, 4)})
    assert read_sparse_parameters(h3).family == "minimax_h3"
    with pytest.raises(ValueError, match="family minimax_h3, expected wan"):
        read_base_weights(h3)
    ltx = write(tmp_path / "ltx.safetensors", {"transformer_blocks.0.attn1.proj_l.weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match="family ltx2, expected wan or minimax_h3"):
        read_sparse_parameters(ltx, format="turbot2av-sla")
    lora = write(tmp_path / "lora.safetensors", {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="no sparse parameters"):
        read_sparse_parameters(lora, format="lightx2v-sla-lora")
    odd = wan_state(trained()) | projections() | {"blocks.0.self_attn.more": torch.zeros(2)}
    assert "blocks.0.self_attn.more" in read_base_weights(write(tmp_path / "odd.pth", odd))
    odd = trained().state_dict() | gates() | {"blocks.0.more": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"no names for blocks.0.more"):
        read_base_weights(write(tmp_path / "odd.safetensors", odd))
    header = {"foveal_checkpoint": json.dumps({"format": "turbodiffusion-sla"})}
    with pytest.raises(ValueError, match="malformed"):
        read_sparse_parameters(write(tmp_path / "header.safetensors", projections(), header))


def exported(folder, *, policy=None):
    """A pipeline's folder as `foveal train` exports it: layers that differ, and a LoRA of scale 2."""
    model = trained()
    configs = {0: VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), router="per_head"), 1: None}
    sparsify(model, SLAConfig(keep_ratio=0.3, drop_ratio=0.1, linear_scope="none", projection=False), layers=configs)
    if policy is not None:
        set_policy(model, policy)
    generator = torch.Generator().manual_seed(3)
    for parameter in sparse_parameters(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 8)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "ffn.net.0.proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    _save_lora(model, folder / "lora")
    foveal.save(model, folder / "sparse")
    return model


def test_what_foveal_saved(tmp_path):
    model = exported(tmp_path, policy=Policy(dense_layers=("blocks.1.attn1", 0)))
    parameters, policy = read_saved_parameters(tmp_path / "sparse")
    processors = sparse_processors(model)
    names = [f"blocks.{index}.attn1" for index in range(LAYERS)]
    assert parameters.configs == tuple(processors[name].config if name in processors else None for name in names)
    assert parameters.configs[1] is None
    assert policy == Policy(dense_layers=(1, 0))
    own = {name.partition(".attn1.")[2]: x for name, x in sparse_parameters(model).items() if "blocks.0." in name}
    same(parameters.layers[0], {name.partition("attention.")[2]: x for name, x in own.items()})
    assert parameters.layers[1] == {}
    assert "vsa in 1 layers" in str(parameters)
    assert [config and config.keep_ratio for config in parameters.following(keep_ratio=0.5).configs][:2] == [0.5, None]
    with pytest.raises(ValueError, match=r"component must be transformer, which .* has, got 'transformer_2'"):
        read_saved_parameters(tmp_path / "sparse", "transformer_2")
    with pytest.raises(FileNotFoundError, match=r"expected a folder that foveal\.save wrote"):
        read_saved_parameters(tmp_path)


def test_the_lora_of_an_export_by_the_names_of_the_wan_repository(tmp_path):
    """Added by hand to the weights of the Wan repository, it gives what diffusers makes of the export."""
    model = exported(tmp_path)
    updates = read_exported_lora(tmp_path, LAYERS)
    weights = wan_state(trained(), flat_patches=False)
    for name in {name.rpartition(".lora_")[0] for name in updates}:
        up, down = (updates[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        weights[f"{name.removeprefix('diffusion_model.')}.weight"] += up @ down
    densify(model).fuse_lora()
    model.unload_lora()
    fused = wan_state(model, flat_patches=False)
    assert fused.keys() == weights.keys()
    for name, tensor in fused.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)
    assert read_exported_lora(tmp_path / "sparse", LAYERS) is None
    model = trained()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q"]))
    _save_lora(model, tmp_path / "other" / "lora")
    with pytest.raises(ValueError, match="has use_rslora, which ComfyUI's names have no place for"):
        read_exported_lora(tmp_path / "other", LAYERS)


def test_the_lora_of_minimax_h3_by_the_names_of_its_repository(tmp_path):
    """Queries, keys, and values are one stack there, and the halves of a gated layer are the other way around."""
    pytest.importorskip("diffusers", minversion="0.42.1")
    from diffusers.loaders.single_file_utils import convert_minimax_h3_transformer_checkpoint_to_diffusers as convert
    from test_minimax_h3 import TestMiniMaxH3

    model = TestMiniMaxH3().model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    targets = ["to_q", "to_v", "to_out.0", "net.0.proj"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    _save_lora(model, tmp_path / "lora")
    updates = read_exported_lora(tmp_path, 3, "minimax_h3")
    own = native(before, torch.zeros(2))
    for name in {name.rpartition(".lora_")[0] for name in updates}:
        up, down = (updates[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        own[f"{name.removeprefix('diffusion_model.')}.weight"] += up @ down
    assert "diffusion_model.blocks.2.attn.qkv_proj.lora_up.weight" in updates
    assert updates["diffusion_model.blocks.2.attn.qkv_proj.lora_down.weight"].shape[0] == 6
    del own["rope.inv_freq"]
    model.fuse_lora()
    model.unload_lora()
    added = convert(own, config=None)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(added[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_weights_of_an_export(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "transformer")
    same(read_exported_weights(tmp_path, LAYERS), wan_state(model, flat_patches=False))
    with pytest.raises(ValueError, match=r"weights of its own of family minimax_h3.*export_checkpoint"):
        read_exported_weights(tmp_path, LAYERS, "minimax_h3")
