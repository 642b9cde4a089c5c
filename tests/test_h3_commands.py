"""The commands with MiniMax-H3's modular pipeline, tiny and random: video and sound."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
transformers = pytest.importorskip("transformers")
av = pytest.importorskip("av")
pytest.importorskip("tyro")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)
if not hasattr(transformers, "Qwen3VLForConditionalGeneration"):
    pytest.skip("transformers has no Qwen3-VL", allow_module_level=True)

from accelerate.state import AcceleratorState  # noqa: E402
from tiny_h3 import save_tiny_h3  # noqa: E402
from tiny_media import moving_bar, precomputed_with_sound, tone  # noqa: E402

from foveal import VideoGrid  # noqa: E402
from foveal.lab import cli  # noqa: E402
from foveal.lab.data.dataset import LatentDataset  # noqa: E402
from foveal.lab.data.sound import read_sound  # noqa: E402
from foveal.lab.data.windows import write_video  # noqa: E402
from foveal.lab.encoding import encode_sound, encode_text, encode_video  # noqa: E402
from foveal.lab.evaluate.metrics import log_spectral_distance  # noqa: E402
from foveal.lab.generate.outputs import write_exact  # noqa: E402
from foveal.lab.modular import MAX_TEXT_TOKENS, is_modular  # noqa: E402
from foveal.lab.pipelines import load_pipeline  # noqa: E402

RATE = 32000
CANVAS = ["--height", "64", "--width", "96", "--steps", "2"]
SPARSE = ["--method", "sla", "--keep-ratio", "0.3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_h3(tmp_path_factory.mktemp("h3"))


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device=torch.device("cpu"), dtype=torch.float32)


def test_generate_writes_one_file_of_video_and_sound(model, tmp_path):
    command = [
        "generate",
        "--model",
        str(model),
        "--prompt",
        "A fox",
        *CANVAS,
        *SPARSE,
        "--compare",
        "dense",
        "--exact",
    ]
    assert cli.main([*command, "--output", str(tmp_path)]) in (0, None)
    clips = sorted(path for path in tmp_path.glob("*.mp4") if "beside" not in path.name)
    assert len(clips) == 2
    for clip in clips:
        with av.open(str(clip)) as written:
            assert [stream.type for stream in written.streams] == ["video", "audio"]
            assert sum(1 for _ in written.decode(video=0)) == 124
        sound = read_sound(clip, rate=RATE)
        assert sound.shape[0] == 2
        assert abs(sound.shape[1] - 207 * 800) < 4096  # AAC pads
        # The lossless file has the same, to the bit.
        exact = read_sound(clip.with_suffix(".mkv"), rate=RATE)
        assert exact.shape == (2, 207 * 800)
    record = json.loads(clips[0].with_suffix(".json").read_text())
    assert record["settings"]["pipeline"] == "MiniMaxH3ModularPipeline"
    assert record["tokens"] == [37, 2, 3]
    assert len(record["seconds"]["steps"]) == 2
    assert len(list(tmp_path.glob("*beside*.mp4"))) == 1


def test_the_pipeline_makes_what_diffusers_makes(model, loaded):
    pipe = diffusers.ModularPipeline.from_pretrained(str(model), workflow="t2va")
    names = ["text_encoder", "tokenizer", "vae", "audio_vae", "scheduler", "audio_scheduler", "transformer"]
    pipe.load_components(names=names, dtype=torch.float32)
    pipe.update_components(processor=loaded.pipe.processor)
    call = {"prompt": "A fox", "num_frames": 124, "height": 64, "width": 96}
    steps = []
    made = loaded.pipe(
        **call,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step) or tensors,
    )
    expected = pipe(
        **call,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        output=["videos", "audio"],
    )
    assert steps == [0, 1]
    assert torch.equal(made[0][0], expected["videos"][0])
    assert torch.equal(made[1], expected["audio"][0])
    latents = loaded.pipe(
        **call, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    )
    assert latents[0].shape == (1, 4, 37, 4, 6)
    assert latents[1].shape == (2, 8, 207)


def test_eval_compares_the_sound_too(model, tmp_path):
    pytest.importorskip("torchmetrics")
    command = ["eval", "--model", str(model), "--prompt", "A fox", *CANVAS, *SPARSE, "--output", str(tmp_path)]
    assert cli.main(command) in (0, None)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    (pair,) = report["pairs"]
    assert pair["sound_distance_db"] > 0
    assert "log-spectral distance of the sound (dB)" in (tmp_path / "evaluation.md").read_text()


def test_inspect_looks_at_the_video_in_the_packed_sequence(model, tmp_path):
    command = [
        "inspect",
        "--model",
        str(model),
        "--prompt",
        "A fox",
        "--frames",
        "124",
        "--height",
        "64",
        "--width",
        "96",
    ]
    assert cli.main([*command, "--steps", "2", "--output", str(tmp_path)]) in (0, None)
    report = json.loads((tmp_path / "inspect.json").read_text())
    assert "37" in json.dumps(report)
    assert (tmp_path / "index.html").is_file()


def test_calibrate_and_generate_by_its_policy(model, tmp_path, capsys):
    size = ["--frames", "124", "--height", "64", "--width", "96", "--steps", "2"]
    command = ["calibrate", "--model", str(model), "--prompt", "A fox", *size, "--error", "0.5"]
    assert cli.main([*command, "--output", str(tmp_path)]) in (0, None)
    found = json.loads((tmp_path / "policy.json").read_text())
    (component,) = found["components"].values()
    assert component["family"] == "minimax_h3"
    # The blocks' attention only; the token refiner, of the same class, stays as it is.
    assert set(component["layers"]) == {f"transformer_blocks.{index}.attn" for index in range(3)}
    assert all(set(steps) == {"0", "1"} for steps in found["measured"].values())
    assert 0 < found["calibration"]["largest_error"] <= 0.5
    assert found["calibration"]["work"] < 1
    command = ["generate", "--model", str(model), "--prompt", "A fox", *size, "--policy", str(tmp_path / "policy.json")]
    assert cli.main([*command, "--output", str(tmp_path / "made")]) in (0, None)
    (record,) = (tmp_path / "made").glob("*.json")
    assert json.loads(record.read_text())["attention_flops_reduction"] > 1


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """What `foveal precompute` makes of a clip with sound, one without, and captions; of 22 frames each."""
    return precomputed_with_sound(model, tmp_path_factory.mktemp("data"), frames=40, rate=RATE, bucket="22x64x96")


def test_precompute_stores_video_sound_and_text(data, loaded):
    dataset = LatentDataset(data)
    assert len(dataset) == 3
    assert dataset.has_sound
    samples = {sample["id"]: sample for sample in dataset}
    for sample in samples.values():
        assert sample["latents"].shape == (4, 7, 4, 6)
        assert sample["audio_latents"].shape == (2, 8, 37)  # round(22 / 24 * 40)
        assert sample["prompt_embeds"].shape == (MAX_TEXT_TOKENS, 16)
    silent, voiced = samples["clip0.mp4#0"], samples["clip1.mp4#0"]
    assert int(silent["prompt_attention_mask"].sum()) == 0
    words = encode_text(loaded, ["a bar"])
    assert torch.equal(voiced["prompt_embeds"], words["prompt_embeds"][0].bfloat16())
    count = int(voiced["prompt_attention_mask"].sum())
    assert count == len(loaded.pipe.tokenizer("a bar", add_special_tokens=False)["input_ids"]) > 0
    assert voiced["prompt_embeds"][count:].eq(0).all()
    # The middle of the clip, from frame 9 on.
    silence = encode_sound(loaded, torch.zeros(2, 37 * 800))
    torch.testing.assert_close(silent["audio_latents"].float(), silence, rtol=0.02, atol=0.02)
    expected = encode_sound(loaded, tone(2.0, RATE, 400.0).samples[:, round(9 / 24 * RATE) :][:, : 37 * 800])
    distance = (samples["clip1.mp4#0"]["audio_latents"].float() - expected).norm() / expected.norm()
    assert dataset.empty_prompt()["prompt_attention_mask"].sum() == 0
    assert distance.isfinite()


def test_latents_are_those_of_the_pipelines_conditions(loaded):
    """Frames normalized as the pipeline normalizes keyframes, and the inverse of what it does before it decodes."""
    from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition

    frames = moving_bar(22, 64, 96).permute(1, 0, 2, 3)[None]
    latents = encode_video(loaded, frames.float() / 127.5 - 1)
    vae = loaded.pipe.vae
    sampled = encode_vae_condition(vae, frames, loaded.pipe.pixel_mean, loaded.pipe.pixel_std)
    pixels = (frames / 255.0 - torch.tensor(loaded.pipe.pixel_mean).view(1, -1, 1, 1, 1)) / torch.tensor(
        loaded.pipe.pixel_std
    ).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        spread = vae.encode(pixels).latent_dist.std
    assert ((sampled - latents).abs() <= 6 * spread + 1e-2).all()


def test_training_on_what_was_precomputed(model, data, tmp_path):
    pytest.importorskip("peft")
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"model.path": model, "data.folder": data, "data.held-out": 1, "batch-size": 1, "steps": 1}
    options |= {"device": "cpu", "tracker": "none", "output": tmp_path / "run"}
    options |= {"evaluation.sample-every": 1, "evaluation.sampling-steps": 2}
    command = ["train", "minimax-h3-vsa", *(x for key, value in options.items() for x in (f"--{key}", str(value)))]
    assert cli.main(command) in (0, None)
    export = tmp_path / "run" / "export"
    assert (export / "sparse" / "foveal.json").is_file()
    (sample,) = (tmp_path / "run" / "samples").glob("*.mp4")
    with av.open(str(sample)) as written:
        frames = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    # Dense and sparse side by side, three times as large, to be seen.
    assert (len(frames), *frames[0].shape) == (22, 3 * 64, 3 * 2 * 96, 3)
    # And the sparse pipeline that this made generates.
    command = ["generate", "--model", str(model), "--prompt", "A fox", *CANVAS, "--sparse", str(export)]
    assert cli.main([*command, "--output", str(tmp_path / "made")]) in (0, None)
    assert len(list((tmp_path / "made").glob("*.mp4"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "121"], "frames must be 5 more than a multiple of 17, got 121"),
        (["--fps", "12"], "fps must be 24 for MiniMaxH3ModularPipeline, whose sound has it, got 12"),
        (["--guidance-scale", "3"], "MiniMaxH3ModularPipeline takes no guidance scale"),
        (["--negative-prompt", "ugly"], "MiniMaxH3ModularPipeline takes no negative prompt"),
    ],
)
def test_what_it_does_not_take(model, tmp_path, options, message, capsys):
    command = ["generate", "--model", str(model), "--prompt", "A fox", *CANVAS, *options, "--output", str(tmp_path)]
    try:
        status = cli.main(command)
    except SystemExit as stop:
        status = stop.code
    assert status
    assert message in " ".join(capsys.readouterr().err.split()) or message in str(status)


def test_long_prompts_are_refused(loaded):
    with pytest.raises(ValueError, match="a prompt may have 1024 tokens, got 1025"):
        encode_text(loaded, ["a" * 1025])


def test_sound_to_the_bit(tmp_path):
    sound = tone(0.5, RATE)
    write_exact(tmp_path / "clip.mkv", moving_bar(12, 16, 16), fps=24, sound=sound)
    assert torch.equal(read_sound(tmp_path / "clip.mkv", rate=RATE), sound.samples)
    assert read_sound(tmp_path / "clip.mkv", rate=RATE, start=0.4, seconds=0.2)[:, 3200:].eq(0).all()
    write_video(tmp_path / "mute.mp4", moving_bar(4, 16, 16), fps=24)
    assert read_sound(tmp_path / "mute.mp4", rate=RATE) is None


def test_log_spectral_distance():
    sound = tone(0.5, RATE).samples
    assert log_spectral_distance(sound, sound) == 0
    # A factor of 10 is 20 dB where the sound is, and none where both are below the floor.
    noise = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert log_spectral_distance(noise * 10, noise) == pytest.approx(20.0, abs=0.1)
    with pytest.raises(ValueError, match="two sounds must have one shape"):
        log_spectral_distance(sound, sound[:, 1:])


def test_sizes(loaded):
    assert loaded.sizes.grid(124, 768, 1344) == VideoGrid(37, 24, 42)
    with pytest.raises(ValueError, match="height must be a positive multiple of 32"):
        loaded.sizes.check(124, 720, 1344)


def test_a_repository_of_the_hub_may_have_only_a_modular_pipeline(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("someone/something does not appear to have a file named model_index.json.")

    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(diffusers.ModularPipeline, "load_config", lambda *args, **kwargs: {})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", missing)
    assert is_modular("someone/something", {})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    assert not is_modular("someone/something", {})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *args, **kwargs: {})
    assert not is_modular("someone/something", {})
