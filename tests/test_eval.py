"""`foveal eval`: the metrics against their definitions, the intervals against tables, and the command on a tiny Wan."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from tiny_media import commands_of, diffusers, save_tiny_wan

import foveal
from foveal.lab import cli
from foveal.lab.evaluate import metrics
from foveal.lab.evaluate.lpips import LPIPS, alexnet_features, alexnet_file
from foveal.lab.evaluate.metrics import flicker, load_lpips, psnr, ssim
from foveal.lab.evaluate.report import EvaluationReport, Row
from foveal.lab.evaluate.statistics import Estimate, t_quantile
from foveal.lab.extras import how_to_install
from foveal.lab.generate.outputs import output_name, read_media
from foveal.lab.generate.sparse import SparseChoice
from foveal.methods.sla.config import SLAConfig

pytest.importorskip("torchmetrics")
pytest.importorskip("tyro")


def noise(frames=9, height=32, width=40, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def test_psnr_is_its_definition():
    video, reference = noise(seed=0), noise(seed=1)
    error = (video.double() - reference.double()).square().mean()
    assert psnr(video, reference) == pytest.approx(10 * math.log10(255**2 / error.item()), rel=1e-12)
    one_off = reference.clone()
    one_off[0, 0, 0, 0] ^= 1
    assert psnr(one_off, reference) == pytest.approx(10 * math.log10(255**2 * reference.numel()), rel=1e-12)
    assert psnr(reference, reference) == metrics.IDENTICAL_DB
    with pytest.raises(ValueError, match=r"videos must have the same shape, got \(9, 3, 32, 40\) and \(8, 3, 32, 40\)"):
        psnr(video, reference[:8])


def test_ssim_is_its_definition():
    """Wang et al., 2004, written out for one frame: moments under an 11 x 11 Gaussian window, borders reflected."""
    video = noise(1, 24, 24, seed=0)
    reference = (video.float() * 0.5 + noise(1, 24, 24, seed=1).float() * 0.5).to(torch.uint8)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line[None] / line.sum() ** 2).expand(3, 1, 11, 11)

    def weighted(x):
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (5,) * 4, mode="reflect"), window, groups=3)

    a, b = video.double() / 255, reference.double() / 255
    mean_a, mean_b = weighted(a), weighted(b)
    var_a, var_b = weighted(a * a) - mean_a**2, weighted(b * b) - mean_b**2
    covariance = weighted(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value = value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert ssim(video, reference) == pytest.approx(value.mean().item(), abs=2e-5)


def test_ssim_averages_over_frames_however_they_are_cut():
    video, reference = noise(11), (noise(11).float() * 0.8).to(torch.uint8)
    single = [ssim(video[i : i + 1], reference[i : i + 1]) for i in range(11)]
    assert ssim(video, reference) == pytest.approx(sum(single) / 11, abs=1e-6)
    assert ssim(video, video) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="SSIM needs at least 11 pixels a side"):
        ssim(video[..., :10], reference[..., :10])


def test_flicker_is_the_change_between_frames():
    still = noise(1).expand(9, 3, 32, 40)
    assert flicker(still) == 0
    blinking = still.clone()
    blinking[1::2] = 255 - blinking[1::2]
    expected = (2 * still[0].float() - 255).abs().mean().item()
    assert flicker(blinking) == pytest.approx(expected, rel=1e-6)
    assert flicker(still[:1]) == 0


def test_lpips_without_weights_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lpips, why = load_lpips(torch.device("cpu"))
    assert lpips is None
    assert str(tmp_path) in why


def test_lpips_is_that_of_torchmetrics(monkeypatch, tmp_path):
    """With random weights in the place of the download. torchmetrics takes its convolutions from torchvision, which is
    given ours here, so that what remains to be compared is all but their sizes."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    from torchmetrics.functional.image import lpips as theirs

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    features = alexnet_features()
    alexnet_file().parent.mkdir()
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, alexnet_file())
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    lpips, why = load_lpips(torch.device("cpu"))
    assert why is None
    video, reference = noise(9, 64, 64), noise(9, 64, 64, seed=1)
    single = [
        learned_perceptual_image_patch_similarity(a[None] / 127.5 - 1, b[None] / 127.5 - 1, net_type="alex").item()
        for a, b in zip(video, reference, strict=True)
    ]
    assert min(single) > 0.01
    assert lpips(video, reference) == pytest.approx(sum(single) / 9, rel=1e-4)
    assert lpips(video, video) == pytest.approx(0, abs=1e-7)


