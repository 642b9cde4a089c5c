"""The models that come with foveal: "foveal/tiny", a Wan pipeline of 8 M parameters, and its adapters.

Every command takes these names where it takes a folder or a hub id, and needs no network for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).with_name("shipped_files")
TINY = "foveal/tiny"
ADAPTERS = ("sla", "sla2", "router", "vsa", "vsa-router")
SHIPPED = {TINY: "tiny", **{f"foveal/tiny-{name}": f"tiny-{name}" for name in ADAPTERS}}


def local_path(source: str) -> str:
    """The folder of a model that foveal ships; any other folder or hub id as it is.

    Raises:
        FileNotFoundError: for a name like those that foveal ships, which is none of them and no folder.
    """
    if source.startswith(TINY) and source not in SHIPPED and not Path(source).exists():
        raise FileNotFoundError(f"no {source} comes with foveal; expected one of {', '.join(SHIPPED)}")
    return str(FOLDER / SHIPPED[source]) if source in SHIPPED else source


def tiny(**options: Any) -> Any:
    """The tiny model, a `WanPipeline`: 49 frames of 144 x 256 pixels, 1,872 tokens, from text.

    It knows rooms, corridors, and arenas of one game and is for trying things out: seconds a video on a CPU. With a
    first frame it is `WanImageToVideoPipeline.from_pipe(tiny())`. How it was made is in docs/tiny.md.

    Args:
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ImportError: diffusers or transformers is missing.
    """
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(local_path(TINY), **options)


@dataclass(frozen=True)
class Clip:
    """A clip that comes with foveal, 49 frames of 144 x 256 pixels from the game that the tiny model knows.

    Attributes:
        name: of its file, without the suffix.
        caption: what is seen in it.
        latents: what the tiny model's VAE makes of it, normalized, float32 [16, 13, 18, 32].
        file: the video. Clips of "train" have none.
    """

    name: str
    caption: str
    latents: Tensor
    file: Path | None


def shipped_clips(part: str) -> list[Clip]:
    """The clips that come with foveal.

    Args:
        part: "train", or "held-out" for walks that the tiny model was not trained on.
    """
    from safetensors.torch import load_file

    folder = FOLDER / "clips"
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))[part]
    latents = load_file(folder / f"{part}.safetensors")
    files = {name: folder / f"{name}.mp4" for name in captions}
    return [
        Clip(name, caption, latents[name].float(), files[name] if files[name].is_file() else None)
        for name, caption in captions.items()
    ]
