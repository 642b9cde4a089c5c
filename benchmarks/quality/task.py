"""What `run.py` trains and measures on: sizes, clips on the device, held-out losses, the dense model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pixel_wan import HELD_OUT_SIGMAS, TEXT_DIM, PixelSettings, build_model, predict, training_loss
from render import clip_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.lab.train.objective import add_noise, flow_matching_loss, sample_sigmas
from foveal.lab.train.optimization import build_optimizer, parameter_groups

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHARD_BYTES = 149 * 2**20 // 10
SAVED_WINDOWS = 8  # of the held-out ones, beside the weights that are returned
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Scale:
    """How large everything is. The first `held_out_clips` clips are held out, the others trained on."""

    demo: PixelSettings
    block: int = 64
    clips: int = 352
    clip_frames: int = 260
    held_out_clips: int = 16
    windows: int = 64
    pixel_step: int = 1
    evaluation_batch: int = 8

    @classmethod
    def full(cls) -> Scale:
        return cls(dataclasses.replace(PixelSettings.for_device("cuda"), height=128, width=224, frames=9))

    @classmethod
    def tiny(cls) -> Scale:
        demo = dataclasses.replace(Scale.full().demo, height=32, width=56, frames=3, num_heads=2, num_layers=2)
        return cls(demo, 16, clips=6, clip_frames=48, held_out_clips=4, windows=8, pixel_step=4)

    @property
    def offsets(self) -> Tensor:
        """Clip frames of a window, from its first."""
        return torch.arange(self.demo.frames) * self.demo.stride


def to_video(frames: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def held_out_frames(scale: Scale, clips: np.ndarray) -> np.ndarray:
    """uint8 [windows, F, H, W, 3]: clip by clip, then the next window of each clip."""
    per_clip = scale.windows // scale.held_out_clips
    last = scale.clip_frames - int(scale.offsets[-1]) - 14
    starts = torch.linspace(20, last, per_clip).long()
    index = [(starts[k // scale.held_out_clips] + scale.offsets).numpy() for k in range(scale.windows)]
    return np.stack([clips[k % scale.held_out_clips][frames] for k, frames in enumerate(index)])


class Clips:
    """The training clips in the device's memory, and the held-out windows."""

    def __init__(self, scale: Scale, work: Path, device: torch.device) -> None:
        self.scale, self.device = scale, device
        clips = np.load(clip_file(work), mmap_mode="r")
        self.held_out = torch.from_numpy(held_out_frames(scale, clips))
        trained = range(scale.held_out_clips, len(clips))
        self.frames = torch.empty((len(trained), *clips.shape[1:]), dtype=torch.uint8, device=device)
        for place, number in enumerate(trained):
            self.frames[place] = torch.from_numpy(np.array(clips[number])).to(device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """(video, noise, sigmas) without end, the same sequence for the same seed on one kind of device."""
        host = torch.Generator().manual_seed(seed)
        on_device = torch.Generator(self.device).manual_seed(seed)
        demo, offsets = self.scale.demo, self.scale.offsets
        while True:
            clip = torch.randint(len(self.frames), (demo.batch, 1), generator=host)
            start = torch.randint(self.frames.shape[1] - int(offsets[-1]), (demo.batch, 1), generator=host)
            sigmas = sample_sigmas(demo.batch, shift=demo.shift, generator=host).to(self.device)
            video = to_video(self.frames[clip.to(self.device), (start + offsets).to(self.device)])
            yield video, torch.randn(video.shape, generator=on_device, device=self.device), sigmas


class HeldOut:
    """Losses of the held-out windows, each with one noise at every noise level."""

    def __init__(self, frames: Tensor, scale: Scale, device: torch.device) -> None:
        self.scale, self.video = scale, to_video(frames.to(device))
        generator = torch.Generator().manual_seed(scale.demo.seed + 1000)
        self.noise = torch.randn(self.video.shape, generator=generator).to(device)

    def noisy(self, windows: slice, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_t, target, sigmas, first frame) of some windows."""
        video = self.video[windows]
        sigmas = torch.full((len(video),), sigma, device=video.device)
        return *add_noise(video, self.noise[windows], sigmas), sigmas, video[:, :, :1]

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """float32 [windows, levels] on the CPU."""
        model.eval()
        step, levels = self.scale.evaluation_batch, []
        for sigma in HELD_OUT_SIGMAS:
            parts = []
            for first in range(0, len(self.video), step):
                noisy, target, sigmas, given = self.noisy(slice(first, first + step), sigma)
                parts.append(flow_matching_loss(predict(model, noisy, sigmas, given), target))
            levels.append(torch.cat(parts))
        return torch.stack(levels, 1).cpu()


@dataclass
class Trained:
    """What `fit` measured; `held_out` has (steps taken, losses [windows, levels])."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def median_step_seconds(self) -> float:
        return sorted(self.step_seconds)[len(self.step_seconds) // 2]


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    learning_rate: float,
    floor: float = 0.0,
    fast: list[nn.Parameter] | None = None,
    fast_learning_rate: float | None = None,
    evaluate: Callable[[nn.Module], Tensor] | None = None,
    evaluations: int = 2,
    cap: float | None = None,
    deadline: float = math.inf,
) -> Trained:
    """AdamW with a linear warm-up over a tenth of the steps and a linear decay, as the demo trains.

    In a process group, gradients are averaged over its ranks; rank 0 alone evaluates.

    Args:
        floor: of the rates, as a share of their peaks.
        fast, fast_learning_rate: parameters with a peak of their own.
        evaluate: called before the first step, and `evaluations` times on the way, the last one at the end.
        cap: seconds after which training is to have ended; the decay then follows the clock.
        deadline: time after which a TimeoutError is raised.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast = [p for p in fast or () if p.requires_grad] if fast_learning_rate is not None else []
    groups = parameter_groups(parameters, (fast, fast_learning_rate), learning_rate=learning_rate)
    optimizer = build_optimizer(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    ranks, warmup = (dist.get_world_size() if dist.is_initialized() else 1), max(1, steps // 10)
    if dist.is_initialized() and dist.get_rank():
        evaluate = None
    trained, started, progress, step, evaluated = Trained(), time.time(), 0.0, 0, 0
    if evaluate is not None:
        trained.held_out.append((0, evaluate(model)))
    model.train()
    while progress < 1:
        if time.time() > deadline:
            raise TimeoutError(f"out of time after {step} steps")
        begun = time.perf_counter()
        decay = floor + (1 - floor) * min(1.0, (1 - progress) * steps / max(1, steps - warmup))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / warmup, decay)
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(model, next(batches))
        loss.backward()
        report = torch.stack((loss.detach().double(), loss.new_tensor(time.time() - started, dtype=torch.float64)))
        if ranks > 1:
            average_gradients(parameters, ranks)
            dist.all_reduce(report)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        value, seconds = (report / ranks).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} at step {step}")
        optimizer.step()
        step += 1
        progress = max(step / steps, seconds / cap if cap else 0.0)
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)
        trained.step_seconds.append(time.perf_counter() - begun)
        trained.losses.append(value)
        if evaluate is not None and math.floor(min(progress, 1.0) * evaluations) > evaluated:
            evaluated = math.floor(min(progress, 1.0) * evaluations)
            trained.held_out.append((step, evaluate(model)))
            model.train()
    model.eval()
    return trained


def average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def fast_kernels(device: torch.device, model: nn.Module, batch: Batch) -> AbstractContextManager:
    """The context to run dense attention in: cuDNN's kernels first, where a training step with them works."""
    if device.type != "cuda":
        return nullcontext()
    try:
        with sdpa_kernel(KERNELS, set_priority=True):
            loss = training_loss(model, batch)
            loss.backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
    except (RuntimeError, FloatingPointError) as error:
        print(f"PyTorch's own choice of attention kernels, since cuDNN's fail here: {error}", flush=True)
        return nullcontext()
    finally:
        model.zero_grad(set_to_none=True)
    return sdpa_kernel(KERNELS, set_priority=True)


def dense_file(work: Path) -> Path:
    return work / "dense.safetensors"


def load_dense(scale: Scale, place: Path, device: torch.device) -> nn.Module:
    """The pretrained model, from a file of all its weights or a folder of those that `export` wrote."""
    model = build_model(scale.demo)
    if place.is_file():
        model.load_state_dict(load_file(place))
        return model.to(device).eval()
    weights = {}
    for shard in sorted(place.glob("dense-*.safetensors")):
        weights |= {name: tensor.float() for name, tensor in load_file(shard).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or sorted(missing) != sorted(set(model.state_dict()) - set(_kept(model))):
        raise ValueError(f"{place} does not hold the weights of this model; missing {missing[:3]}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing and ".norm_" not in name:
                parameter.zero_()
    return model.to(device).eval()


def _kept(model: nn.Module) -> list[str]:
    """Names of the weights that matter where the caption is one zero token: of cross-attention, its output's bias."""
    return [
        name
        for name in model.state_dict()
        if "text_embedder" not in name and (".attn2." not in name or name.endswith("to_out.0.bias"))
    ]


@torch.no_grad()
def export(model: nn.Module, frames: Tensor, folder: Path) -> None:
    """The weights in bfloat16, in files that travel, and some held-out windows.

    Softmax over one token is 1, so cross-attention adds a constant, whatever its queries and keys are.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    caption = next(model.parameters()).new_zeros(1, 1, TEXT_DIM)
    token = model.condition_embedder.text_embedder(caption)
    for number, block in enumerate(model.blocks):
        state[f"blocks.{number}.attn2.to_out.0.bias"] = block.attn2.to_out[0](block.attn2.to_v(token)).flatten()
    shards: list[dict[str, Tensor]] = [{}]
    for name in _kept(model):
        tensor = state[name].to("cpu", torch.bfloat16).contiguous()
        if sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"dense-{number}.safetensors")
    np.savez_compressed(folder / "windows.npz", frames=frames[:SAVED_WINDOWS].numpy())


def write_json(path: Path, content: object) -> None:
    """Whole or not at all, also while others write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=None, separators=(", ", ": ")) + "\n")
    os.replace(part, path)
