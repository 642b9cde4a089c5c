"""What a run is given: an output folder of its own, samples, precomputed ones or windows of one clip, and noise."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.lab.data.dataset import BatchStream, LatentDataset, fill_with_samples, thread_of_this_gpu
from foveal.lab.data.shards import INDEX_FILE
from foveal.lab.data.windows import SAMPLE_CLIPS, ClipWindows, read_video, sample_clip
from foveal.lab.train.objective import sample_noise
from foveal.lab.train.settings import DataSettings, ModelSettings
from foveal.output_folder import OutputFolder

WINDOWS = "clip-windows"


def check_sizes(data: DataSettings, model: ModelSettings) -> None:
    """Raises a ValueError if the windows of a clip are not whole patches of a model with random weights."""
    if data.clip is None or model.architecture is None:
        return
    patch = model.architecture.patch
    for name in ("height", "width"):
        size = getattr(data, name)
        if size % patch:
            raise ValueError(f"data.{name} must be a multiple of {patch} (model.architecture.patch), got {size}")


def open_data(settings: DataSettings, output: OutputFolder, accelerator: Any) -> tuple[LatentDataset, LatentDataset]:
    """(training, held-out) samples; those of a clip are put into `output` first, by the main process.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, damaged or too little, or none at all.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    if (settings.folder is None) == (settings.clip is None):
        raise ValueError(
            "give data.folder, what `foveal precompute` wrote, or data.clip, a video file, one of them; "
            f"got {settings.folder} and {settings.clip}"
        )
    if settings.folder is not None:
        return LatentDataset(settings.folder).split(settings.held_out)
    parts = f"{WINDOWS}/train", f"{WINDOWS}/held-out"
    if accelerator.is_main_process:
        _write_windows(settings, output, *parts)
    accelerator.wait_for_everyone()
    return tuple(LatentDataset(output.path / part) for part in parts)


def _write_windows(settings: DataSettings, output: OutputFolder, train: str, held_out: str) -> None:
    path = sample_clip(settings.clip) if settings.clip in SAMPLE_CLIPS else Path(settings.clip)
    clip = read_video(path, height=settings.height, width=settings.width)
    windows = ClipWindows(clip, frames=settings.frames, stride=settings.stride)
    parts = (train, windows.train_starts, settings.windows), (held_out, windows.held_out_starts, settings.held_out)
    for folder, starts, count in parts:
        picks = torch.linspace(0, len(starts) - 1, min(count, len(starts))).round().long().tolist()
        samples = [
            {"latents": windows.window(starts[pick]), "caption": "", "id": f"{path.name}#{starts[pick]}"}
            for pick in picks
        ]
        with output.renewing(below=folder, last=INDEX_FILE) as new:
            fill_with_samples(new, samples, settings={"space": "pixel", "clip": path.name, "fps": 12})


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


class NoiseAhead:
    """`sample_noise`, the next one made in a thread while one is used: at 480p it takes longer than a layer.

    Args:
        seed, shift, sigma_range, first_frame: as `sample_noise` has them.
        device: where the noise will be used; on a GPU it comes in pinned memory, to be copied without waiting.
    """

    def __init__(
        self,
        *,
        seed: int,
        shift: float,
        sigma_range: tuple[float, float],
        device: torch.device,
        first_frame: float = 0.0,
    ) -> None:
        self._make = functools.partial(
            sample_noise, seed=seed, shift=shift, sigma_range=sigma_range, first_frame=first_frame
        )
        self._pinned = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, **thread_of_this_gpu(self._pinned))
        self._ahead: tuple[Any, Future] | None = None

    def take(self, shape: tuple[int, ...], first: int, following: int) -> tuple[Tensor, Tensor]:
        """`sample_noise` of this shape and first sample; `following` is, most likely, the next call's first."""
        if self._ahead is None or self._ahead[0] != (shape, first):
            self._start(shape, first)
        _, made = self._ahead
        self._start(shape, following)
        return made.result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, shape: tuple[int, ...], first: int) -> None:
        self._ahead = (shape, first), self._thread.submit(self._pinned_noise, shape, first)

    def _pinned_noise(self, shape: tuple[int, ...], first: int) -> tuple[Tensor, Tensor]:
        made = self._make(shape, first=first)
        return tuple(x.pin_memory() for x in made) if self._pinned else made
