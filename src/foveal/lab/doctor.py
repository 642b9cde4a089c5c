"""`foveal doctor`: what is installed, which implementation runs here, and what sparse attention gains for a model.

What can be measured is measured, with a GPU; what cannot is an estimate from FLOPs, and says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from foveal.checks import check_choice
from foveal.kernels import chips
from foveal.kernels.api import IMPLS, choose_impl
from foveal.lab.bench.break_even import break_even
from foveal.lab.bench.machine import machine
from foveal.lab.bench.timing import CudaTimer, Timer, measure
from foveal.lab.pipelines import check_torchvision
from foveal.layout import VideoGrid
from foveal.methods.base import METHODS, Config, LayerCall, Method, method_of
from foveal.methods.cost import attention_cost
from foveal.models.model_sizes import ModelSize, model_size

PACKAGES = ("torch", "triton", "diffusers", "safetensors", "accelerate", "peft", "rich", "tyro")
HEAD_DIMS = (64, 128)
BLOCKS = ((64, 64), (128, 64), (128, 128))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the video that is asked about, in tokens: each a half of the one before.
HALVINGS = 7
# What Wan's cross-attention reads.
TEXT_TOKENS = 512


def examine(
    model: str | os.PathLike[str] = "wan-1.3b",
    *,
    frames: int = 81,
    height: int = 480,
    width: int = 832,
    method: str = "sla",
    keep_ratio: float | None = None,
    measured: bool = True,
) -> dict[str, Any]:
    """Everything that `foveal doctor` says, JSON-ready.

    Args:
        model: a name in `MODEL_SIZES`, or a local folder of diffusers with a `config.json`.
        frames, height, width: the size of the video, in frames and pixels.
        method: a name in `METHODS`, such as "sla" or "vsa", with its default configuration.
        keep_ratio: instead of the default one.
        measured: time attention where there is a GPU.

    Returns:
        {"environment", "implementations", "model", "config", "estimate", "measured"}; "measured" is None where nothing
        was timed.

    Raises:
        ValueError, TypeError: an unknown model or method, or a size that the model cannot take.
    """
    check_choice("method", method, tuple(METHODS))
    size = model_size(model)
    grid = size.grid(frames, height, width)
    config = METHODS[method].configure(**({} if keep_ratio is None else {"keep_ratio": keep_ratio}))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    video = {"frames": frames, "height": height, "width": width, "grid": list(grid.shape), "tokens": grid.num_tokens}
    timed = None
    if measured and device.type == "cuda":
        timed = measure_gain(config, shorter_grids(grid), heads=size.heads, head_dim=size.head_dim, device=device)
    return {
        "environment": environment(device),
        "implementations": implementations(device),
        "model": dataclasses.asdict(size) | {"video": video},
        "config": {"method": method} | config.to_dict(),
        "estimate": estimate(config, size, grid),
        "measured": timed,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The machine as `foveal bench` records it, the versions of what foveal may use (None where it is missing), the
    GPU's compute capability, how well the kernels are known there, and problems that these versions are known for."""
    packages = {name: _version(name) for name in PACKAGES}
    found = machine(device) | {"packages": packages, "capability": None, "kernels": None}
    if device.type == "cuda":
        found["capability"] = chips.capability(device)
        if importlib.util.find_spec("triton") is not None:
            found["kernels"] = chips.chip_of(device).standing
    return found | {"known_problems": known_problems()}


def known_problems() -> list[str]:
    """What these versions of other projects do wrong or may do wrong, a sentence or two each."""
    from torch._inductor import config

    problems = []
    if getattr(config.triton, "mix_order_reduction", False):
        problems.append(
            "torch.compile may leave gradients unwritten where modulated norms share a table, as in Wan "
            "(https://github.com/pytorch/pytorch/issues/193061, from torch 2.10 to 2.14.1 at least): to train compiled "
            'blocks, compile with options={"triton.mix_order_reduction": False}, as `foveal train` does'
        )
    try:
        check_torchvision()
    except ValueError as error:
        problems.append(str(error))
    return problems


