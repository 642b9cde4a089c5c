"""Decoded frames as they are meant to be seen: upright, with square pixels, scaled to a size.

Everything that reads a video or an image decodes it here. Phones store upright videos on their side, with a note on how
to turn them, and some cameras store pixels that are not square.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpenVideo:
    """A video or an image that is being read.

    Args:
        container: PyAV's container.
        stream: its first video stream.
    """

    container: Any
    stream: Any

    def frames(self) -> Iterator[Any]:
        """The frames, as PyAV decodes them."""
        return self.container.decode(self.stream)

    @property
    def pixel_aspect(self) -> float:
        """The width of a stored pixel over its height; 1 if the file does not say."""
        return float(self.stream.sample_aspect_ratio or 1)

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """(height, width) of a frame as it is shown, in square pixels."""
        size = frame.height, round(frame.width * self.pixel_aspect)
        return size[::-1] if _turns(frame) % 2 else size

    def picture(self, frame: Any, *, height: int, width: int) -> Tensor:
        """A frame as uint8 [3, height, width]: upright, scaled to cover that size, and cropped at its center."""
        turns = _turns(frame)
        if turns % 2:
            height, width = width, height
        aspect = self.pixel_aspect
        scale = max(height / frame.height, width / (frame.width * aspect))
        scaled = (max(height, round(frame.height * scale)), max(width, round(frame.width * aspect * scale)))
        # Average when shrinking, so that nothing flickers; use a cubic when enlarging.
        interpolation = "AREA" if scale * aspect**0.5 < 1 else "BICUBIC"
        image = frame.to_ndarray(format="rgb24", height=scaled[0], width=scaled[1], interpolation=interpolation)
        top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
        picture = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        return torch.rot90(picture, turns, (1, 2)).contiguous()


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[OpenVideo]:
    """Open a video or an image for the block that reads it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no video stream, or what the block reads cannot be decoded.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such video file: {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield OpenVideo(container, stream)
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode {path} as a video: {error}") from error


def _turns(frame: Any) -> int:
    """Counterclockwise quarter turns that bring a stored frame upright."""
    return round(frame.rotation / 90) % 4
