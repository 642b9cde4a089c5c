"""The demo from clip to report; everything it measures comes out of here."""

from __future__ import annotations

import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import foveal
from foveal.lab.data.windows import ClipWindows, read_video, sample_clip
from foveal.lab.demo.report import report_files, write_report
from foveal.lab.demo.settings import PICTURED, DemoSettings
from foveal.lab.demo.task import Batches, HeldOut, build_model, generate, predict, psnr, training_loss
from foveal.lab.inspect.capture import capture_selections, token_labels
from foveal.lab.pipelines import check_torchvision
from foveal.lab.terminal import Progress, Stage
from foveal.lab.train.loop import TrainingRecord, train
from foveal.lab.train.objective import add_noise
from foveal.methods.base import Config, method_of
from foveal.methods.cost import attention_cost
from foveal.models import sparsify
from foveal.models.processor import sparse_processors
from foveal.output_folder import OutputFolder

RESULTS_FILE, MODEL_FOLDER = "results.json", "model"
MODEL_FILES = tuple(f"{MODEL_FOLDER}/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors"))


def run_demo(
    settings: DemoSettings,
    *,
    output: Path,
    video: Path | None = None,
    clip: str = "bigbuckbunny",
    device: torch.device,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, convert, fine-tune, generate, measure, and write the report folder.

    Args:
        settings: sizes, steps, seeds.
        output: the folder to write. A former report there is replaced once the new one is complete; an interrupted
            run leaves it as it was. Other files in the folder stay.
        video: a video file; None takes the sample clip named `clip`.
        device: where to run.
        console: where progress goes, bars on a terminal and lines elsewhere; None for the standard error stream.

    Returns:
        The results, as written to results.json.

    Raises:
        FileNotFoundError, ValueError: for a video that is missing, cannot be decoded or is too short, or an output
            folder that holds something else.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    check_torchvision()
    folder = OutputFolder(output, "demo")
    folder.check([RESULTS_FILE, *MODEL_FILES, *report_files(settings)])
    folder.check_alone()
    source = Path(video) if video is not None else sample_clip(clip)
    work = _Work(settings)
    with Progress(console or Console(stderr=True), units=work.total) as progress:
        with progress.stage(f"read {source.name}", brief=True):
            frames = read_video(source, height=settings.height, width=settings.width)
        windows = ClipWindows(frames, frames=settings.frames, stride=settings.stride)
        with folder.renewing(last=RESULTS_FILE) as new:
            results, media = _measure(settings, windows, device, progress, work)
            results["clip"] = {"file": source.name, "frames": len(frames), "sample": video is None}
            results["environment"] = _environment(device)
            with progress.stage("report", 1, units=work.report) as stage:
                write_report(new, results, media, settings)
                media["model"].save_pretrained(new / MODEL_FOLDER)
                (new / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
                stage.advance()
    return results


class _Work:
    """The work of each stage in forward passes of one window, for one progress bar over the whole demo."""

    def __init__(self, settings: DemoSettings) -> None:
        # A backward pass costs two forward passes. A held-out loss takes two of each window.
        step, evaluation = 3 * settings.batch, 2 * settings.held_out_windows
        self.pretraining = settings.pretrain_steps * step + (2 * settings.evaluations + 2) * evaluation
        self.fine_tuning = settings.fine_tune_steps * step + (settings.evaluations + 3) * evaluation
        self.generation = settings.sampling_steps
        arms = len(settings.arms()) * (self.fine_tuning + self.generation)
        self.report = 0.02 * (self.pretraining + arms)
        self.total = self.pretraining + arms + self.report


def _measure(
    settings: DemoSettings, windows: ClipWindows, device: torch.device, progress: Progress, work: _Work
) -> tuple[dict[str, Any], dict[str, Any]]:
    held_out = HeldOut(windows, settings, device)
    model = build_model(settings).to(device)
    started = time.perf_counter()
    with progress.stage("pretrain, dense", settings.pretrain_steps, units=work.pretraining) as stage:
        record = _train(model, windows, held_out, settings, device, stage, pretrain=True)
        pretrain_seconds = time.perf_counter() - started
        pretrained = held_out.velocities(model)

    arms: dict[str, dict[str, Any]] = {}
    videos: dict[str, Tensor] = {}
    maps: dict[str, dict[str, Any]] = {}
    reference = None
    for name, config in settings.arms().items():
        arm = copy.deepcopy(model)
        if config is not None:
            sparsify(arm, config)
        with progress.stage(f"fine-tune, {name}", settings.fine_tune_steps, units=work.fine_tuning) as stage:
            converted_error = _relative_error(held_out.velocities(arm), pretrained)
            record_arm = _train(arm, windows, held_out, settings, device, stage)
            velocities = held_out.velocities(arm)
        reference = velocities if config is None else reference
        with progress.stage(f"generate, {name}", settings.sampling_steps, units=work.generation) as stage:
            video, seconds = _timed(
                device,
                lambda arm=arm, stage=stage: generate(
                    arm, held_out.video[:1, :, :1], held_out.noise[:1], settings, on_step=stage.advance
                ),
            )
        videos[name] = video[0].cpu()
        arms[name] = {
            **_describe(config, settings),
            "held_out_loss": record_arm.held_out,
            "held_out_loss_converted": record_arm.held_out[0][1],
            "held_out_loss_fine_tuned": record_arm.held_out[-1][1],
            "output_error_converted": converted_error,
            "output_error_fine_tuned": _relative_error(velocities, reference),
            "psnr_db": psnr(video, held_out.video[:1]),
            "seconds": {"fine_tune_step": record_arm.median_step_seconds, "generation": seconds},
        }
        if name in PICTURED:
            maps[name] = _selection_map(arm, held_out, settings)

    results = {
        "settings": settings.to_dict(),
        "tokens": settings.grid.num_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretraining": {
            "held_out_loss": record.held_out,
            "seconds": {"total": pretrain_seconds, "step": record.median_step_seconds},
        },
        "arms": arms,
        "expectations": _expectations(arms),
    }
    return results, {"model": model, "clip": held_out.video[0].cpu(), "videos": videos, "maps": maps}


def _train(
    model: nn.Module,
    windows: ClipWindows,
    held_out: HeldOut,
    settings: DemoSettings,
    device: torch.device,
    stage: Stage,
    *,
    pretrain: bool = False,
) -> TrainingRecord:
    steps = settings.pretrain_steps if pretrain else settings.fine_tune_steps
    # Every arm sees the same windows, noise and noise levels; pretraining sees others.
    batches = Batches(windows, settings, device, seed=settings.seed + (1 if pretrain else 2))
    peak = settings.learning_rate if pretrain else settings.fine_tune_learning_rate
    evaluations = 2 * settings.evaluations if pretrain else settings.evaluations
    new = [p for processor in sparse_processors(model).values() for p in processor.parameters()]
    fast = {"fast_parameters": new, "fast_learning_rate": settings.new_learning_rate} if new else {}
    return train(
        model,
        batches,
        training_loss,
        steps=steps,
        learning_rate=peak,
        warmup=max(1, steps // 10),
        final_learning_rate=settings.fine_tune_learning_rate / 2 if pretrain else 0.0,
        evaluate=held_out.loss,
        evaluate_every=max(1, steps // evaluations),
        on_step=lambda step, loss: stage.advance(f"loss {loss:.3f}"),
        **fast,
    )


def _describe(config: Config | None, settings: DemoSettings) -> dict[str, Any]:
    grid = settings.grid
    shape = {"grid": grid, "heads": settings.num_heads, "head_dim": settings.head_dim}
    if config is None:
        return {"method": "dense", "config": None, "attention_flops_reduction": 1.0}
    return {
        "method": method_of(config).name,
        "config": config.to_dict(),
        "attention_flops_reduction": attention_cost(config, **shape).reduction,
    }


def _selection_map(arm: nn.Module, held_out: HeldOut, settings: DemoSettings) -> dict[str, Any]:
    """What one token of one layer sees, and the whole selection of that layer, at a middling noise level."""
    grid = settings.grid
    sigma = torch.full((1,), 0.7, device=held_out.video.device)
    noisy, _ = add_noise(held_out.video[:1], held_out.noise[:1], sigma)
    with torch.no_grad(), capture_selections(arm) as selections:
        predict(arm, noisy, sigma, held_out.video[:1, :, :1])
    name = list(selections)[len(selections) // 2]
    selection, attention = selections[name], arm.get_submodule(name)
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
    """What the method promises, each checked against what came out."""
    loss = {name: arm["held_out_loss_fine_tuned"] for name, arm in arms.items()}
    sla = arms["SLA"]
    return [
        {
            "expected": "fine-tuning lowers SLA's held-out loss",
            "met": loss["SLA"] < sla["held_out_loss_converted"],
            "figures": f"{sla['held_out_loss_converted']:.4f} -> {loss['SLA']:.4f}",
        },
        {
            "expected": "after equal fine-tuning, SLA's held-out loss lies between dense's and sparse-only's",
            "met": loss["dense"] <= loss["SLA"] <= loss["sparse only"],
            "figures": f"dense {loss['dense']:.4f}, SLA {loss['SLA']:.4f}, sparse only {loss['sparse only']:.4f}",
        },
    ]


def _relative_error(velocities: Tensor, reference: Tensor) -> float:
    return ((velocities - reference).norm() / reference.norm()).item()


def _timed(device: torch.device, run) -> tuple[Any, float]:
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
