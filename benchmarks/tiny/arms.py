"""Fine-tunes the tiny model's transformer with dense, sparse, linear, and pooled attention on equal batches.

    python benchmarks/tiny/arms.py train --work WORK --output FILE.json --seeds 0 1 2
    python benchmarks/tiny/arms.py table FILE.json

WORK is that of `make.py` with its latents, its VAE, and its transformer. A run is an arm and a seed; the seed picks the
batches and their noise, and all arms share them. All weights train, those that conversion adds at the same rate unless
the arm's name says otherwise. `table` compares held-out losses, paired by clip and noise level, and shows how far
velocities and videos are from those of the dense checkpoint. FILE gains a run as soon as it has ended, and what it has
is not run again. With `--scratch` arms begin with random weights; the checkpoint then is what they are compared with.
With `--distillation`, a share of the loss is that against the velocity of the dense checkpoint.
Several processes, each with a file of its own, take `--share 0/2` and `--share 1/2` of the runs.

The cubes arms differ in nothing but their branches: the same exact cubes, with and without the coarse branch (VSA's),
the linear branch (SLA's), or both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import model as parts
import torch
from arms_budgets import budgets_by_head
from arms_quality import DenseCheckpoint
from arms_table import levels, quality, table
from common import DEVICE, machine
from safetensors.torch import load_file
from torch import nn
from train_transformer import SIGMAS, Data, Step, batches, loss_of, taught_loss

import foveal
from foveal import SLA2Config, SLAConfig, SLAVSAConfig, VideoGrid, VSAConfig, attention_cost, sparsify
from foveal.lab.train.model import anneal, compile_blocks
from foveal.lab.train.settings import Annealing
from foveal.methods.base import Config
from foveal.models.processor import sparse_processors


class Arm(NamedTuple):
    """A method, the rate of the parameters that it adds, over that of the others, and how its gates begin.

    `start`: by a word in their names, the constant that gates begin with, where the method has another. `frozen`: words
    in the names of those that stay so. `annealed`: dense for an eighth of the steps, then four, three, and two times as
    many cubes, an eighth each, and the configuration's for the second half (VSA, arXiv 2505.13389). `budgeted`: each
    head of each layer has a share of its own, see `arms_budgets.py`.
    """

    config: Config | None = None
    added_rate: float = 1.0
    start: Mapping[str, float] = MappingProxyType({})
    frozen: tuple[str, ...] = ()
    annealed: bool = False
    budgeted: bool = False

    def keep_at(self, model: nn.Module, step: int, steps: int) -> float | None:
        """Sets what layers keep in a step, from 0, of an annealed arm, and returns it; None while dense."""
        keep = self.config.keep_ratio
        eighth = max(1, steps // 8)
        return anneal(model, self.config, Annealing(4 * keep, keep, eighth, eighth), step + 1)

    def begin(self, model: nn.Module, budgets: Mapping[str, tuple[float, ...]] | None = None) -> list[nn.Parameter]:
        """Converts a model, with these shares of the layers' heads. Its new parameters that train."""
        if self.config is None:
            return []
        layers = {name: self.config.replace(keep_ratio=ratios) for name, ratios in (budgets or {}).items()}
        sparsify(model, None if layers else self.config, layers=layers or None)
        own = [pair for processor in sparse_processors(model).values() for pair in processor.named_parameters()]
        for name, parameter in own:
            for word, value in self.start.items():
                if word in name:
                    nn.init.constant_(parameter, value if name.endswith("bias") else 0.0)
            parameter.requires_grad_(not any(word in name for word in self.frozen))
        return [parameter for _, parameter in own if parameter.requires_grad]


GATES = "to_gate_coarse", "to_gate_fine"
TILES = {"2x4x4": (2, 4, 4), "4x4x4": (4, 4, 4), "4x4x8": (4, 4, 8), "auto": "auto", "wide": "wide"}


