"""`foveal precompute` as a user runs it: lists, clips, latents as the pipeline has them, kills, and broken files."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_media import (
    LATENTS_MEAN,
    LATENTS_STD,
    commands_of,
    diffusers,
    moving_bar,
    save_tiny_wan,
    write_clip,
    write_sound,
)

from foveal.lab import cli
from foveal.lab.data.clips import Bucket, MediaInfo, choose_bucket, clip_starts, probe, read_clip
from foveal.lab.data.dataset import LatentDataset
from foveal.lab.data.precompute import PrecomputeSettings, precompute
from foveal.lab.data.shards import INDEX_FILE
from foveal.lab.data.sources import read_sources
from foveal.lab.data.windows import read_video, sample_clip, to_model_range
from foveal.lab.encoding import encode_text, normalize_latents
from foveal.lab.pipelines import PIPELINES, LoadedPipeline, Sizes
from foveal.output_folder import LIST_FILE, OutputFolder

pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips with captions, in two shapes, one long; and files that cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    for name, size, frames in (
        ("a", (48, 64), 12),
        ("b", (48, 64), 24),
        ("deep/c", (64, 48), 12),
        ("deep/d", (48, 64), 12),
    ):
        write_clip(folder / f"{name}.mp4", frames, *size, seed=len(name))
        (folder / f"{name}.txt").write_text(f"a bar, {name}\n")
    return folder


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


# Lists of sources


def test_every_kind_of_list_says_the_same(clips, tmp_path):
    expected = [(f"{name}.mp4", f"a bar, {name}") for name in ("a", "b", "deep/c", "deep/d")]
    named = [{"file_name": name, "text": caption} for name, caption in expected]
    (clips / "list.csv").write_text("video,prompt,extra\n" + "".join(f'{n},"{c}",1\n' for n, c in expected))
    (clips / "list.jsonl").write_text("\n".join(json.dumps(row) for row in named) + "\n\n")
    (clips / "list.json").write_text(json.dumps([{"video_path": n, "caption": c} for n, c in expected]))
    fastvideo = tmp_path / "fastvideo"
    fastvideo.mkdir()
    (fastvideo / "videos").symlink_to(clips)
    rows = [{"path": n, "cap": [c, "another"], "fps": 16.0, "duration": 0.75} for n, c in expected]
    (fastvideo / "videos2caption.json").write_text(json.dumps(rows))
    assert [(s.name, s.caption) for s in read_sources(clips / "a.mp4")] == expected[:1]
    for location in (
        clips,
        clips / "list.csv",
        clips / "list.jsonl",
        clips / "list.json",
        fastvideo / "videos2caption.json",
    ):
        sources = read_sources(location)
        assert [(source.name, source.caption) for source in sources] == expected, location
        assert all(source.path.is_file() for source in sources)


def test_lists_that_cannot_be_read_are_answered_by_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, text, message in (
        ("a.csv", "movie,prompt\nx.mp4,y\n", r"a\.csv, line 2 has none of the columns video, .*; it has movie, prompt"),
        ("b.jsonl", '{"video": "x.mp4", "caption": "y"}\n{"video"', r"b\.jsonl, line 2 is not valid JSON"),
        ("c.json", '{"video": "x.mp4"}', r"c\.json must hold a JSON list of objects, got dict"),
        ("d.json", '[{"path": "x.mp4", "cap": "y"}, 3]', r"d\.json, entry 2 must be an object, got int"),
        (
            "e.json",
            '[{"path": "x.mp4", "cap": 7}]',
            r"entry 1 must name a file and a caption as text, got 'x\.mp4' and 7",
        ),
        ("f.csv", "video,prompt\n", "lists no videos"),
        ("g.csv", "video,prompt\nx.mp4,y\nx.mp4,z\n", r"lists x\.mp4 twice"),
        ("h.txt", "x", r"is not a list of videos; expected a folder, or a file that ends in \.csv, "),
        ("i.csv", b"video,prompt\nx.mp4,\xff\n", "is not UTF-8 text"),
        ("empty", None, "has no video or image; expected files that end in"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message):
            read_sources(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such folder or list of videos"):
        read_sources(tmp_path / "nowhere")


# Clips


def test_clips_are_the_frames_nearest_in_time():
    path = sample_clip("bikes")
    media = probe(path)
    assert (len(media.times), media.height, media.width) == (250, 272, 640)
    assert media.frames_at(None) == 250
    assert media.frames_at(16) == 160
    bucket = Bucket(6, 34, 80)
    whole = read_clip(media, Bucket(250, 34, 80), fps=None, start=0)
    for fps, start in ((None, 0), (None, 200), (16, 0), (16, 100), (50, 30)):
        indices = media.frame_indices(fps, start, 6)
        assert torch.equal(read_clip(media, bucket, fps=fps, start=start), whole[indices])
        if fps is not None:
            # The file has 25 frames per second.
            assert indices == [int((start + k) / fps * 25 + 0.499999) for k in range(6)]


def test_a_clip_of_the_file_s_size_and_rate_is_its_frames(tmp_path):
    path = write_clip(tmp_path / "v.mp4", frames=9, height=48, width=64)
    assert torch.equal(
        read_clip(probe(path), Bucket(9, 48, 64), fps=16, start=0), read_video(path, height=48, width=64)
    )


def test_time_stamps_may_start_anywhere(tmp_path):
    import av

    frames = moving_bar(40, 48, 64)
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=16, options={"qp": "0", "g": "10"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        for place, image in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = 160 + place
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    media = probe(tmp_path / "late.mkv")
    assert media.first == pytest.approx(10, abs=0.01)
    assert len(media.times) == 40
    for start in (0, 5, 30):
        assert torch.equal(read_clip(media, Bucket(8, 48, 64), fps=16, start=start), frames[start : start + 8])


def test_buckets_by_shape_then_length_then_size():
    wide = MediaInfo(None, tuple(k / 16 for k in range(40)), 0.0, 480, 832)
    buckets = [
        Bucket(17, 480, 832),
        Bucket(33, 480, 832),
        Bucket(33, 240, 416),
        Bucket(33, 832, 480),
        Bucket(81, 480, 832),
    ]
    assert choose_bucket(wide, buckets, 16) == Bucket(33, 480, 832)
    assert choose_bucket(MediaInfo(None, wide.times, 0.0, 832, 480), buckets, 16) == Bucket(33, 832, 480)
    assert choose_bucket(MediaInfo(None, wide.times, 0.0, 300, 520), buckets, 16) == Bucket(33, 240, 416)
    assert choose_bucket(MediaInfo(None, wide.times[:20], 0.0, 480, 832), buckets, 16) == Bucket(17, 480, 832)
    with pytest.raises(ValueError, match="has 5 frames at 16 per second, needs at least 17"):
        choose_bucket(MediaInfo("v", wide.times[:5], 0.0, 480, 832), buckets, 16)
    for text in ("81x480", "0x480x832", "81x480x832x3", "a"):
        with pytest.raises(ValueError, match="bucket must read FRAMESxHEIGHTxWIDTH"):
            Bucket.parse(text)


def test_clips_of_a_file_do_not_overlap():
    media = MediaInfo(None, tuple(k / 16 for k in range(40)), 0.0, 480, 832)
    assert clip_starts(media, Bucket(9, 8, 8), 16, 1) == [15]
    for clips in (2, 3, 4, 9):
        starts = clip_starts(media, Bucket(9, 8, 8), 16, clips)
        assert len(starts) == min(clips, 4)
        assert starts[0] == 0
        assert starts[-1] == 31
        assert all(b - a >= 9 for a, b in itertools.pairwise(starts))


# What pipelines make of data


def test_latents_are_what_the_pipeline_decodes(wan, monkeypatch):
    """With a transformer that predicts no change, `WanPipeline` hands its VAE what our normalization was given."""
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    z = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    decoded = []
    monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **rest: (torch.zeros_like(hidden_states),))
    monkeypatch.setattr(
        pipe.vae, "decode", lambda latents, **rest: decoded.append(latents) or (torch.zeros(1, 3, 5, 32, 48),)
    )
    latents = normalize_latents(pipe.vae, z)
    pipe("", latents=latents, height=32, width=48, num_frames=5, num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(decoded[0], z)
    assert (latents - z).abs().max() > 0.1


def test_a_vae_without_statistics_is_refused():
    class Bare(torch.nn.Module):
        config = type("Config", (), {})()

    with pytest.raises(ValueError, match="Bare has neither latents_mean and latents_std nor a scaling_factor"):
        normalize_latents(Bare(), torch.zeros(1, 4, 1, 2, 2))


def test_text_is_encoded_as_the_pipeline_s_call_does(wan):
    """With the length of the call, which for Wan is not that of `encode_prompt`; named as the call names it."""
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    loaded = LoadedPipeline(
        pipe, PIPELINES["WanPipeline"], Sizes(4, 8, (1, 2, 2)), torch.device("cpu"), torch.float32, str(wan)
    )
    encoded = encode_text(loaded, ["a cat", ""])
    assert set(encoded) == {"prompt_embeds"}
    assert encoded["prompt_embeds"].shape == (2, 512, 8)
    expected, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(encoded["prompt_embeds"][:1], expected)


# The command


def test_samples_are_the_pipeline_s_own_encodings(wan, clips, tmp_path, capsys):
    arguments = ("precompute", "--videos", clips, "--model", wan, "--output", tmp_path / "data", "--store", "float32")
    assert run(*arguments, "--bucket", "9x32x48", "9x48x32") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'data'}\n"
    data = LatentDataset(tmp_path / "data", verify=True)
    assert [data[i]["id"] for i in range(4)] == ["a.mp4#0", "b.mp4#0", "deep/c.mp4#0", "deep/d.mp4#0"]
    assert data.buckets == {(4, 3, 4, 6): [0, 1, 3], (4, 3, 6, 4): [2]}
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    frames = read_clip(probe(clips / "a.mp4"), Bucket(9, 32, 48), fps=16, start=1)
    z = pipe.vae.encode(to_model_range(frames)[None]).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    torch.testing.assert_close(data[0]["latents"], ((z - mean) / std)[0])
    assert data[0]["caption"] == "a bar, a"
    for caption, embeds in (("a bar, a", data[0]["prompt_embeds"]), ("", data.empty_prompt()["prompt_embeds"])):
        expected, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(embeds, expected[0])
    assert data.settings == {
        "space": "latent",
        "pipeline": "WanPipeline",
        "model": str(wan),
        "vae": {
            "class": "AutoencoderKLWan",
            "z_dim": 4,
            "latents_mean": LATENTS_MEAN,
            "latents_std": LATENTS_STD,
        },
        "buckets": ["9x32x48", "9x48x32"],
        "fps": 16,
        "clips_per_video": 1,
        "dtype": "float32",
        "text": ["prompt_embeds"],
    }


def test_pixels_without_a_model(clips, tmp_path):
    arguments = ("precompute", "--videos", clips, "--pixels", "--output", tmp_path / "data", "--bucket", "8x48x64")
    assert run(*arguments, "--clips-per-video", "3") == 0
    data = LatentDataset(tmp_path / "data", verify=True)
    assert [data[i]["id"] for i in range(6)] == [
        f"{n}#{k}"
        for n, k in (("a.mp4", 0), ("b.mp4", 0), ("b.mp4", 1), ("b.mp4", 2), ("deep/c.mp4", 0), ("deep/d.mp4", 0))
    ]
    assert set(data[0]) == {"latents", "caption", "id"}
    assert data[3]["latents"].dtype == torch.float32
    # H.264 is lossy; a level is 1/127.5.
    expected = to_model_range(moving_bar(24, 48, 64, seed=1))
    assert (data[3]["latents"] - expected[:, 16:]).abs().mean() < 3 / 127.5


def test_images_are_one_frame(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    picture = moving_bar(1, 48, 64)[0]
    image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "x.png")
    assert run("precompute", "--videos", folder, "--pixels", "--output", tmp_path / "data", "--bucket", "1x48x64") == 0
    assert torch.equal(LatentDataset(tmp_path / "data")[0]["latents"], to_model_range(picture[None]))


KILLED = """
import os, signal, sys
import torch
from foveal.lab.data.clips import Bucket
from foveal.lab.data.precompute import PrecomputeSettings, Progress, precompute

