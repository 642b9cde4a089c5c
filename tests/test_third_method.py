"""A method from outside of the package runs through everything, from its own file and one registration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import window_method
from accelerate.state import AcceleratorState
from tiny_training import config as training_config
from tiny_training import metrics, write_data
from tiny_wan import randomize, run, tiny_transformer
from window_method import WINDOW, WindowConfig

import foveal
from foveal import Policy, SLAConfig, VideoGrid, attention_cost
from foveal.lab import cli, doctor
from foveal.lab.bench import __main__ as bench
from foveal.lab.bench import report
from foveal.lab.bench.run import BenchSettings, run_bench
from foveal.lab.generate.sparse import choose_sparse
from foveal.lab.inspect.probe import InspectSettings, observe
from foveal.lab.train.recipes import parse
from foveal.lab.train.settings import Annealing, SparsitySettings
from foveal.lab.train.trainer import run_training
from foveal.methods.base import METHODS, Method, method_of, register
from foveal.methods.config import MethodConfig
from foveal.models.processor import sparse_processors

SMALL = WindowConfig(reach=1, block=16)
GRID = VideoGrid(3, 5, 7)  # of the tokens that `run` runs


@pytest.fixture(autouse=True)
def registered():
    before = dict(METHODS)
    register(WINDOW)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def model():
    model = foveal.sparsify(tiny_transformer(), SMALL)
    randomize(model)
    return model


def test_it_is_short():
    assert len(Path(window_method.__file__).read_text().splitlines()) <= 60


def test_whole_window_is_dense():
    dense = tiny_transformer()
    expected = run(dense)
    torch.testing.assert_close(run(foveal.sparsify(dense, WindowConfig(reach=9, block=16))), expected)


def test_a_window_is_not(model):
    with foveal.dense(model):
        dense = run(model)
    assert not torch.allclose(run(model), dense, rtol=1e-2, atol=1e-2)


def test_saved_and_loaded(model, tmp_path):
    foveal.save(model, tmp_path)
    saved = json.loads((tmp_path / "foveal.json").read_text())["components"]["transformer"]["layers"]
    assert saved["blocks.1.attn1"] == {"method": "window", "config": {"reach": 1, "block": 16}}
    other = foveal.load(tiny_transformer(), tmp_path)
    assert sparse_processors(other)["blocks.1.attn1"].config == SMALL
    assert torch.equal(run(other), run(model))


def test_summary_and_cost(model):
    run(model)
    lines = str(foveal.summary(model)).splitlines()
    assert lines[-1].split() == ["blocks.1.attn1", "window", "reach", "1", "16", "2", "2.2x"]
    cost = attention_cost(SMALL, grid=GRID, heads=2, head_dim=16)
    assert cost.part("window").flops == 4 * 2 * 105 * 48 * 16
    assert foveal.summary(model, GRID).reduction == cost.reduction == 105 / 48


def test_policy(model):
    """It has no ratios for a policy to change, but may be dense for some timesteps."""
    sparse = run(model)
    with foveal.dense(model):
        dense = run(model)
    foveal.set_policy(model, Policy(keep_ratio={0: 0.9}, drop_ratio={0: 0.05}))
    assert torch.equal(run(model), sparse)
    foveal.set_policy(model, Policy(dense_above=100))
    assert torch.equal(run(model), dense)


def test_training_anneals_it(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    write_data(tmp_path / "data")
    annealing = Annealing(start=3, decrement=1, dense_steps=1, every=1)
    settings = training_config(tmp_path, steps=4, sparsity=SparsitySettings(SMALL, annealing=annealing))
    run_training(settings)
    assert len(metrics(tmp_path)) == 4
    assert metrics(tmp_path, "kept") == {2: 3, 3: 2, 4: 1}
    exported = foveal.load(tiny_transformer(rope_max_seq_len=32), tmp_path / "run" / "export" / "sparse")
    gains = [parameter for name, parameter in exported.named_parameters() if name.endswith("gain")]
    assert gains
    assert not any(torch.equal(gain, torch.ones_like(gain)) for gain in gains), "trained"


def test_training_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match=r"layer_keep_ratio needs .* with a keep_ratio, got one with reach"):
        SparsitySettings(SMALL, layer_keep_ratio={0: 0.5})
    fixed = dataclasses.replace(WINDOW, schedule=dataclasses.replace(WINDOW.schedule, kept=None))
    METHODS["window"] = fixed
    with pytest.raises(ValueError, match=r"annealing needs .* that can keep more or less, got WindowConfig"):
        SparsitySettings(SMALL, annealing=Annealing(start=3, decrement=1))


def test_a_recipe_may_use_it(tmp_path):
    """The command line offers the fields of its configuration."""
    path = tmp_path / "mine.py"
    path.write_text("""
