"""`save` and `load`: exact round trips, interrupted saves, and loads that fail before they change anything."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, randomize, run, tiny_pipeline, tiny_transformer

from foveal import Policy, SLAConfig, VideoGrid, VSAConfig, get_policy, set_policy
from foveal.models import densify, load, save, sparsify
from foveal.models.files.persist import load_parameters
from foveal.models.processor import sparse_processors

safetensors_torch = pytest.importorskip("safetensors.torch")

WEIGHTS, MANIFEST = "foveal.safetensors", "foveal.json"


def sparse_transformer(**kwargs):
    """SLA in the first layer, VSA in the second, dense in the third."""
    model = tiny_transformer(num_layers=3, **kwargs)
    sparsify(model, SPARSE_SLA, layers=[0])
    sparsify(model, SPARSE_VSA.replace(fine_gate=True), layers=[1])
    randomize(model)
    return model


def rewrite(folder, change_manifest=None, change_tensors=None):
    """Edits a saved folder, header and foveal.json alike."""
    manifest = json.loads((folder / MANIFEST).read_text())
    tensors = safetensors_torch.load_file(folder / WEIGHTS)
    if change_manifest is not None:
        change_manifest(manifest)
    if change_tensors is not None:
        change_tensors(tensors)
    text = json.dumps(manifest)
    (folder / MANIFEST).write_text(text)
    safetensors_torch.save_file(tensors, folder / WEIGHTS, metadata={"foveal": text})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["dense", "sparse"])
def test_round_trip_is_exact(tmp_path, dtype, start):
    model = sparse_transformer().to(dtype)
    save(model, tmp_path / "new" / "folder")
    other = tiny_transformer(num_layers=3).to(dtype)
    if start == "sparse":
        sparsify(other, SPARSE_SLA, layers=[0])
        sparsify(other, SPARSE_VSA.replace(fine_gate=True), layers=[1])
    assert load(other, str(tmp_path / "new" / "folder")) is other

    assert [p.config for p in sparse_processors(other).values()] == [
        p.config for p in sparse_processors(model).values()
    ]
    expected, given = model.state_dict(), other.state_dict()
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name], tensor), name
    assert other.blocks[0].attn1.processor.attention.proj.weight.dtype == torch.float32
    assert all(p.requires_grad for name, p in other.named_parameters() if ".processor." in name)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [MANIFEST, WEIGHTS]


def test_saved_files(tmp_path):
    save(sparse_transformer(), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["format"] == 1
    component = manifest["components"]["transformer"]
    assert component["family"] == "wan"
    sizes = {"width": 32, "heads": 2, "head_dim": 16}
    assert component["model"] == {
        "class": "WanTransformer3DModel",
        "self_attention": {f"blocks.{layer}.attn1": sizes for layer in range(3)},
    }
    assert component["layers"]["blocks.0.attn1"] == {"method": "sla", "config": SPARSE_SLA.to_dict()}
    assert set(component["layers"]) == {"blocks.0.attn1", "blocks.1.attn1"}
    tensors = safetensors_torch.load_file(tmp_path / WEIGHTS)
    assert set(tensors) == {
        *(f"transformer.blocks.0.attn1.proj.{name}" for name in ("weight", "bias")),
        *(f"transformer.blocks.1.attn1.to_gate_{g}.{n}" for g in ("coarse", "fine") for n in ("weight", "bias")),
    }


def test_the_policy_is_saved(tmp_path):
    policy = Policy(dense_first_steps=2, dense_layers=[0], keep_ratio={0: 0.2, 500: 0.4})
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    set_policy(pipeline, policy)
    set_policy(pipeline.transformer_2, None)
    save(pipeline, tmp_path)
    components = json.loads((tmp_path / MANIFEST).read_text())["components"]
    assert components["transformer"]["policy"] == {
        "dense_first_steps": 2,
        "dense_layers": [0],
        "keep_ratio": [[0.0, 0.2], [500.0, 0.4]],
    }
    assert "policy" not in components["transformer_2"]
    other = load(tiny_pipeline(), tmp_path)
    assert [get_policy(part) for part in (other.transformer, other.transformer_2)] == [policy, None]
    assert [p.held_dense for p in sparse_processors(other.transformer).values()] == [True, False]
    # A pipeline's scheduler tells the step from then on.
    generate(other)
    # What was saved takes the place of what is there.
    set_policy(other, Policy(dense_above=900))
    load(other, tmp_path)
    assert [get_policy(part) for part in (other.transformer, other.transformer_2)] == [policy, None]


def test_files_without_rounding_keep_the_number_of_cubes_that_they_were_trained_with(tmp_path):
    """As commit 201ff43 wrote them, when a ratio rounded down."""
    model = sparsify(tiny_transformer(), VSAConfig(keep_ratio=0.3, tile=(2, 2, 4)), layers=[0])
    sparsify(model, VSAConfig(topk=3, tile=(2, 2, 4)), layers=[1])
    save(model, tmp_path)

    def forget(manifest):
        for entry in manifest["components"]["transformer"]["layers"].values():
            entry["config"] = {name: entry["config"][name] for name in ("topk", "keep_ratio", "tile", "fine_gate")}

    rewrite(tmp_path, forget)
    first, second = sparse_processors(load(tiny_transformer(), tmp_path)).values()
    assert first.config == VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), rounding="down")
    assert second.config == VSAConfig(topk=3, tile=(2, 2, 4))
    grid = VideoGrid(3, 5, 7)  # 2 x 3 x 2 cubes
    query = torch.randn(1, 2, grid.num_tokens, 16)
    kept = [
        layer.attention.select(query, query, grid=grid).critical_count.unique().tolist() for layer in (first, second)
    ]
    assert kept == [[3], [3]]
    # Today's files have the field, and 0.3 of 12 cubes is 4.
    save(sparsify(tiny_transformer(), VSAConfig(keep_ratio=0.3, tile=(2, 2, 4))), tmp_path / "today")
    first, _ = sparse_processors(load(tiny_transformer(), tmp_path / "today")).values()
    assert first.attention.select(query, query, grid=grid).critical_count.unique().tolist() == [4]


def test_a_router_may_join_saved_parameters(tmp_path):
    """The layers begin as they were, and choose as they did; a router that was saved is taken over, or missed."""
    routed = SPARSE_VSA.replace(router="per_head")
    saved, model, other = (sparsify(tiny_transformer(), config) for config in (SPARSE_VSA, routed, routed))
    randomize(saved)
    save(saved, tmp_path / "plain")
    load_parameters(model, tmp_path / "plain")
    assert torch.equal(run(model), run(saved))
    randomize(other)
    save(other, tmp_path / "routed")
    load_parameters(model, tmp_path / "routed")
    assert torch.equal(run(model), run(other))
    assert not torch.equal(run(model), run(saved))
    with pytest.raises(ValueError, match=r"has unexpected .*router"):
        load_parameters(saved, tmp_path / "routed")


def test_layers_without_parameters(tmp_path):
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none")
    model = sparsify(tiny_transformer(), config, layers=[1])
    save(model, tmp_path)
    other = load(tiny_transformer(), tmp_path)
    assert {name: p.config for name, p in sparse_processors(other).items()} == {"blocks.1.attn1": config}
    with torch.no_grad():
        assert torch.equal(run(other), run(model))


def test_pipeline_round_trip(tmp_path):
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA)
    for seed, part in enumerate((pipeline.transformer, pipeline.transformer_2)):
        randomize(part)
        with torch.no_grad():
            part.blocks[0].attn1.processor.attention.proj.bias.fill_(seed)
    save(pipeline, tmp_path)
    other = load(tiny_pipeline(), tmp_path)
    for part in ("transformer", "transformer_2"):
        expected, given = getattr(pipeline, part).state_dict(), getattr(other, part).state_dict()
        assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())

    bare = tiny_transformer()
    with pytest.raises(ValueError, match=r"\['transformer_2'\]"):
        load(bare, tmp_path)
    assert not sparse_processors(bare)


def test_a_bare_transformer_loads_into_a_pipeline_and_back(tmp_path):
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    randomize(model)
    save(model, tmp_path / "bare")
    pipeline = load(tiny_pipeline(), tmp_path / "bare")
    assert not sparse_processors(pipeline.transformer_2)
    save(pipeline, tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / WEIGHTS).read_bytes() == (tmp_path / "bare" / WEIGHTS).read_bytes()


def test_dtype_follows_the_model(tmp_path):
    model = sparse_transformer()
    save(model, tmp_path)
    other = load(tiny_transformer(num_layers=3).to(torch.bfloat16), tmp_path)
    expected = model.blocks[1].attn1.processor.attention.to_gate_coarse.weight
    assert torch.equal(other.blocks[1].attn1.processor.attention.to_gate_coarse.weight, expected.bfloat16())
    proj = model.blocks[0].attn1.processor.attention.proj.weight
    assert torch.equal(other.blocks[0].attn1.processor.attention.proj.weight, proj)


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5])
def test_an_interrupted_save_leaves_the_former_or_the_new_one(tmp_path, monkeypatch, fail_at):
    """Stops the second save at each of its steps: two flushes, one unlink, two renames."""
    former = sparse_transformer()
    save(former, tmp_path)
    new = sparsify(tiny_transformer(num_layers=3), SPARSE_SLA)
    randomize(new)

    class Killed(BaseException):
        pass

    steps = 0

    def stopping(function):
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == fail_at:
                raise Killed
            return function(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopping(os.fsync))
        patch.setattr(os, "replace", stopping(os.replace))
        patch.setattr(Path, "unlink", stopping(Path.unlink))
        with pytest.raises(Killed):
            save(new, tmp_path)

    expected = former if fail_at <= 4 else new
    other = load(tiny_transformer(num_layers=3), tmp_path)
    given = other.state_dict()
    assert given.keys() == expected.state_dict().keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.state_dict().items())
    save(new, tmp_path)
    assert load(tiny_transformer(num_layers=3), tmp_path).state_dict().keys() == new.state_dict().keys()
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, WEIGHTS]


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "optimizer.pt").write_text("state")
    save(sparse_transformer(), tmp_path)
    save(sparse_transformer(), tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == "state"


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no sparse layer"):
        save(tiny_transformer(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with torch.device("meta"):
        model = tiny_transformer()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.proj\.weight.*meta"):
        save(sparsify(model, SPARSE_SLA), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def layers_of(manifest) -> dict:
    return manifest["components"]["transformer"]["layers"]


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "no foveal.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"{}"), ValueError, "foveal.safetensors is corrupt"),
        (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 4), ValueError, "corrupt"),
        (lambda f: safetensors_torch.save_file({}, f / WEIGHTS), ValueError, "no 'foveal' entry in its header"),
        (lambda f: (f / MANIFEST).write_text("{"), ValueError, "foveal.json is not valid JSON"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\xff"), ValueError, "foveal.json is not valid JSON"),
        (lambda f: (f / MANIFEST).write_text("[]"), ValueError, "must hold a JSON object, got list"),
        (lambda f: (f / MANIFEST).write_text("{}"), ValueError, "foveal.json does not agree"),
        (lambda f: rewrite(f, lambda m: m.update(format=2)), ValueError, "format version 2; this version reads 1"),
        (lambda f: rewrite(f, lambda m: m.pop("components")), ValueError, "lists no components"),
        (
            lambda f: rewrite(f, lambda m: m["components"].update(vae={"family": "wan", "layers": {}})),
            ValueError,
            "'vae'",
        ),
        (
            lambda f: rewrite(f, lambda m: m["components"]["transformer"].update(family="flux")),
            ValueError,
            "family 'flux'",
        ),
        (
            lambda f: rewrite(f, lambda m: layers_of(m).update({"blocks.7.attn1": layers_of(m)["blocks.0.attn1"]})),
            ValueError,
            r"no layers blocks\.7\.attn1",
        ),
        (
            lambda f: rewrite(f, lambda m: layers_of(m)["blocks.0.attn1"].update(method="magic")),
            ValueError,
            "unknown method 'magic'",
        ),
        (
            lambda f: rewrite(f, lambda m: layers_of(m)["blocks.0.attn1"]["config"].update(keep=1)),
            ValueError,
            "unknown SLAConfig fields",
        ),
        (lambda f: rewrite(f, lambda m: layers_of(m)["blocks.0.attn1"].pop("config")), ValueError, "malformed"),
        (
            lambda f: rewrite(f, lambda m: m["components"]["transformer"].update(policy={"dense": True})),
            ValueError,
            r"unknown Policy fields \['dense'\]",
        ),
        (
            lambda f: rewrite(f, lambda m: m["components"]["transformer"].update(policy={"dense_layers": [7]})),
            ValueError,
            r"dense_layers must be in 0\.\.2, got 7",
        ),
        (
            lambda f: rewrite(f, lambda m: m["components"]["transformer"].update(policy={"keep_ratio": [[0, 0.99]]})),
            ValueError,
            r"policy does not go with layer blocks\.0\.attn1",
        ),
        (
            lambda f: rewrite(f, None, lambda t: t.update({"transformer.blocks.2.attn1.proj.bias": torch.zeros(16)})),
            ValueError,
            r"has unexpected transformer\.blocks\.2\.attn1\.proj\.bias",
        ),
        (
            lambda f: rewrite(f, None, lambda t: t.pop("transformer.blocks.0.attn1.proj.bias")),
            ValueError,
            r"lacks transformer\.blocks\.0\.attn1\.proj\.bias",
        ),
        (
            lambda f: rewrite(f, None, lambda t: t.update({"transformer.blocks.0.attn1.proj.bias": torch.zeros(3)})),
            ValueError,
            r"proj\.bias has shape \(3,\), expected \(16,\)",
        ),
    ],
)
@pytest.mark.parametrize("start", ["dense", "sparse"])
def test_a_failed_load_says_why_and_changes_nothing(tmp_path, damage, error, match, start):
    save(sparse_transformer(), tmp_path)
    damage(tmp_path)
    model = tiny_transformer(num_layers=3) if start == "dense" else sparse_transformer(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = len(model.rope._forward_hooks)
    with pytest.raises(error, match=match):
        load(model, tmp_path)
    assert model.state_dict().keys() == former.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in former.items())
    assert len(model.rope._forward_hooks) == hooks


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tiny_transformer(), tmp_path / "nowhere")


def test_the_header_is_enough(tmp_path):
    model = sparse_transformer()
    save(model, tmp_path)
    (tmp_path / MANIFEST).unlink()
    other = load(tiny_transformer(num_layers=3), tmp_path)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_configurations_must_agree_with_a_sparse_model(tmp_path):
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    randomize(model)
    save(model, tmp_path)
    other = sparsify(tiny_transformer(), SPARSE_SLA.replace(keep_ratio=0.5))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1 is .*keep_ratio=0\.5.*keep_ratio=0\.3.*densify"):
        load(other, tmp_path)
    partly = sparsify(tiny_transformer(), SPARSE_SLA, layers=[0])
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 is dense in the model"):
        load(partly, tmp_path)
    load(densify(other), tmp_path)
    assert other.blocks[0].attn1.processor.config == SPARSE_SLA


SMALL = (
    r"WanTransformer3DModel with 2 self-attention layers \(blocks\.0\.attn1 to blocks\.1\.attn1\) "
    r"of width 32, 2 heads of 16"
)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            {"num_layers": 3},
            r"with 3 self-attention layers \(blocks\.0\.attn1 to blocks\.2\.attn1\) of width 32, 2 heads",
        ),
        (
            {"num_layers": 1},
            r"with 1 self-attention layers \(blocks\.0\.attn1 to blocks\.0\.attn1\) of width 32, 2 heads",
        ),
        ({"num_attention_heads": 4}, r"of width 64, 4 heads of 16"),
        ({"num_attention_heads": 4, "attention_head_dim": 8}, r"of width 32, 4 heads of 8"),
    ],
)
@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA, SPARSE_SLA.replace(linear_scope="none", drop_ratio=0.0)])
def test_weights_of_another_model_are_refused(tmp_path, other, what, config):
    """Even if the shapes agree: SLA's projection has only head_dim, and some configurations have no parameters."""
    save(sparsify(tiny_transformer(), config, layers=[0]), tmp_path)
    model = tiny_transformer(**other)
    with pytest.raises(ValueError, match=f"transformer in .* was saved from a {SMALL}, but the model is a .*{what}"):
        load(model, tmp_path)
    assert not sparse_processors(model)
    load(tiny_transformer(), tmp_path)


