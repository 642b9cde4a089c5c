"""LightX2V's Turbo-SLA for MiniMax-H3: LoRA files of its names, in diffusers and in ComfyUI, for a tiny H3."""

import pytest
import torch
from test_fasth3 import HIDDEN, INNER, LAYERS, drawn, tiny

from foveal import SLAConfig, export_checkpoint, load_checkpoint, sparsify
from foveal.models.files.formats import FORMATS
from foveal.models.processor import sparse_processors

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("peft")

FFN = 48
FORMAT = "lightx2v-h3-sla-lora"
TRAINED = SLAConfig(keep_ratio=0.15, drop_ratio=0.0, block_q=128, block_k=64, linear_scope="none", projection=False)
SMALL = {"keep_ratio": 0.3, "block_q": 16, "block_k": 16}
# A module of a block in MiniMax's repository and in diffusers, and its shape.
MODULES = {
    "attn.qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), (3 * INNER, HIDDEN)),
    "attn.out_proj": (("attn.to_out.0",), (HIDDEN, INNER)),
    "mlp.fc1": (("ff.net.0.proj",), (2 * FFN, HIDDEN)),
    "mlp.fc2": (("ff.net.2",), (HIDDEN, FFN)),
}
BLOCKS = {f"blocks.{i}": f"transformer_blocks.{i}" for i in range(LAYERS)} | {
    "token_refiner.blocks.0": "token_refiner.refiner_blocks.0"
}


