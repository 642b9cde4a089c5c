"""Steps of `foveal train` on one GPU and on several: losses must agree, tokens a second are compared.

    python benchmarks/train_scaling.py --json one.json
    torchrun --nproc-per-node 2 benchmarks/train_scaling.py --json two.json --against one.json
    torchrun --nproc-per-node 2 benchmarks/train_scaling.py --parallel ddp --context-parallel 2 ...

The trainer itself runs, on random latents of a 480p video of 81 frames (32,760 tokens), with Wan2.1-1.3B's width and
random weights: float32 weights, bfloat16 autocast, gradient checkpointing, fused AdamW, SLA. Several processes shard
the model (FSDP2) or copy it, and divide the samples, or with `--context-parallel` the tokens of each. The step's batch
is the same whatever the number of processes: with one, gradients accumulate. Few layers, so that checkpoint and export
are small; what a layer costs does not depend on their number.

With `--recipe minimax-h3-vsa-router`, or another of MiniMax-H3's, that recipe runs on a model of its full width with
random weights and `--layers` blocks, and on random latents of video and sound of `--seconds`: LoRA and the new
parameters, taught by the dense model, the frozen weights in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from foveal import SLAConfig
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.data.dataset import write_latent_dataset
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.recipes import RECIPES
from foveal.lab.train.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SparsitySettings,
    WanArchitecture,
)
from foveal.lab.train.trainer import run_training

# Relative, of a loss. The batch is split otherwise, and bfloat16 gradients are summed in another order.
SAME = 2e-3
TEXT_TOKENS = 256


def write_data(folder: Path, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (16, (options.frames - 1) // 4 + 1, options.height // 8, options.width // 8)
    text = torch.randn(512, 4096, generator=generator).bfloat16()
    samples = [
        {
            "latents": torch.randn(shape, generator=generator),
            "prompt_embeds": text,
            "caption": "noise",
            "id": f"noise-{number}#0",
        }
        for number in range(options.batch + 1)
    ]
    write_latent_dataset(folder, samples, empty_prompt={"prompt_embeds": torch.zeros_like(text)})


def write_minimax_h3(base: Path, data: Path, options: argparse.Namespace) -> None:
    """A model's folder without its weights, and samples of the shape that its pipeline packs."""
    from diffusers import MiniMaxH3Scheduler
    from minimax_h3 import build, pack

    smoke = options.device == "cpu"
    model = build(1, torch.device("cpu" if smoke else "cuda"), smoke)
    request = pack(options.seconds, TEXT_TOKENS, model, smoke)
    model.register_to_config(num_layers=options.layers)
    config = model.config
    model.save_config(base / "transformer")
    for part, shift in (("scheduler", 12.0), ("audio_scheduler", 3.0)):
        MiniMaxH3Scheduler(shift=shift).save_pretrained(base / part)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(TEXT_TOKENS, config.text_dim, generator=generator).bfloat16()
    mask = torch.ones(TEXT_TOKENS).long()
    samples = [
        {
            "latents": torch.randn(config.in_channels, *request.latent, generator=generator),
            "audio_latents": torch.randn(
                2, config.audio_in_channels, request.shape["audio_tokens"] // 2, generator=generator
            ),
            "prompt_embeds": text,
            "prompt_attention_mask": mask,
            "caption": "noise",
            "id": f"noise-{number}#0",
        }
        for number in range(options.batch + 1)
    ]
    empty = {"prompt_embeds": torch.zeros_like(text), "prompt_attention_mask": torch.zeros_like(mask)}
    write_latent_dataset(data, samples, settings={"space": "latent", "fps": 24, "model": None}, empty_prompt=empty)


def build_where_it_is_loaded(options: argparse.Namespace) -> None:
    """The trainer gets random weights instead of those of a file, which would have 66 GB for all 50 blocks."""
    from diffusers import MiniMaxH3Transformer3DModel
    from minimax_h3 import build

    def from_pretrained(*args: Any, **settings: Any) -> torch.nn.Module:
        smoke = options.device == "cpu"
        return build(options.layers, torch.device("cpu" if smoke else "cuda"), smoke).train().requires_grad_(True).cpu()

    MiniMaxH3Transformer3DModel.from_pretrained = from_pretrained


