"""Why does SLA lose to sparse attention alone, and what makes it win? One experiment in stages that resume.

    python benchmarks/quality/run.py STAGE --work W --out OUT

`render` game video (needs vizdoom); `check` a training step of every arm at full size, and a merge in float64;
`pretrain` a dense Wan transformer in pixel space, on every GPU; `diagnose` what sparse attention loses of each layer's
output, and what could give it back; `ablate` the loss with other attention put in, untrained; `arms` fine-tunes on
equal batches (start one a GPU, they share); `summary` the table, with paired intervals.

Every stage leaves its results in W and does nothing twice; an arm belongs to the process that holds its lock.
`diagnose`, `ablate` and `arms` also run from what `pretrain` left in OUT (`--checkpoint OUT`). `--tiny` makes all of
it small.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ablate import ablate
from arms import Arm, arms, converted, warm_batches
from attention import check_merge, warm_start
from diagnose import diagnose, table
from pixel_wan import HELD_OUT_SIGMAS, build_model, training_loss
from render import clip_file
from safetensors.torch import save_file
from task import (
    SAVED_WINDOWS,
    Clips,
    HeldOut,
    Scale,
    Trained,
    dense_file,
    export,
    fast_kernels,
    fit,
    held_out_frames,
    load_dense,
    write_json,
)
from torch import Tensor, nn

from foveal.lab.bench.machine import machine
from foveal.lab.train.objective import add_noise
from foveal.models.processor import sparse_processors

PRETRAIN_SEED, FINE_TUNE_SEED = 1, 2  # of batches


def run_arm(name: str, arm: Arm, dense: nn.Module, clips: Clips, held_out: HeldOut, options) -> dict:
    started, demo = time.time(), clips.scale.demo
    model, new = converted(dense, arm)
    removed = warm_start(model, dense, warm_batches(clips)) if arm.warm else None
    trained = fit(
        model,
        clips.batches(FINE_TUNE_SEED + 1000 * options.seed),
        steps=options.steps,
        learning_rate=demo.learning_rate if options.scratch else demo.fine_tune_learning_rate,
        floor=demo.fine_tune_learning_rate / 2 / demo.learning_rate if options.scratch else 0.0,
        fast=new,
        fast_learning_rate=demo.learning_rate if options.scratch else arm.new_rate,
        evaluate=held_out.losses,
        deadline=options.deadline,
    )
    described = None if arm.config is None else {"method": type(arm.config).__name__, **arm.config.to_dict()}
    return {
        "name": name,
        "seed": options.seed,
        "config": described,
        "scratch": options.scratch,
        "new_rate": None if not new else demo.learning_rate if options.scratch else arm.new_rate,
        "warm": arm.warm,
        "frozen": arm.frozen,
        "module": next((type(p.attention).__name__ for p in sparse_processors(model).values()), None),
        "removed_by_warm_start": removed,
        "new_parameter_norms": [round(p.detach().float().norm().item(), 5) for p in new],
        **described_training(trained),
        "seconds": round(time.time() - started, 1),
    } | provenance(options)


def described_training(trained: Trained) -> dict:
    losses = trained.losses
    return {
        "steps": len(trained.losses),
        "levels": list(HELD_OUT_SIGMAS),
        "held_out": [
            {
                "step": step,
                "mean": found.mean().item(),
                "by_level": found.mean(0).tolist(),
                "windows": [[round(x, 8) for x in window] for window in found.tolist()],
            }
            for step, found in trained.held_out
        ],
        "training_loss": [round(statistics.mean(losses[i : i + 10]), 6) for i in range(0, len(losses), 10)],
        "median_step_seconds": trained.median_step_seconds,
    }


def provenance(options) -> dict:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(torch.device(options.device), options.commit),
        "argv": [Path(part).name if "/" in part else part for part in sys.argv],
    }


def run_render(options) -> None:
    scale = options.scale
    sizes = {"--clips": scale.clips, "--frames": scale.clip_frames, "--step": scale.pixel_step, "--work": options.work}
    script = Path(__file__).with_name("render.py")
    flags = [str(part) for pair in sizes.items() for part in pair]
    subprocess.run([sys.executable, str(script), *flags], check=True)


def run_check(options) -> None:
    """Fails early: the merge against a dense formula, then a step of every arm on one layer with random weights."""
    check_merge()
    device, demo = torch.device(options.device), dataclasses.replace(options.scale.demo, num_layers=1)
    dense = build_model(demo).to(device)
    video = torch.randn(demo.batch, 3, demo.frames, demo.height, demo.width, device=device)
    batch = video, torch.randn_like(video), torch.full((demo.batch,), 0.5, device=device)
    failed, tried = [], arms(options.scale.block)
    for name, arm in tried.items():
        try:
            model, _ = converted(dense, arm)
            noisy = add_noise(*(x[:1] for x in batch))[0]
            if arm.warm:
                warm_start(model, dense, [(noisy, batch[2][:1], video[:1, :, :1])])
            loss = training_loss(model, batch)
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not all(math.isfinite(x.norm().item()) for x in (loss, *gradients)):
                raise FloatingPointError("a loss or gradient is not finite")
        except Exception:
            failed.append(name)
            traceback.print_exc()
    print(f"check: the merge is exact; of {len(tried)} arms these fail: {failed or 'none'}", flush=True)


def pretrain_rank(rank: int, ranks: int, options) -> None:
    cuda = options.device.startswith("cuda")
    device = torch.device("cuda", rank) if cuda else torch.device(options.device)
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        store = f"file://{options.work.resolve()}/rendezvous-{os.getppid()}"
        dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=ranks)
    scale, started = options.scale, time.time()
    clips = Clips(scale, options.work, device)
    held_out = HeldOut(clips.held_out, scale, device)
    model = build_model(scale.demo).to(device)  # of one seed on all ranks
    batches = clips.batches(PRETRAIN_SEED + 100 * rank)
    with fast_kernels(device, model, next(batches)):
        trained = fit(
            model,
            batches,
            steps=options.pretrain_steps,
            learning_rate=scale.demo.learning_rate,
            floor=scale.demo.fine_tune_learning_rate / 2 / scale.demo.learning_rate,
            evaluate=held_out.losses,
            evaluations=3,
            cap=options.cap,
        )
    if rank == 0:
        found = described_training(trained) | provenance(options) | {"ranks": ranks, "seconds": time.time() - started}
        found["parameters"] = sum(p.numel() for p in model.parameters())
        write_json(options.work / "pretrain.json", found)
        whole = options.work / "whole.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, whole)
        os.replace(whole, dense_file(options.work))
        export(model, clips.held_out, options.out)
        losses = [(step["step"], round(step["mean"], 5)) for step in found["held_out"]]
        rate = f"{found['median_step_seconds']:.3f} s a step, {found['seconds']:.0f} s in all"
        print(f"pretrain: {found['steps']} steps on {ranks}: held-out {losses}, {rate}", flush=True)
    if ranks > 1:
        dist.destroy_process_group()


def run_pretrain(options) -> None:
    if dense_file(options.work).exists():
        print("pretrain: done before", flush=True)
        return
    ranks = options.ranks or (torch.cuda.device_count() if options.device.startswith("cuda") else 1)
    torch.multiprocessing.spawn(pretrain_rank, (ranks, options), nprocs=ranks)


def load_for_study(options, device: torch.device) -> tuple[nn.Module, HeldOut]:
    """The dense model and a few held-out windows, from the work folder or from what `pretrain` left in OUT."""
    place, scale = options.checkpoint or dense_file(options.work), options.scale
    if place.is_dir():
        frames = torch.from_numpy(np.load(place / "windows.npz")["frames"])
    else:
        frames = torch.from_numpy(held_out_frames(scale, np.load(clip_file(options.work), mmap_mode="r")))
    return load_dense(scale, place, device), HeldOut(frames[:SAVED_WINDOWS], scale, device)


def run_diagnose(options) -> None:
    path, started = options.work / "diagnose.json", time.time()
    if not path.exists():
        device, scale = torch.device(options.device), options.scale
        model, held_out = load_for_study(options, device)
        found = diagnose(model, held_out, scale, row_step=options.row_step)
        write_json(path, found | provenance(options) | {"seconds": time.time() - started})
    report = json.loads(path.read_text())
    print(f"{table(report)}\ndiagnose: {report['seconds']:.0f} s", flush=True)
    if options.out != options.work:
        write_json(options.out / "diagnose.json", report)


def run_ablate(options) -> None:
    started, device, scale = time.time(), torch.device(options.device), options.scale
    model, held_out = load_for_study(options, device)
    found = ablate(model, held_out, scale, one_layer=not options.tiny)
    write_json(options.out / "ablate.json", found | provenance(options) | {"seconds": time.time() - started})


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the file's lock now; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_arms(options) -> None:
    device, scale, table_of_arms = torch.device(options.device), options.scale, arms(options.scale.block)
    names = list(table_of_arms) if options.arms == "all" else options.arms.split(",")
    unknown = sorted(set(names) - set(table_of_arms))
    if unknown:
        raise SystemExit(f"unknown arms {unknown}; expected some of {list(table_of_arms)}")
    clips = Clips(scale, options.work, device)
    held_out = HeldOut(clips.held_out, scale, device)
    if options.scratch:
        dense = build_model(scale.demo).to(device)
    else:
        dense = load_dense(scale, options.checkpoint or dense_file(options.work), device)
    context = fast_kernels(device, dense, next(clips.batches(0)))
    longest = options.arm_seconds
    with context:
        for name in names:
            kind = ("-scratch" if options.scratch else "") + (f"-seed{options.seed}" if options.seed else "")
            result = options.work / "arms" / f"{name}{kind}.json"
            with claimed(result.with_suffix(".lock")) as mine:
                if not mine or result.exists():
                    continue
                if time.time() + longest > options.deadline:
                    print(f"arms: no time left for {name}", flush=True)
                    break
                begun = time.time()
                try:
                    found = run_arm(name, table_of_arms[name], dense, clips, held_out, options)
                except TimeoutError as error:
                    print(f"arms: {name} was given up: {error}", flush=True)
                    break
                except Exception:
                    print(f"arms: {name} failed\n{traceback.format_exc()}", flush=True)
                    continue
                finally:
                    gc.collect()  # hooks and the model refer to each other
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                write_json(result, found)
                longest = max(longest / 2, 1.1 * (time.time() - begun))
                losses = [(step["step"], round(step["mean"], 5)) for step in found["held_out"]]
                rate = f"{found['median_step_seconds']:.3f} s a step, {found['seconds']:.0f} s"
                print(f"{name}: {losses}, {rate}", flush=True)
            collect(options)


def collect(options) -> dict[str, dict]:
    """All finished arms by file name, written together to the folder that is returned."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((options.work / "arms").glob("*.json"))}
    write_json(options.out / "arms.json", found)
    return found