class Kill(Progress):
    def advance(self, source, reason):
        if source.name == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)

settings = PrecomputeSettings(buckets=(Bucket(8, 48, 64),), dtype=torch.float32, shard_samples=2)
precompute(sys.argv[1], sys.argv[2], settings, progress=Kill())
"""


def test_a_killed_run_goes_on_and_ends_the_same(clips, tmp_path):
    settings = PrecomputeSettings(buckets=(Bucket(8, 48, 64),), dtype=torch.float32, shard_samples=2)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(clips), str(tmp_path / "data"), "deep/c.mp4"], timeout=120, check=False
    )
    assert killed.returncode == -9
    with pytest.raises(ValueError, match="is not complete, it has 2 samples so far"):
        LatentDataset(tmp_path / "data")
    # A kill between a shard and the index leaves this behind.
    with OutputFolder(tmp_path / "data", "precompute").writing("shard-00001.safetensors") as aside:
        aside.write_bytes(b"not in the index")
    first = (tmp_path / "data" / "shard-00000.safetensors").stat()
    encoded = []

    class Watch:
        def start(self, files, done):
            encoded.append((files, done))

        def advance(self, source, reason):
            encoded.append(source.name)

    precompute(clips, tmp_path / "data", settings, progress=Watch())
    assert encoded == [(4, 2), "deep/c.mp4", "deep/d.mp4"]
    assert (tmp_path / "data" / "shard-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    precompute(clips, tmp_path / "whole", settings)
    assert LatentDataset(tmp_path / "data", verify=True).fingerprint == LatentDataset(tmp_path / "whole").fingerprint
    shards = {f"shard-0000{number}.safetensors" for number in (0, 1)}
    assert {path.name for path in (tmp_path / "data").iterdir()} == {INDEX_FILE, LIST_FILE, *shards}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_full_disk_is_named_and_the_same_command_goes_on(clips, tmp_path):
    """A sample takes 74 kB. The first two are in a shard when the disk is full; then it grows."""
    (tmp_path / "disk").mkdir()
    data = tmp_path / "disk" / "data"
    python = """
