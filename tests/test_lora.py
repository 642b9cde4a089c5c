"""LoRA files: every way of naming them, exact merging, round trips, and what is refused."""

import pytest
import torch
from checkpoint_files import (
    LAYERS,
    SMALL_SLA,
    TURBO,
    WAN_BLOCK,
    drawn,
    outputs,
    refused,
    safetensors_torch,
    trained,
    write,
)
from tiny_wan import tiny_transformer

from foveal import SLAConfig
from foveal.models import densify, sparsify
from foveal.models.files.checkpoints import export_checkpoint, load_checkpoint
from foveal.models.files.formats import FORMATS


def lora_state(model, style, rank=4, alpha=None, layers=("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.2")):
    """(file's tensors, {module of the model: full update}) for the Wan-repository modules in `layers`."""
    down, up, prefix = {
        "peft": ("lora_A.weight", "lora_B.weight", "diffusion_model."),
        "default": ("lora_A.default.weight", "lora_B.default.weight", ""),
        "kohya": ("lora_down.weight", "lora_up.weight", "diffusion_model."),
        "bare": ("lora_down.weight", "lora_up.weight", ""),
        "diffusers": ("lora_A.weight", "lora_B.weight", "transformer."),
    }[style]
    tensors, updates = {}, {}
    for index in range(len(model.blocks)):
        for name in layers:
            module = f"blocks.{index}.{WAN_BLOCK[name]}"
            linear = model.get_submodule(module)
            a = drawn(rank, linear.in_features, seed=index + len(name))
            b = drawn(linear.out_features, rank, seed=index + 2 * len(name))
            key = prefix + (module if style == "diffusers" else f"blocks.{index}.{name}")
            tensors[f"{key}.{down}"], tensors[f"{key}.{up}"] = a, b
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            updates[module] = b @ a * (1.0 if alpha is None else alpha / rank)
    return tensors, updates


@pytest.mark.parametrize(
    ("style", "alpha"), [("peft", None), ("default", None), ("kohya", 2), ("bare", None), ("diffusers", None)]
)
def test_lora(tmp_path, style, alpha):
    pytest.importorskip("peft")
    model, expected = trained(), trained()
    tensors, updates = lora_state(model, style, alpha=alpha)
    path = write(tmp_path / "lora.safetensors", tensors)
    small = SMALL_SLA | {"keep_ratio": 0.3}
    report = load_checkpoint(model, path, format="lightx2v-sla-lora", **small)
    assert report.config == SLAConfig(drop_ratio=0.0, linear_scope="none", projection=False, **small)
    assert (report.sparse_tensors, report.base_tensors) == (0, 2 * len(updates))
    with torch.no_grad():
        for name, update in updates.items():
            expected.get_submodule(name).weight.add_(update)
    sparsify(expected, report.config)
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)
    model.fuse_lora()
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)


def test_lora_of_the_released_sparsity():
    config = FORMATS["lightx2v-sla-lora"].config_for(5120)
    assert config == SLAConfig(keep_ratio=0.15, drop_ratio=0.0, linear_scope="none", projection=False)


def test_lora_round_trip(tmp_path):
    peft = pytest.importorskip("peft")
    source = sparsify(trained(), SLAConfig(drop_ratio=0.0, linear_scope="none", projection=False, **SMALL_SLA))
    source.add_adapter(peft.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0", "proj_out"]), "mine")
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if ".lora_" in name:
                parameter.copy_(drawn(*parameter.shape, seed=len(name)))
    path = tmp_path / "lora.safetensors"
    export_checkpoint(source, path, format="lightx2v-sla-lora")
    names = set(safetensors_torch.load_file(path))
    assert {
        "diffusion_model.blocks.2.self_attn.o.lora_up.weight",
        "diffusion_model.head.head.lora_down.weight",
    } <= names
    assert len(names) == 2 * (2 * 2 * LAYERS + 1)
    model = trained()
    report = load_checkpoint(model, path)
    assert report.from_file
    torch.testing.assert_close(outputs(model), outputs(source), rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="merge them with fuse_lora"):
        export_checkpoint(sparsify_again(source), tmp_path / "full.pth", format="turbodiffusion-sla")


def sparsify_again(model):
    return sparsify(densify(model), TURBO)


LORA = {"format": "lightx2v-sla-lora"}
QUERY = "diffusion_model.blocks.1.self_attn.q"


def damage_lora(change):
    def made(folder):
        tensors, _ = lora_state(tiny_transformer(num_layers=LAYERS), "kohya")
        change(tensors)
        return write(folder / "lora.safetensors", tensors)

    return made


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (damage_lora(lambda t: None), {}, "nothing in one says"),
        (
            damage_lora(lambda t: t.pop(f"{QUERY}.lora_up.weight")),
            LORA,
            r"blocks\.1\.attn1\.to_q",
        ),
        (
            damage_lora(lambda t: t.update({f"{QUERY}.lora_up.weight": torch.ones(8, 4)})),
            LORA,
            r"blocks\.1\.attn1\.to_q has lora_A \(4, 32\) and lora_B \(8, 4\)",
        ),
        (
            damage_lora(
                lambda t: t.update(
                    {
                        f"diffusion_model.blocks.9.self_attn.q.lora_{part}.weight": torch.ones(4, 4)
                        for part in ("up", "down")
                    }
                )
            ),
            LORA,
            r"blocks\.9\.attn1\.to_q, which is no linear layer",
        ),
        (damage_lora(lambda t: t.update({"diffusion_model.odd.weight": torch.ones(1)})), LORA, "odd"),
        (
            damage_lora(lambda t: t.update({"diffusion_model.blocks.0.norm3.diff": torch.ones(32)})),
            LORA,
            r"updates norms.*blocks\.0\.norm3\.diff",
        ),
    ],
)
def test_a_bad_lora_is_refused(tmp_path, make, arguments, match):
    pytest.importorskip("peft")
    refused(tiny_transformer(num_layers=LAYERS), make(tmp_path), ValueError, match, **arguments)


def test_zero_updates_of_norms_are_nothing(tmp_path):
    pytest.importorskip("peft")
    path = damage_lora(lambda t: t.update({"diffusion_model.blocks.0.norm3.diff": torch.zeros(32)}))(tmp_path)
    assert load_checkpoint(tiny_transformer(num_layers=LAYERS), path, **LORA).layers == LAYERS
