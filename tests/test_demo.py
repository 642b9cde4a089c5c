"""The demo, end to end at a tiny size, and what it does when things go wrong."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")

from rich.console import Console

from foveal.lab import cli
from foveal.lab.demo import run as demo_run
from foveal.lab.demo.run import run_demo
from foveal.lab.demo.settings import DemoSettings
from foveal.output_folder import LIST_FILE

TINY = DemoSettings(
    height=16,
    width=24,
    frames=4,
    patch=4,
    head_dim=16,
    num_layers=1,
    pretrain_steps=3,
    fine_tune_steps=2,
    sampling_steps=2,
    held_out_windows=2,
    evaluations=2,
    keep_ratio=0.5,
)
FILES = {
    "index.html",
    "results.json",
    "loss.png",
    "side-by-side.mp4",
    "clip.mp4",
    "dense.mp4",
    "sparse-only.mp4",
    "sla.mp4",
    "sla-hedgehog.mp4",
    "vsa.mp4",
    "blocks-sla.png",
    "blocks-vsa.png",
    "model",
    LIST_FILE,
}


def _without_seconds(value):
    if isinstance(value, dict):
        return {key: _without_seconds(item) for key, item in value.items() if key != "seconds"}
    return value


@pytest.fixture(scope="module")
def said():
    """What the demo of `report` tells where there is no terminal."""
    return io.StringIO()


@pytest.fixture(scope="module")
def report(tmp_path_factory, said):
    folder = tmp_path_factory.mktemp("demo") / "report"
    results = run_demo(TINY, output=folder, device=torch.device("cpu"), console=Console(file=said))
    return folder, results


def test_stages_are_told_as_they_begin_and_end(report, said):
    _, results = report
    titles = ["pretrain, dense"]
    titles += [f"{what}, {arm}" for arm in results["arms"] for what in ("fine-tune", "generate")]
    # A busy machine takes long enough for more lines between them.
    lines = [line for line in said.getvalue().splitlines() if " so far" not in line]
    assert len(lines) == 2 * len([*titles, "report"])
    for title, begin, end in zip(titles, lines[::2], lines[1::2], strict=False):
        assert re.fullmatch(rf"{title}: \d+ steps", begin)
        assert re.fullmatch(rf"{title}: done, [\d.]+ s(, loss [\d.]+)?", end)
    assert lines[-2] == "report"
    assert "loss" in lines[1]


def test_report_is_complete(report):
    from foveal.lab.data.windows import read_video

    folder, results = report
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (folder / "index.html").read_text()
    for name in ("results.json", "loss.png", "side-by-side.mp4", "blocks-sla.png", "blocks-vsa.png"):
        assert f'"{name}"' in page
    side_by_side = read_video(folder / "side-by-side.mp4", height=64, width=600)
    assert len(side_by_side) == TINY.frames
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_results_compare_like_with_like(report):
    _, results = report
    arms = results["arms"]
    assert list(arms) == ["dense", "sparse only", "SLA", "SLA hedgehog", "VSA"]
    pretrained = results["pretraining"]["held_out_loss"][-1][1]
    assert arms["dense"]["held_out_loss_converted"] == pretrained
    assert arms["dense"]["output_error_converted"] == 0
    # At the start SLA's projection is zero, so it is sparse attention to the last bit.
    assert arms["SLA"]["held_out_loss_converted"] == arms["sparse only"]["held_out_loss_converted"]
    assert arms["SLA"]["held_out_loss_fine_tuned"] != arms["sparse only"]["held_out_loss_fine_tuned"]
    assert arms["sparse only"]["output_error_converted"] > 0
    for arm in arms.values():
        steps = [step for step, _ in arm["held_out_loss"]]
        assert steps == [0, 1, 2]
        assert all(loss > 0 for _, loss in arm["held_out_loss"])
    for expectation in results["expectations"]:
        assert isinstance(expectation["met"], bool)


def test_letters_are_readable_at_the_width_of_the_page(report):
    from matplotlib.text import Text

    from foveal.lab.demo.report import PAGE_WIDTH, loss_figure, map_figure

    _, results = report
    grid = TINY.grid
    block_map = {
        "token": (0, 0, 0),
        "token_labels": [torch.zeros(grid.shape, dtype=torch.int8)] * 2,
        "labels": torch.zeros(2, 2),
        "kept": "1 of 2",
    }
    clip = torch.zeros(3, TINY.frames, TINY.height, TINY.width)
    for figure in (loss_figure(results), map_figure("SLA", block_map, clip)):
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        pixels = PAGE_WIDTH / figure.get_figwidth() / 72
        assert len(texts) > 10
        assert min(text.get_fontsize() for text in texts) * pixels >= 12


def test_the_page_says_what_to_conclude(report):
    from foveal.lab.demo.report import conclusions

    folder, results = report
    page = html.unescape((folder / "index.html").read_text())
    assert all(line in page for line in conclusions(results))
    arms = {name: {**arm, "held_out_loss_converted": 0.3} for name, arm in results["arms"].items()}
    for name, loss in (("dense", 0.2), ("SLA", 0.21), ("SLA hedgehog", 0.22), ("VSA", 0.205), ("sparse only", 0.23)):
        arms[name]["held_out_loss_fine_tuned"] = loss
    arms["dense"]["held_out_loss_converted"] = 0.25
    made = {**results, "arms": arms, "expectations": demo_run._expectations(arms)}
    price, repaired, ranked, verdict = conclusions(made)
    assert "from 0.2500 to 0.3000 (+20.0 %)" in price
    assert "After 2 steps it is 0.2100, against 0.2000 for the dense model after the same steps (+5.0 %)" in repaired
    assert ranked.endswith(
        "VSA 0.2050 (+2.5 %), SLA 0.2100 (+5.0 %), SLA hedgehog 0.2200 (+10.0 %), sparse only 0.2300 (+15.0 %)."
    )
    assert verdict.startswith("SLA's linear branch closes 67 % of the gap that sparse only leaves to dense. ")
    arms["SLA"]["held_out_loss_fine_tuned"] = 0.31
    made["expectations"] = demo_run._expectations(arms)
    verdict = conclusions(made)[-1]
    assert verdict.startswith("This run does not show that fine-tuning lowers SLA's held-out loss or that after equal")


def test_same_seed_same_figures(report, tmp_path):
    _, results = report
    again = run_demo(TINY, output=tmp_path / "again", device=torch.device("cpu"))
    assert _without_seconds(again) == _without_seconds(results)
    other = run_demo(dataclasses.replace(TINY, seed=1), output=tmp_path / "other", device=torch.device("cpu"))
    assert other["pretraining"]["held_out_loss"] != results["pretraining"]["held_out_loss"]


def test_interrupted_run_leaves_the_former_report(report, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    shutil.copytree(report[0], folder)
    former = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "write_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, output=folder, device=torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, output=tmp_path / "new", device=torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == former
    monkeypatch.undo()
    other = run_demo(dataclasses.replace(TINY, seed=1), output=folder, device=torch.device("cpu"))
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(other))


def test_command_line_answers_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "notes.mp4").write_text("no video")
    for arguments, message in (
        (["demo", "--output", str(tmp_path / "thesis")], "holds something else (chapter.tex), nothing of foveal demo"),
        (["demo", "--video", str(tmp_path / "none.mp4")], "no such video file"),
        (["demo", "--video", str(tmp_path / "notes.mp4")], "cannot decode"),
        (["demo", "--clip", "bunny"], "unknown clip 'bunny'"),
        (["demo", "--output", str(tmp_path / "notes.mp4" / "demo")], "notes.mp4 is a file; expected a folder"),
        (["demo", "--device", "tpu"], "unknown device 'tpu'"),
        (["demo", "--pretrain-steps", "0"], "pretrain_steps must be at least 1"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_settings_scale_with_the_device():
    assert DemoSettings.for_device("cpu").grid.num_tokens >= 2000
    assert DemoSettings.for_device("cuda").grid.num_tokens > 16000
    with pytest.raises(ValueError, match="height and width must be multiples of 4"):
        DemoSettings(height=50)
