"""The sound of videos, two channels: read from files, and encoded beside frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sound(NamedTuple):
    """float32 [2, samples] in [-1, 1], and how many samples a second has."""

    samples: Tensor
    rate: int


def encode_sound(container: Any, stream: Any, sound: Sound, format: str = "fltp") -> None:
    """Encode sound into a stream of PyAV's container.

    Args:
        container: the container that is written.
        stream: its stream for the sound.
        sound: the sound.
        format: PyAV's name of the samples that the stream's codec takes, 32-bit floats.
    """
    import av

    samples = sound.samples.float().clamp(-1, 1).cpu()
    planar = format.endswith("p")
    array = samples if planar else samples.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(array.contiguous().numpy(), format=format, layout="stereo")
    frame.sample_rate = sound.rate
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def read_sound(path: str | Path, *, rate: int, start: float = 0.0, seconds: float | None = None) -> Tensor | None:
    """Decode the sound of a file as two channels.

    Args:
        path: any file that FFmpeg decodes.
        rate: samples per second to convert to.
        start: where to begin, in seconds from the first sample.
        seconds: how much; silence fills what the file lacks. None reads to the end.

    Returns:
        float32 [2, samples]; None for a file without sound.

    Raises:
        ValueError: the file cannot be decoded.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                return None
            convert = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
            pieces = [piece for frame in container.decode(audio=0) for piece in convert.resample(frame)]
            pieces += convert.resample(None)
            parts = [torch.from_numpy(piece.to_ndarray()) for piece in pieces]
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode the sound of {path}: {error}") from error
    samples = torch.cat(parts, 1) if parts else torch.zeros(2, 0)
    samples = samples[:, round(start * rate) :]
    if seconds is None:
        return samples
    count = round(seconds * rate)
    return torch.nn.functional.pad(samples[:, :count], (0, max(0, count - samples.shape[1])))
