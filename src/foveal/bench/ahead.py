"""Kernels compiled before they are needed, by processes side by side: compiling one after another takes minutes.

Triton keeps what it compiles on disk, where the benchmark's own process then finds it. Started as a script with one
JSON argument, this module is one of these processes. What fails here fails again, and is reported, in the benchmark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from foveal.bench.candidates import Candidate, candidates_for
from foveal.bench.shapes import Inputs, Shape
from foveal.video_grid import VideoGrid

PROCESSES = 16
# Device memory of one process: about so many tensors of the shape, and what CUDA takes for itself.
TENSORS, CONTEXT_BYTES = 40, 2**30
SECONDS = 300


def compile_ahead(
    candidates: Sequence[Candidate], shape: Shape, dtype: torch.dtype, log: Callable[[str], None]
) -> None:
    """Runs each candidate of ours once at this shape, on the current CUDA device, in other processes."""
    chosen = [x for x in candidates if x.ours and not (x.kind == "method" and x.options["selection"] == "given")]
    wanted = CONTEXT_BYTES + TENSORS * shape.batch * shape.heads * shape.length * shape.head_dim * dtype.itemsize
    processes = min(PROCESSES, os.cpu_count() or 1, len(chosen), torch.cuda.mem_get_info()[0] // wanted)
    if processes < 2:
        return
    log(f"{shape.name}: compiling, {processes} processes side by side")
    jobs = [job(chosen[i::processes], shape, f"cuda:{torch.cuda.current_device()}", dtype) for i in range(processes)]
    command, nowhere = [sys.executable, "-m", "foveal.bench.ahead"], subprocess.DEVNULL
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


def job(chosen: Sequence[Candidate], shape: Shape, device: str, dtype: torch.dtype) -> str:
    """The JSON argument of one process: which candidates, at what shape, where."""
    fields = dataclasses.asdict(shape) | {"grid": list(shape.grid.shape)}
    names = {"names": [x.name for x in chosen], "impls": sorted({x.impl for x in chosen})}
    return json.dumps({**names, "shape": fields, "device": device, "dtype": str(dtype)[6:]})


def run_job(text: str) -> list[str]:
    """Runs the candidates of a `job` forward and backward; the names of those that ran."""
    given = json.loads(text)
    shape = Shape(**given["shape"] | {"grid": VideoGrid(*given["shape"]["grid"])})
    device = torch.device(given["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    inputs = Inputs(shape, device=device, dtype=getattr(torch, given["dtype"]), seed=0)
    ran = []
    for candidate in candidates_for(device.type, impls=tuple(given["impls"]), quick=True):
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
