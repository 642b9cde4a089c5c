"""Cut media files into training clips: a size for each file, a frame rate, and exact frames.

Sizes are buckets, FRAMESxHEIGHTxWIDTH in pixels. A file goes to the bucket with the nearest shape among those it is
long enough for. It is scaled to cover the bucket and cropped at its center.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal.lab.data.decoding import open_video


@dataclass(frozen=True)
class Bucket:
    """The size of a clip: frames, and height and width in pixels; an image has one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Parse a bucket such as "81x480x832".

        Raises:
            ValueError: for any other form.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"bucket must read FRAMESxHEIGHTxWIDTH, like 81x480x832, got {text!r}")
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class MediaInfo:
    """The contents of a media file.

    Args:
        path: the file.
        times: when each frame is shown, ascending, in seconds from the first frame.
        first: the time stamp of the first frame, in seconds.
        height, width: the size of the picture as shown, in pixels.
    """

    path: Path
    times: tuple[float, ...]
    first: float
    height: int
    width: int

    def frames_at(self, fps: float | None) -> int:
        """How many frames the file has at `fps` frames per second; None counts the file's own frames."""
        if fps is None:
            return len(self.times)
        # The last frame is shown as long as the others: a frame at 24 fps lasts until 1/24 s, not until 0.
        lasts = self.times[-1] / (len(self.times) - 1) if len(self.times) > 1 else 0.0
        return max(1, math.floor((self.times[-1] + lasts) * fps + 1e-3))

    def frame_indices(self, fps: float | None, start: int, count: int) -> list[int]:
        """The file's frames that are nearest in time to frames `start` to `start + count` at `fps`."""
        if fps is None:
            return list(range(start, start + count))
        return [self.nearest((start + place) / fps) for place in range(count)]

    def nearest(self, time: float) -> int:
        """The file's frame that is nearest to a time, in seconds from the first frame."""
        after = min(bisect.bisect_left(self.times, time), len(self.times) - 1)
        before = max(after - 1, 0)
        return before if time - self.times[before] <= self.times[after] - time else after


def probe(path: str | Path) -> MediaInfo:
    """Read frame times and picture size of a video or an image. One frame is decoded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no video stream or cannot be decoded.
    """
    path = Path(path)
    with open_video(path) as video:
        frame = next(video.frames(), None)
        if frame is None:
            raise ValueError(f"{path} has a video stream, but no frame could be decoded")
        height, width = video.shown_size(frame)
    with open_video(path) as video:
        # The time stamps of packets, not of decoded frames, so a long file is only read. A container's own count and
        # duration are often wrong or missing.
        packets = video.container.demux(video.stream)
        stamps = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
        base = float(video.stream.time_base or 0)
    stamps = stamps or [0]
    times = tuple((stamp - stamps[0]) * base for stamp in stamps)
    return MediaInfo(path, times, stamps[0] * base, height, width)


def choose_bucket(media: MediaInfo, buckets: Sequence[Bucket], fps: float | None) -> Bucket:
    """Choose the bucket of a file among those it is long enough for.

    The nearest shape wins, then a bucket that needs no enlargement, then the longest, then the largest.

    Raises:
        ValueError: the file is too short for all buckets.
    """
    available = media.frames_at(fps)
    fitting = [bucket for bucket in buckets if bucket.frames <= available]
    if not fitting:
        rate = "" if fps is None else f" at {fps:g} per second"
        shortest = min(bucket.frames for bucket in buckets)
        raise ValueError(f"{media.path} has {available} frame{'s' * (available != 1)}{rate}, needs at least {shortest}")

    def distance(bucket: Bucket) -> tuple[float, bool, int, int]:
        shape = abs(math.log((bucket.height / bucket.width) / (media.height / media.width)))
        enlarged = bucket.height > media.height or bucket.width > media.width
        return round(shape, 2), enlarged, -bucket.frames, -bucket.height * bucket.width

    return min(fitting, key=distance)


def clip_starts(media: MediaInfo, bucket: Bucket, fps: float | None, clips: int) -> list[int]:
    """First frames, at `fps`, of up to `clips` clips that do not overlap, spread evenly over the file."""
    available = media.frames_at(fps)
    count = max(1, min(clips, available // bucket.frames))
    spare = available - bucket.frames
    return [round(place * spare / max(1, count - 1)) if count > 1 else spare // 2 for place in range(count)]


def read_clip(media: MediaInfo, bucket: Bucket, *, fps: float | None, start: int) -> Tensor:
    """Decode one clip.

    Args:
        media: the file, from `probe`.
        bucket: the size.
        fps: frames per second, reached by repeating or skipping the file's frames. None takes them as they are.
        start: the first frame, at `fps`.

    Returns:
        uint8 [frames, 3, height, width], RGB.

    Raises:
        ValueError: the file cannot be decoded up to the clip's end.
    """
    wanted = media.frame_indices(fps, start, bucket.frames)
    missing = set(wanted)
    images: dict[int, Tensor] = {}
    with open_video(media.path) as video:
        if media.times[wanted[0]] > 1.0:
            # Seek a little early: the container's index of key frames is inexact.
            target = media.first + media.times[wanted[0]] - 0.5
            video.container.seek(int(target / float(video.stream.time_base)), stream=video.stream, backward=True)
        for frame in video.frames():
            # Only an image has a frame without a time.
            index = 0 if frame.time is None else media.nearest(frame.time - media.first)
            if index in missing:
                missing.discard(index)
                images[index] = video.picture(frame, height=bucket.height, width=bucket.width)
            if not missing:
                break
    if missing:
        raise ValueError(f"{len(missing)} of {len(set(wanted))} frames of {media.path} could not be decoded")
    return torch.stack([images[index] for index in wanted])
