"""MiniMax-H3's sparse weights under the names of its own repository, as ComfyUI has them, for a tiny H3."""

import pytest
import torch
from test_fasth3 import HIDDEN, INNER, LAYERS, drawn, expected_model, gates, release, tiny

from foveal import SLAConfig, VSAConfig, export_checkpoint, load_checkpoint, sparsify
from foveal.models.files.checkpoints import check_checkpoint
from foveal.models.files.h3_names import native_names
from foveal.models.processor import sparse_processors

safetensors_torch = pytest.importorskip("safetensors.torch")
CONFIG = VSAConfig(keep_ratio=0.1, tile=(4, 4, 4))

# Written out, so that the tests do not lean on the conversion that they test.
BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm2.weight": "norm2.weight",
    "attn.q_norm.weight": "attn.norm_q.weight",
    "attn.k_norm.weight": "attn.norm_k.weight",
    "attn.out_proj.weight": "attn.to_out.0.weight",
    "mlp.fc2.weight": "ff.net.2.weight",
}
MODULATED = {f"adaln_proj.linear.{part}": f"adaln_proj.linear.{part}" for part in ("weight", "bias")}
OUTSIDE = {
    "video_patch_proj": "proj_in",
    "audio_patch_proj": "audio_proj_in",
    "condition_proj": "context_embedder",
    "time_embedder.proj_in": "time_embedder.linear_1",
    "time_embedder.proj_out": "time_embedder.linear_2",
    "final_layer.adaln_proj.linear": "norm_out.linear",
    "final_layer.video_out": "proj_out",
    "final_layer.audio_out": "audio_proj_out",
}


def native_state(model):
    """A dense transformer's weights as ComfyUI's files have them."""
    given = model.state_dict()
    state = {
        f"{theirs}.{part}": given.pop(f"{ours}.{part}")
        for theirs, ours in OUTSIDE.items()
        for part in ("weight", "bias")
    }
    state["final_layer.norm.weight"] = given.pop("norm_out.norm.weight")
    state["token_refiner.final_norm.weight"] = given.pop("token_refiner.final_norm.weight")
    blocks = {f"blocks.{i}": f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))}
    refiners = range(len(model.token_refiner.refiner_blocks))
    stacks = blocks | {f"token_refiner.blocks.{i}": f"token_refiner.refiner_blocks.{i}" for i in refiners}
    for theirs, ours in stacks.items():
        for name, former in (BLOCK | (MODULATED if theirs in blocks else {})).items():
            state[f"{theirs}.{name}"] = given.pop(f"{ours}.{former}")
        state[f"{theirs}.attn.qkv_proj.weight"] = torch.cat([given.pop(f"{ours}.attn.to_{x}.weight") for x in "qkv"])
        value, gate = given.pop(f"{ours}.ff.net.0.proj.weight").chunk(2)
        state[f"{theirs}.mlp.fc1.weight"] = torch.cat([gate, value])
    assert not given
    return {name: x.clone() for name, x in state.items()} | {"rope.inv_freq": model.rope.inv_freq.clone()}


def native_gates():
    return {name.removeprefix("transformer_"): x for name, x in gates("weight").items()}