def recipe(base: Path, data: Path, output: Path, options: argparse.Namespace) -> TrainingConfig:
    """A recipe of MiniMax-H3, on that model."""
    found = RECIPES[options.recipe]()
    return dataclasses.replace(
        found,
        model=dataclasses.replace(found.model, path=str(base), compile=options.compile),
        data=dataclasses.replace(found.data, folder=data, held_out=1),
        output=output,
        **shared(options),
    )


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that both kinds of runs have in common."""
    return {
        "steps": options.steps,
        "batch_size": options.batch,
        "evaluation": EvaluationSettings(every=0, sigmas=(0.5,)),
        "checkpoint": CheckpointSettings(every=10 * options.steps),
        "parallel": options.parallel,
        "context_parallel": options.context_parallel,
        "device": options.device,
        "tracker": "none",
    } | ({"precision": "no"} if options.recipe and options.device == "cpu" else {})


def configuration(data: Path, output: Path, options: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        model=ModelSettings(
            architecture=WanArchitecture(num_layers=options.layers, num_heads=options.heads, ffn_dim=options.ffn_dim),
            compile=options.compile,
            keep_exchanged=options.keep_exchanged,
        ),
        sparsity=SparsitySettings(SLAConfig(keep_ratio=0.05, drop_ratio=0.10)),
        data=DataSettings(folder=data, held_out=1, caption_dropout=0.0),
        output=output,
        objective=ObjectiveSettings(shift=3.0),
        optimizer=OptimizerSettings(learning_rate=1e-4, new_learning_rate=1e-3, warmup=1),
        **shared(options),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12, help="of 128")
    parser.add_argument("--ffn-dim", type=int, default=8960)
    parser.add_argument("--batch", type=int, default=2, help="samples in a step, over all processes")
    parser.add_argument("--steps", type=int, default=6, help="the first two are not timed")
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--context-parallel", type=int, default=1, help="processes that divide a sample's tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument(
        "--keep-exchanged",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compiled blocks keep what came by exchanges for the backward",
    )
    names = [name for name in RECIPES if name.startswith("minimax-h3")]
    parser.add_argument("--recipe", choices=names, help="train MiniMax-H3 by it, and not Wan")
    parser.add_argument("--seconds", type=float, default=5.0, help="of MiniMax-H3's clips")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="an earlier run's file, whose losses must be the same")
    options = parser.parse_args(arguments)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Folders beside the file that will be written: all processes know them.
    base, data, output = (options.json.with_suffix(suffix) for suffix in (".base", ".data", ".run"))
    if rank == 0:
        write_minimax_h3(base, data, options) if options.recipe else write_data(data, options)
    while not (data / "index.json").exists():
        time.sleep(0.1)
    if options.recipe:
        build_where_it_is_loaded(options)
    run_training(recipe(base, data, output, options) if options.recipe else configuration(data, output, options))
    if rank:
        return
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for folder in (base, data, output):
        shutil.rmtree(folder, ignore_errors=folder == base)
    steps = [line for line in lines if "loss" in line]
    results = {
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "against")},
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.commit),
        "processes": ranks,
        "losses": [line["loss"] for line in steps],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps[2:]),
    }
    if torch.cuda.is_available():
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if options.against:
        former = json.loads(options.against.read_text())
        results["scaling"] = results["tokens_per_second"] / former["tokens_per_second"]
        results["one_process"] = former
        pairs = zip(results["losses"], former["losses"], strict=True)
        results["largest_relative_difference"] = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    write_json(options.json, results)
    print({name: value for name, value in results.items() if name not in ("settings", "machine")})
    if options.against and not results["largest_relative_difference"] < SAME:
        raise SystemExit("the losses differ by more than rounding")


if __name__ == "__main__":
    main()
