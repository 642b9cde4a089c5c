"""Released checkpoints: files with the exact names of other projects, read into models, and written again."""

import json
import os
import re

import pytest
import safetensors
import torch
from checkpoint_files import (
    LAYERS,
    SMALL_SLA,
    SMALL_VSA,
    TURBO,
    fastvideo_folder,
    gates,
    outputs,
    projections,
    refused,
    safetensors_torch,
    trained,
    turbo,
    wan_state,
    write,
)
from tiny_wan import SPARSE_SLA, SPARSE_VSA, inputs, randomize, tiny_pipeline, tiny_transformer

from foveal import SLAConfig, VSAConfig
from foveal.lab.inspect.capture import capture_selections
from foveal.models import densify, save, sparsify
from foveal.models.files.checkpoints import export_checkpoint, load_checkpoint
from foveal.models.files.formats import FORMATS, to_diffusers, wan_names
from foveal.models.processor import sparse_processors


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_turbodiffusion(tmp_path, suffix, prefix):
    source = trained()
    proj = projections()
    state = {prefix + name: tensor for name, tensor in (wan_state(source) | proj).items()}
    path = write(tmp_path / f"turbo{suffix}", {"state_dict": state} if (prefix and suffix == ".pth") else state)
    model = tiny_transformer(num_layers=LAYERS)
    report = load_checkpoint(model, path, **SMALL_SLA)

    expected = sparsify(source, TURBO.replace(**SMALL_SLA))
    for i, block in enumerate(expected.blocks):
        with torch.no_grad():
            block.attn1.processor.attention.proj.weight.copy_(
                proj[f"blocks.{i}.self_attn.attn_op.local_attn.proj_l.weight"]
            )
            block.attn1.processor.attention.proj.bias.copy_(
                proj[f"blocks.{i}.self_attn.attn_op.local_attn.proj_l.bias"]
            )
    assert torch.equal(outputs(model), outputs(expected))
    assert report.format == "turbodiffusion-sla"
    assert report.config == TURBO.replace(**SMALL_SLA)
    assert (report.layers, report.sparse_tensors, report.base_tensors) == (3, 6, len(state) - 6)
    assert not report.from_file
    assert "turbodiffusion-sla" in str(report)
    assert "not in the file" in str(report)
    assert "keep_ratio=0.3" in str(report)
    assert "distilled to 1 to 4 forwards" in str(report)


def test_heads_of_128_with_the_released_configuration(tmp_path):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2}
    source = tiny_transformer(seed=3, **sizes)
    path = write(tmp_path / "turbo.pth", wan_state(source) | projections(2, head_dim=128))
    model = tiny_transformer(**sizes)
    report = load_checkpoint(model, path)
    assert report.config == TURBO
    assert report.changes == {}
    proj = model.blocks[1].attn1.processor.attention.proj
    assert torch.equal(proj.weight, projections(2, 128)["blocks.1.self_attn.attn_op.local_attn.proj_l.weight"])

    video = inputs(batch=1, latent=(5, 14, 18))
    expected = sparsify(source, TURBO)
    sparse_only = outputs(expected, **video)
    for one, other in zip(expected.blocks, model.blocks, strict=True):
        one.attn1.processor.attention.load_state_dict(other.attn1.processor.attention.state_dict())
    assert torch.equal(outputs(model, **video), outputs(expected, **video))
    assert (outputs(model, **video) - sparse_only).abs().max() > 1e-3


def test_turbodiffusion_under_the_names_of_diffusers(tmp_path):
    source = trained()
    proj = projections(key="attn1.attn_op.local_attn.proj_l")
    path = write(tmp_path / "turbo.safetensors", source.state_dict() | proj)
    model = tiny_transformer(num_layers=LAYERS)
    assert load_checkpoint(model, path, **SMALL_SLA).format == "turbodiffusion-sla-diffusers"
    other = tiny_transformer(num_layers=LAYERS)
    load_checkpoint(other, write(tmp_path / "wan.pth", wan_state(source) | projections()), **SMALL_SLA)
    assert torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize("kind", ["file", "folder", "shards", "pipeline"])
