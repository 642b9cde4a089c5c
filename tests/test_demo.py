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
from foveal.lab.demo.settings import (
    ARMS,
    DENSE,
    ROUTER_ADAPTER,
    SLA_ADAPTER,
    SLA_CONVERTED,
    VSA_CONVERTED,
    VSA_ROUTER_ADAPTER,
    VSA_TRAINED,
    DemoSettings,
)
from foveal.lab.demo.task import Task
from foveal.lab.train.objective import sample_noise
from foveal.models.shipped import shipped_clips
from foveal.output_folder import LIST_FILE

TINY = DemoSettings(
    frames=17,
    height=96,
    width=128,
    sampling_steps=2,
    fine_tune_steps=2,
    batch=1,
    evaluations=2,
    held_out_clips=2,
    training_clips=2,
    sigmas=(0.7,),
)
FILES = {
    "index.html",
    "results.json",
    "loss.png",
    "side-by-side.mp4",
    "the-real-clip.mp4",
    "dense.mp4",
    "sla-no-training.mp4",
    "sla-adapter.mp4",
    "router-adapter.mp4",
    "vsa-no-training.mp4",
    "vsa-adapter.mp4",
    "vsa-router-adapter.mp4",
    "vsa-trained-here.mp4",
    "blocks-sla-adapter.png",
    "blocks-vsa-trained-here.png",
    LIST_FILE,
}


def _without_seconds(value):
    if isinstance(value, dict):
        return {key: _without_seconds(item) for key, item in value.items() if "seconds" not in key}
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
    titles = ["load foveal/tiny"]
    for arm in ARMS:
        titles += [f"fine-tune, {arm}"] if arm == VSA_TRAINED else []
        titles += [f"generate, {arm}"]
    # A busy machine takes long enough for more lines between them.
    lines = [line for line in said.getvalue().splitlines() if " so far" not in line and "held-out loss" not in line]
    assert len(lines) == 2 * len([*titles, "report"])
    for title, begin, end in zip(titles, lines[::2], lines[1::2], strict=False):
        assert re.fullmatch(rf"{title}(: \d+ steps)?", begin)
        assert re.fullmatch(rf"{title}: done, [\d.]+ s(, loss [\d.]+)?", end)
    assert lines[-2] == "report"


def test_report_is_complete(report):
    from foveal.lab.data.windows import read_video

    folder, results = report
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (folder / "index.html").read_text()
    for name in (
        "results.json",
        "loss.png",
        "side-by-side.mp4",
        *(name for name in FILES if name.startswith("blocks")),
    ):
        assert f'"{name}"' in page
    side_by_side = read_video(folder / "side-by-side.mp4", height=2 * (96 + 28), width=4 * 128)
    assert len(side_by_side) == TINY.frames
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_results_compare_like_with_like(report):
    _, results = report
    arms = results["arms"]
    assert list(arms) == list(ARMS)
    losses = {name: arm["held_out_loss"] for name, arm in arms.items()}
    assert len(set(losses.values())) == len(ARMS)
    curve = results["fine_tuning"]["held_out_loss"]
    # Fine-tuning begins with the converted model, and its last loss is the arm's.
    assert curve[0] == (0, pytest.approx(losses[VSA_CONVERTED], rel=1e-5))
    assert [step for step, _ in curve] == [0, 1, 2]
    assert curve[-1][1] == losses[VSA_TRAINED]
    assert arms[DENSE]["attention_flops_reduction"] == 1
    assert arms[SLA_CONVERTED]["config"] == arms[SLA_ADAPTER]["config"]
    assert arms[DENSE]["psnr_to_dense_db"] is None
    assert all(arms[name]["psnr_to_dense_db"] < 60 for name in ARMS[1:])
    assert all(isinstance(expectation["met"], bool) for expectation in results["expectations"])


