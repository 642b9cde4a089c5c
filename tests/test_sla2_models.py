"""SLA2 in models and commands: converted, saved, counted, explained, trained, and in the benchmark."""

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import config as training_config
from tiny_training import metrics, write_data
from tiny_wan import randomize, run, tiny_transformer

import foveal
from foveal import Policy, SLA2Config, TokenLayout, VideoGrid, attention_cost
from foveal.lab.bench.run import BenchSettings, run_bench
from foveal.lab.train.settings import ObjectiveSettings, SparsitySettings
from foveal.lab.train.trainer import run_training
from foveal.methods.base import METHODS
from foveal.models.processor import sparse_processors
from foveal.testing import make_inputs

SMALL = SLA2Config(keep_ratio=0.3, block_q=16, block_k=16, token_order="tile")
GRID = VideoGrid(3, 5, 7)  # of the tokens that `run` runs


def test_keeping_everything_is_the_dense_model():
    dense = tiny_transformer()
    randomize(dense)
    expected = run(dense)
    torch.testing.assert_close(run(foveal.sparsify(dense, SMALL.replace(keep_ratio=1.0))), expected)


def test_saved_and_loaded(tmp_path):
    model = foveal.sparsify(tiny_transformer(), SMALL)
    randomize(model)
    foveal.save(model, tmp_path)
    saved = json.loads((tmp_path / "foveal.json").read_text())["components"]["transformer"]["layers"]
    assert saved["blocks.1.attn1"] == {"method": "sla2", "config": SMALL.to_dict()}
    other = foveal.load(tiny_transformer(), tmp_path)
    assert sparse_processors(other)["blocks.1.attn1"].config == SMALL
    assert torch.equal(run(other), run(model))
    own = {name.rpartition("processor.attention.")[2] for name in foveal.sparse_parameters(model)}
    assert own == {"router.proj_query", "router.proj_key", "mixing.alpha_logits"}


def test_summary_and_policy():
    model = foveal.sparsify(tiny_transformer(), SMALL)
    randomize(model)
    sparse = run(model)
    row = str(foveal.summary(model)).splitlines()[-1].split()
    assert row[:6] == ["blocks.1.attn1", "sla2", "0.3", "noncritical", "16x16", "tile"]
    foveal.set_policy(model, Policy(keep_ratio={0: 0.9}))
    assert not torch.equal(run(model), sparse)
    with foveal.dense(model):
        dense = run(model)
    foveal.set_policy(model, Policy(dense_above=100))
    assert torch.equal(run(model), dense)


def test_cost():
    """SLA's parts, and the router's and the ratio's."""
    shape = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}
    config = SLA2Config()
    cost, branches = attention_cost(config, **shape), attention_cost(config.branches, **shape)
    names = [part.name for part in branches.parts]
    assert [part.name for part in cost.parts] == ["router", *names, "combine"]
    assert cost.flops - branches.flops == cost.part("router").flops + cost.part("combine").flops
    assert cost.part("router").flops == 2 * 12 * (256 + 512) * 128**2
    assert cost.flops < 1.01 * branches.flops
    fixed = attention_cost(config.replace(routing="fixed"), **shape)
    assert fixed.flops == cost.flops
    assert fixed.part("router").backward == 0
    packed = attention_cost(config, layout=TokenLayout(VideoGrid(4, 8, 8), after=(77,)), heads=2, head_dim=64)
    assert packed.part("router").flops == 2 * 2 * (2 + 4) * 64**2


def test_explained():
    inputs = make_inputs(query_length=105, head_dim=16, dtype=torch.float32)
    explanation = foveal.explain(*inputs, SMALL, GRID)
    assert (explanation.impl, explanation.blocks) == ("torch", (16, 16))


def test_trained_with_a_dense_teacher(tmp_path):
    """Velocity distillation from the dense model moves the router and the ratio, and the export has them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    write_data(tmp_path / "data")
    objective = ObjectiveSettings(flow_matching=0.5, distillation=0.5, teacher="copy", shift=3.0)
    settings = training_config(tmp_path, steps=3, sparsity=SparsitySettings(SMALL), objective=objective)
    run_training(settings)
    assert len(metrics(tmp_path)) == 3
    exported = foveal.load(tiny_transformer(rope_max_seq_len=32), tmp_path / "run" / "export" / "sparse")
    fresh = foveal.sparsify(tiny_transformer(rope_max_seq_len=32), SMALL)
    found, start = foveal.sparse_parameters(exported), foveal.sparse_parameters(fresh)
    assert found.keys() == start.keys()
    for name, parameter in found.items():
        assert not torch.equal(parameter, start[name]), f"{name} is as it was"


@pytest.fixture
def only_sla2():
    before = dict(METHODS)
    for other in set(METHODS) - {"sla2"}:
        del METHODS[other]
    yield
    METHODS.clear()
    METHODS.update(before)


def test_bench(only_sla2):
    settings = BenchSettings(device="cpu", length=150, quick=True, only="methods", gate_grid=VideoGrid(3, 8, 9))
    found = {entry["name"]: entry for entry in run_bench(settings)["results"]}
    ours = [name for name in found if name != "SDPA"]
    assert len(ours) == 2 * len(METHODS["sla2"].bench_cases)
    for name in ours:
        assert (found[name]["status"], found[name]["reason"]) == ("ok", None)
        assert set(found[name]["errors"]["small"]) == {"output", "grad_query", "grad_key", "grad_value"}


def test_configurations_travel():
    assert SLA2Config.from_dict(SMALL.to_dict()) == SMALL
    assert dataclasses.replace(SMALL, alpha=0.5) == SMALL.replace(alpha=0.5)