def test_fastvideo(tmp_path, kind):
    source = trained()
    state = source.state_dict() | gates()
    if kind == "file":
        path = write(tmp_path / "fast.safetensors", state)
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        write(path / "diffusion_pytorch_model.safetensors", state)
    else:
        path = tmp_path / "folder"
        fastvideo_folder(path / "transformer" if kind == "pipeline" else path, state)
    model = tiny_transformer(num_layers=LAYERS)
    report = load_checkpoint(model, path, **SMALL_VSA)
    expected = sparsify(source, VSAConfig(**SMALL_VSA))
    for i, block in enumerate(expected.blocks):
        with torch.no_grad():
            block.attn1.processor.attention.to_gate_coarse.weight.copy_(state[f"blocks.{i}.to_gate_compress.weight"])
            block.attn1.processor.attention.to_gate_coarse.bias.copy_(state[f"blocks.{i}.to_gate_compress.bias"])
    assert torch.equal(outputs(model), outputs(expected))
    assert (report.format, report.sparse_tensors, report.base_tensors) == ("fastvideo-vsa", 6, len(state) - 6)
    assert "3 forwards at timesteps 1000, 757, 522" in str(report)


def test_a_released_checkpoint_may_get_routers_and_begins_as_it_was(tmp_path):
    path = fastvideo_folder(tmp_path / "fastwan", trained().state_dict() | gates())
    released, routed = trained(), trained()
    load_checkpoint(released, path, keep_ratio=0.3)
    report = load_checkpoint(routed, path, keep_ratio=0.3, router="per_head")
    assert report.config.router == "per_head"
    given = inputs()
    assert torch.equal(routed(**given).sample, released(**given).sample)
    with pytest.raises(ValueError, match=r"has no place for router\.proj_query, router\.proj_key"):
        export_checkpoint(routed, tmp_path / "back.safetensors", format="fastvideo-vsa")


def test_fastvideo_ratio_goes_by_the_model_size():
    config_for = FORMATS["fastvideo-vsa"].config_for
    assert config_for(1536) == VSAConfig(keep_ratio=0.2, tile=(4, 4, 4))
    assert config_for(5120) == VSAConfig(keep_ratio=0.1, tile=(4, 4, 4))


def kept_by(model):
    with capture_selections(model) as selections:
        outputs(model, **inputs(latent=(5, 10, 14)))
    return {count for one in selections.values() for count in one.critical_count.unique().tolist()}


def test_a_fastvideo_checkpoint_keeps_as_many_cubes_as_fastvideo(tmp_path):
    """The grid has 2 x 2 x 2 cubes: of a ratio of 0.3, FastVideo keeps max(1, min(ceil(0.3 * 8), 8)) = 3."""
    path = write(tmp_path / "fast.safetensors", trained().state_dict() | gates())
    model = tiny_transformer(num_layers=LAYERS)
    report = load_checkpoint(model, path, keep_ratio=0.3)
    assert report.config == VSAConfig(keep_ratio=0.3, tile=(4, 4, 4))
    assert kept_by(model) == {3}
    export_checkpoint(model, tmp_path / "ours.safetensors", format="fastvideo-vsa")
    report = load_checkpoint(tiny_transformer(num_layers=LAYERS), tmp_path / "ours.safetensors")
    assert report.config == VSAConfig(keep_ratio=0.3, tile=(4, 4, 4))


