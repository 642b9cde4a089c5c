"""FastH3, FastVideo's sparse checkpoints for MiniMax-H3: files of their names and shapes, for a tiny H3."""

import json
from pathlib import Path

import pytest
import torch
from test_minimax_h3 import TestMiniMaxH3 as Tiny

from foveal import VSAConfig, export_checkpoint, load_checkpoint, sparsify
from foveal.models.files.formats import FORMATS
from foveal.models.files.loading import loader
from foveal.models.files.tensor_files import TensorFile
from foveal.models.processor import sparse_processors

safetensors_torch = pytest.importorskip("safetensors.torch")
tiny = Tiny()

LAYERS, HIDDEN, INNER = 3, 32, 48
CONTRACT = {
    "schema_version": "fasth3-inference-contract-v1",
    "attention_backend": "VIDEO_SPARSE_ATTN_H3",
    "vsa_tile_size": 64,
    "vsa_sparsity": 0.8,
    "guidance_scale": 1.0,
    "num_inference_steps": 9,
    "transformer_forwards": 8,
    "dmd_denoising_steps": [999, 874, 749, 624, 500, 375, 250, 125],
    "video_scheduler_shift": 10.0,
    "audio_scheduler_shift": 3.0,
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def gates(ending: str) -> dict[str, torch.Tensor]:
    names = (f"transformer_blocks.{i}.attn.to_gate_compress.{ending}" for i in range(LAYERS))
    return {name: drawn(INNER, HIDDEN, seed=i) for i, name in enumerate(names)}


def release(folder, contract=CONTRACT, **changes):
    """A release's folder: weights of another seed with gates, and the contract beside them."""
    state = {name: x.clone() for name, x in tiny.model(seed=1).state_dict().items()} | gates("weight")
    state = {name: x for name, x in (state | changes).items() if x is not None}
    (folder / "transformer").mkdir(parents=True)
    safetensors_torch.save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    if contract is not None:
        (folder / "fastvideo_inference.json").write_text(json.dumps(contract))
    return folder


def expected_model(config, seed=1):
    model = sparsify(tiny.model(seed=seed), config)
    for processor, gate in zip(sparse_processors(model).values(), gates("weight").values(), strict=True):
        processor.attention.to_gate_coarse.weight.data.copy_(gate)
    return model


@pytest.mark.parametrize("inside", [False, True], ids=["release", "its transformer"])
@torch.no_grad()
def test_a_release(tmp_path, inside):
    folder = release(tmp_path / "FastH3")
    model = tiny.model()
    report = load_checkpoint(model, folder / "transformer" if inside else folder)
    assert report.format == "fasth3-vsa"
    assert report.from_file
    assert report.config == VSAConfig(keep_ratio=0.2, tile=(4, 4, 4))
    assert report.sparse_tensors == LAYERS
    assert torch.equal(tiny.run(model), tiny.run(expected_model(report.config)))
    text = str(report)
    assert "distilled to 8 forwards at timesteps 999, 874, 749, 624, 500, 375, 250, 125, with guidance 1" in text
    assert "num_inference_steps=9 in diffusers" in text
    assert "shift of the schedule: 10 (video), 3 (audio)" in text
    assert "FastVideo keeps ceil" not in text  # a packed sequence rounds up here too
    assert "v1" not in text


@torch.no_grad()
def test_a_release_with_routers_begins_as_it_was(tmp_path):
    folder = release(tmp_path / "FastH3")
    plain, routed = tiny.model(), tiny.model()
    load_checkpoint(plain, folder, keep_ratio=0.3)
    report = load_checkpoint(routed, folder, keep_ratio=0.3, router="per_head")
    assert report.config.router == "per_head"
    assert torch.equal(tiny.run(routed), tiny.run(plain))


@torch.no_grad()
def test_shifts_of_the_schedulers(tmp_path):
    """v1 says its steps in the contract, and its shifts in its schedulers."""
    contract = {name: x for name, x in CONTRACT.items() if not name.endswith("_shift")} | {"vsa_sparsity": 0.9}
    folder = release(tmp_path / "v1", contract)
    for name, shift in (("scheduler", 12.0), ("audio_scheduler", 3.0)):
        (folder / name).mkdir()
        (folder / name / "scheduler_config.json").write_text(json.dumps({"shift": shift}))
    report = load_checkpoint(tiny.model(), folder)
    assert report.config.keep_ratio == 0.1
    assert "shift of the schedule: 12 (video), 3 (audio)" in str(report)


def says_how_v1_runs(report) -> bool:
    words = "taken for FastH3 v1", "4 forwards at timesteps 999, 749, 500, 250, with guidance 1"
    words += "num_inference_steps=5 in diffusers", "shift of the schedule: 12 (video), 3 (audio)"
    return all(x in str(report) for x in words)


def test_weights_without_a_contract(tmp_path):
    report = load_checkpoint(tiny.model(), release(tmp_path / "weights", contract=None), keep_ratio=0.3)
    assert not report.from_file
    assert report.config == VSAConfig(keep_ratio=0.3, tile=(4, 4, 4))
    assert says_how_v1_runs(report)


def test_128_tokens(tmp_path):
    report = load_checkpoint(tiny.model(), release(tmp_path / "wide", CONTRACT | {"vsa_tile_size": 128}))
    assert report.config.tile == (4, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "v2"}, "must have schema_version 'fasth3-inference-contract-v1', got 'v2'"),
        ({"attention_backend": "FLASH_ATTN"}, "must have attention_backend 'VIDEO_SPARSE_ATTN_H3', got 'FLASH_ATTN'"),
        ({"vsa_tile_size": 256}, "must have a vsa_tile_size of 64 or 128, got 256"),
        ({"vsa_sparsity": None}, r"must have a vsa_sparsity in \[0, 1\), got None"),
        ({"vsa_ref_policy": "p2_multi_region"}, "asks for vsa_ref_policy 'p2_multi_region'"),
    ],
)
@torch.no_grad()
def test_contracts_that_do_not_fit(tmp_path, changes, message):
    model = tiny.model()
    before = tiny.run(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, release(tmp_path / "other", CONTRACT | changes))
    assert torch.equal(tiny.run(model), before)
    assert not sparse_processors(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_blocks.1.attn.to_gate_compress.weight": None}, r"lacks transformer_blocks.1.attn.to_gate_comp"),
        ({"transformer_blocks.1.attn.to_gate_compress.bias": drawn(INNER)}, "has unexpected transformer_blocks.1.attn"),
        ({"transformer_blocks.3.attn.to_gate_compress.weight": drawn(INNER, HIDDEN)}, "is for a model of 4 layers"),
        ({"transformer_blocks.1.attn.to_gate_compress.weight": drawn(INNER, 30)}, r"has shape \(48, 30\)"),
        ({"transformer_blocks.0.attn.to_q.weight": None}, "lacks transformer_blocks.0.attn.to_q.weight"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, changes, message):
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, release(tmp_path / "other", **changes))
    assert not sparse_processors(model)