def test_the_held_out_loss_is_that_of_the_objective(report):
    """The dense model's loss by hand: fixed noise, a given first frame, no loss on it."""
    task = Task(TINY, torch.device("cpu"))
    losses = []
    for number, clip in enumerate(shipped_clips("held-out")[:2]):
        clean = clip.latents[None, :, :5, :12, :16]
        noise, _ = sample_noise(tuple(clean.shape), first=-1000 - number, seed=0, shift=3.0)
        noisy = 0.3 * clean + 0.7 * noise
        noisy[:, :, 0] = clean[:, :, 0]
        timesteps = torch.full((1, 5 * 6 * 8), 700.0)
        timesteps[:, : 6 * 8] = 0
        text = task.loaded.pipe.encode_prompt([clip.caption], do_classifier_free_guidance=False)[0]
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        with torch.no_grad():
            predicted = task.dense(noisy, timesteps, text, return_dict=False)[0]
        losses.append((predicted - (noise - clean))[:, :, 1:].square().mean())
    _, results = report
    assert results["arms"][DENSE]["held_out_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_letters_are_readable_at_the_width_of_the_page(report):
    from matplotlib.text import Text

    from foveal.lab.demo.report import PAGE_WIDTH, loss_figure, map_figure

    _, results = report
    block_map = {
        "token": (2, 0, 0),
        "token_labels": [torch.zeros(5, 6, 8, dtype=torch.int8)] * 2,
        "labels": torch.zeros(2, 2),
        "kept": "1 of 2",
    }
    clip = torch.zeros(17, 3, 96, 128, dtype=torch.uint8)
    for figure in (loss_figure(results), map_figure("SLA", block_map, clip)):
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        pixels = PAGE_WIDTH / figure.get_figwidth() / 72
        assert len(texts) > 5
        assert min(text.get_fontsize() for text in texts) * pixels >= 12


def test_the_page_says_what_to_conclude(report):
    from foveal.lab.demo.report import conclusions

    folder, results = report
    page = html.unescape((folder / "index.html").read_text())
    assert all(line in page for line in conclusions(results))
    losses = dict(zip(ARMS, (0.2, 0.3, 0.21, 0.205, 0.25, 0.22, 0.204, 0.24), strict=True))
    arms = {name: {**results["arms"][name], "held_out_loss": loss} for name, loss in losses.items()}
    made = {**results, "arms": arms, "expectations": demo_run._expectations(arms)}
    price, adapters, here = conclusions(made)
    assert "loss of 0.2000. Untrained, SLA has 0.3000 (+50.0 %) with " in price
    assert "VSA 0.2500 (+25.0 %) with " in price
    assert adapters == (
        "The adapters that come with foveal bring SLA to 0.2100 (+5.0 %) and VSA to 0.2200 (+10.0 %). "
        "Where a router in each head learns which blocks to read, as many as SLA, the loss is 0.2050 (+2.5 %); "
        "where it learns which cubes VSA reads, 0.2040 (+2.0 %)."
    )
    assert here == "2 steps here, with a few clips, bring VSA to 0.2400 (+20.0 %)."
    learned = "with a router in each head, SLA and VSA end closer to dense attention than without one"
    for arm, loss, missed in (
        (SLA_ADAPTER, 0.28, "each adapter brings back at least a third of what its method costs"),
        (ROUTER_ADAPTER, 0.22, learned),
        (VSA_ROUTER_ADAPTER, 0.23, learned),
    ):
        changed = {**arms, arm: {**arms[arm], "held_out_loss": loss}}
        said = conclusions({**made, "arms": changed, "expectations": demo_run._expectations(changed)})
        assert said[-1] == f"This run does not show that {missed}."


def test_same_seed_same_figures(report, tmp_path):
    _, results = report
    again = run_demo(TINY, output=tmp_path / "again", device=torch.device("cpu"))
    assert _without_seconds(again) == _without_seconds(results)


def test_interrupted_run_leaves_the_former_report(report, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    shutil.copytree(report[0], folder)
    former = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "_measure", lambda *args: ({}, {}))
    monkeypatch.setattr(demo_run, "write_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, output=folder, device=torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, output=tmp_path / "new", device=torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == former
    monkeypatch.undo()
    other = run_demo(dataclasses.replace(TINY, seed=1), output=folder, device=torch.device("cpu"))
    assert other["arms"][DENSE]["held_out_loss"] != report[1]["arms"][DENSE]["held_out_loss"]
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(other))


def test_command_line_answers_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "notes.mp4").write_text("no video")
    for arguments, message in (
        (["demo", "--output", str(tmp_path / "thesis")], "holds something else (chapter.tex), nothing of foveal demo"),
        (["demo", "--output", str(tmp_path / "notes.mp4" / "demo")], "notes.mp4 is a file; expected a folder"),
        (["demo", "--device", "tpu"], "unknown device 'tpu'"),
        (["demo", "--sampling-steps", "0"], "sampling_steps must be at least 1"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_a_gpu_takes_more_steps():
    assert DemoSettings.for_device("cuda").fine_tune_steps > DemoSettings.for_device("cpu").fine_tune_steps
    with pytest.raises(ValueError, match="height must be a positive multiple of 16"):
        Task(DemoSettings(height=50), torch.device("cpu"))