def implementations(device: torch.device) -> list[dict[str, Any]]:
    """What impl="auto" stands for on a device, by head dimension, blocks and dtype, and why the others do not run."""
    rows = []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            # As models hand it over: a [B, H, L, D] view of [B, L, H, D] memory.
            x = torch.empty(1, 128, 2, head_dim, device=device, dtype=dtype).transpose(1, 2)
            for block_q, block_k in BLOCKS:
                refused = {}
                for impl in IMPLS:
                    try:
                        choose_impl(impl, x, x, x, block_q, block_k)
                    except ValueError as error:
                        refused[impl] = str(error)
                rows.append(
                    {
                        "head_dim": head_dim,
                        "block_q": block_q,
                        "block_k": block_k,
                        "dtype": str(dtype).removeprefix("torch."),
                        "impl": choose_impl("auto", x, x, x, block_q, block_k).impl,
                        "refused": refused,
                    }
                )
    return rows


def estimate(config: Config, size: ModelSize, grid: VideoGrid) -> dict[str, Any]:
    """What a configuration saves in a model's forward pass, by FLOPs.

    Returns:
        "attention_reduction": dense FLOPs of self-attention over ours; "parts": our FLOPs over the dense ones, by part.
        Where the model's other work is known, "attention_share": self-attention's share of the dense transformer's
        FLOPs, and "transformer_reduction": the transformer's FLOPs over those that are left; else both are None.
    """
    cost = attention_cost(config, grid=grid, heads=size.heads, head_dim=size.head_dim)
    share = reduction = None
    if size.ffn_dim is not None:
        tokens, width = grid.num_tokens, size.hidden_dim
        # Query, key, value and output of self-attention, query and output of cross-attention, two feed-forward layers.
        linear = 2 * tokens * width * (6 * width + 2 * size.ffn_dim)
        text = 4 * TEXT_TOKENS * width * width + 4 * tokens * TEXT_TOKENS * width
        total = cost.dense.flops + linear + text
        share = cost.dense.flops / total
        reduction = total / (total - cost.dense.flops + cost.flops)
    return {
        "what": "an estimate from FLOPs of the forward pass, not a measurement",
        "attention_reduction": cost.reduction,
        "parts": {part.name: part.flops / cost.dense.flops for part in cost.parts},
        "attention_share": share,
        "transformer_reduction": reduction,
    }


def shorter_grids(grid: VideoGrid) -> list[VideoGrid]:
    """Grids of about the same proportions, each with half as many tokens as the next; the last is the given one."""
    grids = {}
    for halvings in range(HALVINGS):
        sides = (max(1, round(side * 2 ** (-halvings / 3))) for side in grid.shape)
        smaller = VideoGrid(*sides)
        grids[smaller.num_tokens] = smaller
    return [grids[tokens] for tokens in sorted(grids)]


