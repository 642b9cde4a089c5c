"""diffusers pipelines for the commands: how to load them, and their sizes.

To add a pipeline, add a line to `PIPELINES`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.lab import ltx2, modular
from foveal.lab.hub import hub_options, is_hub_id, one_line
from foveal.layout import VideoGrid
from foveal.models.model_sizes import CHUNKS
from foveal.models.readers import patch_size
from foveal.models.shipped import local_path

TRANSFORMERS = ("transformer", "transformer_2")
# A file in a pipeline's folder that says what to call it with where nothing else is asked for, such as its size.
DEFAULTS_FILE = "generation_config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SoundKind(NamedTuple):
    """How a pipeline's sound becomes latents; each function takes the pipeline first.

    Args:
        samples_of_a_latent: () to the samples, at `pipe.audio_sampling_rate`, that a latent stands for.
        encode: (sound float32 [2, samples of whole latents]) to the latents that the transformer trains on.
        made: (what the pipeline returns beside the video) to one sound, float [2, samples].
        made_rate: () to its samples per second.
    """

    samples_of_a_latent: Callable[[Any], int]
    encode: Callable[[Any, Tensor], Tensor]
    made: Callable[[Any, Any], Tensor]
    made_rate: Callable[[Any], int]


@dataclass(frozen=True)
class PipelineKind:
    """Facts about a pipeline class that diffusers does not keep in one place.

    Args:
        name: the class name.
        family: the family of its transformer, in `FAMILIES`.
        text: names for what `encode_prompt` returns without guidance; None for what a sample need not keep.
        connect: (pipe, what `encode_prompt` returns) to what `text` names, where that is not the same.
        fps: frames per second that its models were trained at; None for images.
        packed: latent pixels per side of a token that the pipeline packs, on top of the transformer's patch.
        vae_float32: generate with the VAE in float32, as the model's authors do.
        pixels: mean and standard deviation, by channel of [0, 1], that its VAE takes videos normalized by; None for
            [-1, 1].
        sound: of pipelines that make sound beside the video.
    """

    name: str
    family: str
    text: tuple[str | None, ...]
    fps: int | None
    packed: int = 1
    vae_float32: bool = False
    pixels: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    sound: SoundKind | None = None
    connect: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]] | None = None

    @property
    def is_image(self) -> bool:
        return self.fps is None


PIPELINES = {
    kind.name: kind
    for kind in (
        PipelineKind("WanPipeline", "wan", ("prompt_embeds", None), fps=16, vae_float32=True),
        PipelineKind(
            "HunyuanVideoPipeline",
            "hunyuan_video",
            ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
            fps=24,
        ),
        PipelineKind("CogVideoXPipeline", "cogvideox", ("prompt_embeds", None), fps=8),
        PipelineKind("LTXPipeline", "ltx_video", ("prompt_embeds", "prompt_attention_mask", None, None), fps=25),
        PipelineKind(
            modular.MINIMAX_H3,
            "minimax_h3",
            ("prompt_embeds", "prompt_attention_mask"),
            fps=24,
            pixels=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            sound=SoundKind(
                samples_of_a_latent=lambda pipe: pipe.audio_vae.hop_length,
                encode=modular.encode_sound,
                made=lambda pipe, sound: sound,
                made_rate=lambda pipe: pipe.audio_sampling_rate,
            ),
        ),
        PipelineKind(
            "LTX2Pipeline",
            "ltx2",
            ("prompt_embeds", "audio_prompt_embeds", "prompt_attention_mask"),
            fps=24,
            sound=SoundKind(
                samples_of_a_latent=ltx2.samples_of_a_latent,
                encode=ltx2.encode_sound,
                made=lambda pipe, sound: sound[0],
                made_rate=lambda pipe: pipe.vocoder.config.output_sampling_rate,
            ),
            connect=ltx2.connect,
        ),
        PipelineKind("FluxPipeline", "flux", ("prompt_embeds", "pooled_prompt_embeds", None), fps=None, packed=2),
    )
}


@dataclass(frozen=True)
class Sizes:
    """How a pipeline's pixels become latents and tokens.

    Args:
        temporal, spatial: pixels per latent pixel. The first frame is a latent frame of its own.
        patch: latent pixels per token, (time, height, width).
        chunks: (frames and latent frames of a chunk, those of what is left at the end) for a VAE that takes frames in
            chunks; None for one of `temporal`.
    """

    temporal: int
    spatial: int
    patch: tuple[int, int, int]
    chunks: tuple[tuple[int, int], tuple[int, int]] | None = None

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise a ValueError for a size that the pipeline would round, or that gives no token."""
        for name, pixels, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            multiple = self.spatial * patch
            if pixels < multiple or pixels % multiple:
                raise ValueError(
                    f"{name} must be a positive multiple of {multiple} "
                    f"(the VAE's {self.spatial} times {patch} to a token), got {pixels}"
                )
        (chunk, _), (end, _) = self._chunks
        if frames < end or (frames - end) % chunk:
            raise ValueError(f"frames must be {end} more than a multiple of {chunk}, got {frames}")

    def grid(self, frames: int, height: int, width: int) -> VideoGrid:
        """The token grid of a video of this size; call `check` first."""
        (chunk, latents), (end, end_latents) = self._chunks
        depth = (frames - end) // chunk * latents + end_latents
        latent = (depth, height // self.spatial, width // self.spatial)
        return VideoGrid(*(-(-side // patch) for side, patch in zip(latent, self.patch, strict=True)))

    @property
    def _chunks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.chunks or ((self.temporal, 1), (1, 1))


@dataclass
class LoadedPipeline:
    """A diffusers pipeline on its device, and the facts about it.

    Args:
        pipe: the pipeline.
        kind: its entry in `PIPELINES`.
        sizes: how pixels become latents and tokens.
        device: the device of its modules.
        dtype: the dtype it was loaded in.
        source: the folder or hub id it came from.
        revision: the hub revision; None for the newest, or for a folder.
        defaults: arguments of its call where nothing else is asked for, from its `DEFAULTS_FILE`.
    """

    pipe: Any
    kind: PipelineKind
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    source: str
    revision: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def default(self, argument: str) -> Any:
        """What an argument of the pipeline's call is by default; None where it has none."""
        parameter = inspect.signature(self.pipe.__call__).parameters.get(argument)
        unset = parameter is None or parameter.default is parameter.empty
        return self.defaults.get(argument, None if unset else parameter.default)


def load_pipeline(
    source: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    without_transformer: bool = False,
    check: Callable[[LoadedPipeline], object] = lambda outline: None,
) -> LoadedPipeline:
    """Load a pipeline from a folder that `save_pretrained` wrote, or from the Hugging Face hub.

    Args:
        source: the folder, a hub id like "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", or "foveal/tiny".
        device: where to put it.
        dtype: for everything except a VAE that needs float32; without transformers the VAE stays in float32.
        revision: the hub revision.
        without_transformer: skip the transformers' weights and read only their configuration.
        check: called before any weights are read, with an outline of the pipeline: its kind, its sizes, and a pipe that
            has a VAE without weights and no other component. What it raises ends the load.

    Raises:
        FileNotFoundError: source is neither a folder nor a hub id.
        ValueError: source has no pipeline, or one that cannot be loaded; the hub cannot be reached, and the pipeline is
            not in the local cache; or the installed torchvision does not match this torch, so that diffusers does not
            import.
        TypeError: the pipeline's class is not in the table.
    """
    check_torchvision()
    import diffusers

    source = str(source)
    place = local_path(source)
    if Path(place).is_dir():
        if not any(Path(place, name).is_file() for name in ("model_index.json", modular.INDEX_FILE)):
            raise ValueError(f"{source} has no model_index.json; expected a folder that a pipeline was saved to")
    elif not is_hub_id(place):
        raise FileNotFoundError(f"no such pipeline folder: {source} (nor does it look like a hub id, OWNER/NAME)")
    keyword = hub_options(place) | ({} if revision is None else {"revision": revision})
    try:
        if modular.is_modular(place, keyword):
            return _load_modular(place, keyword, source, device, dtype, revision, without_transformer, check)
        parts = diffusers.DiffusionPipeline.load_config(place, **keyword)
        kind = _kind(parts.get("_class_name", ""), source)
        left_out = {name: None for name in TRANSFORMERS if without_transformer and name in parts}
        library, class_name = parts["transformer"]
        if library is None:
            raise ValueError(f"pipeline {source} has no transformer")
        config = getattr(diffusers, class_name).load_config(place, subfolder="transformer", **keyword)
        pipe = _outline(kind, parts, place, keyword)
    except (OSError, ImportError) as error:
        raise ValueError(f"cannot load pipeline {source}: {one_line(error)}") from error
    sizes = sizes_of(pipe, kind, config)
    defaults = _defaults(place)
    check(LoadedPipeline(pipe, kind, sizes, device, dtype, source, revision, defaults))
    try:
        float32 = kind.vae_float32 or without_transformer
        dtypes = {"vae": torch.float32, "default": dtype} if float32 else dtype
        if without_transformer and kind.sound:
            dtypes["audio_vae"] = torch.float32
        with _without_progress_bars():
            pipe = getattr(diffusers, kind.name).from_pretrained(place, dtype=dtypes, **left_out, **keyword)
    except (OSError, ImportError) as error:
        raise ValueError(f"cannot load pipeline {source}: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipe.to(device), kind, sizes, device, dtype, source, revision, defaults)


def _load_modular(
    place: str,
    keyword: dict[str, Any],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
    without_transformer: bool,
    check: Callable[[LoadedPipeline], object],
) -> LoadedPipeline:
    """`load_pipeline` for a modular pipeline; `place` and `keyword` are what diffusers loads `source` by."""
    pipe = modular.open_pipeline(place, keyword)
    kind = _kind(type(pipe).__name__, source)
    vae, transformer_config = modular.outline(pipe, keyword)
    strides = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    sizes = Sizes(*strides, patch_size(transformer_config), CHUNKS[kind.family])
    facts = kind, sizes, device, torch.float32 if without_transformer else dtype, source, revision
    check(LoadedPipeline(modular.MiniMaxH3(pipe, vae=vae), *facts))
    with _without_progress_bars():
        # As in other pipelines, videos are encoded in float32.
        dtypes = {"text_encoder": dtype, "default": facts[3]}
        made = modular.load(pipe, dtypes, device, without_transformer=without_transformer)
    return LoadedPipeline(made, kind, sizes, device, dtype, source, revision)


def _outline(kind: PipelineKind, parts: Mapping[str, Any], source: str, keyword: dict[str, Any]) -> Any:
    """The pipeline with a VAE on the meta device and no other component: its configurations are all that is read."""
    import diffusers

    cls, vae_class = getattr(diffusers, kind.name), getattr(diffusers, parts["vae"][1])
    with torch.device("meta"):
        vae = vae_class.from_config(vae_class.load_config(source, subfolder="vae", **keyword))
    components = {name: None for name, part in parts.items() if isinstance(part, list | tuple)}
    settings = {name: part for name, part in parts.items() if name not in components and not name.startswith("_")}
    return cls(**components | settings | {"vae": vae})


def _defaults(place: str) -> dict[str, Any]:
    """What a pipeline's folder says to call it with; nothing for one without the file, or of the hub."""
    file = Path(place, DEFAULTS_FILE)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def sizes_of(pipe: Any, kind: PipelineKind, transformer_config: Mapping[str, Any]) -> Sizes:
    """The sizes of a pipeline, from its VAE's factors and its transformer's patch."""
    temporal = _first_attribute(pipe, ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"), 1)
    spatial = _first_attribute(
        pipe, ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"), 1
    )
    patch = transformer_config.get("patch_size", 1)
    if not isinstance(patch, list | tuple):
        patch = (transformer_config.get("patch_size_t") or 1, patch, patch)
    return Sizes(int(temporal), int(spatial), (patch[0], patch[1] * kind.packed, patch[2] * kind.packed))


def default_size(loaded: LoadedPipeline) -> tuple[int | None, int | None, int | None]:
    """(frames, height, width) that the pipeline generates by default; None where its call has no default."""
    frames = 1 if loaded.kind.is_image else loaded.default("num_frames")
    return frames, loaded.default("height"), loaded.default("width")


def choose_device(name: str) -> torch.device:
    """The device for "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: for another name, or a GPU that torch does not find.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:NUMBER")
    if kind == "cuda" and (not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for "auto" (bfloat16 on a GPU, float32 on a CPU) or one of `DTYPES`.

    Raises:
        ValueError: for another name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def step_callback(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    """A value for a pipeline's `callback_on_step_end` that calls `on_step` after each denoising step."""

    def end_of_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    return end_of_step


def check_torchvision() -> None:
    """Raise a ValueError if torchvision is installed and does not match torch.

    diffusers imports an installed torchvision, and fails with a traceback of a hundred lines that does not name it.
    foveal itself does not need torchvision.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"torchvision does not match torch {torch.__version__} ({one_line(error)}): install the matching version, "
            "or uninstall it; foveal does not need it, but diffusers cannot be imported next to it"
        ) from error


def _kind(class_name: str, source: str) -> PipelineKind:
    if class_name not in PIPELINES:
        raise TypeError(f"{source} is a {class_name or 'nameless pipeline'}; expected one of {', '.join(PIPELINES)}")
    return PIPELINES[class_name]


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the bars that diffusers and transformers draw for every component; the commands have their own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _first_attribute(owner: Any, names: tuple[str, ...], default: int) -> Any:
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), default)
