"""Compile kernels before they are needed, in parallel processes. Compiling them one by one takes minutes.

Triton keeps compiled kernels on disk, where the benchmark's own process finds them. Started as a script with one JSON
argument, this module is one of these processes. What fails here fails again in the benchmark, which reports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from foveal.lab.bench.candidates import Candidate, candidates_for
from foveal.lab.bench.shapes import Inputs, Shape
from foveal.layout import VideoGrid

PROCESSES = 16
# Device memory of one process: about this many tensors of the shape, plus what CUDA takes for itself.
TENSORS, CONTEXT_BYTES = 40, 2**30
SECONDS = 300
# Fields of a `Shape` that JSON has as lists.
TUPLES = ("before", "keep_ratios")


def fix_cache_keys() -> dict[str, str]:
    """Compute Triton's keys of all kernels and their helpers in one order, and return them by name.

    A kernel's key depends on which of its helpers the process hashed before it (triton-lang/triton#10494). Processes
    that hash in another order would not find what others compiled.
    """
    from triton.runtime.jit import JITFunction

    from foveal.kernels.hopper import support

    keys = {}
    for package in ("triton", "hopper") if support.missing_gluon() is None else ("triton",):
        folder = importlib.import_module(f"foveal.kernels.{package}")
        for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")):
            functions = vars(importlib.import_module(name)).items()
            keys |= {f"{name}.{label}": x.cache_key for label, x in functions if isinstance(x, JITFunction)}
    return keys


def compile_ahead(
    candidates: Sequence[Candidate], shapes: Sequence[Shape], dtype: torch.dtype, log: Callable[[str], None]
) -> None:
    """Run each candidate of ours once at each of these shapes, on the current CUDA device, in other processes.

    Args:
        shapes: the shape that is timed comes first; it has the name and takes the most memory.
    """
    shape = shapes[0]
    chosen = [x for x in candidates if x.ours and not (x.kind == "method" and x.options["selection"] == "given")]
    wanted = CONTEXT_BYTES + TENSORS * shape.batch * shape.heads * shape.length * shape.head_dim * dtype.itemsize
    processes = min(PROCESSES, os.cpu_count() or 1, len(chosen), torch.cuda.mem_get_info()[0] // wanted)
    if processes < 2:
        return
    fix_cache_keys()
    log(f"{shape.name}: compiling in {processes} parallel processes")
    jobs = [job(chosen[i::processes], shapes, f"cuda:{torch.cuda.current_device()}", dtype) for i in range(processes)]
    command, nowhere = [sys.executable, "-m", "foveal.lab.bench.ahead"], subprocess.DEVNULL
    started = [subprocess.Popen([*command, x], stdout=nowhere, stderr=nowhere) for x in jobs]
    deadline = time.monotonic() + SECONDS
    try:
        for process in started:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        log(f"{shape.name}: compiling takes over {SECONDS} s; continuing without it")
    finally:
        for process in started:
            process.kill()
            process.wait()


def job(chosen: Sequence[Candidate], shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> str:
    """The JSON argument of one process: which candidates to run, at which shapes, and where."""
    fields = [dataclasses.asdict(x) | {"grid": list(x.grid.shape)} for x in shapes]
    names = {"names": [x.name for x in chosen], "impls": sorted({x.impl for x in chosen})}
    return json.dumps({**names, "shapes": fields, "device": device, "dtype": str(dtype)[6:]})


def run_job(text: str) -> list[str]:
    """Run the candidates of a `job` forward and backward, and return the names of those that ran, once per shape."""
    given = json.loads(text)
    device = torch.device(given["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fix_cache_keys()
    ran = []
    shapes = [
        Shape(**fields | {"grid": VideoGrid(*fields["grid"])} | {name: tuple(fields[name]) for name in TUPLES})
        for fields in given["shapes"]
    ]
    # The gate's shape goes through the candidates of the shape that is timed.
    chosen = {"impls": tuple(given["impls"]), "quick": True, "keep_ratios": shapes[0].keep_ratios}
    candidates = candidates_for(device.type, **chosen)
    for shape in shapes:
        inputs = Inputs(shape, device=device, dtype=getattr(torch, given["dtype"]), seed=0)
        for candidate in candidates:
            if candidate.name not in given["names"]:
                continue
            with contextlib.suppress(Exception):
                problem = candidate.build(inputs)
                leaves = [x.detach().requires_grad_() for x in problem.tensors]
                with torch.no_grad():
                    problem.run(*leaves)
                torch.autograd.grad(problem.run(*leaves), leaves, problem.grad)
                ran.append(candidate.name)
    return ran


if __name__ == "__main__":
    run_job(sys.argv[1])
