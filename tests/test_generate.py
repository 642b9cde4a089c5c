"""`foveal generate` as a user runs it, on a tiny random Wan pipeline: outputs, records, and what is skipped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_media import commands_of, diffusers, save_tiny_wan

import foveal
from foveal.lab import cli
from foveal.lab.generate.outputs import output_name, read_media, write_exact, write_media
from foveal.lab.generate.run import read_prompts
from foveal.lab.generate.sparse import SparseChoice, choose_sparse
from foveal.methods.sla.config import SLAConfig
from foveal.output_folder import LIST_FILE

pytest.importorskip("tyro")

# The VAE of random weights makes noise, which H.264 changes more than a seed does.
SIZE = ("--frames", "5", "--height", "96", "--width", "96", "--steps", "2", "--exact")
# 2 x 6 x 6 tokens: two blocks of 64.
SLA = ("--method", "sla", "--keep-ratio", "0.4", "--drop-ratio", "0.4")

# What file names call that.
LABEL = SparseChoice(config=SLAConfig(keep_ratio=0.4, drop_ratio=0.4)).label


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def generate(wan, output, *arguments) -> int:
    return run("generate", "--model", wan, "--output", output, *SIZE, *arguments)


def stats(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def reference(wan, prompt: str, seed: int, prepare=None) -> torch.Tensor:
    """What diffusers makes of it without foveal, uint8 [frames, 3, height, width]."""
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    if prepare is not None:
        prepare(pipe)
    video = pipe(
        prompt,
        height=96,
        width=96,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames[0]
    return (video * 255).round().to(torch.uint8)


def video_of(folder, prompt: str, seed: int, arm: str) -> torch.Tensor:
    return read_media(folder / f"{output_name(prompt, seed, arm)}.mkv", height=96, width=96)


@pytest.fixture(scope="module")
def outputs(wan, tmp_path_factory):
    """Two prompts, two seeds, dense and sparse."""
    folder = tmp_path_factory.mktemp("generated") / "videos"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a cat\n\n  A dog, running: fast!  \n")
    assert generate(wan, folder, "--prompt-file", prompts, "--seed", "0", "1", *SLA, "--compare", "dense") == 0
    return folder


def test_every_prompt_seed_and_arm_has_its_files(outputs):
    names = {
        output_name(prompt, seed, arm)
        for prompt in ("a cat", "A dog, running: fast!")
        for seed in (0, 1)
        for arm in ("dense", LABEL, f"{LABEL}-beside-dense")
    }
    assert {path.stem for path in outputs.glob("*.mp4")} == names
    assert {path.stem for path in outputs.glob("*.json")} == {name for name in names if "beside" not in name}
    assert len(list(outputs.iterdir())) == 28 + 2
    assert (outputs / LIST_FILE).is_file()


class Page(HTMLParser):
    """What a page shows: the source of each player or picture and its caption, its links, its headings."""

    def __init__(self, path):
        super().__init__()
        self.shown, self.links, self.headings, self.inside = [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "src" in values:
            self.shown.append([values["src"], ""])
        if tag == "a":
            self.links.append(values["href"])
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "figcaption" and data.strip():
            self.shown[-1][1] += data
            self.inside = None
        if self.inside == "h2" and data.strip():
            self.headings.append(data.strip())
            self.inside = None


def test_the_page_shows_every_output_and_each_pair_side_by_side(wan, outputs, tmp_path):
    page = Page(outputs / "index.html")
    assert {source for source, _ in page.shown} == {path.name for path in outputs.glob("*.mp4")}
    assert set(page.links) == {path.name for path in outputs.glob("*.json")}
    assert page.headings == ["A dog, running: fast!"] * 2 + ["a cat"] * 2
    captions = dict(page.shown)
    name = output_name("a cat", 1, LABEL)
    assert captions[f"{name}-beside-dense.mp4"] == f"dense on the left, {LABEL} on the right"
    assert re.fullmatch(
        rf"{LABEL}: [\d.]+ s, [\d.]+ s a step, \d+ % of dense attention's FLOPs", captions[f"{name}.mp4"]
    )
    assert re.fullmatch(r"dense: [\d.]+ s, [\d.]+ s a step", captions[f"{output_name('a cat', 1, 'dense')}.mp4"])
    text = (outputs / "index.html").read_text()
    for shown in ("<th>keep_ratio</th><td>0.4</td>", "<th>height</th><td>96</td>", "<small>seed 1</small>"):
        assert shown in text
    assert "http" not in text
    # Of former runs too, and what another program wrote is none of ours.
    folder = tmp_path / "again"
    assert generate(wan, folder, "--prompt", "<b>x & y</b>") == 0
    (folder / "notes.json").write_text("{}")
    assert generate(wan, folder, "--prompt", "another") == 0
    page = Page(folder / "index.html")
    assert page.headings == ["<b>x & y</b>", "another"]
    assert len(page.shown) == 2
    assert "<b>" not in (folder / "index.html").read_text()
    # A page that somebody changed stays, and is named before anything is generated.
    (folder / "index.html").write_text("mine")
    assert generate(wan, folder, "--prompt", "a third") == 2
    assert (folder / "index.html").read_text() == "mine"
    assert len(list(folder.glob("*.mp4"))) == 2


def test_videos_are_those_of_the_pipeline(wan, outputs):
    def sparse(pipe):
        foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.4))

    for arm, prepare in (("dense", None), (LABEL, sparse)):
        assert torch.equal(video_of(outputs, "a cat", 1, arm), reference(wan, "a cat", 1, prepare)), arm
    dense = video_of(outputs, "a cat", 1, "dense")
    assert not torch.equal(dense, video_of(outputs, "a cat", 1, LABEL))
    assert not torch.equal(dense, video_of(outputs, "a cat", 0, "dense"))
    frames = read_media(outputs / f"{output_name('a cat', 1, 'dense')}.mp4", height=96, width=96)
    assert (frames.float() - dense.float()).abs().mean() < 25
    beside = read_media(outputs / f"{output_name('a cat', 1, LABEL)}-beside-dense.mp4", height=96, width=196)
    assert beside.shape == (5, 3, 96, 196)


def test_the_record_says_how(wan, outputs):
    record = json.loads((outputs / f"{output_name('a cat', 1, LABEL)}.json").read_text())
    settings = record["settings"]
    assert {
        key: settings[key] for key in ("prompt", "seed", "arm", "num_frames", "height", "width", "fps", "dtype")
    } == {
        "prompt": "a cat",
        "seed": 1,
        "arm": "sparse",
        "num_frames": 5,
        "height": 96,
        "width": 96,
        "fps": 16,
        "dtype": "float32",
    }
    assert settings["pipeline"] == "WanPipeline"
    assert settings["model"] == str(wan)
    assert settings["num_inference_steps"] == 2
    # What the pipeline's call has for nobody who says otherwise.
    assert settings["guidance_scale"] == 5.0
    assert SLAConfig.from_dict(settings["sparse"]["config"]) == SLAConfig(keep_ratio=0.4, drop_ratio=0.4)
    seconds = record["seconds"]
    assert len(seconds["steps"]) == 2
    parts = [seconds["text_encoding"], *seconds["steps"], seconds["decoding"]]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(seconds["total"], rel=1e-6)
    assert record["tokens"] == [2, 6, 6]
    cost = foveal.attention_cost(
        SLAConfig(keep_ratio=0.4, drop_ratio=0.4), grid=foveal.VideoGrid(2, 6, 6), heads=2, head_dim=16
    )
    assert record["attention_flops_reduction"] == pytest.approx(cost.reduction)
    assert record["peak_memory_bytes"] is None
    assert record["environment"]["foveal"] == foveal.__version__
    files = [outputs / f"{output_name('a cat', 1, LABEL)}.{suffix}" for suffix in ("mp4", "mkv")]
    assert record["outputs"] == [{"file": file.name, "bytes": file.stat().st_size} for file in files]
    dense = json.loads((outputs / f"{output_name('a cat', 1, 'dense')}.json").read_text())
    assert dense["settings"]["sparse"] is None
    assert dense["attention_flops_reduction"] == 1.0


def test_finished_outputs_are_skipped_and_the_others_made(wan, outputs, capsys):
    prompts = outputs.parent / "prompts.txt"
    arguments = ("--prompt-file", prompts, "--seed", "0", "1", *SLA, "--compare", "dense")
    before = stats(outputs)
    assert generate(wan, outputs, *arguments) == 0
    assert stats(outputs) == before
    assert "8 of 8 outputs are there already" in capsys.readouterr().err
    # One was interrupted (no record), one has lost its video.
    names = [output_name("a cat", 0, LABEL), output_name("a cat", 1, "dense")]
    (outputs / f"{names[0]}.json").unlink()
    (outputs / f"{names[1]}.mp4").unlink()
    assert generate(wan, outputs, *arguments) == 0
    errors = " ".join(capsys.readouterr().err.split())
    assert "6 of 8 outputs are there already" in errors
    assert f"{names[1]}: made again, {names[1]}.mp4 is missing or has another size" in errors
    made = {name for name, time in stats(outputs).items() if time != before[name]}
    beside = {f"{output_name('a cat', seed, LABEL)}-beside-dense.mp4" for seed in (0, 1)}
    assert made == {f"{name}.{suffix}" for name in names for suffix in ("mp4", "mkv", "json")} | beside | {
        LIST_FILE,
        "index.html",
    }


def test_outputs_that_were_made_otherwise_are_made_again(wan, tmp_path, capsys):
    cat = ("--prompt", "a cat", "--seed", "0", "1")
    assert generate(wan, tmp_path, *cat) == 0
    before = stats(tmp_path)
    assert generate(wan, tmp_path, *cat[:-1], "--steps", "3") == 0
    name = output_name("a cat", 0, "dense")
    assert f"{name}: made again, it was made with other num_inference_steps" in " ".join(
        capsys.readouterr().err.split()
    )
    made = {name for name, time in stats(tmp_path).items() if time != before[name]}
    assert made == {f"{name}.{suffix}" for suffix in ("mp4", "mkv", "json")} | {LIST_FILE, "index.html"}


def test_an_output_that_somebody_changed_is_not_made_again(wan, tmp_path, capsys):
    cat = ("--prompt", "a cat", "--seed", "0")
    assert generate(wan, tmp_path, *cat) == 0
    video = tmp_path / f"{output_name('a cat', 0, 'dense')}.mp4"
    video.write_bytes(b"cut")
    before = stats(tmp_path)
    assert generate(wan, tmp_path, *cat) == 2
    assert f"foveal: {video} was changed after foveal generate wrote it" in capsys.readouterr().err
    assert stats(tmp_path) == before


def test_interrupted_runs_go_on(wan, tmp_path, monkeypatch, capsys):
    from foveal.lab import terminal

    def interrupt(self):
        if self.begun == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.StepProgress, "step", interrupt)
    arguments = ("--prompt", "a cat", "--seed", "0", "1", "2")
    with pytest.raises(SystemExit) as stopped:
        generate(wan, tmp_path, *arguments)
    assert stopped.value.code == 130
    assert "what is done is kept, run the same command again" in capsys.readouterr().err
    first = stats(tmp_path)
    assert first.pop(LIST_FILE)
    assert first.pop("index.html")
    assert set(first) == {f"{output_name('a cat', 0, 'dense')}.{suffix}" for suffix in ("mp4", "mkv", "json")}
    monkeypatch.undo()
    assert generate(wan, tmp_path, *arguments) == 0
    assert len(stats(tmp_path)) == 9 + 2
    assert {name: stats(tmp_path)[name] for name in first} == first


def test_saved_sparse_weights_and_when_they_change(wan, tmp_path, capsys):
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.0))
    for name, parameter in pipe.transformer.named_parameters():
        if ".processor." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    foveal.save(pipe, tmp_path / "sparse")
    arguments = ("--prompt", "a cat", "--sparse", tmp_path / "sparse")
    assert generate(wan, tmp_path / "out", *arguments) == 0
    expected = reference(wan, "a cat", 0, lambda pipe: foveal.load(pipe, tmp_path / "sparse"))
    assert torch.equal(video_of(tmp_path / "out", "a cat", 0, SparseChoice(tmp_path / "sparse").label), expected)
    assert "transformer: sla" in capsys.readouterr().err  # the report
    # Training goes on, and the weights are saved again: same names, same sizes.
    foveal.save(pipe, tmp_path / "sparse")
    assert generate(wan, tmp_path / "out", *arguments) == 0
    assert "made again, it was made with other sparse" in " ".join(capsys.readouterr().err.split())


def test_sparse_weights_of_another_model_are_refused(wan, tmp_path, capsys):
    from tiny_wan import tiny_transformer

    foveal.save(foveal.sparsify(tiny_transformer(num_layers=1), SLAConfig(keep_ratio=0.4)), tmp_path / "sparse")
    assert generate(wan, tmp_path / "out", "--prompt", "a cat", "--sparse", tmp_path / "sparse") == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith(f"foveal: transformer in {tmp_path}/sparse was saved from a WanTransformer3DModel with 1 ")
    assert "but the model is a WanTransformer3DModel with 2 self-attention layers" in error


def test_what_train_exports_brings_its_own_weights(wan, tmp_path):
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(1.1)
    pipe.transformer.save_pretrained(tmp_path / "export" / "transformer")
    foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.0))
    foveal.save(pipe.transformer, tmp_path / "export" / "sparse")
    arguments = ("--prompt", "a cat", "--sparse", tmp_path / "export", "--compare", "dense")
    assert generate(wan, tmp_path / "out", *arguments) == 0

    def trained(pipe):
        for parameter in pipe.transformer.parameters():
            parameter.data.mul_(1.1)
        foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.0))

    for arm, prepare in ((SparseChoice(tmp_path / "export").label, trained), ("dense", None)):
        assert torch.equal(video_of(tmp_path / "out", "a cat", 0, arm), reference(wan, "a cat", 0, prepare)), arm


def test_pipelines_that_were_saved_sparse(wan, tmp_path, capsys):
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.4))
    pipe.save_pretrained(tmp_path / "sparse-wan")
    assert generate(tmp_path / "sparse-wan", tmp_path / "out", "--prompt", "a cat", "--compare", "dense") == 0
    records = {
        arm: json.loads((tmp_path / "out" / f"{output_name('a cat', 0, arm)}.json").read_text())
        for arm in ("dense", "sparse")
    }
    assert records["sparse"]["settings"]["sparse"] == {"in_pipeline": True}
    assert records["sparse"]["attention_flops_reduction"] != records["dense"]["attention_flops_reduction"] == 1.0
    found = {arm: video_of(tmp_path / "out", "a cat", 0, arm).int() for arm in records}
    for arm, prepare in (
        ("dense", None),
        ("sparse", lambda pipe: foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.4))),
    ):
        # Weights of another file lie elsewhere in memory, and some processors then sum them in another order.
        difference = (found[arm] - reference(wan, "a cat", 0, prepare).int()).abs()
        assert difference.max() <= 1, arm
        assert difference.float().mean() <= 1e-3, arm
    assert (found["dense"] - found["sparse"]).abs().float().mean() > 1e-2
    assert generate(tmp_path / "sparse-wan", tmp_path / "out", "--prompt", "a cat", *SLA) == 2
    assert "is a sparse pipeline already; it takes no other sparse weights or method" in capsys.readouterr().err


def test_exact_files_are_exact(tmp_path):
    frames = torch.randint(0, 256, (5, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_exact(tmp_path / "v.mkv", frames, fps=16)
    assert torch.equal(read_media(tmp_path / "v.mkv", height=48, width=64), frames)
    write_media(tmp_path / "v.png", frames[:1], fps=1)
    assert torch.equal(read_media(tmp_path / "v.png", height=48, width=64), frames[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.mkv", "v.png"]


def test_names_are_readable_and_unique():
    long = "a very long prompt about a cat that surfs at dawn while"
    names = {output_name(f"{long} {end}", 0, "dense") for end in ("singing", "dancing")}
    assert len(names) == 2
    assert all(name.startswith("a-very-long-prompt-about-a-cat-that-surf-") for name in names)
    assert output_name("猫", 3, "sparse").startswith("prompt-")
    assert output_name("../../etc/passwd", 0, "dense").startswith("etc-passwd-")


def test_mistakes_are_answered_in_one_line(wan, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    cat = ("--prompt", "a cat")
    for arguments, message in (
        ((), "give --prompt or --prompt-file"),
        ((*cat, "--prompt-file", tmp_path / "blank.txt"), "give --prompt or --prompt-file"),
        (("--prompt-file", tmp_path / "none.txt"), "no such prompt file"),
        (("--prompt-file", tmp_path / "blank.txt"), "blank.txt has no prompt; expected one a line"),
        (("--prompt-file", tmp_path / "twice.txt"), "has a prompt twice: 'a'"),
        (("--prompt-file", tmp_path / "latin.txt"), "is not UTF-8 text"),
        (("--prompt", ""), "give at least one prompt, none of them empty or twice"),
        ((*cat, "--seed", "1", "1"), "give at least one seed, none of them empty or twice"),
        ((*cat, "--compare", "sparse"), "unknown comparison 'sparse'; expected dense"),
        ((*cat, "--compare", "dense"), "nothing to compare"),
        ((*cat, "--method", "nsa"), "unknown method 'nsa'; expected one of"),
        ((*cat, "--keep-ratio", "0.1"), "give --method with keep_ratio; expected one of sla, sla2, vsa, sla_vsa"),
        ((*cat, "--method", "vsa", "--drop-ratio", "0.1"), "method vsa has no drop_ratio"),
        ((*cat, "--method", "sla", "--keep-ratio", "1.5"), "keep_ratio must be"),
        ((*cat, *SLA, "--impl", "cuda"), "impl"),
        ((*cat, "--sparse", tmp_path / "none"), "no such folder or checkpoint of sparse weights"),
        ((*cat, "--sparse", tmp_path / "file", *SLA), "give --sparse, or --method and ratios"),
        ((*cat, "--sparse", tmp_path / "empty"), str(tmp_path / "empty")),
        ((*cat, "--sparse", tmp_path / "junk.safetensors"), "junk.safetensors"),
        ((*cat, "--height", "8"), "height must be a positive multiple of 16 (the VAE's 8 times 2 to a token), got 8"),
        ((*cat, "--frames", "8"), "frames must be 1 more than a multiple of 4, got 8"),
        ((*cat, "--steps", "0"), "steps must be at least 1"),
        ((*cat, "--fps", "0"), "fps must be above 0, got 0.0"),
        ((*cat, "--fps", "-5"), "fps must be above 0, got -5.0"),
        ((*cat, "--guidance-scale", "nan"), "guidance_scale must be finite, got nan"),
        ((*cat, *SLA, "--frames", "1"), "too small for sparse attention: its 1x6x6 tokens are one block of 64 tokens"),
        (
            (*cat, "--method", "vsa", "--frames", "1", "--height", "64", "--width", "64"),
            "tokens are one block of 4x4x4 tokens",
        ),
        ((*cat, "--output", tmp_path / "file"), "is a file; expected a folder"),
        ((*cat, "--device", "cuda:9"), "torch finds"),
        ((*cat, "--dtype", "int8"), "unknown dtype 'int8'"),
    ):
        assert generate(wan, tmp_path / "out", *arguments) == 2, message
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("foveal: ")
        assert message in error, error
    assert run("generate", "--model", tmp_path / "nowhere", *cat) == 2
    assert "no such pipeline folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_sparse_weights_are_looked_at_before_anything_is_made(wan, tmp_path, capsys, monkeypatch, command):
    from safetensors.torch import save_file

    monkeypatch.setattr("foveal.lab.pipelines.load_pipeline", lambda *args, **kwargs: pytest.fail("loaded first"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "foveal.safetensors").write_bytes(b"half")
    save_file({"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, tmp_path / "dense.safetensors")
    save_file({"encoder.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for name, message in (
        ("none", "no such folder or checkpoint of sparse weights"),
        ("empty", "must hold one safetensors file"),
        ("saved", "is corrupt or cut short"),
        ("dense.safetensors", "is a dense checkpoint"),
        ("other.safetensors", "is of no known format"),
    ):
        compare = ("--compare", "dense") if command == "generate" else ()
        arguments = ("--model", wan, "--prompt", "a cat", "--sparse", tmp_path / name, *compare)
        assert run(command, "--output", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sparse_weights_of_a_call_are_looked_at_before_dense_outputs(wan, tmp_path, monkeypatch):
    from foveal.lab.generate import run as generation
    from foveal.lab.pipelines import load_pipeline

    loaded = load_pipeline(wan, device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(generation, "_generate_one", lambda *args: pytest.fail("made a video first"))
    settings = generation.GenerationSettings(frames=5, height=96, width=96, steps=2)
    (tmp_path / "empty").mkdir()
    for name, error in (("none", FileNotFoundError), ("empty", ValueError)):
        choice = SparseChoice(path=tmp_path / name)
        with pytest.raises(error, match=name):
            generation.generate(loaded, ["a cat"], [0], tmp_path / "out", settings, sparse=choice, compare_dense=True)
    assert not (tmp_path / "out").exists()


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\n\r\n  a dog \r\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]


def test_choices_on_the_command_line():
    assert choose_sparse(None, None, keep_ratio=None, drop_ratio=None, impl="auto") is None
    choice = choose_sparse(None, "vsa", keep_ratio=0.25, drop_ratio=None, impl="torch")
    assert choice.config.keep_ratio == 0.25
    assert choice.describe()["method"] == "vsa"
    assert choice.label.startswith("vsa-")
    labels = {choose_sparse(None, "vsa", keep_ratio=r, drop_ratio=None, impl="torch").label for r in (0.25, 0.5)}
    assert len(labels) == 2
    assert choice.label in labels
    rule = {"keep_ratio": 0.1, "score": "log_sum_exp", "keep_mass": 0.5, "max_keep_ratio": 0.3}
    assert choose_sparse(None, "sla", impl="auto", drop_ratio=None, **rule).config == SLAConfig(**rule)
    with pytest.raises(ValueError, match="give --method with keep_mass"):
        choose_sparse(None, None, impl="auto", keep_mass=0.5)


def test_commands_of_the_page_run(wan, tmp_path, monkeypatch):
    """With the tiny pipeline and size in the place of the real ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    foveal.save(foveal.sparsify(pipe, SLAConfig(keep_ratio=0.4, drop_ratio=0.4)), tmp_path / "wan-sla")
    commands = commands_of("generate.md")
    assert len(commands) == 3
    for command in commands:
        arguments = [wan if argument == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" else argument for argument in command]
        small = {"--frames": "5", "--height": "96", "--width": "96", "--steps": "1"}
        assert run(*arguments, *(part for option in small.items() for part in option)) == 0, command
    # The first command's, then dense, sparse and both beside each other; nothing is overwritten.
    assert len(list((tmp_path / "foveal-generate").glob("*.mp4"))) == 1 + 2 * 3 * 3
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
