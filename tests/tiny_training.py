"""The smallest run of `foveal train` that has everything, and how to start it in this process or in another."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from foveal import SLAConfig
from foveal.lab.data.dataset import write_latent_dataset
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.recipes import parse
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

ARCHITECTURE = WanArchitecture(
    num_layers=2,
    num_heads=2,
    head_dim=16,
    ffn_dim=32,
    patch=2,
    channels=4,
    text_dim=8,
    freq_dim=16,
    rope_max_seq_len=32,
)
SPARSE = SLAConfig(keep_ratio=0.4, drop_ratio=0.1, block_q=16, block_k=16)
LATENT = (4, 3, 8, 12)


def write_data(folder: Path, count: int = 10, samples_per_shard: int = 64) -> Path:
    """Random latents with random captions, each from a file of its own."""
    generator = torch.Generator().manual_seed(3)
    samples = [
        {
            "latents": torch.randn(LATENT, generator=generator),
            "prompt_embeds": torch.randn(5, 8, generator=generator),
            "caption": f"clip {i}",
            "id": f"{i}.mp4#0",
        }
        for i in range(count)
    ]
    settings = {"space": "latent", "fps": 12, "model": None}
    write_latent_dataset(
        folder,
        samples,
        settings=settings,
        empty_prompt={"prompt_embeds": torch.zeros(5, 8)},
        samples_per_shard=samples_per_shard,
    )
    return folder


def config(folder: Path, **changes) -> TrainingConfig:
    """A run on `folder`/data into `folder`/run; changes as "steps" or "optimizer__trainable"."""
    base = TrainingConfig(
        model=ModelSettings(architecture=ARCHITECTURE, gradient_checkpointing=False),
        sparsity=SparsitySettings(SPARSE),
        data=DataSettings(folder=folder / "data", held_out=2, workers=0),
        output=folder / "run",
        steps=6,
        batch_size=2,
        objective=ObjectiveSettings(shift=2.0),
        optimizer=OptimizerSettings(learning_rate=2e-3, new_learning_rate=1e-2, warmup=2, ema_decay=0.9),
        evaluation=EvaluationSettings(every=3, sigmas=(0.3, 0.8), sampling_steps=2),
        checkpoint=CheckpointSettings(every=2, keep=2),
        precision="no",
        device="cpu",
        tracker="none",
    )
    whole = {name: value for name, value in changes.items() if "__" not in name}
    parts: dict[str, dict] = {}
    for name in changes.keys() - whole.keys():
        part, field = name.split("__")
        parts.setdefault(part, {})[field] = changes[name]
    for part, fields in parts.items():
        whole[part] = dataclasses.replace(whole.get(part, getattr(base, part)), **fields)
    return base.replace(**whole)


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    """One figure of `metrics.jsonl` by step."""
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def small_tiny(*arguments: object) -> list[str]:
    """Arguments of `foveal train`: the tiny recipe, smaller yet and without a tracker, and these."""
    smaller = ["--data.height", "16", "--data.width", "24", "--data.frames", "4", "--tracker", "none"]
    return ["tiny", *smaller, *map(str, arguments)]


def run_here(*arguments: object) -> None:
    """`foveal train` with these in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run_training(parse(small_tiny(*arguments)))


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    """The same in another process or some, its messages piped."""
    python = [sys.executable, "-c", "import sys; from foveal.lab.cli import main; sys.exit(main())"]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        python = [*launcher, "--no-python", *python]
    return subprocess.Popen(
        [*python, "train", *small_tiny(*arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
