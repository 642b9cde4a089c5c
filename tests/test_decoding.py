"""Videos as they are meant to be seen, whoever reads them: turned upright, with square pixels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_media import write_clip, write_turned, write_wide_pixels

from foveal.lab.data.clips import Bucket, probe, read_clip
from foveal.lab.data.dataset import LatentDataset
from foveal.lab.data.windows import ClipWindows, read_video

pytest.importorskip("av")


def shade(height: int, width: int, frames: int = 12) -> torch.Tensor:
    """uint8 [frames, 3, height, width]: dark on the left and bright on the right, so that each side can be told."""
    levels = torch.linspace(20, 230, width).round().to(torch.uint8)
    return levels.expand(frames, 3, height, width).contiguous()


@pytest.fixture
def phone(tmp_path):
    """(an upright video as a phone stores it, the frames that it shows)."""
    lying = write_clip(tmp_path / "lying.mp4", frames=24, height=48, width=64)
    stored = read_video(lying, height=48, width=64)
    return write_turned(tmp_path / "phone.mp4", lying), torch.rot90(stored, -1, (2, 3))


def test_phone_videos_are_turned_upright(phone):
    path, shown = phone
    assert torch.equal(read_video(path, height=64, width=48), shown)
    media = probe(path)
    assert (media.height, media.width) == (64, 48)
    assert torch.equal(read_clip(media, Bucket(24, 64, 48), fps=None, start=0), shown)


def test_other_shapes_show_the_middle_of_the_upright_picture(phone):
    path, shown = phone
    assert torch.equal(read_video(path, height=32, width=48), shown[:, :, 16:48])


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = write_wide_pixels(tmp_path / "wide.mp4", shade(48, 32), fps=12, aspect=2)
    media = probe(path)
    assert (media.height, media.width) == (48, 64)
    for seen in (read_video(path, height=48, width=64), read_clip(media, Bucket(12, 48, 64), fps=None, start=0)):
        assert (seen.int() - shade(48, 64).int()).abs().max() <= 8
    # A square is cut from the middle of what is shown, half as wide as of what is stored.
    middle = shade(48, 64)[..., 8:56]
    assert (read_video(path, height=48, width=48).int() - middle.int()).abs().max() <= 8


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path):
    path = write_turned(
        tmp_path / "turned.mp4", write_wide_pixels(tmp_path / "wide.mp4", shade(48, 32), fps=12, aspect=2)
    )
    assert (probe(path).height, probe(path).width) == (64, 48)
    shown = torch.rot90(shade(48, 64), -1, (2, 3))
    assert (read_video(path, height=64, width=48).int() - shown.int()).abs().max() <= 8


def test_the_page_shows_what_is_shown(phone):
    from foveal.lab.pipelines import load_pipeline
    from foveal.lab.ui.scene import clip_scene
    from foveal.models.shipped import TINY

    path, shown = phone
    tiny = load_pipeline(TINY, device=torch.device("cpu"), dtype=torch.float32)
    scene = clip_scene(tiny, path, size=(5, 64, 48), noise_level=0.5, window=0.0)
    assert torch.equal(scene.frames.permute(0, 3, 1, 2), shown[[1, 3]])


def test_training_on_a_clip_sees_what_is_shown(phone, tmp_path):
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    from tiny_training import ARCHITECTURE, config

    from foveal.lab.train.settings import DataSettings
    from foveal.lab.train.trainer import Trainer

    path, shown = phone
    data = DataSettings(
        clip=str(path), height=64, width=48, frames=3, stride=1, windows=1, held_out=1, caption_dropout=0.0, workers=0
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(config(tmp_path, data=data, model__architecture=dataclasses.replace(ARCHITECTURE, channels=3)))
    sample = LatentDataset(tmp_path / "run" / "clip-windows" / "train")[0]
    assert torch.equal(sample["latents"], ClipWindows(shown, frames=3, stride=1).window(0))
