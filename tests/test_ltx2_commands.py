"""The commands with a tiny random LTX-2: `precompute` stores what its pipeline works with, and training reads it."""

import json
import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
transformers = pytest.importorskip("transformers")
av = pytest.importorskip("av")
pytest.importorskip("tyro")
if not hasattr(transformers, "Gemma3ForConditionalGeneration"):
    pytest.skip("transformers has no Gemma 3", allow_module_level=True)

from accelerate.state import AcceleratorState  # noqa: E402
from tiny_media import precomputed_with_sound, tone  # noqa: E402
from tiny_pipelines import tiny_ltx2  # noqa: E402

from foveal.lab import cli, ltx2  # noqa: E402
from foveal.lab.data.dataset import LatentDataset  # noqa: E402
from foveal.lab.encoding import decode_video, encode_sound, encode_text, encode_video  # noqa: E402
from foveal.lab.pipelines import PIPELINES, load_pipeline  # noqa: E402

RATE = 16000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2")
    pipe = tiny_ltx2()
    # Statistics that tell a latent's channels and bins apart.
    pipe.audio_vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    pipe.audio_vae.latents_std.copy_(torch.tensor([0.5, 2.0, 1.5, 0.8]))
    pipe.vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    pipe.vae.latents_std.copy_(torch.tensor([0.5, 2.0, 1.5, 0.8]))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """What `foveal precompute` makes of three clips of 17 frames, one of them silent."""
    return precomputed_with_sound(model, tmp_path_factory.mktemp("data"), frames=34, rate=RATE, bucket="17x64x96")


def test_precompute_stores_video_sound_and_text(data, loaded):
    dataset = LatentDataset(data)
    assert len(dataset) == 3
    assert dataset.has_sound
    samples = {sample["id"]: sample for sample in dataset}
    for sample in samples.values():
        assert sample["latents"].shape == (4, 3, 2, 3)
        # 25 a second, as the pipeline counts them.
        assert sample["audio_latents"].shape == (2, round(17 / 24 * 25), 2)
        assert sample["prompt_embeds"].shape == sample["audio_prompt_embeds"].shape == (1024, 16)
        assert sample["prompt_attention_mask"].shape == (1024,)
    words = encode_text(loaded, ["a bar"])
    for name, tensor in words.items():
        assert torch.equal(samples["clip1.mp4#0"][name], tensor[0].to(samples["clip1.mp4#0"][name].dtype)), name
    silence = encode_sound(loaded, torch.zeros(2, 18 * 640))
    torch.testing.assert_close(samples["clip0.mp4#0"]["audio_latents"].float(), silence, rtol=0.02, atol=0.02)
    assert not torch.allclose(samples["clip1.mp4#0"]["audio_latents"], samples["clip2.mp4#0"]["audio_latents"])
    assert set(dataset.empty_prompt()) == set(words)


