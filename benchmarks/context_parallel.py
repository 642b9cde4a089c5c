"""A transformer call on one GPU against several: context parallelism by Ulysses, dense and sparse, random weights.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --backward --no-compile
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --size h3 --layers 8

A Wan at sizes of its own, or MiniMax-H3 at its full width with a few of its 50 blocks, over the packed sequence of one
request. Everything outside of the blocks is done once per call, so a few blocks gain a little less than all of them.

Every rank holds the whole model twice: as it is, which all ranks run at the same time on the same input, and under
diffusers' `enable_parallelism`, which they run together. The two take turns, round by round; what counts is the median
of the slowest rank's times. With `--backward` a call is a forward and its backward under gradient checkpointing,
without the sum of gradients over ranks that a training step needs.

First, a tiny float32 model must give the same on one rank as on all, outputs and summed gradients, for every arm. At
full size, in bfloat16, the relative difference of the outputs is written down beside the times: rounding moves a block
in or out of a selection, so sparse arms differ by more than dense ones.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import minimax_h3
import torch
import torch.distributed as dist
import wan_transformer
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import nn
from wan_transformer import (
    DENSE,
    RESOLUTIONS,
    SIZES,
    build,
    call_inputs,
    inductor_option,
    milliseconds,
    synchronize,
)

import foveal
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import file_name, write_json
from foveal.lab.train.model import compile_blocks
from foveal.methods.base import Config

SAME = 1e-3  # of a float32 gradient's norm: other sums, in another order


class Subject(Protocol):
    """The model that is timed, at the size and the length of the options."""

    arms: dict[str, Config]
    resolutions: tuple[str, ...]

    def build(self, options: argparse.Namespace, device: torch.device) -> nn.Module:
        """With random weights, to be timed."""

    def inputs(self, options: argparse.Namespace, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Its arguments at full length."""

    def tiny(self, device: torch.device) -> nn.Module:
        """A float32 model for the check, with one head a rank."""

    def tiny_inputs(self, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Its arguments."""


class Wan:
    arms, resolutions = wan_transformer.ARMS, tuple(RESOLUTIONS)

    def build(self, options, device):
        return build(options.size, device)

    def inputs(self, options, model, device):
        return call_inputs(options.resolution, model, device)

    def tiny(self, device):
        with torch.device(device):
            settings = SIZES["tiny"] | {"num_attention_heads": dist.get_world_size()}
            return WanTransformer3DModel(attention_head_dim=128, **settings)

    def tiny_inputs(self, model, device):
        return {name: x.float() for name, x in call_inputs("tiny", model, device).items()}


class H3:
    arms: ClassVar = {name: arm.config for name, arm in minimax_h3.ARMS.items() if arm.config is not None}
    resolutions = tuple(minimax_h3.CLIPS)
    TEXT = 256

    def build(self, options, device):
        return minimax_h3.build(options.layers, device, smoke=options.size == "h3-tiny")

    def inputs(self, options, model, device):
        smoke = options.size == "h3-tiny"
        return minimax_h3.pack(minimax_h3.CLIPS[options.resolution], self.TEXT, model, smoke).inputs

    def tiny(self, device):
        settings = minimax_h3.SMOKE | {"num_attention_heads": dist.get_world_size(), "attention_head_dim": 128}
        with torch.device(device):
            return minimax_h3.MiniMaxH3Transformer3DModel(num_layers=2, **settings)

    def tiny_inputs(self, model, device):
        return minimax_h3.pack(minimax_h3.CLIPS["5 s"], 8, model, smoke=True).inputs


SUBJECTS: dict[str, Subject] = {name: Wan() for name in SIZES} | {name: H3() for name in ("h3", "h3-tiny")}


def sparsified(model: nn.Module, config: Config | None) -> nn.Module:
    """Converted, with sparse parameters that leave their neutral start; as it is without a configuration."""
    if config is not None:
        foveal.sparsify(model, config)
        with torch.no_grad():
            for parameter in foveal.sparse_parameters(model).values():
                parameter.normal_(0, 0.02)
    return model


def parallelized(model: nn.Module) -> nn.Module:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return model


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return ((ours - expected).float().norm() / expected.float().norm()).item()


def check(arm: str, subject: Subject, device: torch.device) -> dict[str, float]:
    """Relative differences of a tiny float32 model on all ranks from the same on one.

    Raises:
        SystemExit: they are no rounding.
    """

    def output_and_gradients(parallel: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = sparsified(subject.tiny(device), subject.arms.get(arm))
        torch.manual_seed(1)
        fed = subject.tiny_inputs(model, device)
        output = (parallelized(model) if parallel else model)(**fed, return_dict=False)[0]
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for gradient in gradients if parallel else ():
            dist.all_reduce(gradient)
        return output.detach(), gradients

    (expected, theirs), (output, ours) = output_and_gradients(False), output_and_gradients(True)
    found = {
        "output": difference(output, expected),
        "gradients": difference(*(torch.cat([x.flatten() for x in gradients]) for gradients in (ours, theirs))),
    }
    if len(ours) != len(theirs) or not max(found.values()) < SAME:
        raise SystemExit(f"{arm}: one rank and {dist.get_world_size()} disagree in float32, {found}; nothing was timed")
    return found


def build_call(arm: str, parallel: bool, options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """A function that runs one call, and returns the output."""
    subject = SUBJECTS[options.size]
    model = subject.build(options, device)
    if options.backend is not None:
        model.set_attention_backend(options.backend)
    torch.manual_seed(1)
    model = sparsified(model, subject.arms.get(arm)).requires_grad_(options.backward)
    if options.backward:
        model.enable_gradient_checkpointing()
    torch.manual_seed(2)
    fed = subject.inputs(options, model, device)

    def call() -> torch.Tensor:
        if not options.backward:
            with torch.no_grad():
                return model(**fed, return_dict=False)[0]
        model.zero_grad(set_to_none=True)
        output = model(**fed, return_dict=False)[0]
        output.float().square().mean().backward()
        return output.detach()

    if parallel:
        parallelized(model)
        call()  # diffusers' hook on the first block looks up its parameters, which a compiler cannot follow
    if options.compile:
        keep = True if parallel else None
        compile_blocks(model, keep_exchanged=keep, fullgraph=True, dynamic=False, options=dict(options.inductor))
    return call


def slowest(here: float, device: torch.device) -> float:
    """A time, on the rank where it is longest."""
    worst = torch.tensor(here, device=device, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def time_arm(arm: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    calls = {name: build_call(arm, name == "parallel", options, device) for name in ("single", "parallel")}
    results: dict[str, Any] = {name: {"all_ms": []} for name in calls}
    outputs = {}
    for name, call in calls.items():
        call()  # compiles
        synchronize(device)
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        outputs[name] = call()
        if device.type == "cuda":
            results[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    for _ in range(options.rounds):
        for name, call in calls.items():
            dist.barrier()
            results[name]["all_ms"].append(slowest(milliseconds(call, device), device))
    for result in results.values():
        result["ms"] = statistics.median(result["all_ms"])
    results["speedup"] = results["single"]["ms"] / results["parallel"]["ms"]
    results["relative_difference"] = difference(outputs["parallel"], outputs["single"])
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SUBJECTS), default="1.3b", help="of a Wan, or MiniMax-H3's width")
    parser.add_argument("--resolution", help="a Wan's, or a clip of MiniMax-H3; 480p or 15 s by default")
    parser.add_argument("--layers", type=int, default=8, help="blocks of MiniMax-H3")
    parser.add_argument("--arms", nargs="+", help="all of them by default")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each arm")
    parser.add_argument("--backend", help="diffusers' name for the dense backend; by default cuDNN's on CUDA")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no arm that would end later")
    parser.add_argument(
        "--inductor", nargs="+", type=inductor_option, default=[], metavar="NAME=VALUE", help="options of torch.compile"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    started = time.monotonic()
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.size]
    options.resolution = options.resolution or ("480p" if isinstance(subject, Wan) else "15 s")
    options.arms = options.arms or [DENSE, *subject.arms]
    for name, given, valid in (
        ("--resolution", [options.resolution], subject.resolutions),
        ("--arms", options.arms, (DENSE, *subject.arms)),
    ):
        if not set(given) <= set(valid):
            parser.error(f"{name} of --size {options.size} must be out of {valid}, got {given}")

    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    if options.device == "cuda":
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        options.backend = options.backend or "_native_cudnn"
    else:
        device = torch.device("cpu")
        # diffusers divides by the number of accelerators.
        torch.accelerator.device_count = lambda: ranks
    torch._dynamo.config.recompile_limit = 64

    names = ("size", "resolution", "layers", "backward", "rounds", "backend", "compile")
    results: dict[str, Any] = {
        "schema": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: getattr(options, name) for name in names}
        | {"ranks": ranks, "inductor": dict(options.inductor)},
        "machine": machine(device, options.commit),
        "arms": {arm: subject.arms[arm].to_dict() for arm in options.arms if arm != DENSE},
        "float32_differences": {},
        "calls": {},
    }
    path = options.output / f"context-parallel-{options.size}-{file_name(results)}"
    for arm in options.arms:
        results["float32_differences"][arm] = check(arm, subject, device)
    longest = 0.0
    for arm in options.arms:
        begun = time.monotonic()
        if slowest(begun - started + longest, device) > options.budget_seconds:
            if first:
                print(f"out of time before {arm}; --arms takes those that are left", flush=True)
            break
        results["calls"][arm] = found = time_arm(arm, options, device)
        if first:
            times = f"{found['single']['ms']:.1f} ms on one rank, {found['parallel']['ms']:.1f} ms on {ranks}"
            differing = f"differing by {found['relative_difference']:.2e}"
            print(f"{arm}: {times}, {found['speedup']:.2f}x, {differing}", file=sys.stderr, flush=True)
            write_json(path, results)
        longest = max(longest, time.monotonic() - begun)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if first:
        print(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