def test_alexnet_has_the_sizes_of_its_paper():
    """Of 224 pixels: "One weird trick", arXiv 1404.5997, and the parameters that torchvision's weights hold."""
    features = alexnet_features()
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    channels = (64, 192, 384, 256, 256)
    linear = {f"lin{layer}.model.1.weight": torch.zeros(1, width, 1, 1) for layer, width in enumerate(channels)}
    activations = LPIPS(weights, linear).activations(torch.zeros(1, 3, 224, 224))
    assert [tuple(x.shape[1:]) for x in activations] == [
        (width, side, side) for width, side in zip(channels, (55, 27, 13, 13, 13), strict=True)
    ]
    assert sum(p.numel() for p in features.parameters()) == 2_469_696


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # Abramowitz and Stegun, table 26.10, at 0.975.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=6e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for values in torch.randn(2000, 5, generator=generator).tolist():
        estimate = Estimate.of(values)
        held += estimate.low <= 0 <= estimate.high
    assert abs(held / 2000 - 0.95) < 0.015
    single = Estimate.of([3.0])
    assert (single.mean, single.low, single.high) == (3.0, None, None)
    assert single.text(1) == "3.0"
    assert Estimate.of([1.0, 3.0]).text(2, "x") == "2.00x [-10.71, 14.71]"
    with pytest.raises(ValueError, match="at least one value"):
        Estimate.of([])


def test_tables_say_the_same_everywhere():
    from rich.console import Console

    row = Row("seconds a step", Estimate.of([2.0, 2.0]), Estimate.of([1.0, 1.0]), Estimate.of([2.0, 2.0]), 1, "x")
    settings = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 4, "dtype": "float32"}
    note = 'LPIPS is left out: pip install -e ".[eval]"'
    report = EvaluationReport((row,), 2, (note,), settings, [], {"device": "a machine"})
    assert "| seconds a step | 2.0 [2.0, 2.0] | 1.0 [1.0, 1.0] | 2.0x [2.0, 2.0] |" in report.markdown()
    assert "2 pairs of 9x32x48, 4 steps, float32, on a machine, mean and 95% confidence interval" in report.markdown()
    assert report.to_dict()["table"]["seconds a step"]["paired"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "count": 2}
    console = Console(width=120, file=io.StringIO())
    console.print(report)
    printed = console.file.getvalue()
    assert "2.0x [2.0, 2.0]" in printed
    assert note in printed


# The command

LABEL = SparseChoice(config=SLAConfig(keep_ratio=0.4, drop_ratio=0.4)).label


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


def run_eval(wan, output, *arguments) -> int:
    size = ("--frames", "5", "--height", "96", "--width", "96", "--steps", "2")
    return cli.main([str(a) for a in ("eval", "--model", wan, "--output", output, *size, *arguments)])