def test_another_family(tmp_path):
    from tiny_wan import tiny_transformer

    with pytest.raises(ValueError, match="is for models of family 'minimax_h3', got one of 'wan'"):
        load_checkpoint(tiny_transformer(), release(tmp_path / "FastH3"))


@torch.no_grad()
def test_export(tmp_path):
    config = VSAConfig(keep_ratio=0.25, tile=(4, 4, 4))
    model = expected_model(config)
    export_checkpoint(model, tmp_path / "ours.safetensors", format="fasth3-vsa")
    names = set(safetensors_torch.load_file(tmp_path / "ours.safetensors"))
    assert names == set(tiny.model().state_dict()) | set(gates("weight"))
    other = tiny.model()
    report = load_checkpoint(other, tmp_path / "ours.safetensors")
    assert report.config == config
    assert torch.equal(tiny.run(other), tiny.run(model))
    next(iter(sparse_processors(model).values())).attention.to_gate_coarse.bias += 0.1
    with pytest.raises(ValueError, match=r"has no place for to_gate_coarse.bias of transformer_blocks\.0\.attn"):
        export_checkpoint(model, tmp_path / "biased.safetensors", format="fasth3-vsa")


def adapter(path, metadata=None, **changes):
    """FastVideo's adapter: pairs, whole updates of a weight and of a bias, and gates."""
    tensors = {
        "transformer_blocks.0.attn.to_q.lora_A.weight": drawn(4, HIDDEN),
        "transformer_blocks.0.attn.to_q.lora_B.weight": drawn(INNER, 4),
        "transformer_blocks.2.attn.to_out.0.lora_A.weight": drawn(4, INNER),
        "transformer_blocks.2.attn.to_out.0.lora_B.weight": drawn(HIDDEN, 4),
        "transformer_blocks.1.norm1.diff": drawn(HIDDEN),
        "proj_in.diff": drawn(HIDDEN, 16),
        "proj_in.diff_b": drawn(HIDDEN),
        **gates("set_weight"),
    }
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    safetensors_torch.save_file(
        tensors, path, metadata={"format": "fastvideo-lora-v2"} if metadata is None else metadata
    )
    return path, tensors