def arms(blocks: float = 0.1, cubes: float = 0.125) -> dict[str, Arm]:
    """The arms by name, for the share of the key blocks and of the cubes that are exact."""
    plain = SLAConfig(
        keep_ratio=blocks,
        drop_ratio=0.0,
        linear_scope="none",
        token_order="tile",
        block_q=64,
        block_k=64,
        projection=False,
    )
    sla = plain.replace(drop_ratio=0.1, linear_scope="marginal", projection=True)
    sla2 = SLA2Config(keep_ratio=blocks, block_q=64, block_k=64, token_order="tile")
    router = sla2.replace(linear_scope="none", router="per_head")
    exact = SLAVSAConfig(keep_ratio=cubes, coarse=False, linear_scope="none")
    both = exact.replace(coarse=True, linear_scope="noncritical")
    vsa, raster = VSAConfig(keep_ratio=cubes), {"token_order": "raster"}
    vsa_router = VSAConfig(keep_ratio=cubes, router="per_head")
    return {
        "dense": Arm(),
        "cubes": Arm(exact),
        "cubes, coarse": Arm(exact.replace(coarse=True)),
        "cubes, linear": Arm(exact.replace(linear_scope="noncritical")),
        "cubes, coarse, linear": Arm(both),
        "cubes, coarse, linear (rate x 10)": Arm(both, 10.0),
        "cubes, coarse, linear (rate x 30)": Arm(both, 30.0),
        "blocks": Arm(plain),
        "blocks, linear": Arm(sla),
        "blocks, linear (rate x 10)": Arm(sla, 10.0),
        "blocks, linear (rate x 30)": Arm(sla, 30.0),
        "blocks, linear (relu)": Arm(sla.replace(feature_map="relu")),
        "blocks, linear (all)": Arm(sla.replace(linear_scope="all")),
        # SLA's table: the map, the scope, the projection, the order, and the share.
        **{
            f"blocks, linear ({name}, rate x 10)": Arm(sla.replace(feature_map=name), 10.0)
            for name in ("elu", "relu", "hedgehog")
        },
        **{
            f"blocks, linear ({name}, rate x 10)": Arm(sla.replace(linear_scope=name), 10.0)
            for name in ("noncritical", "all")
        },
        "blocks, linear (no projection)": Arm(sla.replace(projection=False)),
        "linear only": Arm(sla.replace(keep_ratio=0.0, drop_ratio=0.0, linear_scope="all", projection=False)),
        "raster blocks": Arm(plain.replace(**raster)),
        "raster blocks, linear (rate x 10)": Arm(sla.replace(**raster), 10.0),
        **{f"blocks (x {share:g})": Arm(plain.replace(keep_ratio=share * blocks)) for share in (2, 3)},
        **{
            f"blocks, linear (x {share:g}, rate x 10)": Arm(sla.replace(keep_ratio=share * blocks), 10.0)
            for share in (0.6, 2)
        },
        "blocks, SLA2": Arm(sla2),
        "blocks, SLA2 (rate x 10)": Arm(sla2, 10.0),
        "blocks, SLA2 (rate x 30)": Arm(sla2, 30.0),
        "blocks, SLA2 (fixed router, rate x 10)": Arm(sla2.replace(routing="fixed"), 10.0),
        "blocks, SLA2 (router per head, rate x 10)": Arm(sla2.replace(router="per_head"), 10.0),
        "blocks, router (rate x 10)": Arm(sla2.replace(linear_scope="none"), 10.0),
        "blocks, router per head (rate x 10)": Arm(router, 10.0),
        "blocks, router per head (rate x 30)": Arm(router, 30.0),
        "blocks, router per head (temperature 0.03, rate x 10)": Arm(router.replace(temperature=0.03), 10.0),
        "blocks, router per head (temperature 0.3, rate x 10)": Arm(router.replace(temperature=0.3), 10.0),
        # At 1,872 tokens these two are 3 of 30 blocks again: repeats.
        "blocks (x 1.25)": Arm(plain.replace(keep_ratio=1.25 * blocks)),
        "blocks, router per head (x 1.25, rate x 10)": Arm(router.replace(keep_ratio=1.25 * blocks), 10.0),
        "blocks (x 4/3)": Arm(plain.replace(keep_ratio=4 / 3 * blocks)),
        "blocks, router per head (x 4/3, rate x 10)": Arm(router.replace(keep_ratio=4 / 3 * blocks), 10.0),
        **{f"VSA {name}": Arm(vsa.replace(tile=tile)) for name, tile in TILES.items()},
        # VSA's table: its gates.
        "cubes, a budget for each head": Arm(vsa.replace(coarse=False), budgeted=True),
        "VSA 4x4x4, router per head (closed gate, a budget for each head, rate x 10)": Arm(
            vsa_router.replace(coarse=False), 10.0, budgeted=True
        ),
        "VSA 4x4x4, annealed": Arm(vsa, annealed=True),
        "VSA 4x4x4, both gates": Arm(vsa.replace(fine_gate=True)),
        "VSA 4x4x4, no gates": Arm(vsa, start={GATES[0]: 1.0}, frozen=GATES[:1]),
        "VSA 4x4x4, coarse only": Arm(
            vsa.replace(fine_gate=True), start={GATES[0]: 1.0, GATES[1]: 0.0}, frozen=GATES[1:]
        ),
        "VSA 4x4x4, router per head (rate x 10)": Arm(vsa_router, 10.0),
        "VSA 4x4x4, router per head (rate x 30)": Arm(vsa_router, 30.0),
        "VSA 4x4x4, router per head (closed gate, rate x 10)": Arm(vsa_router.replace(coarse=False), 10.0),
        "VSA auto, router per head (rate x 10)": Arm(vsa_router.replace(tile="auto"), 10.0),
        "VSA 4x4x4, router (rate x 10)": Arm(vsa_router.replace(router="shared"), 10.0),
        "VSA 4x4x4, router per head (x 1/2, rate x 10)": Arm(vsa_router.replace(keep_ratio=cubes / 2), 10.0),
    }