def measure_gain(
    config: Config,
    grids: Sequence[VideoGrid],
    *,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Times one sample's forward pass through dense attention and through a method's module, selection and all.

    Dense is `scaled_dot_product_attention` as diffusers calls it. Inputs are random, which changes no time.

    Args:
        config: the method's configuration.
        grids: the videos to time, in tokens.
        heads, head_dim: H and D.
        timer: instead of the CUDA one.

    Returns:
        {"lengths": one entry a grid with "tokens", "grid", "dense_ms", "sparse_ms", "speedup" (medians after a rest),
        "skipped": token counts that did not fit into memory, "break_even_tokens", "verdict"}.
    """
    timer = CudaTimer(device) if timer is None else timer
    method = method_of(config)
    module = method.build(config, heads * head_dim, heads, head_dim, "auto").to(device=device, dtype=dtype).eval()
    lengths, skipped = [], []
    for grid in grids:
        try:
            with torch.inference_mode():
                times = _times_of(method, module, grid, heads, head_dim, timer, device, dtype)
        except torch.OutOfMemoryError:
            skipped.append(grid.num_tokens)
            continue
        speedup = times["dense_ms"] / times["sparse_ms"]
        lengths.append({"tokens": grid.num_tokens, "grid": list(grid.shape), **times, "speedup": speedup})
    tokens, verdict = break_even([(entry["tokens"], entry["speedup"]) for entry in lengths])
    return {"lengths": lengths, "skipped": skipped, "break_even_tokens": tokens, "verdict": verdict}


def _times_of(
    method: Method,
    module: nn.Module,
    grid: VideoGrid,
    heads: int,
    head_dim: int,
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    shape = (1, grid.num_tokens, heads, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    hidden = torch.randn(1, grid.num_tokens, heads * head_dim, device=device, dtype=dtype)
    functions = {
        "dense_ms": lambda: F.scaled_dot_product_attention(query, key, value),
        "sparse_ms": lambda: method.run(module, LayerCall(query, key, value, hidden, grid)),
    }
    for function in functions.values():
        # Compiles kernels.
        function()
    times = measure(timer, functions, rounds=3, calls=3, seconds=0.05)
    return {name: statistics.median(rested) for name, (rested, *_) in times.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tables(report: dict[str, Any]) -> list[Any]:
    """What `examine` found as rich tables and lines, in order."""
    shown = [_environment_table(report["environment"])]
    shown += [f"- {problem}" for problem in report["environment"]["known_problems"]]
    shown.append(_implementation_table(report["implementations"]))
    reasons = {reason for row in report["implementations"] for reason in row["refused"].values()}
    shown += [f"- {reason}" for reason in sorted(reasons)]
    shown.append(_gain_table(report))
    if report["measured"] is not None:
        shown += [_measured_table(report["measured"]), report["measured"]["verdict"]]
        if report["measured"]["skipped"]:
            shown.append(f"did not fit into memory: {report['measured']['skipped']} tokens")
    else:
        shown.append("nothing was timed; the gain above is an estimate from FLOPs")
    return shown


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and len(columns) > 2 else "left", overflow="fold")
    return table


def _environment_table(found: dict[str, Any]) -> Any:
    table = _table("This machine", "what", "found")
    rows = {"device": found["device"], "compute capability": found["capability"]}
    rows["kernels"] = found["kernels"]
    rows |= {"memory, GiB": found.get("memory_gib"), "driver": found["driver"], "CUDA of torch": found["cuda"]}
    rows |= {"foveal": found["foveal"], "python": found["python"]} | found["packages"]
    for name, value in rows.items():
        absent = "not installed" if name in found["packages"] else "none"
        table.add_row(name, absent if value is None else str(value))
    return table


def _implementation_table(rows: list[dict[str, Any]]) -> Any:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    table = _table('What impl="auto" runs here', "head dim, blocks", *dtypes)
    shapes: dict[str, dict[str, str]] = {}
    for row in rows:
        name = f"{row['head_dim']}, {row['block_q']}x{row['block_k']}"
        shapes.setdefault(name, {})[row["dtype"]] = row["impl"]
    for name, impls in shapes.items():
        table.add_row(name, *(impls[dtype] for dtype in dtypes))
    return table


def _gain_table(report: dict[str, Any]) -> Any:
    model, config, found = report["model"], report["config"], report["estimate"]
    video = model["video"]
    table = _table(f"Gain for {model['name']}, estimated from FLOPs (forward)", "what", "value")
    sides = "x".join(map(str, video["grid"]))
    table.add_row("video", f"{video['frames']} frames of {video['width']}x{video['height']}")
    table.add_row("tokens", f"{video['tokens']:,} ({sides})")
    table.add_row("attention", f"{model['layers']} layers, {model['heads']} heads of {model['head_dim']}")
    settings = ", ".join(f"{name}={value}" for name, value in config.items() if name != "method")
    table.add_row("method", f"{config['method']}: {settings}")
    table.add_row("self-attention", f"{found['attention_reduction']:.1f}x fewer FLOPs")
    if found["attention_share"] is not None:
        table.add_row("its share of the transformer", f"{100 * found['attention_share']:.0f} % of the dense FLOPs")
        table.add_row("the whole transformer", f"{found['transformer_reduction']:.2f}x fewer FLOPs")
    if model["note"]:
        table.add_row("note", model["note"])
    return table


def _measured_table(found: dict[str, Any]) -> Any:
    table = _table("Measured here: one sample, one layer, forward, bfloat16", "tokens", "dense ms", "sparse ms", "gain")
    for entry in found["lengths"]:
        cells = (f"{entry['dense_ms']:.3f}", f"{entry['sparse_ms']:.3f}", f"{entry['speedup']:.2f}x")
        table.add_row(f"{entry['tokens']:,}", *cells)
    return table
