"""`benchmarks/selection_cost.py`: what it measures and says, over small shapes on a CPU."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import selection_cost as script


def test_it_measures_and_says_what_is_over(tmp_path, monkeypatch, capsys):
    kept = "SLA: mean", "SLA, tile order: mean", "VSA: log_sum_exp", "SLA + VSA"
    monkeypatch.setattr(script, "ROUNDS", 1)
    monkeypatch.setattr(script, "MOST", -1e9)
    assert script.main(["--smoke", "--arms", *kept, "--output", str(tmp_path / "cost.json"), "--commit", "abc"]) == 0
    results = json.loads((tmp_path / "cost.json").read_text())
    assert [x["shape"] for x in results["entries"]] == ["smoke"] * 4 + ["smoke, packed"] * 4
    for entry in results["entries"]:
        assert entry["share"] == pytest.approx(entry["cost_ms"] / entry["inside_ms"])
        assert len(entry["all_ms"]["given"]) == script.CALLS
        assert 0 < entry["kept"] <= 1
    said = capsys.readouterr().out
    assert said.count("% over") == 8
    assert "x SLA, tile order" in said


def test_every_score_and_rule_has_an_arm():
    rules = {"mean", "log_sum_exp", "mean_spread", "top-p", "top-p, log_sum_exp", "first frame", "ratio by head"}
    for shape in script.SMOKE:
        found = {name: {x.rule for x in script.arms_of(shape) if x.method == name} for name in ("SLA", "VSA")}
        assert found == {"SLA": rules, "VSA": rules | {"window", "router"}}


def test_an_arm_that_fails_is_said_and_not_timed(monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("no such arm")

    monkeypatch.setattr(script, "calls_of", refuse)
    assert script.main(["--smoke"]) == 1
    said = capsys.readouterr().out
    assert said.count("FAILED: ValueError: no such arm") == 2 * len(script.arms_of(script.SMOKE[0]))
