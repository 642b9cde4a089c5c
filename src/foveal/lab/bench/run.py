"""`foveal bench`: gate, then time, then figures; the results as one JSON-ready dictionary.

Every shape runs by itself: all candidates are built, checked and warmed up, and those that pass are timed in turns.
Rates come in two kinds, never mixed: *executed* TFLOP/s count the work that a candidate does, *dense-equivalent* ones
what exact attention would have done in its stead. Time ratios are to the dense baselines of the same run.
The backward is timed by itself, over a graph built once; "both" is a forward that builds the graph and its backward.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from foveal.checks import check_choice
from foveal.kernels.api import IMPLS
from foveal.lab.bench.ahead import compile_ahead
from foveal.lab.bench.break_even import break_evens
from foveal.lab.bench.candidates import Candidate, Problem, candidates_for, dense_flops
from foveal.lab.bench.gate import Gate
from foveal.lab.bench.machine import machine
from foveal.lab.bench.shapes import SHAPE_SETS, SHAPES, Inputs, Shape, shape_of_length
from foveal.lab.bench.timing import PASSES, CpuTimer, CudaTimer, Timer, measure, peak_memory
from foveal.layout import VideoGrid

# The name of the command in the lists of `OutputFolder`.
COMMAND = "bench"
SCHEMA = 2  # 2: rested times are the device's, with launches queued ahead; host_ms
# Small, and no multiple of any block or cube.
GATE_GRID = VideoGrid(5, 12, 25)
# In the order of preference: ratios in tables are to the first that ran.
BASELINES = ("SDPA cuDNN", "SDPA flash", "SDPA")


@dataclass(frozen=True)
class BenchSettings:
    """What to run.

    Args:
        shapes: names out of `SHAPES` or `SHAPE_SETS`; the long ones by default.
        quick: only 480p unless `shapes` says otherwise, fewer repetitions, no FlexAttention, no "both" pass.
        only: "kernels" or "methods"; None for both.
        names: parts of names, such as "SLA2": run what has one of them in its name, and dense attention. Without any,
            run all.
        impls: implementations of ours to run instead of the default ones.
        seed: the seed of all tensors and random selections.
        device: "cuda", or "cpu" with a `length`.
        length: run one small shape of so many tokens instead of `shapes` (1 sample, 2 heads, 64 wide).
        gate_grid: the video of the small correctness check.
        commit: the commit of this tree, for the record, where git cannot say.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    shapes: tuple[str, ...] = ()
    quick: bool = False
    only: str | None = None
    names: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cuda"
    length: int | None = None
    gate_grid: VideoGrid = GATE_GRID
    commit: str | None = None

    def __post_init__(self) -> None:
        check_choice("device", self.device, ("cuda", "cpu"))
        for name in self.shapes:
            check_choice("shape", name, (*SHAPES, *SHAPE_SETS))
        for impl in self.impls:
            check_choice("impl", impl, IMPLS)
        if self.only is not None:
            check_choice("only", self.only, ("kernels", "methods"))
        packed = [shape.name for shape in self.chosen_shapes() if shape.before]
        if packed and self.only == "methods":
            raise ValueError(f"only must be 'kernels' for the shapes {packed}, whose sequence has more than a video")
        if self.shapes and self.length is not None:
            raise ValueError(f"give shapes or length, not both, got {self.shapes} and {self.length}")
        if self.device == "cpu" and self.length is None:
            raise ValueError("device 'cpu' needs a length, such as 2048: the named shapes are for GPUs")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "the benchmark needs a CUDA device, and torch finds none; device 'cpu' with length 2048 tries it out"
            )
        if self.names:
            known = {x.name for shape in self.chosen_shapes() for x in self.candidates(shape, named=False)}
            for part in self.names:
                if not any(part in name for name in known):
                    raise ValueError(f"names must be parts of {sorted(known)}, got {part!r}")

    def chosen_shapes(self) -> list[Shape]:
        """The shapes to run, in order."""
        if self.length is not None:
            return [shape_of_length(self.length)]
        names = self.shapes or (("480p",) if self.quick else ("long",))
        return [SHAPES[name] for one in names for name in SHAPE_SETS.get(one, (one,))]

    def candidates(self, shape: Shape, *, named: bool = True) -> list[Candidate]:
        """What to run of a shape, in order; with `named` only that, else all that `names` chooses from."""
        found = candidates_for(
            self.device,
            only="kernels" if shape.before else self.only,
            impls=self.impls,
            quick=self.quick,
            keep_ratios=shape.keep_ratios,
        )
        if not (named and self.names):
            return found
        return [x for x in found if x.kind == "dense" or any(part in x.name for part in self.names)]


