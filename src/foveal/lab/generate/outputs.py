"""Files of a generation run: names, videos and images, and the record beside each that says how it was made.

The record is written after the file that it is of, so that one that matches means a finished output.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.lab.data.sound import Sound, encode_sound, read_sound
from foveal.lab.data.windows import read_video, write_video

FORMAT = 1
SLUG_LENGTH = 40


def output_name(prompt: str, seed: int, label: str) -> str:
    """A file name without suffix: readable, and different for different prompts however alike they begin."""
    readable = slug(prompt, SLUG_LENGTH) or "prompt"
    return f"{readable}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-seed{seed}-{label}"


def slug(text: str, length: int) -> str:
    """The ASCII letters and digits of a text for a file name, at most `length` characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].rstrip("-")


def media_suffix(is_image: bool) -> str:
    return ".png" if is_image else ".mp4"


def beside_name(name: str, *, is_image: bool) -> str:
    """The file that shows the output of this name side by side with the dense one."""
    return f"{name}-beside-dense{media_suffix(is_image)}"


def write_media(path: Path, frames: Tensor, *, fps: float, sound: Sound | None = None) -> None:
    """uint8 [frames, 3, height, width] as an MP4 with its sound, or one frame as a PNG, by the suffix."""
    if path.suffix == ".png":
        from PIL import Image

        Image.fromarray(frames[0].permute(1, 2, 0).contiguous().numpy()).save(path)
    else:
        write_video(path, frames, fps=round(fps), sound=sound)


def write_exact(path: Path, frames: Tensor, *, fps: float, sound: Sound | None = None) -> None:
    """uint8 [frames, 3, height, width] and its sound as a Matroska video that decodes to the same bits."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=round(fps), options={"qp": "0", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "rgb24"
        voice = None if sound is None else container.add_stream("pcm_f32le", rate=sound.rate, layout="stereo")
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            encode_sound(container, voice, sound, format="flt")


def read_media(path: Path, *, height: int, width: int) -> Tensor:
    """uint8 [frames, 3, height, width] of what the functions above wrote."""
    return read_video(path, height=height, width=width)


def frames_of(output: Path, record: dict[str, Any]) -> Tensor:
    """The frames of an output, uint8 [frames, 3, height, width], bit for bit if they were kept so."""
    size = {name: record["settings"][name] for name in ("height", "width")}
    return read_media(output / record["outputs"][-1]["file"], **size)


def sound_of(output: Path, record: dict[str, Any]) -> Sound | None:
    """The sound of an output that was kept bit for bit; None if it has none."""
    rate = record["settings"].get("sampling_rate")
    samples = None if rate is None else read_sound(output / record["outputs"][-1]["file"], rate=rate)
    return None if samples is None else Sound(samples, rate)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two videos of one size next to each other, a strip of gray between them."""
    strip = torch.full((*left.shape[:3], 4), 128, dtype=torch.uint8)
    return torch.cat((left, strip, right), dim=3)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """The record of an output, to go beside it."""
    path.write_text(json.dumps({"format": FORMAT, **record}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finished(folder: Path, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """(the record of a finished output with these settings, why an output that is there does not count).

    An output without a record, or none at all, is (None, None): it was not finished.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        return None, None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            return None, f"its record has format version {record['format']!r}"
        former = record["settings"]
        for output in record["outputs"]:
            path = folder / output["file"]
            if not path.is_file() or path.stat().st_size != output["bytes"]:
                return None, f"{output['file']} is missing or has another size"
        differing = sorted(key for key in settings.keys() | former.keys() if settings.get(key) != former.get(key))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "its record is malformed"
    return (None, f"it was made with other {', '.join(differing)}") if differing else (record, None)
