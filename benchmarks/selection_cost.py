"""What choosing the blocks costs: the share of a method's forward, by score and rule; and the methods beside SLA.

On the device machine, from the repository's root:

    PYTHONPATH=src python3 benchmarks/selection_cost.py --output $OUT/selection-cost.json --budget-seconds 140

Each arm is the forward of a layer, timed with the selection made inside and with the same selection given. The share is
what the difference makes of the first. "By itself" is the selection alone, which may be more: made inside, a part of it
shares passes with the method or runs beside its attention. The inputs are normal tokens around a random mean of each 64
of them, so that scores differ as a trained model's do, by a standard deviation of about 2. At the shapes of MiniMax-H3
the sequence is packed, with text and audio before the video. Processes compile all kernels first, a few arms each.

An arm counts only if its output is finite, and that with the selection given is the same but for rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.lab.bench.ahead import fix_cache_keys
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.bench.shapes import SHAPES, Shape
from foveal.lab.bench.timing import CpuTimer, CudaTimer, in_turns
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.sla.attention import SparseLinearAttention
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla2.attention import RoutedSparseLinearAttention
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla_vsa.attention import SparseLinearVideoAttention
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.vsa.attention import VideoSparseAttention
from foveal.methods.vsa.config import VSAConfig

MOST = 0.06  # of the forward that the choice may cost
SLOWER = 1.10  # times SLA's forward that other methods may take
SAME = 0.01  # relative error: of a selection that differs in a few blocks whose scores are next to equal
SMOKE = (Shape("smoke", 1, 2, VideoGrid(4, 8, 16), 64), Shape("smoke, packed", 1, 2, VideoGrid(4, 8, 16), 64, (16,)))
WARM_HEADS, PROCESSES, WARM_SECONDS = 8, 14, 80
ROUNDS, CALLS = 5, 3


class Arm(NamedTuple):
    """One way to choose in one method; `rule` is its name in tables."""

    method: str
    rule: str
    config: Any


def arms_of(shape: Shape) -> list[Arm]:
    """Every score and rule at equal kept blocks, as far as the rule says how many; SLA's first."""
    sla = SLAConfig(keep_ratio=0.05, drop_ratio=0.10)
    vsa = VSAConfig(keep_ratio=0.1 if shape.before else 0.125, tile="auto")
    by_head = tuple(0.02 + 0.06 * i / max(1, shape.heads - 1) for i in range(shape.heads))
    rules: dict[str, dict[str, Any]] = {
        "mean": {},
        "log_sum_exp": {"score": "log_sum_exp"},
        "mean_spread": {"score": "mean_spread"},
        "top-p": {"keep_ratio": 0.01, "keep_mass": 0.5, "max_keep_ratio": 0.1},
        "top-p, log_sum_exp": {"keep_ratio": 0.01, "keep_mass": 0.5, "max_keep_ratio": 0.1, "score": "log_sum_exp"},
        "first frame": {"sink_frames": 1},
        "ratio by head": {"keep_ratio": by_head},
    }
    arms = [Arm("SLA", rule, sla.replace(**changes)) for rule, changes in rules.items()]
    arms += [
        Arm("SLA 128x64", "mean", sla.replace(block_q=128)),
        Arm("SLA 128x64, all keys", "mean", sla.replace(block_q=128, linear_scope="all", drop_ratio=0.0)),
        Arm("SLA, tile order", "mean", sla.replace(token_order="tile")),
        Arm("SLA, tile order", "window", sla.replace(token_order="tile", window=(1, 3, 3))),
    ]
    router = SLA2Config(keep_ratio=0.05, block_q=64, linear_scope="none", router="per_head")
    rules["window"] = {"window": (1, 3, 3)}
    arms += [Arm("VSA", rule, vsa.replace(**changes)) for rule, changes in rules.items()]
    return [
        *arms,
        Arm("SLA2", "router", SLA2Config(keep_ratio=0.05, block_q=64)),
        Arm("SLA2, no linear branch", "router", router),
        Arm("SLA2, no linear branch, tile order", "router", router.replace(token_order="tile")),
        Arm("VSA", "router", vsa.replace(router="per_head")),
        Arm("SLA + VSA", "mean", SLAVSAConfig(keep_ratio=0.05, tile="auto")),
    ]


def arms_named(shape: Shape, names: list[str] | None) -> list[Arm]:
    """Those of `arms_of` whose method, or "METHOD: RULE", is among the names; None for all."""
    return [arm for arm in arms_of(shape) if names is None or {arm.method, f"{arm.method}: {arm.rule}"} & set(names)]


