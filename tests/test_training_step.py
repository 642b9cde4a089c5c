"""`benchmarks/training_step.py` at a tiny size: it runs, and what it writes is what it measured."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training_step.py"
# Two blocks at least: with one, which is critical, the linear branch has no gradient.
TINY = "--device cpu --no-compile --layers 1 --heads 2 --head-dim 16 --ffn-dim 32 --height 96 --width 96 --frames 9"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_are_timed_and_written(script, tmp_path, capsys):
    path = tmp_path / "results" / "step.json"
    arms = ["dense", "sla 5% 64x64 marginal", "vsa 12.5%"]
    script.main([*TINY.split(), "--warmup", "1", "--steps", "2", "--arms", *arms, "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["tokens"] == 3 * 6 * 6
    assert list(found["arms"]) == arms
    for arm in found["arms"].values():
        assert arm["passed"]
        assert len(arm["loss"]) == 3
        assert arm["median_seconds"] == statistics.median(arm["seconds"])
    assert found["arms"]["dense"]["config"] is None
    assert found["arms"]["vsa 12.5%"]["parameters"] > found["arms"]["dense"]["parameters"]
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in arms)


def test_an_arm_that_does_not_learn_fails_the_run(script, tmp_path, monkeypatch, capsys):
    from foveal.lab.train.optimization import StepReport

    monkeypatch.setattr(script, "optimizer_step", lambda *args, **kwargs: StepReport(float("nan"), 1.0, True))
    with pytest.raises(SystemExit, match="1"):
        script.main([*TINY.split(), "--steps", "1", "--arms", "dense", "--json", str(tmp_path / "step.json")])
    assert "FAILED" in capsys.readouterr().out


def test_the_default_is_the_shape_of_the_papers(script):
    assert script.grid_of(script.parse([])).num_tokens == 32760
    assert script.grid_of(script.parse(["--frames", "61", "--height", "448"])).num_tokens == 23296
    with pytest.raises(SystemExit):
        script.parse(["--frames", "80"])