def test_a_model_with_other_layers_is_told_by_their_names(tmp_path):
    save(sparsify(tiny_transformer(num_layers=3), SPARSE_SLA), tmp_path)

    def rename(manifest):
        model = manifest["components"]["transformer"]["model"]
        names = {"blocks.1.attn1": "blocks.9.attn1"}
        model["self_attention"] = {names.get(name, name): sizes for name, sizes in model["self_attention"].items()}

    rewrite(tmp_path, rename)
    with pytest.raises(ValueError, match=r"only one of them has blocks\.1\.attn1, blocks\.9\.attn1"):
        load(tiny_transformer(num_layers=3), tmp_path)
    rewrite(tmp_path, lambda m: m["components"]["transformer"].update(model={"class": "WanTransformer3DModel"}))
    with pytest.raises(ValueError, match=r"the model entry of transformer in .* is malformed"):
        load(tiny_transformer(num_layers=3), tmp_path)


def forget_the_model(folder):
    """Makes a file of what `save` writes now what it wrote before it saved which model it is for."""
    rewrite(folder, lambda manifest: [entry.pop("model") for entry in manifest["components"].values()])


def test_files_that_do_not_say_their_model_still_load(tmp_path, recwarn):
    model = sparse_transformer()
    save(model, tmp_path)
    forget_the_model(tmp_path)
    other = load(tiny_transformer(num_layers=3), tmp_path)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    every = sparsify(tiny_transformer(), SPARSE_SLA)
    save(every, tmp_path / "every")
    forget_the_model(tmp_path / "every")
    recwarn.clear()
    load(tiny_transformer(), tmp_path / "every")
    assert not [warning for warning in recwarn if "foveal" in str(warning.filename) or "sparse layers" in str(warning)]
    # A smaller model's, or some layers of this one: it cannot be told, and is said.
    with pytest.warns(
        UserWarning, match=r"has 2 sparse layers, up to blocks\.1\.attn1, and the model has 3.*right one"
    ):
        load(tiny_transformer(num_layers=3), tmp_path / "every")
    # What can be told from names and shapes is an error.
    with pytest.raises(ValueError, match=r"has no layers blocks\.1\.attn1; it has 1"):
        load(tiny_transformer(num_layers=1), tmp_path / "every")
    with pytest.raises(ValueError, match=r"proj\.\w+ has shape"):
        load(tiny_transformer(attention_head_dim=8), tmp_path / "every")


def test_load_names_the_implementation(tmp_path):
    save(sparsify(tiny_transformer(), SPARSE_SLA), tmp_path)
    other = load(tiny_transformer(), tmp_path, impl="reference")
    assert other.blocks[0].attn1.processor.attention.impl == "reference"
    with pytest.raises(ValueError, match="unknown impl"):
        load(tiny_transformer(), tmp_path, impl="fast")
