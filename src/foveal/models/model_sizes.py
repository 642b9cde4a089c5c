"""The size of a model's attention: by name for models of the supported families, and from a folder for others."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveal.checks import check_positive_int
from foveal.layout import VideoGrid
from foveal.models.families.table import FAMILIES
from foveal.models.readers import patch_size

# Pixels per latent (frames, height, width) of the VAE that a family's models come with. A folder's own VAE wins.
USUAL_VAE_STRIDES = {
    "wan": (4, 8, 8),
    "wan_vace": (4, 8, 8),
    "wan_animate": (4, 8, 8),
    "wan_animate_2": (4, 8, 8),
    "skyreels_v2": (4, 8, 8),
    "chronoedit": (4, 8, 8),
    "anyflow": (4, 8, 8),
    "hunyuan_video": (4, 8, 8),
    "hunyuan_video_framepack": (4, 8, 8),
    "hunyuan_video15": (4, 16, 16),
    "cogvideox": (4, 8, 8),
    "ltx_video": (8, 32, 32),
    "ltx2": (8, 32, 32),
    "minimax_h3": (4, 16, 16),
    "flux": (1, 8, 8),
}
# Its pipeline folds squares of latents into tokens, which no configuration says. It makes images.
_PACKED_IMAGES = {"flux": (1, 2, 2)}
# Their VAEs take frames in chunks: (frames and latents of a chunk, frames and latents of the end).
CHUNKS = {"minimax_h3": ((17, 5), (5, 2))}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of one transformer that determine the cost of its attention.

    Args:
        name: the name that users give.
        family: its name in the table of families.
        layers: the number of self-attention layers.
        heads, head_dim: the sizes of each layer.
        vae_strides: pixels per latent (frames, height, width).
        patch_size: latents per token (frames, height, width).
        ffn_dim: width of the feed-forward layers for families whose other work is known (Wan); else None.
        note: what foveal assumed.
    """

    name: str
    family: str
    layers: int
    heads: int
    head_dim: int
    vae_strides: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    ffn_dim: int | None = None
    note: str | None = None

    @property
    def hidden_dim(self) -> int:
        """heads * head_dim."""
        return self.heads * self.head_dim

    def grid(self, frames: int, height: int, width: int) -> VideoGrid:
        """The token grid of a video of this size in frames and pixels.

        Raises:
            TypeError, ValueError: a side is not a positive int, or the model cannot cut it evenly.
        """
        for name, side in (("frames", frames), ("height", height), ("width", width)):
            check_positive_int(name, side)
        if self.family in _PACKED_IMAGES and frames != 1:
            raise ValueError(f"frames must be 1 for {self.name}, which makes images, got {frames}")
        # Most video VAEs keep the first frame separate. An odd latent frame at the end is padded.
        (chunk, latents), (end, end_latents) = CHUNKS.get(self.family, ((self.vae_strides[0], 1), (1, 1)))
        if frames < end or (frames - end) % chunk:
            raise ValueError(f"frames must be {end} more than a multiple of {chunk} for {self.name}, got {frames}")
        cells = [-(-((frames - end) // chunk * latents + end_latents) // self.patch_size[0])]
        for axis, (name, side) in enumerate((("height", height), ("width", width)), start=1):
            pixels = self.vae_strides[axis] * self.patch_size[axis]
            if side % pixels:
                raise ValueError(f"{name} must be a multiple of {pixels} for {self.name}, got {side}")
            cells.append(side // pixels)
        return VideoGrid(*cells)


MODEL_SIZES = {
    size.name: size
    for size in (
        ModelSize("wan-1.3b", "wan", 30, 12, 128, (4, 8, 8), (1, 2, 2), 8960),
        ModelSize("wan-14b", "wan", 40, 40, 128, (4, 8, 8), (1, 2, 2), 13824),
        ModelSize("wan-5b", "wan", 30, 24, 128, (4, 16, 16), (1, 2, 2), 14336),
        ModelSize("hunyuan-video", "hunyuan_video", 60, 24, 128, (4, 8, 8), (1, 2, 2)),
        ModelSize("hunyuan-video-1.5", "hunyuan_video15", 54, 16, 128, (4, 16, 16), (1, 1, 1)),
        ModelSize("cogvideox-2b", "cogvideox", 30, 30, 64, (4, 8, 8), (1, 2, 2)),
        ModelSize("cogvideox-5b", "cogvideox", 42, 48, 64, (4, 8, 8), (1, 2, 2)),
        ModelSize("ltx-video", "ltx_video", 28, 32, 64, (8, 32, 32), (1, 1, 1)),
        ModelSize("ltx-2", "ltx2", 48, 32, 128, (8, 32, 32), (1, 1, 1)),
        ModelSize("minimax-h3", "minimax_h3", 50, 56, 128, (4, 16, 16), (1, 2, 2)),
        ModelSize("flux", "flux", 57, 24, 128, (1, 8, 8), (1, 2, 2)),
    )
}


def model_size(model: str | os.PathLike[str]) -> ModelSize:
    """The size of a model by its name in `MODEL_SIZES`, or of the transformer in a local diffusers folder.

    Args:
        model: a name, or the folder of a transformer or a pipeline, of which only `config.json` is read.

    Raises:
        ValueError: model is neither, or its transformer is of no supported family.
    """
    if str(model) in MODEL_SIZES:
        return MODEL_SIZES[str(model)]
    folder = Path(model)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise ValueError(f"unknown model {str(model)!r}; expected a folder with a config.json, or {tuple(MODEL_SIZES)}")
    config = _read(folder / "config.json")
    name = config.get("_class_name")
    families = {family.transformer: family for family in FAMILIES.values()}
    if name not in families:
        raise ValueError(f"{folder} holds a {name}; expected one of {tuple(families)}")
    family = families[name]

    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, name).from_config(config)
    layers = family.self_attention_layers(transformer)
    shapes = {family.dimensions(attn)[1:] for attn in layers.values()}
    if len(shapes) != 1:
        raise ValueError(f"{folder} has attention of several shapes, (heads, head_dim) in {sorted(shapes)}")
    ((heads, head_dim),) = shapes
    usual = USUAL_VAE_STRIDES[family.name]
    strides = _vae_strides(folder.parent / "vae" / "config.json", usual)
    return ModelSize(
        name=str(model),
        family=family.name,
        layers=len(layers),
        heads=heads,
        head_dim=head_dim,
        vae_strides=strides or usual,
        patch_size=_PACKED_IMAGES.get(family.name) or patch_size(transformer.config),
        ffn_dim=transformer.config.ffn_dim if family.name == "wan" else None,
        note=None if strides else f"no VAE next to it: strides {usual} assumed",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _vae_strides(path: Path, usual: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """The strides in a VAE's configuration, or the usual ones where it has none; None without a VAE."""
    if not path.is_file():
        return None
    config = _read(path)
    time = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or usual[0]
    space = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio") or usual[1]
    return (time, space, space)