def test_an_older_version_of_foveal_wrote_a_checkpoint_that_rounds_down(tmp_path):
    path = tmp_path / "ours.safetensors"
    export_checkpoint(sparsify(trained(), VSAConfig(keep_ratio=0.3)), path, format="fastvideo-vsa")
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["foveal_checkpoint"])
    del header["config"]["rounding"]
    safetensors_torch.save_file(
        safetensors_torch.load_file(path), path, metadata={"foveal_checkpoint": json.dumps(header)}
    )
    model = tiny_transformer(num_layers=LAYERS)
    assert load_checkpoint(model, path).config == VSAConfig(keep_ratio=0.3, rounding="down")
    assert kept_by(model) == {2}


def test_sparse_parameters_alone_leave_the_base_weights(tmp_path):
    model = trained()
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_checkpoint(model, write(tmp_path / "proj.safetensors", projections()), **SMALL_SLA)
    assert (report.sparse_tensors, report.base_tensors) == (6, 0)
    assert "own were kept" in str(report)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in former.items())
    assert state["blocks.2.attn1.processor.attention.proj.weight"].abs().max() > 0


def test_dtypes_follow_the_model(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in (wan_state(trained()) | projections()).items()}
    path = write(tmp_path / "turbo.pth", state)
    model = tiny_transformer(num_layers=LAYERS).to(torch.float16)
    report = load_checkpoint(model, path, **SMALL_SLA)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float16
    proj = model.blocks[0].attn1.processor.attention.proj.weight
    assert proj.dtype == torch.float32
    assert torch.equal(proj, state["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"].float())
    assert "bfloat16 cast to float16" in str(report)


@pytest.mark.parametrize(
    ("format", "config", "suffix", "changes"),
    [
        ("turbodiffusion-sla", TURBO.replace(**SMALL_SLA), ".safetensors", {}),
        ("turbodiffusion-sla", TURBO.replace(**SMALL_SLA), ".pth", SMALL_SLA),
        ("turbodiffusion-sla-diffusers", TURBO.replace(**SMALL_SLA), ".safetensors", {}),
        ("fastvideo-vsa", VSAConfig(keep_ratio=0.3), ".safetensors", {}),
        ("fastvideo-vsa", VSAConfig(topk=2), ".pt", {"topk": 2, "keep_ratio": None}),
    ],
)
def test_round_trip(tmp_path, format, config, suffix, changes):
    source = sparsify(trained(), config)
    randomize(source)
    path = tmp_path / "new" / f"model{suffix}"
    export_checkpoint(source, path, format=format)
    assert os.listdir(path.parent) == [path.name]
    model = tiny_transformer(num_layers=LAYERS)
    report = load_checkpoint(model, path, **changes)
    assert report.format == format
    assert report.config == config
    assert report.from_file == (suffix == ".safetensors")
    assert torch.equal(outputs(model), outputs(source))
    expected, given = source.state_dict(), model.state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_exported_names_are_those_of_the_projects(tmp_path):
    source = sparsify(trained(), TURBO)
    export_checkpoint(source, tmp_path / "turbo.pth", format="turbodiffusion-sla")
    written = torch.load(tmp_path / "turbo.pth", weights_only=True)
    expected = wan_state(densify(source)) | projections()
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    source = sparsify(trained(), VSAConfig())
    export_checkpoint(source, tmp_path / "fast.safetensors", format="fastvideo-vsa")
    written = safetensors_torch.load_file(tmp_path / "fast.safetensors")
    assert written.keys() == (densify(source).state_dict() | gates()).keys()