@pytest.fixture(scope="module")
def evaluated(wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "out"
    arguments = ("--prompt", "a cat", "a dog", "--method", "sla", "--keep-ratio", "0.4", "--drop-ratio", "0.4")
    assert run_eval(wan, folder, *arguments) == 0
    return folder, arguments


def test_figures_are_those_of_the_files(evaluated):
    folder, _ = evaluated
    results = json.loads((folder / "evaluation.json").read_text())
    assert [(pair["prompt"], pair["seed"]) for pair in results["pairs"]] == [("a cat", 0), ("a dog", 0)]
    for pair in results["pairs"]:
        dense, sparse = (
            read_media(folder / f"{output_name(pair['prompt'], 0, arm)}.mkv", height=96, width=96)
            for arm in ("dense", LABEL)
        )
        assert pair["psnr_db"] == pytest.approx(psnr(sparse, dense))
        assert pair["psnr_db"] < metrics.IDENTICAL_DB
        assert pair["ssim"] == pytest.approx(ssim(sparse, dense))
        assert pair["dense"]["flicker"] == pytest.approx(flicker(dense))
        assert pair["sparse"]["flicker"] == pytest.approx(flicker(sparse))
        record = json.loads((folder / f"{output_name(pair['prompt'], 0, LABEL)}.json").read_text())
        # The second step of two: the first warms up.
        assert pair["sparse"]["step_seconds"] == record["seconds"]["steps"][1]
    values = [pair["psnr_db"] for pair in results["pairs"]]
    half = 12.706 * abs(values[0] - values[1]) / 2
    interval = results["table"]["PSNR (dB)"]["paired"]
    assert interval["mean"] == pytest.approx(sum(values) / 2)
    assert interval["high"] - interval["mean"] == pytest.approx(half, rel=1e-3)
    ratios = [pair["dense"]["step_seconds"] / pair["sparse"]["step_seconds"] for pair in results["pairs"]]
    assert results["table"]["seconds a step"]["paired"]["mean"] == pytest.approx(sum(ratios) / 2)
    assert results["settings"]["sparse"]["config"]["keep_ratio"] == 0.4
    assert "Memory is measured only on GPUs" in results["notes"]
    table = (folder / "evaluation.md").read_text()
    for name in results["table"]:
        assert f"| {name} |" in table


def test_vbench_gets_a_folder_for_each_kind(evaluated):
    folder, _ = evaluated
    for arm in ("dense", "sparse"):
        prompts = json.loads((folder / "vbench" / f"{arm}.json").read_text())
        assert sorted(prompts.values()) == ["a cat", "a dog"]
        assert {path.name for path in (folder / "vbench" / arm).iterdir()} == set(prompts)
        for name in prompts:
            assert (folder / "vbench" / arm / name).read_bytes() == (folder / name).read_bytes()


def test_a_second_run_measures_again_and_generates_nothing(wan, evaluated, capsys):
    folder, arguments = evaluated
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mkv")}
    first = json.loads((folder / "evaluation.json").read_text())
    assert run_eval(wan, folder, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder / 'evaluation.md'}\n"
    assert "PSNR (dB)" in captured.err
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mkv")} == before
    assert json.loads((folder / "evaluation.json").read_text()) == first


def test_nothing_dropped_is_nothing_lost(wan, tmp_path):
    arguments = ("--prompt", "a cat", "--method", "sla", "--keep-ratio", "1.0", "--drop-ratio", "0")
    assert run_eval(wan, tmp_path / "out", *arguments) == 0
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # All blocks kept is dense attention but for the order of its sums.
    assert results["pairs"][0]["psnr_db"] > 60
    assert results["pairs"][0]["ssim"] > 0.9999


def test_mistakes_are_answered_in_one_line(wan, tmp_path, capsys):
    sla = ("--method", "sla")
    for arguments, message in (
        (("--prompt", "a cat"), "is dense, nothing to compare; give sparse weights or a method"),
        (sla, "give --prompt or --prompt-file"),
        (("--prompt", "a cat", *sla, "--frames", "4"), "frames must be 1 more than a multiple of 4, got 4"),
        (("--prompt", "a cat", "--sparse", tmp_path / "none"), "no such folder or checkpoint of sparse weights"),
    ):
        assert run_eval(wan, tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("foveal: ")
        assert message in error
    assert not (tmp_path / "out").exists()


def test_commands_of_the_page_run(wan, tmp_path, monkeypatch):
    """With the tiny pipeline and size in the place of the real ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    foveal.save(foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.4)), tmp_path / "wan-sla")
    commands = commands_of("evaluate.md")
    assert len(commands) == 2
    for command in commands:
        arguments = [wan if argument == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" else argument for argument in command]
        small = {"--frames": "5", "--height": "96", "--width": "96", "--steps": "1"}
        assert cli.main([str(a) for a in (*arguments, *(part for option in small.items() for part in option))]) == 0, (
            command
        )
    assert (tmp_path / "foveal-eval" / "evaluation.md").is_file()
    assert (tmp_path / "eval-vsa" / "vbench" / "sparse.json").is_file()


def test_missing_packages_are_named(wan, tmp_path, monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("av", "torchmetrics") else found(name)
    )
    for command, package in (("eval", "torchmetrics"), ("generate", "av")):
        assert cli.main([command, "--model", str(wan), "--prompt", "a cat"]) == 2
        assert capsys.readouterr().err == f"foveal: this command needs {package}: {how_to_install(command)}\n"
    # At once, before anything is read.
    hidden = ("accelerate", "transformers", "gradio", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("av", *hidden) else found(name))
    for arguments, extra, missing in (
        (["train", "tiny"], "train", "accelerate"),
        (["inspect", "--model", str(wan), "--prompt", "a cat"], "generate", "transformers"),
        (["ui"], "ui", "gradio, transformers, av"),
        (["demo"], "demo", "transformers, av, matplotlib"),
    ):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err == f"foveal: this command needs {missing}: {how_to_install(extra)}\n"
    assert cli.main(["precompute", "--videos", str(tmp_path), "--output", str(tmp_path / "out"), "--pixels"]) == 2
    assert capsys.readouterr().err == f"foveal: this command needs av: {how_to_install('train')}\n"
