"""What the page shows: a video, and query, key, and value of a model's layers while it denoises that video.

Shape legend: H heads, L tokens of the grid, N keys (the grid's and then text), D head dimension, n tokens in question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.lab.data.windows import read_video, to_model_range
from foveal.lab.encoding import encode_text, encode_video
from foveal.lab.inspect.capture import token_labels
from foveal.lab.inspect.probe import watch
from foveal.lab.inspect.statistics import sample
from foveal.lab.pipelines import step_callback
from foveal.lab.train.model import velocity
from foveal.lab.train.objective import add_noise
from foveal.layout import VideoGrid
from foveal.methods.base import Config, method_of
from foveal.methods.cost import attention_cost

# Query tokens sampled for a head's error and recall.
SAMPLED_TOKENS = 96
# (frames, height, width) of a scene where neither the user nor the model says one: a large model's own takes minutes.
SMALL = (17, 240, 416)
BRIGHTNESS = {1: 1.0, 0: 0.42, -1: 0.10}


@dataclass(frozen=True)
class Scene:
    """A video and the attention inputs of some layers.

    Attributes:
        title: a title to display.
        frames: uint8 [frames of the grid, height, width, 3], a picture of each of the grid's frames.
        grid: the token grid.
        layers: name to (query [1, H, L, D], key and value [1, H, N, D]), the video in raster order.
    """

    title: str
    frames: Tensor
    grid: VideoGrid
    layers: dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class View:
    """What one token sees of a scene, and what that costs.

    Attributes:
        labels: int8 [frames, height, width] of the grid: +1 read exactly, 0 through the global branch, -1 not at all.
        kept, blocks: how many key blocks the token's block reads exactly, and how many there are.
        recall: share of this token's attention mass in the blocks that it reads exactly.
        head_recall, head_error: recall over sampled tokens of the head, and |O_kept - O| / |O| over them.
        work: FLOPs of the method over those of dense attention, at this size.
    """

    labels: Tensor
    kept: int
    blocks: int
    recall: float
    head_recall: float
    head_error: float
    work: float


def clip_scene(
    loaded: Any, video: Path, *, size: tuple[int, int, int], noise_level: float, window: float = 0.5, seed: int = 0
) -> Scene:
    """A video model, denoising a window of a clip, without a caption.

    Args:
        loaded: a Wan pipeline from `foveal.lab.pipelines.load_pipeline`.
        video: any video file.
        size: (frames, height, width) in pixels of the window.
        noise_level: sigma in (0, 1).
        window: the place in the clip, from 0 to 1.
        seed: the seed of the noise.

    Raises:
        FileNotFoundError: the video does not exist.
        ValueError: the video cannot be decoded or is too short, or the noise level is out of range.
    """
    if not 0.0 < noise_level < 1.0:
        raise ValueError(f"noise_level must be above 0 and below 1, got {noise_level}")
    frames, height, width = size
    clip = read_video(video, height=height, width=width)
    if len(clip) < frames:
        raise ValueError(f"{Path(video).name} has {len(clip)} frames, but {frames} are needed")
    start = round(min(max(window, 0.0), 1.0) * (len(clip) - frames))
    shown = clip[start : start + frames]
    latents = encode_video(loaded, to_model_range(shown)[None]).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    sigma = torch.full((1,), noise_level, device=latents.device)
    noisy, _ = add_noise(latents, noise, sigma)
    model, text = loaded.pipe.transformer, encode_text(loaded, [""])
    layers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def look(component, layer, progress, query, key, value, grid) -> None:
        layers[layer] = tuple(x.float().cpu() for x in (query, key, value))

    with torch.no_grad():
        watch(model, lambda: velocity(model, noisy.to(model.dtype), sigma, text), look)
    grid = loaded.sizes.grid(frames, height, width)
    pictures = shown.permute(0, 2, 3, 1)[_middles(grid, frames)].contiguous()
    return Scene(f"{Path(video).name}, noise level {noise_level:g}", pictures, grid, layers)


def _middles(grid: VideoGrid, frames: int) -> Tensor:
    """Which of the pixel frames to show for each of the grid's, that of the middle of those that it stands for."""
    return ((torch.arange(grid.frames) + 0.5) * frames / grid.frames).long()