def test_image_to_video_models_have_their_names_too(tmp_path):
    sizes = {"num_layers": 2, "in_channels": 8, "image_dim": 12, "added_kv_proj_dim": 32}
    source = sparsify(tiny_transformer(seed=3, **sizes), TURBO)
    randomize(source)
    export_checkpoint(source, tmp_path / "i2v.pth", format="turbodiffusion-sla")
    names = torch.load(tmp_path / "i2v.pth", weights_only=True).keys()
    assert {"blocks.1.cross_attn.k_img.weight", "blocks.1.cross_attn.norm_k_img.weight", "img_emb.proj.4.bias"} <= names
    assert "img_emb.proj.0.weight" in names
    model = tiny_transformer(**sizes)
    load_checkpoint(model, tmp_path / "i2v.pth")
    expected, given = source.state_dict(), model.state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_the_names_of_the_wan_repository_go_both_ways():
    names = wan_names(2)
    converted = to_diffusers(names, "wan")
    assert len(converted) == len(names) == len(set(names))
    assert sorted(converted.values()) == sorted(names)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: turbo(f, lambda s: s.pop("blocks.1.self_attn.q.weight")), r"lacks blocks\.1\.attn1\.to_q\.weight"),
        (
            lambda f: turbo(f, lambda s: s.pop("blocks.1.self_attn.attn_op.local_attn.proj_l.bias")),
            r"lacks blocks\.1\.self_attn\.attn_op\.local_attn\.proj_l\.bias",
        ),
        (lambda f: turbo(f, lambda s: s.update(odd=torch.ones(1))), "has unexpected odd"),
        (lambda f: turbo(f, lambda s: s.update({"motion_encoder.x": torch.ones(1)})), "Wan-Animate"),
        (
            lambda f: turbo(f, lambda s: s.update({"blocks.1.ffn.0.weight": torch.ones(3, 32)})),
            r"does not fit.*blocks\.1\.ffn\.0\.weight has shape \(3, 32\), the model's is \(32, 32\)",
        ),
        (
            lambda f: turbo(f, lambda s: s.update({"patch_embedding.weight": torch.ones(16, 32)})),
            r"patch_embedding\.weight has shape \(16, 32\)",
        ),
        (
            lambda f: turbo(f, lambda s: s.update({"blocks.1.ffn.0.weight": torch.ones(32, 32, dtype=torch.int8)})),
            r"quantized, or damaged: blocks\.1\.ffn\.0\.weight",
        ),
        (
            lambda f: write(f / "deep.pth", wan_state(tiny_transformer(num_layers=5)) | projections(5)),
            "for a model of 5 layers, got one of 3",
        ),
        (
            lambda f: write(
                f / "wide.pth",
                wan_state(tiny_transformer(num_layers=3, num_attention_heads=3)) | projections(),
            ),
            r"another size maybe: .*\(and \d+ more\)",
        ),
        (lambda f: write(f / "dense.pth", wan_state(trained())), "is a dense checkpoint"),
        (lambda f: write(f / "other.pth", {"encoder.weight": torch.ones(2)}), "is of no known format"),
        (lambda f: write(f / "empty.safetensors", {}), "is of no known format"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, make, match):
    refused(tiny_transformer(num_layers=LAYERS), make(tmp_path), ValueError, match, **SMALL_SLA)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"format": "gguf"}, ValueError, "unknown format 'gguf'; expected one of"),
        (
            {"format": "fastvideo-vsa"},
            ValueError,
            r"is not of format 'fastvideo-vsa': it has no blocks\.0",
        ),
        ({"keep": 0.1}, ValueError, r"unknown SLAConfig fields \['keep'\]; expected some of \['keep_ratio'"),
        ({"keep_ratio": 2.0}, ValueError, "keep_ratio must be in"),
        ({"projection": False}, ValueError, "'turbodiffusion-sla' stands for projection=True, got False"),
        ({"block_q": "64"}, TypeError, "block_q must be an int"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, error, match):
    refused(tiny_transformer(num_layers=LAYERS), turbo(tmp_path), error, match, **arguments)


