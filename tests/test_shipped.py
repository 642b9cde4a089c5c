"""The model that comes with foveal: what it is, and that every command takes its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import foveal
from foveal.lab import cli
from foveal.lab.encoding import encode_text, encode_video
from foveal.lab.pipelines import default_size, load_pipeline
from foveal.models.processor import sparse_processors
from foveal.models.shipped import FOLDER, SHIPPED, TINY, local_path, shipped_clips, tiny

PROMPT = "first-person view of a brown stone corridor"
SIZE = ("--frames", "9", "--height", "96", "--width", "128")


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline(TINY, device=torch.device("cpu"), dtype=torch.float32)


def test_it_is_small_and_has_a_size_of_its_own(loaded):
    weights = list((FOLDER / "tiny").rglob("*.safetensors"))
    assert len(weights) == 3
    assert sum(file.stat().st_size for file in weights) <= 16e6
    assert default_size(loaded) == (49, 144, 256)
    assert loaded.source == TINY
    assert loaded.sizes.grid(*default_size(loaded)).num_tokens == 1872


def test_it_is_an_ordinary_pipeline_that_foveal_converts():
    pipe = tiny(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    foveal.sparsify(pipe, foveal.SLAConfig(keep_ratio=0.5, drop_ratio=0.1))
    arguments = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1, "output_type": "pt"}
    video = pipe(PROMPT, **arguments).frames
    assert video.shape == (1, 9, 3, 64, 96)
    assert video.isfinite().all()


def test_names_are_folders_and_others_stay():
    assert all((FOLDER / folder).is_dir() for folder in SHIPPED.values())
    assert local_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    with pytest.raises(
        FileNotFoundError, match=r"no foveal/tiny-vsa-routr comes with foveal; .* foveal/tiny-vsa-router"
    ):
        local_path("foveal/tiny-vsa-routr")


def test_every_word_of_the_captions_is_known(loaded):
    tokenizer = loaded.pipe.tokenizer
    for clip in (*shipped_clips("train"), *shipped_clips("held-out")):
        assert tokenizer.unk_token_id not in tokenizer(clip.caption).input_ids
    one, other = encode_text(loaded, ["a brown stone corridor", "a green maze"])["prompt_embeds"]
    assert not torch.equal(one, other)


def test_latents_of_the_clips_are_those_of_the_vae(loaded):
    from foveal.lab.data.windows import read_video, to_model_range

    clip = shipped_clips("held-out")[0]
    frames = read_video(clip.file, height=144, width=256)
    assert len(frames) == 49
    latents = encode_video(loaded, to_model_range(frames[:17])[None])[0]
    # The file is compressed, the latents are those of the frames before.
    error = (latents - clip.latents[:, :5]).norm() / latents.norm()
    assert error < 0.25


def test_its_denoising_beats_no_change(loaded):
    """It has learned something: its velocity at a middling noise level explains most of the target's variance."""
    from foveal.lab.train.model import velocity
    from foveal.lab.train.objective import add_noise

    clip = shipped_clips("held-out")[0]
    clean = clip.latents[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy, target = add_noise(clean, noise, torch.tensor([0.7]))
    with torch.no_grad():
        predicted = velocity(loaded.pipe.transformer, noisy, torch.tensor([0.7]), encode_text(loaded, [clip.caption]))
    assert (predicted - target).square().mean() < 0.3 * target.square().mean()


def test_generate_takes_its_names(tmp_path):
    pytest.importorskip("tyro")
    pytest.importorskip("av")
    arguments = ["generate", "--model", TINY, "--prompt", PROMPT, "--output", str(tmp_path)]
    assert cli.main([*arguments, *SIZE, "--steps", "1", "--sparse", "foveal/tiny-sla", "--compare", "dense"]) == 0
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {record["settings"]["arm"] for record in records} == {"dense", "sparse"}
    assert all(record["settings"]["model"] == TINY for record in records)
    assert all(record["settings"]["model_fingerprint"] for record in records)
    assert all(record["settings"]["guidance_scale"] == 2.0 for record in records)


def test_eval_takes_its_names(tmp_path):
    pytest.importorskip("tyro")
    pytest.importorskip("torchmetrics")
    arguments = ["eval", "--model", TINY, "--prompt", PROMPT, "--output", str(tmp_path / "report"), "--steps", "1"]
    assert cli.main([*arguments, *SIZE, "--sparse", "foveal/tiny-sla", "--device", "cpu"]) == 0
    assert (tmp_path / "report" / "index.html").is_file()


def test_figures_of_its_page_are_those_of_its_runs():
    root = Path(__file__).parents[1]
    page, runs = (root / "docs" / "tiny.md").read_text(), root / "benchmarks" / "results" / "tiny"
    first, decoder = (json.loads((runs / name).read_text()) for name in ("vae-start.json", "vae.json"))
    words = " ".join(page.split())
    assert (first["batch"], first["crop"]) == (decoder["batch"], decoder["crop"]) == (4, [72, 128])
    assert f"{first['steps']:,} steps of four clips, of each a quarter of the picture" in words
    assert decoder["decoder_only"]
    assert f"{decoder['steps']:,} steps of the decoder only (commit `{decoder['commit']}`)" in words
    assert all(page.count(f"{run['psnr']:.1f} dB") == 1 for run in (first, decoder))
    losses = {
        line["step"]: line["text"] for line in map(json.loads, (runs / "transformer.jsonl").open()) if "step" in line
    }
    shown = [f"{losses[step]:.4f}" for step in (1000, 5000, max(losses))]
    assert f"{shown[0]} after 1,000 steps, {shown[1]} after 5,000, and {shown[2]} at the end" in " ".join(page.split())
    start = [json.loads(line) for line in (runs / "transformer-start.jsonl").open()]
    assert f"which {start[-1]['step']:,} steps on the clips of commit `{start[0]['commit'][:7]}` had made" in words
    assert f"{max(losses):,} more steps of 64 clips" in words
    rows = []
    for method, kept in (("sla", "10%"), ("sla2", "10%"), ("vsa", "12.5%")):
        lines = [
            line for line in map(json.loads, (runs / f"{method}-adapter.jsonl").open()) if "held_out/sparse" in line
        ]
        assert [lines[0]["step"], lines[-1]["step"]] == [0, 400]
        dense, name = lines[0]["held_out/dense"], method.upper()
        rows += [("dense", "100%", dense), (f"{name}, no training", kept, lines[0]["held_out/sparse"])]
        rows += [(f"{name} adapter", kept, lines[-1]["held_out/sparse"])]
    for name, kept, loss in rows:
        against = "" if name == "dense" else f" {100 * (loss / dense - 1):+.1f}%"
        assert f"| {name} | {kept} | {loss:.4f} |{against} |" in page


def test_words_of_its_page_are_known(loaded):
    page = " ".join((Path(__file__).parents[1] / "docs" / "tiny.md").read_text().split())
    known = loaded.pipe.tokenizer.get_vocab()
    assert f"a word tokenizer of {len(known)} words" in page
    places = page[page.index("The places are") : page.index("## What it was trained on")]
    quoted = re.findall('"([^"]+)"', places)
    assert len(quoted) > 15
    assert {word for text in quoted for word in text.split()} <= set(known)


def test_inspect_takes_its_name(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["inspect", "--model", TINY, "--prompt", PROMPT, "--output", str(tmp_path / "report")]
    assert cli.main([*arguments, *SIZE, "--steps", "1", "--query-blocks", "2"]) == 0
    assert (tmp_path / "report" / "index.html").is_file()


def test_precompute_and_train_take_its_name(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from accelerate.state import AcceleratorState

    from foveal.models.files.exports import load_export

    videos = tmp_path / "videos"
    videos.mkdir()
    for clip in shipped_clips("held-out")[:3]:
        (videos / clip.file.name).write_bytes(clip.file.read_bytes())
        (videos / f"{clip.name}.txt").write_text(clip.caption)
    data, run = tmp_path / "data", tmp_path / "run"
    folders = ["--videos", str(videos), "--output", str(data)]
    assert cli.main(["precompute", *folders, "--model", TINY, "--bucket", "9x64x96", "--device", "cpu"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    options = ["--data.folder", data, "--output", run, "--steps", 2, "--batch-size", 2, "--micro-batch-size", 2]
    options += ["--data.held-out", 1, "--data.workers", 0, "--evaluation.every", 0, "--device", "cpu"]
    assert cli.main(["train", "tiny-sla", *map(str, options)]) == 0
    model = load_export(tiny(dtype=torch.float32).transformer, run / "export")
    assert len(sparse_processors(model)) == 6
    assert (run / "export" / "lora" / "pytorch_lora_weights.safetensors").is_file()
