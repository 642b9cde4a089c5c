"""`save_pretrained` and `from_pretrained` of diffusers: sparse models come back sparse, or the user is told."""

import copy
import json
import pickle
import sys

import diffusers
import pytest
import torch
from diffusers.utils import logging
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, randomize, run, tiny_pipeline, tiny_transformer

import foveal
from foveal import Policy, densify, get_policy, set_policy, sparsify, summary
from foveal.models.processor import sparse_processors

HEDGEHOG = SPARSE_SLA.replace(feature_map="hedgehog")
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def sparse_transformer():
    """SLA, VSA, dense, and SLA with a learned feature map."""
    model = sparsify(tiny_transformer(num_layers=4), layers={0: SPARSE_SLA, 1: SPARSE_VSA, 3: HEDGEHOG})
    randomize(model)
    return model


def same_weights(model, other):
    expected, given = model.state_dict(), other.state_dict()
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name], tensor), name


@pytest.fixture
def warnings_of_diffusers(caplog):
    """What diffusers logs; it keeps its messages from pytest otherwise."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@torch.no_grad()
def test_pipeline_round_trip(tmp_path, warnings_of_diffusers):
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA, layers={1: SPARSE_VSA})
    for part in (pipeline.transformer, pipeline.transformer_2):
        randomize(part)
    set_policy(pipeline, Policy(dense_first_steps=1, dense_layers=[0]))
    expected = generate(pipeline)
    reduction = summary(pipeline).reduction
    grid = f"; {reduction:.1f}x fewer attention FLOPs than dense at 3x5x7 tokens"
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == index["transformer_2"] == ["foveal.models", "WanTransformer3DModel"]

    warnings_of_diffusers.clear()
    for cls in (diffusers.WanPipeline, diffusers.DiffusionPipeline):
        other = cls.from_pretrained(tmp_path, **NO_TEXT)
        assert isinstance(other.transformer, diffusers.WanTransformer3DModel)
        # The layers and the policy, without what the first pipeline's forwards ran.
        title = "\n".join(summary(pipeline).title().splitlines()[:2])
        assert summary(other).title() == title.replace(grid, "")
        for part in ("transformer", "transformer_2"):
            same_weights(getattr(pipeline, part), getattr(other, part))
        assert get_policy(other) == get_policy(pipeline)
        assert torch.equal(generate(other), expected)
    assert "processor" not in warnings_of_diffusers.text
    assert "not expected" not in warnings_of_diffusers.text
    # And once more from there.
    other.save_pretrained(tmp_path / "again")
    again = diffusers.AutoModel.from_pretrained(str(tmp_path / "again"), subfolder="transformer")
    same_weights(pipeline.transformer, again)


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("shards", ["10GB", "40KB"])
def test_transformer_round_trip(tmp_path, settings, shards):
    model = sparse_transformer()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "40KB")
    other, info = foveal.models.WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True, **settings)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    same_weights(model, other)
    assert [p.config for p in sparse_processors(other).values()] == [SPARSE_SLA, SPARSE_VSA, HEDGEHOG]
    with torch.no_grad():
        assert torch.equal(run(other), run(model))
    assert other.blocks[2].attn1.processor.__class__.__name__ == "WanAttnProcessor"


def test_half_precision_leaves_the_projection_alone(tmp_path):
    model = sparse_transformer()
    model.save_pretrained(tmp_path)
    other = foveal.models.WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert other.dtype == other.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    sla, vsa, hedgehog = (p.attention for p in sparse_processors(other).values())
    assert torch.equal(sla.proj.weight, model.blocks[0].attn1.processor.attention.proj.weight)
    expected = model.blocks[1].attn1.processor.attention.to_gate_coarse.weight
    assert torch.equal(vsa.to_gate_coarse.weight, expected.bfloat16())
    assert hedgehog.feature_weight.dtype == torch.bfloat16
    assert hedgehog.proj.weight.dtype == torch.float32


def test_configurations_of_the_moment_are_saved(tmp_path):
    model = sparse_transformer()
    foveal.reconfigure(model, layers={0: SPARSE_SLA.replace(keep_ratio=0.6)})
    model.save_pretrained(tmp_path)
    other = foveal.models.WanTransformer3DModel.from_pretrained(tmp_path)
    assert next(iter(sparse_processors(other).values())).config.keep_ratio == 0.6
    densify(other).save_pretrained(tmp_path / "dense")
    assert "foveal" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not sparse_processors(foveal.models.WanTransformer3DModel.from_pretrained(tmp_path / "dense"))


def test_a_dense_class_says_what_it_leaves(tmp_path, warnings_of_diffusers):
    """A bare transformer that was converted inside a pipeline: the pipeline does not know, and says the dense class."""
    pipeline = tiny_pipeline()
    sparsify(pipeline.transformer, SPARSE_SLA)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "diffusers"
    other = diffusers.WanPipeline.from_pretrained(tmp_path, **NO_TEXT)
    assert not sparse_processors(other.transformer)
    assert "{'foveal': {'family': 'wan'" in warnings_of_diffusers.text
    assert "processor.attention.proj.weight" in warnings_of_diffusers.text
    assert "were not used" in warnings_of_diffusers.text

    # Set again, or converted through the pipeline, it is known.
    pipeline.transformer = pipeline.transformer
    pipeline.save_pretrained(tmp_path)
    assert sparse_processors(diffusers.WanPipeline.from_pretrained(tmp_path, **NO_TEXT).transformer)


def test_without_foveal_a_sparse_pipeline_is_refused(tmp_path, monkeypatch):
    sparsify(tiny_pipeline(), SPARSE_SLA).save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "foveal.models")
    with pytest.raises(ValueError, match=r"import foveal\.models before calling `from_pretrained`"):
        diffusers.WanPipeline.from_pretrained(tmp_path, **NO_TEXT)


def rewrite(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["foveal"].update(format=2), "format 2; this version reads 1"),
        (lambda c: c.update(foveal=["sla"]), r"format \['sla'\]; this version reads 1"),
        (lambda c: c["foveal"].pop("layers"), "config.json.* is malformed"),
        (lambda c: c["foveal"]["layers"].update({"blocks.9.attn1": None}), "malformed"),
        (lambda c: c["foveal"].update(family="flux"), "family 'flux', but the model's is 'wan'"),
        (lambda c: c["foveal"].update(policy={"dense_steps": 1}), "unknown Policy fields"),
        (lambda c: c["foveal"].update(policy={"dense_layers": [9]}), r"dense_layers must be in 0\.\.3, got 9"),
        (
            lambda c: c["foveal"]["layers"].update({"blocks.2.attn1": c["foveal"]["layers"]["blocks.0.attn1"]}),
            r"lacks sparse parameters .*blocks\.2\.attn1\.processor\.attention\.proj\.bias and 1 more",
        ),
        (
            lambda c: c["foveal"]["layers"].update({"blocks.9.attn1": c["foveal"]["layers"]["blocks.0.attn1"]}),
            r"no layers blocks\.9\.attn1",
        ),
    ],
)
def test_damaged_descriptions(tmp_path, change, match):
    sparse_transformer().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        foveal.models.WanTransformer3DModel.from_pretrained(tmp_path)


def test_the_class_of_a_sparse_model():
    model = tiny_transformer()
    original = type(model)
    sparsify(model, SPARSE_SLA, layers=[0])
    assert type(model) is foveal.models.WanTransformer3DModel
    assert issubclass(type(model), original)
    # diffusers looks some things up by the class's name.
    assert type(model).__name__ == original.__name__
    sparsify(model, SPARSE_SLA, layers=[1])
    assert type(model) is foveal.models.WanTransformer3DModel
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone) is type(model)
        assert type(densify(clone)) is original
    assert type(densify(model)) is original

    class Mine(diffusers.WanTransformer3DModel):
        pass

    mine = Mine(**dict(tiny_transformer().config))
    assert type(sparsify(mine, SPARSE_SLA)) is Mine
    with pytest.raises(AttributeError, match=r"'foveal\.models' has no attribute 'UNet2DModel'"):
        foveal.models.UNet2DModel  # noqa: B018


def test_a_dense_checkpoint_loads_as_ever(tmp_path):
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    other = foveal.models.WanTransformer3DModel.from_pretrained(tmp_path)
    assert not sparse_processors(other)
    same_weights(model, other)


TINY = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
FAMILIES = {
    "LTXVideoTransformer3DModel": {
        "out_channels": 4,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 8,
    },
    "HunyuanVideoTransformer3DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 8,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    },
    "CogVideoXTransformer3DModel": {"time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 2, "sample_frames": 9},
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, tmp_path):
    model = getattr(diffusers, name)(**TINY, **FAMILIES[name])
    sparsify(model, SPARSE_SLA)
    randomize(model)
    set_policy(model, Policy(dense_above=900, dense_layers=[0]))
    model.save_pretrained(tmp_path)
    other = getattr(foveal.models, name).from_pretrained(tmp_path)
    assert type(other) is type(model) is getattr(foveal.models, name)
    same_weights(model, other)
    assert get_policy(other) == get_policy(model)
    half = getattr(foveal.models, name).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in foveal.sparse_parameters(half).values()} == {torch.float32}