def run_bench(
    settings: BenchSettings,
    *,
    candidates: Sequence[Candidate] | None = None,
    timer: Timer | None = None,
    log: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        candidates: instead of those that the settings stand for.
        timer: instead of the device's own.
        log: called with each line of progress.
        keep: called with the results so far after each shape.

    Returns:
        {"schema", "started", "settings", "machine", "shapes": {name: sizes}, "results": one entry per shape and
        candidate, with "status" "ok", "failed" or "skipped" (and a "reason"), the gate's "errors", "passes", "memory",
        "break_even": see `break_evens`}.
    """
    if settings.device == "cuda":
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    else:
        device, dtype = torch.device("cpu"), torch.float32
    if timer is None:
        timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    shapes = settings.chosen_shapes()
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "quick": settings.quick,
            "only": settings.only,
            "names": list(settings.names),
            "seed": settings.seed,
            "dtype": str(dtype)[6:],
        },
        "machine": machine(device, settings.commit),
        "shapes": {shape.name: shape.to_dict() for shape in shapes},
        "results": [],
        "break_even": [],
    }
    for shape in shapes:
        chosen = settings.candidates(shape) if candidates is None else candidates
        results["results"] += _run_shape(shape, chosen, settings, timer, device, dtype, log)
        results["break_even"] = break_evens(results, BASELINES)
        keep(results)
    return results


def _run_shape(shape, candidates, settings, timer, device, dtype, log) -> list[dict[str, Any]]:
    if any(candidate.impl == "FlexAttention" for candidate in candidates):
        # Compiled code is specialized to its shape; too many specializations of one function fall back to eager.
        torch.compiler.reset()
    gate_shape = Shape("gate", 1, 2, settings.gate_grid, shape.head_dim)
    if device.type == "cuda":
        compile_ahead(candidates, (shape, gate_shape), dtype, log)
    inputs, small = (Inputs(x, device=device, dtype=dtype, seed=settings.seed) for x in (shape, gate_shape))
    whole_gate, head_gate = Gate(), Gate()
    # Forward and backward together show the host's whole cost, which counts where sequences are short.
    passes = PASSES[:2] if settings.quick and shape.name not in SHAPE_SETS["short"] else PASSES
    last = (shape.batch - 1, shape.heads - 1)
    heads = (last,) if settings.quick or last == (0, 0) else ((0, 0), last)

    entries, functions = [], {}
    for candidate in candidates:
        log(f"{shape.name}: {candidate.name}: checking")
        entry = _new_entry(shape, candidate)
        entries.append(entry)
        try:
            made = _prepare(candidate, inputs, small, (whole_gate, head_gate), heads, passes, entry)
        except Exception as error:
            # A wrong peer failed; one that does not run, for whatever reason, was skipped.
            failed = candidate.ours or isinstance(error, AssertionError)
            entry["status"] = "skipped" if isinstance(error, _NotForThisMachine) or not failed else "failed"
            entry["reason"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            log(f"{shape.name}: {candidate.name}: {entry['status'].upper()}: {entry['reason']}")
        else:
            functions |= {(len(entries) - 1, name): function for name, function in made.items()}
            del made
    del whole_gate, head_gate, small
    gc.collect()

    log(f"{shape.name}: timing {len(functions)} passes in turns")
    repeats = {"rounds": 3, "calls": 3, "seconds": 0.1} if settings.quick else {"rounds": 6, "calls": 4, "seconds": 0.2}
    # All forwards, then all backwards: a pass has its like as neighbors.
    order = sorted(functions, key=lambda key: (PASSES.index(key[1]), key[0]))
    times = measure(timer, {key: functions[key] for key in order}, **repeats)
    for (index, name), measured in times.items():
        work = _of_pass(name, *candidates[index].flops(shape))
        entries[index]["passes"][name] = figures(*measured, work, _of_pass(name, *dense_flops(shape)))
    add_ratios(entries)

    functions.clear()
    del inputs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return entries


def _new_entry(shape: Shape, candidate: Candidate) -> dict[str, Any]:
    names = {"shape": shape.name, "name": candidate.name, "task": candidate.task, "impl": candidate.impl}
    rest = {"status": "ok", "reason": None, "errors": {}, "passes": {}, "memory": {}}
    return names | {"kind": candidate.kind, "ours": candidate.ours, "options": candidate.options} | rest


class _NotForThisMachine(Exception):
    """A named implementation refused before anything ran."""


def _prepare(
    candidate: Candidate,
    inputs: Inputs,
    small: Inputs,
    gates: tuple[Gate, Gate],
    heads: tuple[tuple[int, int], ...],
    passes: Sequence[str],
    entry: dict[str, Any],
) -> dict[str, Callable[[], object]]:
    """Checks a candidate, at the small shape and the timed one, and returns its passes, warmed up.

    Writes "errors" and "memory" into `entry`. Whatever is raised is the reason not to time the candidate.
    """
    if candidate.ours:
        problem = candidate.build(small)
        try:
            with torch.no_grad():
                problem.run(*problem.tensors)
        except ValueError as error:
            raise _NotForThisMachine(str(error)) from error
        entry["errors"]["small"] = gates[0].check_whole(candidate, problem)
    problem = candidate.build(inputs)
    if problem.head is not None:
        entry["errors"]["heads"] = gates[1].check_heads(candidate, problem, heads)
    made = _pass_functions(problem, passes)
    for function in made.values():
        function()
    if inputs.device.type == "cuda":
        entry["memory"] = _memory(inputs.device, problem)
    return made


def _pass_functions(problem: Problem, passes: Sequence[str]) -> dict[str, Callable[[], object]]:
    leaves = [x.detach().requires_grad_() for x in problem.tensors]
    output = problem.run(*leaves)

    def forward() -> Tensor:
        with torch.no_grad():
            return problem.run(*problem.tensors)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, problem.grad, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(problem.run(*leaves), leaves, problem.grad)

    made = {"forward": forward, "backward": backward, "both": both}
    return {name: made[name] for name in passes}


def _memory(device: torch.device, problem: Problem) -> dict[str, int]:
    """Bytes at the peak beyond inputs and results (output; output and gradients)."""
    leaves = [x.detach().requires_grad_() for x in problem.tensors]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (problem.run(*problem.tensors),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = problem.run(*leaves)
        return (output, *torch.autograd.grad(output, leaves, problem.grad))

    return {"forward": peak_memory(device, forward), "forward_backward": peak_memory(device, forward_backward)}


def _of_pass(name: str, forward: float, backward: float) -> float:
    return {"forward": forward, "backward": backward, "both": forward + backward}[name]


def figures(rested: list[float], sustained: float, host: float, flops: float, flops_of_dense: float) -> dict[str, Any]:
    """Milliseconds and rates of one pass; the rates are of the rested median."""
    median = statistics.median(rested)
    return {
        "rested_ms": median,
        "rested_all_ms": rested,
        "sustained_ms": sustained,
        "host_ms": host,
        "executed_tflops": flops / median * 1e-9,
        "dense_equivalent_tflops": flops_of_dense / median * 1e-9,
    }


def baselines_of(entries: list[dict[str, Any]]) -> list[str]:
    """The dense baselines that ran, the preferred one first."""
    ran = {entry["task"] for entry in entries if entry["status"] == "ok"}
    return [task for task in BASELINES if task in ran]


def add_ratios(entries: list[dict[str, Any]]) -> None:
    """Sets each pass's "ratios", to every dense baseline of these entries (one shape, one run) that has the same pass.

    By baseline: "speedup" and "sustained_speedup" (its time over ours) and "share_of_rate" (our executed TFLOP/s over
    its; what a block-sparse kernel keeps of dense speed).
    """
    baselines = {entry["task"]: entry["passes"] for entry in entries if entry["task"] in BASELINES}
    for entry in entries:
        for name, own in entry["passes"].items():
            own["ratios"] = {
                task: {
                    "speedup": passes[name]["rested_ms"] / own["rested_ms"],
                    "sustained_speedup": passes[name]["sustained_ms"] / own["sustained_ms"],
                    "share_of_rate": own["executed_tflops"] / passes[name]["executed_tflops"],
                }
                for task, passes in baselines.items()
                if name in passes
            }
