"""Kernels compiled before they are needed, by processes side by side: compiling one after another takes minutes.

Triton keeps what it compiles on disk, where the benchmark's own process then finds it. Started as a script with one
JSON argument, this module is one of these processes. What fails here fails again, and is reported, in the benchmark.
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
# Device memory of one process: about so many tensors of the shape, and what CUDA takes for itself.
TENSORS, CONTEXT_BYTES = 40, 2**30
SECONDS = 300


def fix_cache_keys() -> dict[str, str]:
    """Triton's keys of all kernels and their helpers, computed in one order; by name.

    A kernel's key depends on which of its helpers the process had hashed before it, until Triton mends that
    (triton-lang/triton#10494): processes that do not start alike would miss what others compiled.
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
    """Runs each candidate of ours once at each of these shapes, on the current CUDA device, in other processes.

    Args:
        shapes: the one that is timed first; it has the name, and takes the most memory.
    """
    shape = shapes[0]
    chosen = [x for x in candidates if x.ours and not (x.kind == "method" and x.options["selection"] == "given")]
    wanted = CONTEXT_BYTES + TENSORS * shape.batch * shape.heads * shape.length * shape.head_dim * dtype.itemsize
    processes = min(PROCESSES, os.cpu_count() or 1, len(chosen), torch.cuda.mem_get_info()[0] // wanted)
    if processes < 2:
        return
    fix_cache_keys()
    log(f"{shape.name}: compiling, {processes} processes side by side")
    jobs = [job(chosen[i::processes], shapes, f"cuda:{torch.cuda.current_device()}", dtype) for i in range(processes)]
    command, nowhere = [sys.executable, "-m", "foveal.lab.bench.ahead"], subprocess.DEVNULL
    started = [subprocess.Popen([*command, x], stdout=nowhere, stderr=nowhere) for x in jobs]
    deadline = time.monotonic() + SECONDS
    try:
        for process in started:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        log(f"{shape.name}: compiling takes over {SECONDS} s; going on without")
    finally:
        for process in started:
            process.kill()
            process.wait()


def job(chosen: Sequence[Candidate], shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> str:
    """The JSON argument of one process: which candidates, at what shapes, where."""
    fields = [dataclasses.asdict(x) | {"grid": list(x.grid.shape)} for x in shapes]
    names = {"names": [x.name for x in chosen], "impls": sorted({x.impl for x in chosen})}
    return json.dumps({**names, "shapes": fields, "device": device, "dtype": str(dtype)[6:]})


def run_job(text: str) -> list[str]:
    """Runs the candidates of a `job` forward and backward; the names of those that ran, once a shape."""
    given = json.loads(text)
    device = torch.device(given["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fix_cache_keys()
    candidates = candidates_for(device.type, impls=tuple(given["impls"]), quick=True)
    ran = []
    for fields in given["shapes"]:
        shape = Shape(**fields | {"grid": VideoGrid(*fields["grid"])})
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
