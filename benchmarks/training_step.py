"""A fine-tuning step of a Wan transformer with random weights: dense, SLA and VSA one after the other, in one run.

    python benchmarks/training_step.py                                    480p, 81 frames: 32,760 tokens
    python benchmarks/training_step.py --frames 61 --height 448           23,296 tokens
    python benchmarks/training_step.py --device cpu --no-compile --layers 2 --heads 2 --frames 9 --height 64 --width 96

The sizes are Wan2.1-1.3B's. What is timed is the step of `foveal train`: one sample, forward under bfloat16 autocast
with the blocks compiled and checkpointed, backward, clipping, fused AdamW on float32 weights. Reading data, VAE and
text encoder are left out. Dense attention, cross-attention included, runs on the fastest backend of
scaled_dot_product_attention for this shape, found first; so does the sparse models' cross-attention. The dense model
comes first, and once more at the end, so that a card that warms up shows. An arm counts only if its losses and
gradients are finite and its sparse parameters have gradients.

Needs torch, diffusers and, for the sparse arms on a GPU, triton.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal import SLAConfig, VideoGrid, VSAConfig, attention_cost, sparsify
from foveal.lab.bench.machine import machine
from foveal.lab.train.model import build_wan, compile_blocks, token_grid, velocity
from foveal.lab.train.objective import add_noise, flow_matching_loss
from foveal.lab.train.optimization import StepReport, build_optimizer, optimizer_step, warmup_and_decay
from foveal.lab.train.settings import WanArchitecture
from foveal.lab.train.throughput import peak_flops, sample_flops
from foveal.methods.base import Config

ARMS: dict[str, Config | None] = {
    "dense": None,
    "sla 5% 64x64 marginal": SLAConfig(keep_ratio=0.05, drop_ratio=0.10),
    "sla 5% 128x64 all": SLAConfig(keep_ratio=0.05, drop_ratio=0.0, block_q=128, linear_scope="all"),
    "vsa 12.5%": VSAConfig(keep_ratio=0.125, tile="auto"),
    "vsa 12.5% wide": VSAConfig(keep_ratio=0.125, tile="wide"),
    "vsa 10%": VSAConfig(keep_ratio=0.10, tile="auto"),
    "vsa 10% wide": VSAConfig(keep_ratio=0.10, tile="wide"),
    "dense again": None,
}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# argparse formats its help texts.
ARM_NAMES = ", ".join(ARMS).replace("%", "%%")
# Of the latents against pixels and frames, as Wan's VAE has them.
SPATIAL, TEMPORAL = 8, 4
TEXT_LENGTH = 512


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest_backend(grid: VideoGrid, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward of dense attention at this shape by backend, the fastest first."""
    shape = (1, options.heads, grid.num_tokens, options.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times = []
                for _ in range(4):
                    synchronize(device)
                    start = time.perf_counter()
                    output = F.scaled_dot_product_attention(query, key, value)
                    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
                    synchronize(device)
                    times.append(time.perf_counter() - start)
            found[name] = statistics.median(times[1:])
        except RuntimeError:
            # Not for this device, or not for this shape.
            continue
    return dict(sorted(found.items(), key=lambda item: item[1]))


class Step:
    """One arm: a model, its optimizer, and a sample that never changes."""

    def __init__(self, config: Config | None, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        sizes = WanArchitecture(
            num_layers=options.layers, num_heads=options.heads, head_dim=options.head_dim, ffn_dim=options.ffn_dim
        )
        with device:
            self.model = build_wan(sizes)
        if config is not None:
            sparsify(self.model, config)
        self.model.enable_gradient_checkpointing()
        if options.compile:
            compile_blocks(self.model)
        self.model.train()
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer([{"params": self.parameters, "lr": 1e-5}])
        self.schedule = warmup_and_decay(self.optimizer, steps=1000, warmup=100)
        generator = torch.Generator(device).manual_seed(1)
        self.clean = torch.randn(latent_shape(options), generator=generator, device=device)
        self.noise = torch.randn(self.clean.shape, generator=generator, device=device)
        self.text = {"prompt_embeds": torch.randn(1, TEXT_LENGTH, 4096, generator=generator, device=device)}
        self.sigmas = torch.full((1,), 0.7, device=device)

    def run(self) -> StepReport:
        noisy, target = add_noise(self.clean, self.noise, self.sigmas)
        with torch.autocast(self.clean.device.type, dtype=torch.bfloat16):
            predicted = velocity(self.model, noisy, self.sigmas, self.text)
        loss = flow_matching_loss(predicted, target).mean()
        return optimizer_step(
            self.parameters, self.optimizer, self.schedule, [loss], accept=lambda loss, gradient_norm: True
        )


def latent_shape(options: argparse.Namespace) -> tuple[int, ...]:
    frames = (options.frames - 1) // TEMPORAL + 1
    return (1, 16, frames, options.height // SPATIAL, options.width // SPATIAL)


def grid_of(options: argparse.Namespace) -> VideoGrid:
    _, _, frames, height, width = latent_shape(options)
    return VideoGrid(frames, height // 2, width // 2)


def measure(config: Config | None, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """One arm's seconds a step and memory; the model is gone afterwards."""
    torch.compiler.reset()
    started = time.perf_counter()
    step = Step(config, options, device)
    reports = [step.run() for _ in range(options.warmup)]
    synchronize(device)
    preparing = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(options.steps):
        synchronize(device)
        start = time.perf_counter()
        reports.append(step.run())
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    finite = all(bool(torch.isfinite(torch.tensor([report.loss, report.gradient_norm])).all()) for report in reports)
    sparse = [p for name, p in step.model.named_parameters() if ".processor." in name]
    learning = all(bool(p.grad is not None and p.grad.ne(0).any()) for p in sparse)
    flops = sample_flops(step.model, token_grid(step.model, step.clean.shape))
    median = statistics.median(seconds)
    peak = peak_flops(device)
    return {
        "config": None if config is None else config.to_dict(),
        "attention_flops_reduction": attention_cost(
            config, grid=grid_of(options), heads=options.heads, head_dim=options.head_dim
        ).reduction,
        "passed": finite and learning,
        "loss": [report.loss for report in reports],
        "seconds": seconds,
        "median_seconds": median,
        "model_flops": flops,
        "mfu": None if peak is None else flops / (median * peak),
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "preparing_seconds": preparing,
        "parameters": sum(p.numel() for p in step.parameters),
    }


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=81, help="of the video, 4 n + 1")
    parser.add_argument("--height", type=int, default=480, help="in pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=832, help="in pixels, a multiple of 16")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ffn-dim", type=int, default=8960)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed, compilation among them")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=ARM_NAMES)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the blocks eagerly")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the figures here; under benchmarks/results otherwise")
    options = parser.parse_args(arguments)
    if options.frames % TEMPORAL != 1 or options.height % (2 * SPATIAL) or options.width % (2 * SPATIAL):
        parser.error("frames must be 4 n + 1, height and width multiples of 16")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    grid = grid_of(options)
    backends = fastest_backend(grid, options, device)
    print(f"{grid.num_tokens:,} tokens; dense attention by {backends}", flush=True)
    release(device)
    # The fastest first; the others stand in where it does not take a shape of cross-attention.
    priority = [BACKENDS[name] for name in backends]
    results = {}
    for name in options.arms:
        with sdpa_kernel(priority, set_priority=True) if priority else contextlib.nullcontext():
            try:
                results[name] = measure(ARMS[name], options, device)
            except torch.OutOfMemoryError as error:
                results[name] = {"passed": False, "error": str(error).split(". ")[0]}
        release(device)
        row = results[name]
        if not row["passed"]:
            print(f"{name:24} FAILED {row.get('error', 'the loss or a gradient is not finite, or a gradient is 0')}")
            continue
        memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:7.1f} GiB"
        dense = results.get("dense", {}).get("median_seconds")
        ratio = f"{dense / row['median_seconds']:6.2f}x" if dense else ""
        used = "" if row["mfu"] is None else f"   MFU {row['mfu']:.0%}"
        print(f"{name:24} {row['median_seconds']:8.3f} s a step {ratio} {memory}{used}", flush=True)

    shape = {name: value for name, value in vars(options).items() if name not in ("json", "commit", "device")}
    found = {
        "what": "seconds of a fine-tuning step, one sample; medians",
        "tokens": grid.num_tokens,
        "settings": shape,
        "machine": machine(device, options.commit),
        "dense_backends_seconds": backends,
        "arms": results,
    }
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    path = options.json or Path(__file__).parent / "results" / f"training-step-{grid.num_tokens}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(path)
    if not all(row["passed"] for row in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