def test_models_that_do_not_take_checkpoints(tmp_path):
    path = turbo(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tiny_transformer(), tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="transformer and transformer_2"):
        load_checkpoint(tiny_pipeline(), path)
    with pytest.raises(TypeError, match="WanTransformer3DModel"):
        load_checkpoint(torch.nn.Linear(2, 2), path)
    sparse = sparsify(tiny_transformer(num_layers=LAYERS), SPARSE_SLA)
    with pytest.raises(ValueError, match="sparse already"):
        load_checkpoint(sparse, path)
    with torch.device("meta"):
        offloaded = tiny_transformer(num_layers=LAYERS)
    with pytest.raises(ValueError, match="on the meta device"):
        load_checkpoint(offloaded, path)
    assert not sparse_processors(offloaded)
    save(sparse, tmp_path / "own")
    with pytest.raises(ValueError, match=r"foveal\.load reads it"):
        load_checkpoint(tiny_transformer(num_layers=LAYERS), tmp_path / "own" / "foveal.safetensors")


def test_a_malformed_header_is_refused(tmp_path):
    path = write(
        tmp_path / "turbo.safetensors", projections(), {"foveal_checkpoint": '{"format": "turbodiffusion-sla"}'}
    )
    refused(tiny_transformer(num_layers=LAYERS), path, ValueError, "header of .* is malformed")
    other = {"format": "turbodiffusion-sla", "method": "vsa", "config": VSAConfig().to_dict()}
    path = write(tmp_path / "other.safetensors", projections(), {"foveal_checkpoint": json.dumps(other)})
    refused(tiny_transformer(num_layers=LAYERS), path, ValueError, "is for SLAConfig, got VSAConfig")


def with_sla():
    return sparsify(tiny_transformer(), SPARSE_SLA)


def with_vsa():
    return sparsify(tiny_transformer(), SPARSE_VSA)


def mixed():
    model = sparsify(tiny_transformer(num_layers=LAYERS), TURBO, layers=[0, 1])
    return sparsify(model, TURBO.replace(keep_ratio=0.5), layers=[2])


@pytest.mark.parametrize(
    ("make", "format", "match"),
    [
        (lambda: tiny_transformer(), "turbodiffusion-sla", r"blocks\.0\.attn1, blocks\.1\.attn1 are dense"),
        (mixed, "turbodiffusion-sla", r"blocks\.2\.attn1 have others"),
        (
            with_sla,
            "turbodiffusion-sla",
            "linear_scope='all', got 'marginal'",
        ),
        (
            with_sla,
            "fastvideo-vsa",
            "is for VSAConfig, got SLAConfig",
        ),
        (with_vsa, "fastvideo-vsa", r"stands for tile=\(4, 4, 4\)"),
        (with_vsa, "magic", "unknown format 'magic'"),
        (
            lambda: sparsify(tiny_transformer(), SLAConfig(linear_scope="none")),
            "lightx2v-sla-lora",
            "holds one LoRA adapter, got a model with none",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, make, format, match):
    with pytest.raises(ValueError, match=match):
        export_checkpoint(make(), tmp_path / "model.safetensors", format=format)
    assert os.listdir(tmp_path) == []


def test_a_file_of_ours_says_which_model_it_is_for(tmp_path):
    """The same widths with other heads: no shape tells them apart."""
    source = sparsify(tiny_transformer(), VSAConfig(keep_ratio=0.3))
    export_checkpoint(source, tmp_path / "vsa.safetensors", format="fastvideo-vsa")
    other = tiny_transformer(num_attention_heads=4, attention_head_dim=8)
    with pytest.raises(ValueError, match=r"was saved from .* 2 heads of 16, but the model is .* 4 heads of 8"):
        load_checkpoint(other, tmp_path / "vsa.safetensors")
    assert not sparse_processors(other)


def test_reports_are_for_people(tmp_path):
    source = sparsify(tiny_transformer(num_layers=LAYERS), TURBO.replace(keep_ratio=0.15))
    export_checkpoint(source, tmp_path / "turbo.safetensors", format="turbodiffusion-sla")
    text = str(load_checkpoint(tiny_transformer(num_layers=LAYERS), tmp_path / "turbo.safetensors", block_q=128))
    assert "said by the file; changed: block_q=128" in text
    assert re.search(r"sla in 3 layers: SLAConfig\(keep_ratio=0\.15", text)