def scene_size(loaded: Any, size: tuple[int | None, int | None, int | None]) -> tuple[int, int, int]:
    """(frames, height, width) in pixels: as asked for, else the model's own if it ships one, else a small one."""
    names = ("num_frames", "height", "width")
    own = [loaded.defaults.get(name, small) for name, small in zip(names, SMALL, strict=True)]
    return tuple(default if asked is None else asked for asked, default in zip(size, own, strict=True))


def check_request(
    loaded: Any,
    prompt: str | None,
    *,
    step: int,
    size: tuple[int | None, int | None, int | None],
    num_inference_steps: int,
) -> None:
    """Check the request for a scene against a pipeline or its outline.

    Args:
        loaded: the pipeline.
        prompt: to generate from; None looks at clips.
        step, size, num_inference_steps: as in `pipeline_scene`; None in a size takes `scene_size`'s.

    Raises:
        ValueError: a pipeline that cannot look at clips, and as in `pipeline_scene`.
    """
    if prompt is None and loaded.kind.family != "wan":
        raise ValueError(f"only Wan pipelines look at clips, {loaded.source} is a {loaded.kind.name}; give a prompt")
    if not 0 <= step < num_inference_steps:
        raise ValueError(f"step must be in [0, {num_inference_steps}), got {step}")
    loaded.sizes.check(*scene_size(loaded, size))


