"""Every kind of pipeline through `foveal precompute` and `foveal generate`: tiny random models of the real classes."""

from __future__ import annotations

import functools
import json
import socket
import sys

import pytest
import torch
from tiny_media import diffusers, save_tiny_wan, write_clip
from tiny_pipelines import tiny_cogvideox, tiny_flux, tiny_hunyuan, tiny_ltx

from foveal.lab import cli
from foveal.lab.data.clips import Bucket, probe, read_clip
from foveal.lab.data.dataset import LatentDataset, write_latent_dataset
from foveal.lab.data.windows import to_model_range
from foveal.lab.encoding import normalize_latents
from foveal.lab.generate.outputs import output_name, read_media
from foveal.lab.hub import hub_options, hub_unreachable
from foveal.lab.pipelines import PIPELINES, Sizes, choose_device, choose_dtype, default_size, load_pipeline, sizes_of

pytest.importorskip("tyro")

# name: builder, size in pixels, latent shape of it, grid of tokens, text tensors of a sample
KINDS = {
    "ltx": (
        tiny_ltx,
        (9, 96, 96),
        (4, 3, 6, 6),
        (3, 6, 6),
        {"prompt_embeds": (128, 16), "prompt_attention_mask": (128,)},
    ),
    "cogvideox": (tiny_cogvideox, (5, 96, 96), (4, 2, 12, 12), (2, 6, 6), {"prompt_embeds": (226, 16)}),
    "hunyuan": (
        tiny_hunyuan,
        (5, 96, 96),
        (4, 2, 12, 12),
        (2, 6, 6),
        {"prompt_embeds": (256, 16), "pooled_prompt_embeds": (16,), "prompt_attention_mask": (256,)},
    ),
    "flux": (
        tiny_flux,
        (1, 32, 48),
        (4, 1, 16, 24),
        (1, 8, 12),
        {"prompt_embeds": (512, 16), "pooled_prompt_embeds": (16,)},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for name, (build, *_) in KINDS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
    write_clip(folder / "clips" / "a.mp4", 9, 96, 96)
    (folder / "clips" / "a.txt").write_text("a bar that moves")
    return folder


def pipeline_of(folder, name):
    return diffusers.DiffusionPipeline.from_pretrained(folder / name)


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_the_pipeline_s_own_encodings(folder, tmp_path, name):
    _, size, latent_shape, _, text = KINDS[name]
    arguments = ("--model", folder / name, "--videos", folder / "clips", "--output", tmp_path / "data")
    assert run("precompute", *arguments, "--bucket", "x".join(map(str, size)), "--fps", 16, "--store", "float32") == 0
    data = LatentDataset(tmp_path / "data", verify=True)
    assert data[0]["latents"].shape == latent_shape
    assert {key: data[0][key].shape for key in data.settings["text"]} == text

    pipe = pipeline_of(folder, name)
    frames = read_clip(probe(folder / "clips" / "a.mp4"), Bucket(*size), fps=None, start=(9 - size[0]) // 2)
    video = to_model_range(frames)[None]
    z = pipe.vae.encode(video.squeeze(2) if name == "flux" else video).latent_dist.mode()
    expected = normalize_latents(pipe.vae, z.unsqueeze(2) if name == "flux" else z)[0]
    same = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # processors sum in their own orders
    same(data[0]["latents"], expected)
    encoded = pipe.encode_prompt("a bar that moves", **({"prompt_2": None} if name == "flux" else {}))
    same(data[0]["prompt_embeds"], encoded[0][0])
    if "pooled_prompt_embeds" in text:
        same(data[0]["pooled_prompt_embeds"], encoded[1][0])


@pytest.mark.parametrize("name", KINDS)
def test_latents_are_normalized_as_the_pipeline_undoes_it(folder, name):
    """Against the arithmetic that each family's pipeline has in front of its decoder."""
    vae = pipeline_of(folder, name).vae
    if name == "ltx":
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.5]))
        vae.latents_std.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5]))
    z = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    latents = normalize_latents(vae, z)
    if name == "ltx":
        restored = diffusers.LTXPipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
    elif name == "flux":
        restored = latents / vae.config.scaling_factor + vae.config.shift_factor
    else:
        restored = 1 / vae.config.scaling_factor * latents
    torch.testing.assert_close(restored, z)
    assert (latents - z).abs().max() > 0.05


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_pipeline(folder, tmp_path, name):
    _, (frames, height, width), _, grid, _ = KINDS[name]
    size = ("--frames", frames, "--height", height, "--width", width, "--steps", 2, "--exact")
    arguments = ("--model", folder / name, "--prompt", "a cat", "--output", tmp_path / "out", *size)
    assert run("generate", *arguments, "--method", "sla", "--keep-ratio", 0.4, "--compare", "dense") == 0
    dense = output_name("a cat", 0, "dense")
    record = json.loads((tmp_path / "out" / f"{dense}.json").read_text())
    assert tuple(record["tokens"]) == grid
    assert len(record["seconds"]["steps"]) == 2
    length = {} if name == "flux" else {"num_frames": frames}
    result = pipeline_of(folder, name)(
        "a cat",
        height=height,
        width=width,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
        **length,
    )[0]
    expected = ((result if name == "flux" else result[0]) * 255).round().to(torch.uint8)
    suffix = "png" if name == "flux" else "mkv"
    assert torch.equal(read_media(tmp_path / "out" / f"{dense}.{suffix}", height=height, width=width), expected)
    sparse = list((tmp_path / "out").glob("*sla*.json"))
    assert len(sparse) == 1
    for path in sparse:
        video = read_media(path.with_suffix(f".{suffix}"), height=height, width=width)
        assert video.shape == expected.shape
        assert not torch.equal(video, expected)


