"""The parts of a released Wan checkpoint, read without a model: the sparse parameters, and the rest by Wan's names."""

import json

import pytest
import torch
from checkpoint_files import LAYERS, fastvideo_folder, gates, projections, trained, wan_state, write

from foveal import SLAConfig, VSAConfig
from foveal.models.files.checkpoints import export_checkpoint, load_checkpoint
from foveal.models.files.parts import read_base_weights, read_sparse_parameters
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
    assert (parameters.format, parameters.config, parameters.from_file) == ("turbodiffusion-sla", TURBO, False)
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
    assert (parameters.format, parameters.config) == ("fastvideo-vsa", VSAConfig(keep_ratio=0.2, tile=(4, 4, 4)))
    for index, layer in enumerate(parameters.layers):
        key = f"blocks.{index}.to_gate_compress."
        same(layer, {"to_gate_coarse.weight": sparse[key + "weight"], "to_gate_coarse.bias": sparse[key + "bias"]})
    same(read_base_weights(path), wan_state(model, flat_patches=False))


def test_changes_and_a_header_say_the_configuration(tmp_path):
    path = write(tmp_path / "turbo.pth", projections())
    assert read_sparse_parameters(path, keep_ratio=0.2).config == TURBO.replace(keep_ratio=0.2)
    with pytest.raises(ValueError, match="stands for linear_scope='all'"):
        read_sparse_parameters(path, linear_scope="none")
    model = trained()
    load_checkpoint(model, path, keep_ratio=0.3, block_q=16, block_k=16)
    config = next(iter(sparse_processors(model).values())).config
    written = tmp_path / "exported.safetensors"
    export_checkpoint(model, written, format="turbodiffusion-sla")
    parameters = read_sparse_parameters(written)
    assert (parameters.config, parameters.from_file, len(parameters.layers)) == (config, True, LAYERS)


def test_files_that_have_no_such_parts(tmp_path):
    path = write(tmp_path / "only.pth", projections())
    with pytest.raises(ValueError, match="only sparse parameters"):
        read_base_weights(path)
    lacking = {name: value for name, value in projections().items() if "blocks.1" not in name}
    with pytest.raises(ValueError, match=r"lacks blocks.1.self_attn"):
        read_sparse_parameters(write(tmp_path / "lacking.pth", lacking))
    with pytest.raises(ValueError, match="dense checkpoint"):
        read_sparse_parameters(write(tmp_path / "dense.pth", wan_state(trained())))
    h3 = {"transformer_blocks.0.attn.to_gate_compress.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="family minimax_h3, expected wan"):
        read_sparse_parameters(write(tmp_path / "h3.safetensors", h3))
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