def pipeline_scene(
    loaded: Any,
    prompt: str,
    *,
    step: int,
    size: tuple[int, int, int],
    num_inference_steps: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Scene:
    """A diffusers pipeline, at one denoising step of a video that it generates.

    Args:
        loaded: from `foveal.lab.pipelines.load_pipeline`.
        prompt: the text.
        step: which denoising step's attention to keep, from 0.
        size: (frames, height, width) in pixels.
        num_inference_steps: denoising steps; the frames shown are those of the finished video.
        seed: the seed of the noise.
        on_step: called after each denoising step.

    Raises:
        ValueError: the pipeline does not take this size, or the schedule does not have this step.
    """
    check_request(loaded, prompt, step=step, size=size, num_inference_steps=num_inference_steps)
    arguments = dict(zip(("num_frames", "height", "width"), size, strict=True))
    if loaded.kind.is_image:
        del arguments["num_frames"]
    layers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    grids: list[VideoGrid] = []

    def look(component, layer, progress, query, key, value, grid) -> None:
        layers[layer] = tuple(x.float().cpu() for x in (query, key, value))
        grids.append(grid)

    made: list[Tensor] = []

    def run() -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        output = loaded.pipe(
            prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="pt",
            callback_on_step_end=step_callback(on_step),
            **arguments,
        )
        made.append(output[0][0] if not loaded.kind.is_image else output[0])

    watch(loaded.pipe, run, look, steps=(step,))
    video = (made[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    places = _middles(grids[0], len(video))
    return Scene(f"{prompt}, step {step} of {num_inference_steps}", video[places], grids[0], layers)


@torch.no_grad()
def view(scene: Scene, config: Config, *, layer: str, head: int, token: tuple[int, int, int]) -> View:
    """What a token sees under a configuration.

    Args:
        scene: from `clip_scene` or `pipeline_scene`.
        config: an `SLAConfig` or `VSAConfig`.
        layer: a name in `scene.layers`.
        head: the head's index, from 0.
        token: (frame, row, column) in the grid.

    Raises:
        ValueError: the scene does not have this layer, head, or token.
    """
    if layer not in scene.layers:
        raise ValueError(f"unknown layer {layer!r}; expected one of {tuple(scene.layers)}")
    query, key, value = scene.layers[layer]
    heads, tokens, head_dim = query.shape[1:]
    if not 0 <= head < heads:
        raise ValueError(f"head must be in [0, {heads}), got {head}")
    if any(not 0 <= place < side for place, side in zip(token, scene.grid.shape, strict=True)):
        raise ValueError(f"token must lie in the grid {scene.grid.shape}, got {token}")
    attention = method_of(config).build(config, heads * head_dim, heads, head_dim, "auto")
    # The selection among the video's blocks. Every token reads the text.
    selection = attention.select(query, key[:, :, :tokens], grid=scene.grid)
    labels = token_labels(selection, attention, scene.grid, token=token, head=head)
    places = attention.token_places(scene.grid)
    kept = int(selection.critical_count[0, head, places[_index(token, scene.grid)] // selection.block_q])

    some = torch.cat((torch.tensor([_index(token, scene.grid)]), sample(tokens, SAMPLED_TOKENS)))
    weights = ((query[0, head, some].float() * head_dim**-0.5) @ key[0, head].float().T).softmax(-1)
    row_labels = selection.labels()[0, head][places[some] // selection.block_q][:, places // selection.block_k]
    read = torch.cat((row_labels == 1, row_labels.new_ones(len(some), key.shape[2] - tokens, dtype=torch.bool)), 1)
    inside = weights * read
    exact = weights @ value[0, head].float()
    part = (inside @ value[0, head].float()) / inside.sum(-1, keepdim=True).clamp_min(1e-30)
    recalls = inside.sum(-1)
    cost = attention_cost(config, grid=scene.grid, heads=heads, head_dim=head_dim)
    return View(
        labels=labels,
        kept=kept,
        blocks=selection.num_key_blocks,
        recall=float(recalls[0]),
        head_recall=float(recalls[1:].mean()),
        head_error=float((part - exact)[1:].norm() / exact[1:].norm()),
        work=cost.flops_ratio,
    )


def _index(token: tuple[int, int, int], grid: VideoGrid) -> int:
    return (token[0] * grid.height + token[1]) * grid.width + token[2]


class Sheet:
    """Arrange the frames of a scene in rows, so that one picture shows all of them and a click names a token.

    Args:
        scene: the scene to show.
        columns: frames per row; None makes the sheet about as wide as high.
        width: the approximate width of the whole sheet in pixels.
    """

    GAP = 6

    def __init__(self, scene: Scene, columns: int | None = None, width: int = 1080) -> None:
        count, height, across = scene.frames.shape[:3]
        self.scene = scene
        self.columns = columns or max(1, min(count, round((count * height / across * 1.6) ** 0.5) or 1))
        self.factor = max(1, (width // self.columns - self.GAP) // across)
        self.cell = (height * self.factor + self.GAP, across * self.factor + self.GAP)

    def draw(self, labels: Tensor, token: tuple[int, int, int]) -> Tensor:
        """uint8 [height, width, 3]: tokens bright, dim, or dark by label, with a red frame around the token."""
        frames, grid = self.scene.frames, self.scene.grid
        count, height, width = frames.shape[:3]
        brightness = torch.zeros(labels.shape)
        for label, level in BRIGHTNESS.items():
            brightness[labels == label] = level
        rows, columns = self._pixels(height, grid.height), self._pixels(width, grid.width)
        lit = (frames.float() * brightness[:, rows][:, :, columns][..., None]).round().to(torch.uint8)
        lit = lit.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        self._mark(lit[token[0]], token)
        lines = -(-count // self.columns)
        sheet = torch.full((lines * self.cell[0], self.columns * self.cell[1], 3), 255, dtype=torch.uint8)
        for index, frame in enumerate(lit):
            top, left = (index // self.columns) * self.cell[0], (index % self.columns) * self.cell[1]
            sheet[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
        return sheet

    def token_at(self, x: int, y: int) -> tuple[int, int, int] | None:
        """The token under a pixel of the sheet; None for a gap."""
        grid = self.scene.grid
        height, width = (side * self.factor for side in self.scene.frames.shape[1:3])
        frame = (y // self.cell[0]) * self.columns + x // self.cell[1]
        down, across = y % self.cell[0], x % self.cell[1]
        if frame >= grid.frames or x // self.cell[1] >= self.columns or down >= height or across >= width:
            return None
        return frame, down * grid.height // height, across * grid.width // width

    @staticmethod
    def _pixels(pixels: int, tokens: int) -> Tensor:
        return torch.arange(pixels) * tokens // pixels

    def _mark(self, frame: Tensor, token: tuple[int, int, int]) -> None:
        grid = self.scene.grid
        height, width = frame.shape[:2]
        top, bottom = token[1] * height // grid.height, (token[1] + 1) * height // grid.height
        left, right = token[2] * width // grid.width, (token[2] + 1) * width // grid.width
        thick = max(1, self.factor // 2)
        red = torch.tensor([230, 40, 40], dtype=torch.uint8)
        for rows, columns in (
            (slice(top, top + thick), slice(left, right)),
            (slice(bottom - thick, bottom), slice(left, right)),
            (slice(top, bottom), slice(left, left + thick)),
            (slice(top, bottom), slice(right - thick, right)),
        ):
            frame[rows, columns] = red