def test_sizes_are_checked_before_anything_runs():
    sizes = Sizes(4, 8, (1, 2, 2))
    sizes.check(81, 480, 832)
    assert sizes.grid(81, 480, 832).shape == (21, 30, 52)
    assert Sizes(1, 8, (1, 2, 2)).grid(1, 1024, 1024).shape == (1, 64, 64)
    for size, message in (
        ((80, 480, 832), "frames must be 1 more than a multiple of 4, got 80"),
        ((81, 472, 832), "height must be a positive multiple of 16"),
        ((81, 480, 0), "width must be a positive multiple of 16"),
        ((0, 480, 832), "frames must be 1 more than a multiple of 4, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sizes.check(*size)


def test_pipelines_are_loaded_as_asked(folder):
    cpu = torch.device("cpu")
    loaded = load_pipeline(folder / "ltx", device=cpu, dtype=torch.bfloat16, without_transformer=True)
    assert loaded.pipe.transformer is None
    assert loaded.pipe.vae.dtype == torch.float32
    assert loaded.pipe.text_encoder.dtype == torch.bfloat16
    assert loaded.kind is PIPELINES["LTXPipeline"]
    whole = load_pipeline(folder / "ltx", device=cpu, dtype=torch.bfloat16)
    assert {whole.pipe.transformer.dtype, whole.pipe.vae.dtype} == {torch.bfloat16}
    assert whole.sizes == loaded.sizes


def test_a_torchvision_that_does_not_fit_is_named(folder, monkeypatch):
    """One of another build fails when it is imported, and diffusers with it."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"torchvision does not match torch .*nms does not exist.*uninstall it"):
        load_pipeline(folder / "flux", device=torch.device("cpu"), dtype=torch.float32)


def test_devices_and_dtypes_by_name():
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", cpu) == torch.float16
    for name in ("gpu", "cuda:x", "CPU"):
        with pytest.raises(ValueError, match="unknown device"):
            choose_device(name)


# What is said before weights are loaded


@pytest.fixture(scope="module")
def saved_wan(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("saved") / "wan")


CLIP = ("--videos", "CLIPS", "--output", "OUT")
CAT = ("--prompt", "a cat", "--output", "OUT")
SIZE = ("--frames", "9", "--height", "96", "--width", "96")
SLA = ("--method", "sla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("precompute", "--videos", "NOWHERE", "--output", "OUT"), "no such folder or list of videos: NOWHERE"),
        (("precompute", *CLIP, "--bucket", "9x50x48"), "bucket 9x50x48: height must be a positive multiple of 16"),
        (("precompute", "--videos", "CLIPS", "--output", "FILE"), "output FILE is a file; expected a folder"),
        (("precompute", "--videos", "CLIPS", "--output", "THEIRS"), "output THEIRS holds something else (notes.txt)"),
        (("generate", *CAT, *SIZE[:2], "--height", "50"), "height must be a positive multiple of 16"),
        (("generate", *CAT, "--frames", "8"), "frames must be 1 more than a multiple of 4, got 8"),
        (("generate", *CAT, *SIZE, "--steps", "0"), "steps must be at least 1, got 0"),
        (("generate", *CAT[:-1], "FILE", *SIZE), "output FILE is a file; expected a folder"),
        (("generate", *CAT, *SLA, "--frames", "1", *SIZE[2:]), "too small for sparse attention"),
        (("eval", *CAT, *SLA, "--height", "50"), "height must be a positive multiple of 16"),
        (("eval", *CAT[:-1], "FILE", *SLA, *SIZE), "output FILE is a file; expected a folder"),
        (("eval", *CAT[:-1], "TABLE", *SLA, *SIZE), "TABLE/evaluation.md was not written by foveal eval"),
        (("inspect", *CAT, *SIZE[:2], "--height", "50", "--width", "64"), "height must be a positive multiple of 16"),
        (("inspect", *CAT, *SIZE, "--sparse", "NOWHERE"), "no such folder: NOWHERE"),
        (("inspect", *CAT, *SIZE, "--sparse", "THEIRS"), "THEIRS has no foveal.safetensors"),
        (("inspect", *CAT[:-1], "TABLE", *SIZE), "TABLE/index.html was not written by foveal inspect"),
        (("ui", "--port", "PORT", *SIZE[:2], "--height", "50", "--width", "64"), "height must be a positive multiple"),
        (("ui", "--port", "PORT", *SIZE, "--steps", "5", "--look-at", "5"), "step must be in [0, 5), got 5"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(saved_wan, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("torchmetrics")
    if arguments[0] == "ui":
        pytest.importorskip("gradio")
    write_clip(tmp_path / "CLIPS" / "a.mp4")
    for name in ("FILE", "THEIRS/notes.txt", "TABLE/evaluation.md", "TABLE/index.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("theirs")
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded first"))
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    arguments = [port if argument == "PORT" else argument for argument in arguments]
    assert cli.main([*arguments, "--model", str(saved_wan)]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("foveal: ")
    assert message in error
    assert not (tmp_path / "OUT").exists()


def test_an_outline_has_the_sizes_of_the_pipeline(tmp_path):
    for make in (tiny_ltx, tiny_cogvideox, tiny_hunyuan, tiny_flux):
        make().save_pretrained(tmp_path / make.__name__)
        outlines = []
        loaded = load_pipeline(
            tmp_path / make.__name__, device=torch.device("cpu"), dtype=torch.float32, check=outlines.append
        )
        (outline,) = outlines
        assert outline.sizes == sizes_of(loaded.pipe, loaded.kind, loaded.pipe.transformer.config)
        assert default_size(outline) == default_size(loaded)
        assert {parameter.device.type for parameter in outline.pipe.vae.parameters()} == {"meta"}


# The hub


@pytest.fixture
def offline(monkeypatch):
    """How often the hub was asked for; it is never reached."""
    from huggingface_hub import utils

    asked = []

    class Session:
        def head(self, *args, **kwargs):
            asked.append(args)
            raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(utils, "get_session", Session)
    hub_unreachable.cache_clear()
    yield asked
    hub_unreachable.cache_clear()


def test_without_a_network_that_is_the_reason_and_it_is_said_at_once(offline, tmp_path, capsys, monkeypatch):
    from accelerate.state import AcceleratorState
    from huggingface_hub import constants

    AcceleratorState._reset_state(True)  # a test before this one in the process may have trained
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *a, **k: pytest.fail("tried"))
    name = "someone/something"
    reason = (
        f"foveal: {name} cannot be downloaded: {constants.ENDPOINT} cannot be reached ([Errno -2] Name or service not "
        "known). Nor is it a local folder or in the local cache\n"
    )
    assert cli.main(["generate", "--model", name, "--prompt", "a cat", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(reason)
    pytest.importorskip("accelerate")
    write_latent_dataset(
        tmp_path / "data", [{"id": f"{n}#0", "caption": "", "latents": torch.zeros(16, 1, 2, 2)} for n in range(9)]
    )
    arguments = ("--data.folder", tmp_path / "data", "--model.path", name, "--output", tmp_path / "run")
    options = ("--device", "cpu", "--tracker", "none")
    assert cli.main(["train", "wan-1.3b-sla", *map(str, (*arguments, *options))]) == 2
    assert capsys.readouterr().err.endswith(reason)
    assert len(offline) == 1


def test_without_a_network_the_cache_is_read(offline, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--someone--something").mkdir()
    assert hub_options("someone/something") == {"local_files_only": True}
    assert hub_options(str(tmp_path)) == {}
    assert len(offline) == 1


def test_with_a_network_nothing_is_kept_from_the_hub(monkeypatch):
    monkeypatch.setattr("foveal.lab.hub.hub_unreachable", lambda: None)
    assert hub_options("someone/something") == {}
