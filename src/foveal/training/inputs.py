"""The samples of a run: what `foveal precompute` wrote, or windows of one clip in pixel space."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foveal.training.data import SAMPLE_CLIPS, ClipWindows, read_video, sample_clip
from foveal.training.dataset import BatchStream, LatentDataset, write_latent_dataset
from foveal.training.settings import DataSettings


def open_data(settings: DataSettings, output: Path, accelerator: Any) -> tuple[LatentDataset, LatentDataset]:
    """(training, held-out) samples; those of a clip are put into `output` first, by the main process.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, damaged or too little, or none at all.
    """
    if (settings.folder is None) == (settings.clip is None):
        raise ValueError(
            "give data.folder, what `foveal precompute` wrote, or data.clip, a video file, one of them; "
            f"got {settings.folder} and {settings.clip}"
        )
    if settings.folder is not None:
        return LatentDataset(settings.folder).split(settings.held_out)
    folders = output / "clip" / "train", output / "clip" / "held-out"
    if accelerator.is_main_process:
        _write_windows(settings, output / "clip", *folders)
    accelerator.wait_for_everyone()
    return tuple(LatentDataset(folder) for folder in folders)


def _write_windows(settings: DataSettings, parent: Path, train: Path, held_out: Path) -> None:
    path = sample_clip(settings.clip) if settings.clip in SAMPLE_CLIPS else Path(settings.clip)
    clip = read_video(path, height=settings.height, width=settings.width)
    windows = ClipWindows(clip, frames=settings.frames, stride=settings.stride)
    shutil.rmtree(parent, ignore_errors=True)
    parts = (train, windows.train_starts, settings.windows), (held_out, windows.held_out_starts, settings.held_out)
    for folder, starts, count in parts:
        picks = torch.linspace(0, len(starts) - 1, min(count, len(starts))).round().long().tolist()
        samples = [
            {"latents": windows.window(starts[pick]), "caption": "", "id": f"{path.name}#{starts[pick]}"}
            for pick in picks
        ]
        write_latent_dataset(folder, samples, settings={"space": "pixel", "clip": path.name, "fps": 12})


def read_batch(stream: BatchStream) -> tuple[dict[str, Any] | None, str]:
    """(the next batch, "") or (None, what is wrong with it); the stream goes on either way."""
    from safetensors import SafetensorError

    position = stream.position
    try:
        return next(stream), ""
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        stream.load_state_dict(stream.state_dict() | {"position": position + 1})
        return None, f"batch {position} could not be read and is left out: {type(error).__name__}: {error}"


def micro_batches(batch: dict[str, Any], size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first sample, micro-batch) of a batch, in order."""
    total = len(batch["latents"])
    for start in range(0, total, size):
        yield start, {key: value[start : start + size] for key, value in batch.items()}