def updates(rank=4, comfy=False, alpha=None):
    """(file's tensors, {weight of the model: what is added}); LightX2V trains 52 x 6 modules, ComfyUI has 52 x 4."""
    tensors, added = {}, {}
    for theirs, ours in BLOCKS.items():
        for module, (parts, (rows, columns)) in MODULES.items():
            a, b = drawn(rank, columns, seed=len(added)), drawn(rows, rank, seed=len(added) + 1)
            whole = b @ a * (1.0 if alpha is None else alpha / rank)
            chunks = whole.chunk(len(parts))
            if module == "mlp.fc1":  # gate and value change places
                chunks = (torch.cat(whole.chunk(2)[::-1]),)
            added |= {f"{ours}.{part}.weight": x for part, x in zip(parts, chunks, strict=True)}
            if comfy:
                name = f"diffusion_model.{theirs}.{module}"
                tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
                tensors[f"{name}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
                continue
            ups = (torch.cat(b.chunk(2)[::-1]),) if module == "mlp.fc1" else b.chunk(len(parts))
            for part, up in zip(parts, ups, strict=True):
                name = f"{ours}.{part}"
                tensors |= {f"{name}.lora_A.default.weight": a.clone(), f"{name}.lora_B.default.weight": up.clone()}
    return tensors, added


def write(path, tensors, metadata=None):
    safetensors_torch.save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    return path


def check_merged(model, added, config):
    expected = tiny.model()
    state = expected.state_dict()
    with torch.no_grad():
        for name, update in added.items():
            state[name] += update
        sparsify(expected, config)
        torch.testing.assert_close(tiny.run(model), tiny.run(expected), rtol=1e-4, atol=1e-5)
        assert (tiny.run(model) - tiny.run(sparsify(tiny.model(), config))).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_names_of_diffusers(tmp_path, prefix):
    tensors, added = updates()
    path = write(tmp_path / "sla.safetensors", {prefix + name: x for name, x in tensors.items()})
    model = tiny.model()
    report = load_checkpoint(model, path, format=FORMAT, **SMALL)
    assert report.config == TRAINED.replace(**SMALL)
    assert (report.layers, report.sparse_tensors, report.base_tensors) == (LAYERS, 0, 2 * len(added))
    assert "distilled to 4 forwards" in str(report)
    assert "shift of the schedule: 6 (video), 3 (audio)" in str(report)
    check_merged(model, added, report.config)
    model.fuse_lora()
    check_merged(model, added, report.config)


@pytest.mark.parametrize("alpha", [None, 2])
def test_names_of_comfyui(tmp_path, alpha):
    tensors, added = updates(comfy=True, alpha=alpha)
    assert len(tensors) == 3 * len(BLOCKS) * len(MODULES)
    model = tiny.model()
    report = load_checkpoint(model, write(tmp_path / "sla.safetensors", tensors), format=FORMAT, **SMALL)
    check_merged(model, added, report.config)


def test_an_alpha_in_the_header(tmp_path):
    tensors, added = updates()
    model = tiny.model()
    path = write(tmp_path / "sla.safetensors", tensors, {"alpha": "8"})
    report = load_checkpoint(model, path, format=FORMAT, **SMALL)
    check_merged(model, {name: 2 * x for name, x in added.items()}, report.config)
    path = write(tmp_path / "odd.safetensors", tensors, {"alpha": "high"})
    with pytest.raises(ValueError, match="must have a number as alpha in its header, got 'high'"):
        load_checkpoint(tiny.model(), path, format=FORMAT)


def test_the_released_configuration_and_shapes():
    """On the meta device: a file of the released file's 52 x 6 modules at rank 128 names linear layers of H3."""
    import diffusers

    assert FORMATS[FORMAT].config_for(5376) == TRAINED
    with torch.device("meta"):
        model = diffusers.MiniMaxH3Transformer3DModel()
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    blocks = [f"transformer_blocks.{i}" for i in range(50)] + [f"token_refiner.refiner_blocks.{i}" for i in range(2)]
    parts = [part for parts, _ in MODULES.values() for part in parts]
    assert {f"{block}.{part}" for block in blocks for part in parts} <= linear


GATE = "transformer_blocks.0.attn.to_gate_compress"


@pytest.mark.parametrize(
    ("comfy", "change", "match"),
    [
        (False, {f"{GATE}.set_weight": drawn(INNER, HIDDEN)}, f"has unexpected transformer.{GATE}.set_weight"),
        (True, {"diffusion_model.blocks.0.attn.to_gate_compress.set_weight": drawn(2)}, "to_gate_compress.set_weight"),
        (False, {f"{GATE}.lora_A.weight": drawn(4, 2), f"{GATE}.lora_B.weight": drawn(2, 4)}, "no linear layer"),
        (False, {"transformer_blocks.0.attn.to_q.lora_B.default.weight": None}, "only one of lora_A and lora_B"),
        (True, {"diffusion_model.blocks.0.attn.qkv_proj.lora_up.weight": None}, "that diffusers can read"),
        (True, {"diffusion_model.blocks.0.mlp.fc2.lora_up.weight": drawn(30, 4)}, r"does not fit.*\(30, 4\)"),
    ],
)
@torch.no_grad()
def test_what_does_not_fit_is_refused(tmp_path, comfy, change, match):
    tensors, _ = updates(comfy=comfy)
    tensors = {name: x for name, x in (tensors | change).items() if x is not None}
    model = tiny.model()
    before = tiny.run(model)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(model, write(tmp_path / "bad.safetensors", tensors), format=FORMAT)
    assert torch.equal(tiny.run(model), before)
    assert not sparse_processors(model)


def test_a_lora_has_to_be_named(tmp_path):
    path = write(tmp_path / "sla.safetensors", updates()[0])
    with pytest.raises(ValueError, match="give format='lightx2v-sla-lora' or 'lightx2v-h3-sla-lora'"):
        load_checkpoint(tiny.model(), path)
    with pytest.raises(ValueError, match="is for models of family 'wan', got one of 'minimax_h3'"):
        load_checkpoint(tiny.model(), path, format="lightx2v-sla-lora")


def test_export(tmp_path):
    tensors, _ = updates()
    model = tiny.model()
    report = load_checkpoint(model, write(tmp_path / "sla.safetensors", tensors), format=FORMAT, **SMALL)
    export_checkpoint(model, tmp_path / "ours.safetensors", format=FORMAT)
    names = set(safetensors_torch.load_file(tmp_path / "ours.safetensors"))
    assert names == {f"transformer.{name.replace('.default.', '.')}" for name in tensors}
    other = tiny.model()
    assert load_checkpoint(other, tmp_path / "ours.safetensors").config == report.config
    torch.testing.assert_close(tiny.run(other), tiny.run(model), rtol=1e-4, atol=1e-5)