def test_the_transformer_gets_what_the_pipeline_gives_it(loaded):
    """The text after the connectors, and as many latents of sound as the pipeline makes for these frames."""
    seen = {}

    def keep(module, args, kwargs):
        seen.setdefault("text", kwargs["encoder_hidden_states"][-1:])
        seen.setdefault("audio_text", kwargs["audio_encoder_hidden_states"][-1:])
        seen.setdefault("mask", kwargs["encoder_attention_mask"][-1:])
        seen.setdefault("sound", kwargs["audio_hidden_states"])

    handle = loaded.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        call = {"num_frames": 17, "height": 64, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
        loaded.pipe("a bar", **call, spatio_temporal_guidance_blocks=[1])
    finally:
        handle.remove()
    words = encode_text(loaded, ["a bar"])
    assert torch.equal(words["prompt_embeds"], seen["text"])
    assert torch.equal(words["audio_prompt_embeds"], seen["audio_text"])
    assert torch.equal(words["prompt_attention_mask"], seen["mask"])
    sound = encode_sound(loaded, torch.zeros(2, 18 * 640))
    assert sound.transpose(0, 1).flatten(1).shape == seen["sound"].shape[1:]


def test_sound_is_normalized_as_the_pipeline_denormalizes(loaded):
    """What the pipeline does before it decodes gives back what the VAE's encoder gave."""
    pipe, sound = loaded.pipe, torch.randn(2, 18 * 640, generator=torch.Generator().manual_seed(0))
    latents = encode_sound(loaded, sound)[None]
    packed = pipe._denormalize_audio_latents(
        pipe._pack_audio_latents(latents), pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std
    )
    mel = ltx2.log_mel(sound, RATE, 160, 8)[None]
    assert mel.shape == (1, 2, 18 * 4 + 1, 8)
    with torch.no_grad():
        expected = pipe.audio_vae.encode(mel).latent_dist.mode()
    torch.testing.assert_close(pipe._unpack_audio_latents(packed, 18, num_mel_bins=2), expected[:, :, :18])


def test_the_spectrogram_by_hand():
    """One column of a tone, by a plain transform in float64 and triangles on Slaney's scale, each of unit area."""

    def to_mel(hertz):
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)

    def to_hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    bins, column = 64, 20
    sound = tone(0.5, RATE).samples
    found = ltx2.log_mel(sound, RATE, 160, bins)[:, column]
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(1024, dtype=torch.float64) / 1024)
    piece = sound[:, column * 160 - 512 : column * 160 + 512].double() * window
    frequencies = torch.arange(513, dtype=torch.float64) * RATE / 1024
    turns = torch.exp(-2j * math.pi * frequencies[:, None] * torch.arange(1024) / RATE)
    magnitudes = (turns @ piece.to(torch.complex128).mT).abs().mT
    edges = [to_hertz(to_mel(RATE / 2) * place / (bins + 1)) for place in range(bins + 2)]
    for place, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        triangle = torch.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle))
        area = 2 / (high - low)
        expected = (magnitudes @ (triangle.clamp(min=0) * area)).clamp(min=1e-5).log()
        torch.testing.assert_close(found[:, place].double(), expected, rtol=1e-3, atol=2e-3)


def test_decode_video_is_the_inverse_before_the_vae(loaded):
    """It gives the VAE what the pipeline gives it: the latents before they were normalized."""
    videos = torch.rand(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, vae = encode_video(loaded, videos), loaded.pipe.vae
    with torch.no_grad():
        expected = vae.decode(vae.encode(videos).latent_dist.mode()).sample
    torch.testing.assert_close(decode_video(vae, latents, PIPELINES["LTX2Pipeline"]), expected, rtol=1e-4, atol=1e-4)


def test_training_on_what_was_precomputed_and_its_samples(model, data, tmp_path):
    pytest.importorskip("peft")
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"model.path": model, "data.folder": data, "data.held-out": 1, "batch-size": 1, "steps": 1}
    options |= {"device": "cpu", "tracker": "none", "output": tmp_path / "run", "objective.shift": 3}
    options |= {"evaluation.sample-every": 1, "evaluation.sampling-steps": 2}
    command = ["train", "minimax-h3-vsa", *(x for key, value in options.items() for x in (f"--{key}", str(value)))]
    assert cli.main(command) in (0, None)
    assert (tmp_path / "run" / "export" / "sparse" / "foveal.json").is_file()
    (sample,) = (tmp_path / "run" / "samples").glob("*.mp4")
    with av.open(str(sample)) as written:
        assert sum(1 for _ in written.decode(video=0)) == 17


def test_generate_writes_video_and_sound(model, tmp_path):
    command = ["generate", "--model", str(model), "--prompt", "A fox", "--method", "sla", "--keep-ratio", "0.3"]
    size = ["--frames", "33", "--height", "96", "--width", "256", "--steps", "2"]
    assert cli.main([*command, *size, "--output", str(tmp_path)]) in (0, None)
    (clip,) = tmp_path.glob("*.mp4")
    with av.open(str(clip)) as written:
        assert [stream.type for stream in written.streams] == ["video", "audio"]
    assert json.loads(clip.with_suffix(".json").read_text())["settings"]["sampling_rate"] == 24000
