"""`quality/fine_tune.py` and `train_scaling.py` of the benchmarks at tiny sizes: they run, and write figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal import SLAConfig
from foveal.methods.sla.reference import sla_attention_reference
from foveal.output_folder import LIST_FILE
from foveal.testing import make_inputs, random_selection, relative_error

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _beside_its_neighbors(monkeypatch):
    """A script finds the modules of its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))


def test_linear_attention_is_the_linear_branch_over_all_keys():
    """What SLA adds to its sparse part, unprojected, where every key is summed over."""
    query, key, value = (x.double() for x in make_inputs(query_length=70, dtype=torch.float64))
    selection = random_selection(query_length=70)
    config = SLAConfig(linear_scope="all", drop_ratio=0.0, projection=False)
    common = {"selection": selection, "scale": 0.1, "feature_weight_DD": None, "proj_bias_D": None}
    with_branch = sla_attention_reference(query, key, value, config=config, proj_weight_DD=None, **common)
    without = sla_attention_reference(
        query, key, value, config=config.replace(linear_scope="none"), proj_weight_DD=None, **common
    )
    ours = load("quality/fine_tune").LinearAttention(config)(query, key, value)
    # The branch adds 1e-5 to its denominator, about 1, and the other is in float32.
    assert relative_error(ours, with_branch - without) < 2e-5


def test_fine_tune(tmp_path, monkeypatch):
    script = load("quality/fine_tune")
    monkeypatch.setitem(script.TOKENS, "2k", {"height": 32, "width": 32, "frames": 3})
    frames = {name: torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8) for name in ("one", "other")}
    script.save_file(frames, tmp_path / "frames.safetensors")
    path = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--tokens", "2k", "--pretrain-steps", "2", "--steps", "2"]
    script.main([*arguments, "--frames", str(tmp_path / "frames.safetensors"), "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["tokens"] == 3 * 8 * 8
    assert list(found["arms"]) == list(script.ARMS)
    start = found["pretraining"]["held_out_loss"][-1]
    assert start[0] == 2
    for arm in found["arms"].values():
        assert [step for step, _ in arm["held_out_loss"]] == [0, 1, 2]
    # Every arm starts from the pretrained weights; dense then is what it was.
    assert found["arms"]["dense"]["held_out_loss"][0][1] == start[1]
    assert found["arms"][script.LINEAR]["held_out_loss"][0][1] != start[1]


def test_train_scaling(tmp_path):
    sizes = {"frames": 9, "height": 64, "width": 96, "layers": 1, "heads": 1, "ffn-dim": 32, "steps": 3}
    tiny = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)] + ["--device", "cpu"]
    one, again = tmp_path / "one.json", tmp_path / "again.json"
    for arguments in (["--json", one], ["--json", again, "--against", one]):
        # Processes of their own: accelerate keeps the precision of a process's first run.
        subprocess.run([sys.executable, ROOT / "benchmarks" / "train_scaling.py", *tiny, *arguments], check=True)
    found = json.loads(again.read_text())
    assert found["losses"] == json.loads(one.read_text())["losses"]
    assert found["largest_relative_difference"] == 0.0
    assert found["scaling"] == found["tokens_per_second"] / found["one_process"]["tokens_per_second"]
    assert {path.name for path in tmp_path.iterdir()} == {"again.json", "one.json", LIST_FILE}


def test_train_scaling_by_a_recipe_of_minimax_h3(tmp_path):
    """Its weights are made where the trainer would load them, and nothing else is left behind."""
    path = tmp_path / "one.json"
    arguments = ["--recipe", "minimax-h3-vsa-router", "--layers", 2, "--steps", 3, "--device", "cpu", "--json", path]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "train_scaling.py", *map(str, arguments)], check=True)
    found = json.loads(path.read_text())
    assert len(found["losses"]) == 3
    assert min(found["losses"]) > 0
    assert {x.name for x in tmp_path.iterdir()} == {"one.json", LIST_FILE}