def interval(relative: Tensor) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, in %."""
    freedom, normal = len(relative) - 1, 1.96
    student = normal + (normal**3 + normal) / (4 * max(1, freedom))
    return 100 * relative.mean().item(), 100 * student * relative.std().item() / len(relative) ** 0.5


def run_summary(options) -> None:
    """Relative differences of paired held-out losses; a window's mean over the noise levels is the unit."""
    found = collect(options)
    seeds: dict[tuple[bool, int], dict[str, Tensor]] = {}
    for arm in found.values():
        after = torch.tensor(arm["held_out"][-1]["windows"], dtype=torch.float64)
        seeds.setdefault((arm.get("scratch", False), arm["seed"]), {})[arm["name"]] = after
    rows, lines = [], []
    for (scratch, seed), losses in sorted(seeds.items()):
        lines += [
            f"\n{'from scratch' if scratch else 'fine-tuned'}, seed {seed}",
            "| arm | before | loss | against dense | against sparse5 | worse on | % by level |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, loss in sorted(losses.items(), key=lambda item: item[1].mean().item()):
            key = scratch, seed, name
            arm = next(x for x in found.values() if (x.get("scratch", False), x["seed"], x["name"]) == key)
            row = {
                "arm": name,
                "seed": seed,
                "scratch": scratch,
                "loss": loss.mean().item(),
                "before": arm["held_out"][0]["mean"],
            }
            cells = []
            for base in ("dense", "sparse5"):
                if base not in losses or base == name:
                    cells.append("")
                    continue
                reference = losses[base]
                relative = loss.mean(1) / reference.mean(1) - 1
                clips = relative.view(-1, min(options.scale.held_out_clips, len(relative))).mean(0)
                row[base] = {"percent": interval(relative), "percent_by_clip": interval(clips)}
                row[base]["worse"] = int((relative > 0).sum())
                row[base]["by_level"] = [100 * x for x in (loss / reference - 1).mean(0).tolist()]
                cells.append("{:+.2f} ± {:.2f} %".format(*row[base]["percent"]))
            against = row.get("sparse5", row.get("dense"))
            worse = f"{against['worse']}/{len(loss)}" if against else ""
            levels = " / ".join(f"{x:+.2f}" for x in against["by_level"]) if against else ""
            cells = [name, f"{row['before']:.5f}", f"{row['loss']:.5f}", *cells, worse, levels]
            lines.append(f"| {' | '.join(cells)} |")
            rows.append(row)
    text = "\n".join(lines)
    (options.work / "summary.md").write_text(text + "\n")
    write_json(options.work / "summary.json", rows)
    print(text, flush=True)


STAGES = {
    "render": run_render,
    "check": run_check,
    "pretrain": run_pretrain,
    "diagnose": run_diagnose,
    "ablate": run_ablate,
    "arms": run_arms,
    "summary": run_summary,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder for what later stages and calls need")
    parser.add_argument("--out", type=Path, help="folder for results; by default the same")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tuning batches")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--deadline", type=float, default=math.inf, help="Unix time by which arms are done or given up")
    parser.add_argument("--pretrain-steps", type=int, default=1300)
    parser.add_argument("--cap", type=float, help="seconds of pretraining at most")
    parser.add_argument("--ranks", type=int, help="processes of pretraining; by default one a GPU")
    parser.add_argument("--checkpoint", type=Path, help="weights of another folder, which pretrain wrote with --out")
    parser.add_argument("--row-step", type=int, default=2, help="for diagnose: take every n-th block of queries")
    parser.add_argument("--arms", default="all", help="names between commas, in this order")
    parser.add_argument("--scratch", action="store_true", help="train arms from random weights, without a checkpoint")
    parser.add_argument("--steps", type=int, default=260, help="of each arm")
    parser.add_argument("--arm-seconds", type=float, default=60, help="what the first arm is expected to take")
    options = parser.parse_args(arguments)
    options.scale = Scale.tiny() if options.tiny else Scale.full()
    options.out = options.out or options.work
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