@torch.no_grad()
def test_an_adapter(tmp_path):
    path, tensors = adapter(tmp_path / "adapter_model.safetensors")
    model = tiny.model()
    report = load_checkpoint(model, path)
    assert (report.format, report.sparse_tensors, report.base_tensors) == ("fasth3-vsa-adapter", LAYERS, 7)
    assert "merged into the base weights" in str(report)
    assert says_how_v1_runs(report)
    expected = expected_model(report.config, seed=0)
    state = expected.state_dict()
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_out.0"):
        state[f"{module}.weight"] += tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    state["transformer_blocks.1.norm1.weight"] += tensors["transformer_blocks.1.norm1.diff"]
    state["proj_in.weight"] += tensors["proj_in.diff"]
    state["proj_in.bias"] += tensors["proj_in.diff_b"]
    torch.testing.assert_close(tiny.run(model), tiny.run(expected))
    assert (tiny.run(model) - tiny.run(expected_model(report.config, seed=0))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_blocks.1.attn.to_gate_compress.set_weight": None}, "lacks transformer_blocks.1.attn.to_gate"),
        ({"proj_out.set_weight": drawn(3)}, "has unexpected proj_out.set_weight"),
        ({"proj_in.diff_m": drawn(3)}, "has proj_in.diff_m; expected names that end in .lora_A.weight"),
        ({"transformer_blocks.0.attn.to_q.lora_B.weight": None}, "has only one of lora_A and lora_B for transformer_b"),
        ({"transformer_blocks.0.attn.to_q.lora_B.weight": drawn(INNER, 5)}, "of different ranks for transformer_b"),
        ({"transformer_blocks.0.attn.to_q.lora_B.weight": drawn(40, 4)}, r"by \(40, 32\), the model's is \(48, 32\)"),
        ({"somewhere.diff": drawn(3)}, "updates somewhere.weight, which the model does not have"),
        ({"transformer_blocks.5.norm1.diff": drawn(HIDDEN)}, "is for a model of 6 layers, got one of 3"),
    ],
)
@torch.no_grad()
def test_adapters_that_do_not_fit(tmp_path, changes, message):
    model = tiny.model()
    before = tiny.run(model)
    path, _ = adapter(tmp_path / "adapter_model.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, path)
    assert torch.equal(tiny.run(model), before)
    assert not sparse_processors(model)


def test_an_adapter_of_another_kind(tmp_path):
    path, _ = adapter(tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must say format 'fastvideo-lora-v2' in its header, got 'pt'"):
        load_checkpoint(tiny.model(), path)


def test_a_full_size_state_maps_without_a_missing_or_extra_name():
    """Names and shapes are checked before the model, which has no memory on the meta device."""
    import diffusers

    with torch.device("meta"):
        model = diffusers.MiniMaxH3Transformer3DModel()
    release = FORMATS["fasth3-vsa"]
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    shapes |= {f"transformer_blocks.{i}.attn.to_gate_compress.weight": (7168, 5376) for i in range(50)}

    def load(shapes):
        file = TensorFile(Path("release"), shapes, frozenset(), {}, read=shapes.__getitem__)
        loader(release)(model, file, {name: name for name in shapes}, release, release.config_for(5376), "auto")

    with pytest.raises(ValueError, match="are on the meta device; load before offloading it"):
        load(shapes)
    last = "transformer_blocks.49.attn.to_gate_compress"
    with pytest.raises(ValueError, match=f"lacks {last}.weight"):
        load({name: x for name, x in shapes.items() if name != f"{last}.weight"})
    with pytest.raises(ValueError, match=f"has unexpected {last}.bias"):
        load(shapes | {f"{last}.bias": (7168,)})
    with pytest.raises(ValueError, match=rf"{last}.weight has shape \(5376, 7168\), the model's is \(7168, 5376\)"):
        load(shapes | {f"{last}.weight": (5376, 7168)})
