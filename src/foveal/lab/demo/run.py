"""The demo from the shipped model to the report; everything it measures comes out of here."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import foveal
from foveal.lab.demo.report import report_files, write_report
from foveal.lab.demo.settings import (
    ARMS,
    DENSE,
    PICTURED,
    ROUTER_ADAPTER,
    SLA_ADAPTER,
    SLA_CONVERTED,
    VSA_ADAPTER,
    VSA_CONVERTED,
    VSA_ROUTER_ADAPTER,
    VSA_TRAINED,
    DemoSettings,
)
from foveal.lab.demo.task import Task, psnr
from foveal.lab.inspect.capture import capture_selections, token_labels
from foveal.lab.pipelines import check_torchvision
from foveal.lab.terminal import Progress
from foveal.lab.train.model import velocity
from foveal.methods.base import method_of
from foveal.methods.cost import attention_cost
from foveal.models import sparsify
from foveal.models.files.exports import load_export
from foveal.models.processor import sparse_processors
from foveal.models.shipped import TINY, local_path
from foveal.output_folder import OutputFolder

RESULTS_FILE = "results.json"
ADAPTERS = {
    SLA_ADAPTER: "foveal/tiny-sla",
    ROUTER_ADAPTER: "foveal/tiny-router",
    VSA_ADAPTER: "foveal/tiny-vsa",
    VSA_ROUTER_ADAPTER: "foveal/tiny-vsa-router",
}


def run_demo(
    settings: DemoSettings, *, output: Path, device: torch.device, console: Console | None = None
) -> dict[str, Any]:
    """Generate with the tiny model, convert it, load its adapters, fine-tune, measure, and write the report folder.

    Args:
        settings: steps, clips, seed.
        output: the folder to write. A former report there is replaced once the new one is complete; an interrupted
            run leaves it as it was. Other files in the folder stay.
        device: where to run.
        console: where progress goes, bars on a terminal and lines elsewhere; None for the standard error stream.

    Returns:
        The results, as written to results.json.

    Raises:
        ValueError: the output folder holds something else, or the installed torchvision does not match this torch.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    check_torchvision()
    folder = OutputFolder(output, "demo")
    folder.check([RESULTS_FILE, *report_files()])
    folder.check_alone()
    work = _Work(settings)
    started = time.perf_counter()
    with Progress(console or Console(stderr=True), units=work.total) as progress:
        with progress.stage(f"load {TINY}", 1, units=work.loading) as stage:
            task = Task(settings, device)
            stage.advance()
        with folder.renewing(last=RESULTS_FILE) as new:
            results, media = _measure(task, progress, work)
            results["environment"] = _environment(device)
            with progress.stage("report", 1, units=work.report) as stage:
                results["seconds"] = time.perf_counter() - started
                write_report(new, results, media)
                (new / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
                stage.advance()
    return results


class _Work:
    """The work of each stage in forward passes of one clip, for one progress bar over the whole demo."""

    def __init__(self, settings: DemoSettings) -> None:
        self.loading = 15
        self.generation = settings.sampling_steps + 10  # and decoding
        self.evaluation = settings.held_out_clips * len(settings.sigmas)
        # A backward pass costs two forward passes.
        step = 3 * settings.batch
        self.fine_tuning = settings.fine_tune_steps * step + (settings.evaluations + 1) * self.evaluation
        self.report = 15
        arms = len(ARMS) * (self.generation + self.evaluation)
        self.total = self.loading + self.fine_tuning + arms + self.report


def _measure(task: Task, progress: Progress, work: _Work) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = task.settings
    arms: dict[str, dict[str, Any]] = {}
    videos: dict[str, Tensor] = {}
    maps: dict[str, dict[str, Any]] = {}
    curve: list[tuple[int, float]] = []
    for name in ARMS:
        model = _convert(task, name)
        if name == VSA_TRAINED:
            with progress.stage(f"fine-tune, {name}", settings.fine_tune_steps, units=work.fine_tuning) as stage:
                record = task.fine_tune(model, lambda step, loss, stage=stage: stage.advance(f"loss {loss:.3f}"))
            curve = record.held_out
        with progress.stage(f"held-out loss, {name}", units=work.evaluation, brief=True):
            loss = curve[-1][1] if name == VSA_TRAINED else task.held_out_loss(model)
        with progress.stage(f"generate, {name}", settings.sampling_steps, units=work.generation) as stage:
            videos[name], seconds = _timed(task.device, lambda m=model, s=stage: task.generate(m, s.advance))
        arms[name] = {
            **_describe(model, task),
            "held_out_loss": loss,
            "psnr_to_dense_db": None if name == DENSE else psnr(videos[name], videos[DENSE]),
            "generation_seconds": seconds,
        }
        if name in PICTURED:
            maps[name] = _selection_map(model, task)
    results = {
        "settings": settings.to_dict(),
        "model": TINY,
        "tokens": task.grid.num_tokens,
        "parameters": sum(p.numel() for p in task.dense.parameters()),
        "clip": {"name": task.clip.name, "caption": task.clip.caption},
        "arms": arms,
        "fine_tuning": {"held_out_loss": curve, "step_seconds": record.median_step_seconds},
        "expectations": _expectations(arms),
    }
    return results, {"real": task.real, "videos": videos, "maps": maps}


def _convert(task: Task, name: str) -> nn.Module:
    """The model of an arm, before any training here."""
    if name == DENSE:
        return task.dense
    model = task.copy()
    if name in ADAPTERS:
        return load_export(model, Path(local_path(ADAPTERS[name])))
    return sparsify(model, task.settings.configs[name])


def _describe(model: nn.Module, task: Task) -> dict[str, Any]:
    processors = list(sparse_processors(model).values())
    if not processors:
        return {"method": "dense", "config": None, "attention_flops_reduction": 1.0}
    config, sizes = processors[0].config, task.dense.config
    cost = attention_cost(config, grid=task.grid, heads=sizes.num_attention_heads, head_dim=sizes.attention_head_dim)
    return {
        "method": method_of(config).name,
        "config": config.to_dict(),
        "attention_flops_reduction": cost.reduction,
    }


def _selection_map(model: nn.Module, task: Task) -> dict[str, Any]:
    """What one token of one layer sees, and the whole selection of that layer, at a middling noise level."""
    noisy, sigmas, text = task.noisy(0.7)
    with torch.no_grad(), task.autocast(), capture_selections(model) as selections:
        velocity(model, noisy, sigmas, text)
    grid, name = task.grid, list(selections)[len(selections) // 2]
    selection, attention = selections[name], model.get_submodule(name)
    token = (grid.frames // 2, grid.height // 2, grid.width // 2)
    labels = selection.labels()
    counts = labels.eq(1).sum(-1)[0, 0]
    return {
        "layer": name,
        "token": token,
        "token_labels": [token_labels(selection, attention, grid, token=token, head=h) for h in (0, 1)],
        "labels": labels[0, 0].cpu(),
        "kept": f"{int(counts.max())} of {labels.shape[-1]}",
    }


def _expectations(arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the methods promise, each checked against what came out."""
    loss = {name: arm["held_out_loss"] for name, arm in arms.items()}

    def figures(*names: str) -> str:
        return ", ".join(f"{name} {loss[name]:.4f}" for name in names)

    adapters = ((SLA_CONVERTED, SLA_ADAPTER), (VSA_CONVERTED, VSA_ADAPTER))
    routers = ((SLA_ADAPTER, ROUTER_ADAPTER), (VSA_ADAPTER, VSA_ROUTER_ADAPTER))
    return [
        {
            "expected": "leaving blocks out costs quality as long as nothing is trained",
            "met": loss[DENSE] < min(loss[SLA_CONVERTED], loss[VSA_CONVERTED]),
            "figures": figures(DENSE, SLA_CONVERTED, VSA_CONVERTED),
        },
        {
            "expected": "each adapter brings back at least a third of what its method costs",
            "met": all(loss[plain] - loss[tuned] > (loss[plain] - loss[DENSE]) / 3 for plain, tuned in adapters),
            "figures": figures(DENSE, *adapters[0], *adapters[1]),
        },
        {
            "expected": "with a router in each head, SLA and VSA end closer to dense attention than without one",
            "met": all(loss[learned] < loss[plain] for plain, learned in routers),
            "figures": figures(DENSE, *routers[0], *routers[1]),
        },
        {
            "expected": "a few steps of fine-tuning bring back some of what VSA costs",
            "met": loss[VSA_TRAINED] < loss[VSA_CONVERTED],
            "figures": figures(DENSE, VSA_CONVERTED, VSA_TRAINED),
        },
    ]


def _timed(device: torch.device, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _environment(device: torch.device) -> dict[str, Any]:
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "foveal": foveal.__version__,
    }