class Inputs:
    """What all arms at a shape are fed: views of [B, L, H, D] memory, as transformers have them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.layout = shape, TokenLayout(shape.grid, before=shape.before)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def drawn(length: int) -> Tensor:
            size = (shape.batch, length, shape.heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        def around_means() -> Tensor:
            means = drawn(-(-shape.length // 64)).repeat_interleave(64, 1)[:, : shape.length]
            return drawn(shape.length).add_(means, alpha=1.4).transpose(1, 2)

        self.query, self.key = around_means(), around_means()
        self.value, self.gate = (drawn(shape.length).transpose(1, 2) for _ in range(2))


def module_of(config: Any, shape: Shape, device: torch.device, impl: str) -> nn.Module:
    heads, head_dim = shape.heads, shape.head_dim
    if isinstance(config, SLAConfig):
        module = SparseLinearAttention(head_dim, config, impl=impl)
    elif isinstance(config, SLA2Config):
        module = RoutedSparseLinearAttention(heads, head_dim, config, impl=impl)
    else:
        kind = VideoSparseAttention if isinstance(config, VSAConfig) else SparseLinearVideoAttention
        module = kind(8, heads, head_dim, config, impl=impl)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.to(device).requires_grad_(False)


class Calls(NamedTuple):
    """The forward with its own selection, the same with that selection given, and the selection by itself."""

    inside: Callable[[], Tensor]
    given: Callable[[], Tensor]
    select: Callable[[], Any]
    kept: float
    ran: str


def calls_of(arm: Arm, inputs: Inputs, device: torch.device) -> Calls:
    """An arm's calls, each called once.

    Raises:
        AssertionError: if the selection made inside is not the one that `select` makes, or the output is not finite.
    """
    impl = "auto" if device.type == "cuda" else "torch"
    module = module_of(arm.config, inputs.shape, device, impl)
    tokens = inputs.query, inputs.key, inputs.value
    if isinstance(arm.config, VSAConfig | SLAVSAConfig):
        tokens = *tokens, None, (inputs.gate, None)
    where = {"layout": inputs.layout}

    @torch.no_grad()
    def inside() -> Tensor:
        return module(*tokens, **where)

    @torch.no_grad()
    def select() -> Any:
        return module.select(inputs.query, inputs.key, **where)

    selection = select()
    # As the method has it, padded; a view of that would be padded again.
    mask = selection.marginal
    if mask is not None and mask._base is not None and mask._base.dim() == 4:
        selection = dataclasses.replace(selection, marginal=mask._base)

    @torch.no_grad()
    def given() -> Tensor:
        return module(*tokens, selection=selection, **where)

    output = inside()
    ran = module.ran
    assert torch.isfinite(output).all(), f"{arm}: not finite"
    error = float((given() - output).float().norm() / output.float().norm())
    assert error <= SAME, f"{arm}: the output is another by {error:.4f} with the selection that `select` makes"
    kept = selection.critical_count.double().mean().item() / selection.num_key_blocks
    said = ran.impl if ran.why is None else f"{ran.impl}: {ran.why}"
    return Calls(inside, given, select, kept, said)


def measure_shape(
    shape: Shape, device: torch.device, deadline: float, log: Callable[[str], None], names: list[str] | None = None
) -> list[dict[str, Any]]:
    """Figures of the named arms at a shape, one entry each; rounds until the deadline, one at least."""
    inputs, entries, functions = Inputs(shape, device), [], {}
    for arm in arms_named(shape, names):
        entry = {
            "shape": shape.name,
            "method": arm.method,
            "rule": arm.rule,
            "config": arm.config.to_dict(),
        }
        entries.append(entry)
        try:
            calls = calls_of(arm, inputs, device)
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            log(f"{shape.name}: {arm.method}, {arm.rule}: FAILED: {entry['failed']}")
            continue
        entry |= {"kept": calls.kept, "ran": calls.ran}
        for name in ("inside", "given", "select"):
            functions[len(entries) - 1, name] = getattr(calls, name)
    log(f"{shape.name}: timing {len(functions)} calls")
    timer = CudaTimer(device, pause=0.01) if device.type == "cuda" else CpuTimer()
    times: dict[tuple[int, str], list[float]] = {key: [] for key in functions}
    for index in range(ROUNDS):
        started = time.monotonic()
        for key, spans in in_turns(timer, functions, rounds=1, calls=CALLS).items():
            times[key] += spans
        log(f"{shape.name}: round {index + 1} took {time.monotonic() - started:.1f} s")
        if 2 * time.monotonic() - started > deadline:
            break
    for (index, name), spans in times.items():
        entries[index][f"{name}_ms"] = statistics.median(spans)
        entries[index].setdefault("all_ms", {})[name] = spans
    for entry in entries:
        if "inside_ms" in entry:
            entry["cost_ms"] = entry["inside_ms"] - entry["given_ms"]
            entry["share"] = entry["cost_ms"] / entry["inside_ms"]
    return entries


def warm(shapes: list[Shape], names: list[str] | None, part: int, parts: int, device: torch.device) -> None:
    """Compiles what some of the arms launch, by calling them with few heads."""
    if device.type == "cuda":
        fix_cache_keys()
    for shape in shapes:
        few = dataclasses.replace(shape, heads=min(shape.heads, WARM_HEADS))
        inputs = Inputs(few, device)
        for arm in arms_named(few, names)[part::parts]:
            calls_of(arm, inputs, device)


def compile_ahead(names: list[str], arms: list[str] | None, log: Callable[[str], None]) -> None:
    """`warm` in other processes, which leave what they compile in Triton's cache."""
    fix_cache_keys()
    command = [sys.executable, __file__, "--shapes", *names, *([] if arms is None else ["--arms", *arms]), "--warm"]
    started, began = [], time.monotonic()
    for part in range(PROCESSES):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen([*command, f"{part}/{PROCESSES}"], **quiet))
    for process in started:
        try:
            process.wait(max(0.1, began + WARM_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    failed = sum(process.returncode != 0 for process in started)
    log(f"compiled ahead in {time.monotonic() - began:.1f} s; {failed} of {PROCESSES} processes did not finish")


def tables(entries: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Rows of two tables: what choosing costs, and the methods beside SLA at equal kept blocks."""
    costs = [["shape", "method", "rule", "kept", "forward, ms", "selection, ms", "share", "by itself, ms", "ran"]]
    others = [["shape", "method", "kept", "forward, ms", "x SLA", "x SLA, tile order"]]
    known = {(x["shape"], x["method"], x["rule"]): x["inside_ms"] for x in entries if "inside_ms" in x}
    for x in entries:
        if "inside_ms" not in x:
            costs.append([x["shape"], x["method"], x["rule"], "failed", "", "", "", "", ""])
            continue
        mark = "" if x["share"] <= MOST else " over"
        figures = f"{x['inside_ms']:.3f}", f"{x['cost_ms']:.3f}", f"{100 * x['share']:.1f}%{mark}"
        ran = x["ran"].partition(":")[0] + (" (part slow)" if ":" in x["ran"] else "")
        names = x["shape"], x["method"], x["rule"]
        costs.append([*names, f"{100 * x['kept']:.1f}%", *figures, f"{x['select_ms']:.3f}", ran])
        if x["method"] in ("SLA2", "SLA + VSA"):
            slas = [known.get((x["shape"], of, "mean")) for of in ("SLA", "SLA, tile order")]
            ratios = [None if of is None else x["inside_ms"] / of for of in slas]
            cells = ["" if x is None else f"{x:.2f}" + ("" if x <= SLOWER else " over") for x in ratios]
            others.append([x["shape"], x["method"], f"{100 * x['kept']:.1f}%", f"{x['inside_ms']:.3f}", *cells])
    return [costs, others]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["480p", "h3-5s", "h3-15s"], choices=sorted(SHAPES))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help='only these: "SLA2", or "SLA: mean" for one rule')
    parser.add_argument("--output", type=Path, help="the file of results, JSON")
    parser.add_argument("--budget-seconds", type=float, default=600.0)
    parser.add_argument("--commit", help="the commit of this tree, where git cannot say")
    parser.add_argument("--smoke", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--warm", metavar="PART/PARTS", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    device = torch.device("cpu" if given.smoke else "cuda")
    shapes = list(SMOKE) if given.smoke else [SHAPES[name] for name in given.shapes]
    if given.warm:
        warm(shapes, given.arms, *map(int, given.warm.split("/")), device)
        return 0

    def log(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    if not given.smoke:
        compile_ahead(given.shapes, given.arms, log)
    results = {
        "schema": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device, given.commit),
        "shapes": {shape.name: shape.to_dict() for shape in shapes},
        "entries": [],
    }
    for index, shape in enumerate(shapes):
        left = began + given.budget_seconds - time.monotonic()
        # Longer sequences take more of what is left.
        deadline = time.monotonic() + left / (len(shapes) - index)
        results["entries"] += measure_shape(shape, device, deadline, log, given.arms)
        if given.output is not None:
            write_json(given.output, results)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for rows in tables(results["entries"]):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(flush=True)
    return int(any("failed" in entry for entry in results["entries"]))


if __name__ == "__main__":
    sys.exit(main())