ARMS = tuple(arms())
FIRST_STEP = 1_000_000  # seeds' batches begin here, far from those of pretraining


def step_flops(model: nn.Module, config: Config | None, latents: torch.Size) -> float:
    """FLOPs of a training step on one clip, forward and backward: those of the weights, and of self-attention."""
    frames, height, width = latents[-3:]
    heads = {"heads": model.config.num_attention_heads, "head_dim": model.config.attention_head_dim}
    cost = attention_cost(config, grid=VideoGrid(frames, height // 2, width // 2), **heads)
    weights = sum(p.numel() for p in model.parameters())
    attention = model.config.num_layers * (cost.flops + cost.backward_flops)
    return 6 * weights * frames * height * width / 4 + attention


def train_arm(
    dense: nn.Module, arm: Arm, data: Data, beside: DenseCheckpoint, seed: int, options: argparse.Namespace
) -> dict:
    torch.manual_seed(seed)
    model = copy.deepcopy(dense)
    budgets = budgets_by_head(dense, data, arm.config, FIRST_STEP) if arm.budgeted else None
    added = arm.begin(model, budgets)
    before, errors_before = beside.losses_and_errors(model)
    cuda = DEVICE.type == "cuda"
    known = {id(p) for processor in sparse_processors(model).values() for p in processor.parameters()}
    groups = [(arm.added_rate, added), (1.0, [p for p in model.parameters() if id(p) not in known])]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": group,
                "peak": options.rate * share,
                "lr": torch.tensor(options.rate, device=DEVICE) if cuda else 0.0,
            }
            for share, group in groups
            if group
        ],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=cuda,
        capturable=cuda,
    )
    warmup, first, started = max(1, options.steps // 10), FIRST_STEP * (seed + 1), time.time()
    losses, curve = [], []
    loss, modules = loss_of, [model]
    if options.distillation:
        teacher = copy.deepcopy(beside.model).requires_grad_(False)
        loss, modules = partial(taught_loss, teacher=teacher, share=options.distillation), [model, teacher]
    if options.compile:
        torch.compiler.reset()  # what earlier arms compiled counts toward a limit
        for module in modules:
            compile_blocks(module, fullgraph=True)
    update, kept, phase = None, None, contextlib.nullcontext()
    for step, values in enumerate(batches(data, options.batch, first, first + options.steps)):
        if arm.annealed:
            former, kept = kept, arm.keep_at(model, step, options.steps)
            phase = foveal.dense(model) if kept is None else contextlib.nullcontext()
            update = update if kept == former else None
        share = min((step + 1) / warmup, (options.steps - step) / max(1, options.steps - warmup))
        with phase:
            if update is None:
                update = Step(model, [optimizer], values, graphed=cuda, loss=loss)
            losses.append(update(values, share).clone())
        if options.evaluate_every and (step + 1) % options.evaluate_every == 0 and step + 1 < options.steps:
            with torch.compiler.set_stance("force_eager"):
                curve.append([step + 1, beside.losses_and_errors(model)[0].mean().item()])
    training = torch.stack(losses).float().cpu()
    if not training.isfinite().all():
        raise FloatingPointError("a training loss is not finite")
    seconds = time.time() - started
    with torch.compiler.set_stance("force_eager"):
        after, errors = beside.losses_and_errors(model)
        videos, sets = beside.compare_videos(model), beside.compare_sets(model)
    return {
        "config": None if arm.config is None else {"method": type(arm.config).__name__, **arm.config.to_dict()},
        "budgets": budgets,
        "steps": options.steps,
        "batch": options.batch,
        "tokens": math.prod(data.latents.shape[2:]) // 4,
        "parameters": sum(p.numel() for p in dense.parameters()),
        "scratch": options.scratch,
        "distillation": options.distillation,
        "flops_of_a_clip": step_flops(dense, arm.config, data.latents.shape),
        "curve": curve,
        "rate": options.rate,
        "added_rate": options.rate * arm.added_rate,
        "levels": list(SIGMAS),
        "before": before.mean(0).tolist(),
        "after": [[round(x, 7) for x in clip] for clip in after.tolist()],
        "velocity_error": {"before": errors_before, "after": errors},
        "videos": videos,
        "frechet": sets,
        "training_loss": [round(x, 6) for x in training.unflatten(0, (-1, 10)).mean(1).tolist()]
        if options.steps % 10 == 0
        else None,
        "added_norms": [round(p.detach().float().norm().item(), 4) for p in added],
        "seconds": round(seconds, 1),
        **machine(options.commit),
    }


def train(options: argparse.Namespace) -> None:
    data = Data(options.work, held_out=options.clips)
    dense, found_arms = parts.build_transformer(options.size), arms(options.keep_blocks, options.keep_cubes)
    tensors = load_file(options.work / f"{options.name}.safetensors")
    dense.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average/")})
    dense.to(DEVICE)
    beside = DenseCheckpoint(dense, data, options.work, options.batch, options.videos, distance=options.distance)
    if options.scratch:
        torch.manual_seed(0)
        dense = parts.build_transformer(options.size).to(DEVICE)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    mine, shares = (int(part) for part in options.share.split("/"))
    runs = [(name, seed) for seed in options.seeds for name in options.arms or ARMS]
    for name, seed in runs[mine::shares]:
        key = f"{name} #{seed}"
        if key in found or time.time() > options.deadline:
            continue
        found[key] = {"arm": name, "seed": seed, **train_arm(dense, found_arms[name], data, beside, seed, options)}
        aside = options.output.with_suffix(".part")
        aside.write_text(json.dumps(found) + "\n")
        os.replace(aside, options.output)
        gc.collect()  # the memory of its CUDA graph
        mean = torch.tensor(found[key]["after"]).mean().item()
        before = sum(found[key]["before"]) / len(SIGMAS)
        print(f"{key}: {before:.5f} -> {mean:.5f}, {found[key]['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    trains = stages.add_parser("train")
    trains.add_argument("--work", type=Path, required=True)
    trains.add_argument("--output", type=Path, required=True)
    trains.add_argument("--name", default="transformer", help="of the checkpoint in WORK")
    trains.add_argument("--size", choices=tuple(parts.SIZES), default="tiny", help="of the checkpoint")
    trains.add_argument("--keep-blocks", type=float, default=0.1, help="the share of exact key blocks")
    trains.add_argument("--keep-cubes", type=float, default=0.125, help="the share of exact cubes")
    trains.add_argument("--compile", action="store_true", help="the blocks, for many steps")
    trains.add_argument("--seeds", type=int, nargs="+", default=[0])
    trains.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {len(ARMS)}: {'; '.join(ARMS)}")
    trains.add_argument("--share", default="0/1", help="I/N: run the I-th of every N runs")
    trains.add_argument("--steps", type=int, default=300)
    trains.add_argument("--batch", type=int, default=32)
    trains.add_argument("--rate", type=float, default=3e-4)
    trains.add_argument("--clips", type=int, default=256, help="held-out clips, at most")
    trains.add_argument("--scratch", action="store_true", help="begin with random weights, the same for all arms")
    trains.add_argument("--distillation", type=float, default=0.0, help="share of the loss against the checkpoint's")
    trains.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="also every N steps; 0: at the end")
    trains.add_argument("--videos", type=int, default=8, help="held-out clips that every arm continues")
    trains.add_argument(
        "--distance",
        type=int,
        default=0,
        metavar="CLIPS",
        help="held-out clips that every arm continues, compared as a set by the network of `make.py features`",
    )
    trains.add_argument("--deadline", type=float, default=math.inf, help="Unix time after which no run begins")
    trains.add_argument("--commit", help="of this tree, for the record")
    stages.add_parser("table").add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.stage == "train":
        if not 0 <= options.distillation <= 1:
            parser.error(f"argument --distillation: expected a share from 0 to 1, got {options.distillation}")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        train(options)
    else:
        runs = [run for file in options.files for run in json.loads(file.read_text()).values()]
        runs.sort(key=lambda run: ARMS.index(run["arm"]))
        print(*filter(None, (table(runs), levels(runs), quality(runs))), sep="\n\n")


if __name__ == "__main__":
    main()