from window_method import WindowConfig

from foveal.lab.train.recipes import tiny
from foveal.lab.train.settings import SparsitySettings


def mine():
    return tiny().replace(sparsity=SparsitySettings(WindowConfig()))
""")
    assert parse([f"{path}:mine", "--sparsity.attention.reach", "3"]).sparsity.attention == WindowConfig(reach=3)


def test_bench(tmp_path, monkeypatch):
    """Its reference is what `impl="reference"` runs. The other methods, which take longer, have tests of their own."""
    for other in set(METHODS) - {"window"}:
        del METHODS[other]
    small = BenchSettings(device="cpu", length=150, quick=True, only="methods", gate_grid=VideoGrid(3, 8, 9))
    seen = []

    def run_small(settings, **rest):
        seen.append(settings)
        return run_bench(small, **rest)

    monkeypatch.setattr(report, "run_bench", run_small)
    options = ["--device", "cpu", "--length", "150", "--only", "methods", "--quick", "--output", str(tmp_path)]
    assert bench.main(options) == 0
    assert seen[0].only == "methods"
    (path,) = tmp_path.glob("*.json")
    found = {entry["name"]: entry for entry in json.loads(path.read_text())["results"]}
    assert list(found) == ["SDPA", "window, auto", "window, selection given, auto"]
    for name in list(found)[1:]:
        assert (found[name]["status"], found[name]["reason"]) == ("ok", None)
        assert set(found[name]["errors"]["small"]) == {"output", "grad_query", "grad_key", "grad_value"}
        assert set(found[name]["passes"]) == {"forward", "backward"}


def test_inspected_on_its_own_path(model):
    settings = InspectSettings(keep_ratios=(0.5,), blocks=((16, 16),), orders=("raster",))
    found = observe(model, lambda: run(model), settings=settings)
    assert [one.layer for one in found] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert found[0].grid == GRID


def test_command_lines():
    choice = choose_sparse(None, "window", keep_ratio=None, drop_ratio=None, impl="auto")
    assert choice.describe() == {"method": "window", "config": {"reach": 1, "block": 64}, "impl": "auto"}
    with pytest.raises(ValueError, match="its 1x4x4 tokens are one block of 64 tokens"):
        choice.check_grid(VideoGrid(1, 4, 4), [choice.config])
    with pytest.raises(ValueError, match="method window has no keep_ratio"):
        choose_sparse(None, "window", keep_ratio=0.5, drop_ratio=None, impl="auto")
    assert set(doctor.examine(method="window", measured=False)["estimate"]["parts"]) == {"window"}


@pytest.mark.parametrize("command", ["doctor", "generate"])
def test_named_in_the_help(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "sla or sla2 or vsa or sla_vsa or window" in " ".join(capsys.readouterr().out.split())


def test_one_registration_a_method():
    with pytest.raises(ValueError, match="a method named 'window' is registered already"):
        register(WINDOW)
    with pytest.raises(ValueError, match="method 'other' must have a type of configuration of its own: SLAConfig and"):
        register(dataclasses.replace(WINDOW, name="other", config_type=SLAConfig))
    with pytest.raises(TypeError, match="method must be a Method, got type"):
        register(Method)
    with pytest.raises(TypeError, match=r"method\.config_type must derive from MethodConfig, got <class 'dict'>"):
        register(dataclasses.replace(WINDOW, name="other", config_type=dict))
    with pytest.raises(ValueError, match="must have a type of configuration of its own: MethodConfig and SLAConfig"):
        register(dataclasses.replace(WINDOW, name="other", config_type=MethodConfig))
    assert method_of(SMALL) is WINDOW