def comfyui_file(path, prefix="", **changes):
    """A file of another seed's weights with gates."""
    state = native_state(tiny.model(seed=1)) | native_gates() | changes
    safetensors_torch.save_file({prefix + name: x for name, x in state.items() if x is not None}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@torch.no_grad()
def test_a_file_of_comfyui(tmp_path, prefix):
    path = comfyui_file(tmp_path / "fasth3.safetensors", prefix)
    check_checkpoint(path)
    model = tiny.model()
    report = load_checkpoint(model, path)
    assert (report.format, report.config) == ("fasth3-vsa", CONFIG)
    expected = expected_model(report.config)
    for name, x in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name
    assert report.sparse_tensors == LAYERS
    assert report.base_tensors == len(tiny.model().state_dict())
    assert torch.equal(tiny.run(model), tiny.run(expected))
    assert "the names are those of MiniMax-H3's repository, as ComfyUI has them" in str(report)


@torch.no_grad()
def test_gates_without_base_weights(tmp_path):
    safetensors_torch.save_file(native_gates(), tmp_path / "gates.safetensors")
    model = tiny.model(seed=1)
    report = load_checkpoint(model, tmp_path / "gates.safetensors")
    assert (report.sparse_tensors, report.base_tensors) == (LAYERS, 0)
    assert torch.equal(tiny.run(model), tiny.run(expected_model(CONFIG)))


def test_nothing_is_missing_at_full_size():
    """Of the names of the 50 layers, diffusers' conversion makes those of its model, and the gates."""
    from diffusers.loaders.single_file_utils import convert_minimax_h3_transformer_checkpoint_to_diffusers as convert

    with torch.device("meta"):
        model = tiny.model().__class__()
        theirs = native_state(model)
        converted = convert(dict(theirs), config=model.config)
        converted_gates = convert({name: torch.empty(1) for name in native_names(50, 2) if "gate" in name}, config=None)
    assert set(native_names(50, 2)) == set(theirs) - {"rope.inv_freq"} | {
        f"blocks.{i}.attn.to_gate_compress.weight" for i in range(50)
    }
    assert {name: x.shape for name, x in converted.items()} == {name: x.shape for name, x in model.state_dict().items()}
    assert set(converted_gates) == {f"transformer_blocks.{i}.attn.to_gate_compress.weight" for i in range(50)}


@torch.no_grad()
def test_export(tmp_path):
    """Every name and value that ComfyUI's model has, the frequencies of its rotary embedding too."""
    model = tiny.model()
    load_checkpoint(model, release(tmp_path / "FastH3"))
    path = tmp_path / "exported.safetensors"
    export_checkpoint(model, path, format="fasth3-vsa-comfyui")
    written = safetensors_torch.load_file(path)
    expected = native_state(tiny.model(seed=1)) | native_gates()
    assert set(written) == set(expected)
    for name, x in expected.items():
        assert torch.equal(written[name], x), name
    again = tiny.model()
    report = load_checkpoint(again, path)
    assert (report.format, report.from_file, report.config.keep_ratio) == ("fasth3-vsa-comfyui", True, 0.2)
    assert torch.equal(tiny.run(again), tiny.run(model))


def test_what_export_cannot_express(tmp_path):
    model = sparsify(tiny.model(), CONFIG)
    next(iter(sparse_processors(model).values())).attention.to_gate_coarse.bias.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"has no place for to_gate_coarse\.bias"):
        export_checkpoint(model, tmp_path / "x.safetensors", format="fasth3-vsa-comfyui")
    sla = sparsify(tiny.model(), SLAConfig(keep_ratio=0.3))
    with pytest.raises(ValueError, match="is for VSAConfig, got SLAConfig"):
        export_checkpoint(sla, tmp_path / "x.safetensors", format="fasth3-vsa-comfyui")
    fused = tiny.model()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"has no names for .*transformer_blocks\.0\.attn\.to_qkv\.weight"):
        export_checkpoint(sparsify(fused, CONFIG), tmp_path / "x.safetensors", format="fasth3-vsa-comfyui")
    assert not (tmp_path / "x.safetensors").exists()


INT8 = torch.zeros(3 * INNER, HIDDEN, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # FastVideo-FastH3-Comfy's files are pruned and in int8.
        (
            {
                "adaln_t_table": drawn(9, 8),
                "blocks.0.attn.qkv_proj.weight": INT8,
                "blocks.0.attn.qkv_proj.comfy_quant": torch.zeros(4, dtype=torch.uint8),
                "time_embedder.proj_in.weight": None,
            },
            "is a pruned file for ComfyUI: adaln_t_table stands in the place of the time embedder",
        ),
        (
            {
                "blocks.0.attn.qkv_proj.weight": INT8,
                "blocks.0.attn.qkv_proj.weight_scale": drawn(3 * INNER, 1),
                "blocks.0.attn.qkv_proj.comfy_quant": torch.zeros(4, dtype=torch.uint8),
            },
            r"is quantized for ComfyUI \(blocks\.0\.attn\.qkv_proj\.comfy_quant, blocks\.0",
        ),
        (
            {"blocks.0.attn.qkv_proj.weight": INT8},
            r"is quantized, or damaged: transformer_blocks\.0\.attn\.to_q\.weight",
        ),
        (
            {"blocks.1.attn.qkv_proj.weight": drawn(100, HIDDEN)},
            r"rows of blocks\.1\.attn\.qkv_proj\.weight are no whole",
        ),
        ({"blocks.1.mlp.fc1.weight": drawn(95, HIDDEN)}, r"rows of blocks\.1\.mlp\.fc1\.weight are no whole"),
        (
            {"blocks.1.attn.qkv_proj.weight": torch.tensor(1.0)},
            r"rows of blocks\.1\.attn\.qkv_proj\.weight are no whole",
        ),
        (
            {"blocks.1.attn.qkv_proj.weight": drawn(3 * 40, HIDDEN)},
            r"to_q\.weight has shape \(40, 32\), the model's is",
        ),
        (
            {"blocks.2.attn.to_gate_compress.weight": None},
            r"lacks transformer_blocks\.2\.attn\.to_gate_compress\.weight",
        ),
        ({"blocks.2.attn.qkv_proj.weight": None}, r"lacks transformer_blocks\.2\.attn\.to_k\.weight"),
        ({"blocks.2.attn.extra.weight": drawn(3)}, r"has unexpected transformer_blocks\.2\.attn\.extra\.weight"),
    ],
)
@torch.no_grad()
def test_files_that_do_not_fit(tmp_path, changes, message):
    model = tiny.model()
    before = tiny.run(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, comfyui_file(tmp_path / "other.safetensors", **changes))
    assert torch.equal(tiny.run(model), before)
    assert not sparse_processors(model)


def test_a_dense_file(tmp_path):
    dense = dict.fromkeys(native_gates())
    with pytest.raises(ValueError, match="is a dense checkpoint"):
        load_checkpoint(tiny.model(), comfyui_file(tmp_path / "dense.safetensors", **dense))
