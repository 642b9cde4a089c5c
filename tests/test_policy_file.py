"""Policy files: `sparsify(model, policy=...)` by a file or a `Policy`, and what is refused."""

import json

import diffusers
import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, inputs, run, tiny_pipeline, tiny_transformer

import foveal
from foveal import Policy, SLAConfig, get_policy, sparsify
from foveal.models.files.policy_file import ComponentPolicy, policy_text, read_policy
from foveal.models.processor import sparse_processors

TAIL = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, linear_scope="none", tail="pooled", block_q=16, block_k=16)
LAYER = "blocks.1.attn1"


def write(path, layers=None, policy=None, component="transformer", **more):
    found = ComponentPolicy("wan", layers or {LAYER: TAIL}, policy or Policy(dense_above=900))
    path.write_text(policy_text({component: found}, **more), encoding="utf-8")
    return path


def test_round_trip(tmp_path):
    layers, policy = {LAYER: TAIL, "blocks.0.attn1": SPARSE_VSA}, Policy(dense_first_steps=2, min_tokens=100)
    file = write(tmp_path / "policy.json", layers, policy, measured={"error": 0.05})
    assert read_policy(file) == {"transformer": ComponentPolicy("wan", layers, policy)}
    assert json.loads(file.read_text())["measured"] == {"error": 0.05}


def test_a_file_makes_a_model_sparse_as_a_table_and_a_policy_do(tmp_path):
    by_file = sparsify(tiny_transformer(), policy=write(tmp_path / "policy.json"), impl="torch")
    by_hand = sparsify(tiny_transformer(), layers={LAYER: TAIL}, policy=Policy(dense_above=900), impl="torch")
    assert list(sparse_processors(by_file)) == [LAYER]
    assert get_policy(by_file) == get_policy(by_hand) == Policy(dense_above=900)
    assert torch.equal(run(by_file), run(by_hand))
    assert not torch.equal(run(by_file), run(tiny_transformer()))
    noisy = inputs() | {"timestep": torch.full((2,), 950)}
    assert torch.equal(run(by_file, **noisy), run(tiny_transformer(), **noisy))
    foveal.save(by_file, tmp_path / "saved")
    assert get_policy(foveal.load(tiny_transformer(), tmp_path / "saved")) == Policy(dense_above=900)


def test_a_pipeline_follows_the_steps_of_a_file(tmp_path):
    pipe = sparsify(tiny_pipeline(), policy=write(tmp_path / "policy.json", policy=Policy(dense_first_steps=1)))
    generate(pipe, num_inference_steps=3)  # the third step is that of transformer_2, which stays dense
    assert [(row.ran.impl, row.forwards) for row in foveal.report(pipe).rows] == [("dense", 2), ("torch", 2)]
    # A bare transformer follows the pipeline that calls it, as a loaded one does.
    sparsify(tiny_transformer(), policy=write(tmp_path / "policy.json", policy=Policy(dense_first_steps=1)))


def test_min_tokens_keeps_short_videos_dense():
    model = sparsify(tiny_transformer(), SPARSE_SLA, policy=Policy(min_tokens=106), impl="torch")
    short, long = inputs(), inputs(latent=(4, 10, 14))  # 105 and 140 tokens
    assert torch.equal(run(model, **short), run(tiny_transformer(), **short))
    assert not torch.equal(run(model, **long), run(tiny_transformer(), **long))
    assert [row.ran.why for row in foveal.report(model).rows] == ["the policy's min_tokens", None]
    assert str(Policy(min_tokens=106)) == "dense below 106 tokens"
    with pytest.raises(ValueError, match="min_tokens must be at least 0, got -1"):
        Policy(min_tokens=-1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "is no policy file; foveal calibrate writes one"),
        ('{"format": 1}', "is no policy file"),
        ('{"foveal_policy": 2, "components": {}}', "is of version 2; this version reads 1"),
        ('{"foveal_policy": 1, "components": {}}', "has no sparse layer"),
        ('{"foveal_policy": 1, "components": {"transformer": {"layers": 3}}}', "component 'transformer' of the saved"),
    ],
)
def test_files_that_are_no_policy(tmp_path, text, match):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        sparsify(tiny_transformer(), policy=tmp_path / "policy.json")


def test_wrong_requests_change_nothing(tmp_path):
    model = tiny_transformer()
    file = write(tmp_path / "policy.json")
    with pytest.raises(FileNotFoundError, match=r"no such policy file: .*none\.json"):
        sparsify(model, policy=tmp_path / "none.json")
    with pytest.raises(ValueError, match="a policy file has the configuration of every layer"):
        sparsify(model, SPARSE_SLA, policy=file)
    with pytest.raises(TypeError, match="policy must be a Policy or a policy file, got 3"):
        sparsify(model, policy=3)
    with pytest.raises(ValueError, match=r"transformer has no layers blocks\.9\.attn1"):
        sparsify(model, policy=write(tmp_path / "wrong.json", {"blocks.9.attn1": TAIL}))
    with pytest.raises(ValueError, match="is for transformer_2, but the model has transformer"):
        sparsify(model, policy=write(tmp_path / "wrong.json", component="transformer_2"))
    with pytest.raises(ValueError, match="dense_first_steps and dense_last_steps need a schedule"):
        sparsify(model, SPARSE_SLA, policy=Policy(dense_first_steps=1))
    with pytest.raises(ValueError, match="policy does not go with layer"):
        sparsify(model, SPARSE_SLA, policy=Policy(keep_ratio={0: 1.0}))
    with pytest.raises(ValueError, match="unknown layer"):
        sparsify(model, SPARSE_SLA, policy=Policy(dense_layers=("blocks.7.attn1",)))
    assert not sparse_processors(model)
    with pytest.raises(ValueError, match="transformer is sparse already; densify the model"):
        sparsify(sparsify(model, SPARSE_SLA), policy=file)
    assert isinstance(model, diffusers.WanTransformer3DModel)