import sys
from foveal.lab import cli
from foveal.lab.data.precompute import PrecomputeSettings
PrecomputeSettings.__init__.__defaults__ = (*PrecomputeSettings.__init__.__defaults__[:-1], 2)
sys.exit(cli.main())
"""
    command = [sys.executable, "-c", python, "precompute", "--videos", clips, "--output", data, "--pixels"]
    run = shlex.join(map(str, [*command, "--bucket", "2x48x64"]))
    script = f"""
mount -t tmpfs -o size=250k none {tmp_path}/disk
{run}
echo $? $(ls -A {data})
mount -o remount,size=2m {tmp_path}/disk
{run}
echo $?
cp -r {data} {tmp_path}/data
"""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True, timeout=300
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("may not mount here")
    full = f"foveal: {data}: the disk is full; 2 samples are kept, and the same command continues when there is room\n"
    assert full in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == f"2 {LIST_FILE} {INDEX_FILE} shard-00000.safetensors\n{data}\n0\n"
    settings = PrecomputeSettings(buckets=(Bucket(2, 48, 64),), dtype=torch.float32, shard_samples=2)
    precompute(clips, tmp_path / "whole", settings)
    assert LatentDataset(tmp_path / "data", verify=True).fingerprint == LatentDataset(tmp_path / "whole").fingerprint


def test_an_interrupt_keeps_what_is_done(clips, tmp_path, monkeypatch, capsys):
    from foveal.lab import terminal

    def interrupt(self, source, reason):
        if source.name == "deep/c.mp4":
            raise KeyboardInterrupt

    arguments = ("precompute", "--videos", clips, "--pixels", "--output", tmp_path / "data", "--bucket", "8x48x64")
    monkeypatch.setattr(terminal.FileProgress, "advance", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 130
    assert "what is done is kept, run the same command again to go on" in capsys.readouterr().err
    assert len(LatentDataset(tmp_path / "data", incomplete=True)) == 3
    monkeypatch.undo()
    assert run(*arguments) == 0
    assert len(LatentDataset(tmp_path / "data")) == 4


def test_new_files_are_added_and_broken_ones_tried_again(clips, tmp_path):
    settings = PrecomputeSettings(buckets=(Bucket(8, 48, 64),), dtype=torch.float32)
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((clips / "a.mp4").read_bytes())
    (folder / "b.mp4").write_bytes((clips / "b.mp4").read_bytes()[:200])
    index = precompute(folder, tmp_path / "data", settings)
    assert index.samples == 1
    assert [entry["file"] for entry in index.skipped] == ["b.mp4"]
    (folder / "b.mp4").write_bytes((clips / "b.mp4").read_bytes())
    write_clip(folder / "c.mp4", 8)
    index = precompute(folder, tmp_path / "data", settings)
    assert (index.samples, index.skipped) == (3, [])


def test_broken_files_are_left_out_and_listed(clips, tmp_path, capsys):
    folder = tmp_path / "videos"
    write_clip(folder / "good.mp4", 8)
    write_clip(folder / "one-frame.mp4", 1)
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("not a video")
    content = (clips / "b.mp4").read_bytes()
    # An index that promises frames which are not there.
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "list.csv").write_text(
        "video,prompt\n" + "".join(f"{n}.mp4,x\n" for n in ("good", "gone", "one-frame", "sound", "text", "truncated"))
    )
    arguments = ("precompute", "--videos", folder / "list.csv", "--pixels", "--output", tmp_path / "data")
    assert run(*arguments, "--bucket", "8x48x64") == 0
    errors = capsys.readouterr().err
    skipped = {e["file"]: e["reason"] for e in json.loads((tmp_path / "data" / "index.json").read_text())["skipped"]}
    assert set(skipped) == {"gone.mp4", "one-frame.mp4", "sound.mp4", "text.mp4", "truncated.mp4"}
    for name, message in (
        ("gone", "no such video file"),
        ("one-frame", "has 1 frame, needs at least 8"),
        ("sound", "has no video stream"),
        ("text", "cannot decode"),
    ):
        assert message in skipped[f"{name}.mp4"]
    assert "5 files left out" in errors
    assert errors.count("left out: ") == 5
    assert len(LatentDataset(tmp_path / "data")) == 1


def test_mistakes_are_answered_in_one_line(wan, clips, tmp_path, capsys):
    write_clip(tmp_path / "short" / "v.mp4", 1)
    write_sound(tmp_path / "v.mp4")
    (tmp_path / "sound").mkdir()
    write_sound(tmp_path / "sound" / "v.mp4")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "no-model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableAudioPipeline"}')
    pixels = ("--pixels", "--bucket", "8x48x64")
    data = tmp_path / "data"
    for arguments, message in (
        (("--videos", tmp_path / "none", "--output", data, *pixels), "no such folder or list of videos"),
        (("--videos", clips, "--output", data), "give --model, the pipeline to encode with, or --pixels"),
        (
            ("--videos", clips, "--output", data, "--model", wan, "--pixels"),
            "give --model, the pipeline to encode with",
        ),
        (("--videos", clips, "--output", data, "--pixels"), "pixel space has no size of its own"),
        (("--videos", clips, "--output", data, "--model", tmp_path / "none"), "no such pipeline folder"),
        (("--videos", clips, "--output", data, "--model", tmp_path / "no-model"), "has no model_index.json"),
        (
            ("--videos", clips, "--output", data, "--model", tmp_path / "other"),
            "is a StableAudioPipeline; expected one of",
        ),
        (
            ("--videos", clips, "--output", data, "--model", wan, "--bucket", "9x8x48"),
            "height must be a positive multiple of 16",
        ),
        (
            ("--videos", clips, "--output", data, "--model", wan, "--bucket", "8x32x48"),
            "1 more than a multiple of 4, got 8",
        ),
        (("--videos", clips, "--output", data, "--pixels", "--bucket", "8x48"), "bucket must read FRAMESxHEIGHTxWIDTH"),
        (("--videos", clips, "--output", data, *pixels, "8x48x64"), "a bucket is given twice"),
        (("--videos", clips, "--output", data, *pixels, "--fps", "0"), "fps must be positive"),
        (("--videos", clips, "--output", data, *pixels, "--store", "int8"), "unknown dtype 'int8'"),
        (
            ("--videos", clips, "--output", data, *pixels, "--clips-per-video", "0"),
            "clips_per_video must be at least 1",
        ),
        (("--videos", clips, "--output", tmp_path / "thesis", *pixels), "holds something else"),
        (("--videos", clips, "--output", tmp_path / "v.mp4", *pixels), "is a file; expected a folder"),
        (("--videos", clips / "a.txt", "--output", data, *pixels), "is not a list of videos"),
        (("--videos", clips, "--output", data, "--model", wan, "--device", "tpu"), "unknown device 'tpu'"),
        (("--videos", clips, "--output", data, "--model", wan, "--dtype", "int8"), "unknown dtype 'int8'"),
    ):
        assert run("precompute", *arguments) == 2, message
        error = capsys.readouterr().err.strip()
        assert message in error
        assert error.count("\n") == 0, error
    for folder, message in (
        ("short", "has 1 frame, needs at least 8"),
        ("sound", "has no video stream"),
        ("v.mp4", "has no video stream"),
    ):
        assert run("precompute", "--videos", tmp_path / folder, "--output", tmp_path / f"{folder}-data", *pixels) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith(f"foveal: none of the 1 files of {tmp_path / folder} could be used; the first: ")
        assert message in error
    assert not (tmp_path / "data").exists()


def test_other_settings_and_captions_need_another_folder(clips, tmp_path):
    settings = PrecomputeSettings(buckets=(Bucket(8, 48, 64),))
    folder = tmp_path / "videos"
    write_clip(folder / "a.mp4", 8)
    precompute(folder, tmp_path / "data", settings)
    with pytest.raises(ValueError, match=r"was made with buckets \['8x48x64'\], this run has \['7x48x64'\]"):
        precompute(folder, tmp_path / "data", PrecomputeSettings(buckets=(Bucket(7, 48, 64),)))
    (folder / "a.txt").write_text("a new caption")
    with pytest.raises(
        ValueError, match=r"a\.mp4 has another caption now than in output .*: 'a new caption', there ''"
    ):
        precompute(folder, tmp_path / "data", settings)


def test_a_model_that_overflows_stops_the_run(wan, clips, tmp_path, monkeypatch):
    import foveal.lab.data.precompute as module
    from foveal.lab.pipelines import load_pipeline

    loaded = load_pipeline(wan, device=torch.device("cpu"), dtype=torch.float32, without_transformer=True)
    monkeypatch.setattr(module, "encode_video", lambda *args: torch.full((1, 4, 3, 4, 6), float("nan")))
    settings = PrecomputeSettings(buckets=(Bucket(9, 32, 48),))
    with pytest.raises(FloatingPointError, match=r"latents that are not finite for a\.mp4"):
        precompute(clips, tmp_path / "data", settings, loaded=loaded)


def test_hub_failures_are_one_line(monkeypatch, clips, tmp_path, capsys):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub\nat all")

    monkeypatch.setattr("foveal.lab.hub.hub_unreachable", lambda: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    arguments = ("--videos", clips, "--output", tmp_path / "data", "--model", "someone/something")
    assert run("precompute", *arguments) == 2
    assert capsys.readouterr().err == "foveal: cannot load pipeline someone/something: cannot reach the hub at all\n"


def test_commands_of_the_page_run(wan, clips, tmp_path, monkeypatch):
    """With the tiny pipeline and sizes in the place of the real ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").symlink_to(clips)
    (tmp_path / "clip.mp4").symlink_to(sample_clip("bigbuckbunny"))
    stand_ins = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan, "81x480x832": "9x32x48", "81x832x480": "9x48x32"}
    commands = commands_of("precompute.md")
    assert len(commands) == 3
    for command in commands:
        arguments = [stand_ins.get(argument, argument) for argument in command]
        if "--bucket" not in arguments:
            arguments += ["--bucket", "9x32x48"]
        assert run(*arguments) == 0, command
        assert len(LatentDataset(arguments[arguments.index("--output") + 1])) > 0
