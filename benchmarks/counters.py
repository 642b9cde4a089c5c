"""What bounds the kernels: hardware counters of one forward and backward of some candidates of `foveal bench`.

    python benchmarks/counters.py                    needs an NVIDIA GPU and Nsight Compute's `ncu`
    python benchmarks/counters.py --csv FILE --like RESULT
                                                     reads what `ncu --csv --page raw` printed before, for the same
                                                     candidates, on the machine of another result

Nsight Compute runs each kernel again and again under its own clock: shares of a limit are the point, not milliseconds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from foveal.lab.bench.candidates import candidates_for
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import file_name, write_json
from foveal.lab.bench.shapes import SHAPES, Inputs

CANDIDATES = (
    "block-sparse 64x64 12.5 %, gluon",
    "block-sparse 64x64 5 %, gluon",
    "block-sparse 128x64 12.5 %, gluon",
    "SLA 64x64 marginal, auto",
    "VSA 12.5 %, auto tile, auto",
    "VSA 12.5 %, wide tile, auto",
)
# Ours to counters of Nsight Compute, all but the first in percent of what the hardware can do.
COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "l2_out": "lts__lts2xbar_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_lookup": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l1_and_shared": "l1tex__throughput.avg.pct_of_peak_sustained_active",
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
KERNELS = "regex:block_sparse|cubes_fwd"
LAST_KERNEL = "block_sparse_dkdv_kernel"  # of a backward
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3}


def run_candidate(name: str, shape: str) -> None:
    """One forward and backward between the profiler's start and stop, after two that do not count."""
    inputs = Inputs(SHAPES[shape], device=torch.device("cuda", 0), dtype=torch.bfloat16, seed=0)
    (candidate,) = (one for one in candidates_for("cuda", quick=True) if one.name == name)
    problem = candidate.build(inputs)
    leaves = [x.detach().requires_grad_() for x in problem.tensors]
    for counted in (False, False, True):
        torch.cuda.synchronize()
        if counted:
            torch.cuda.cudart().cudaProfilerStart()
        torch.autograd.grad(problem.run(*leaves), leaves, problem.grad)
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def profiled(name: str, shape: str) -> str:
    """What `ncu` prints for one candidate."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw", *sections]
    again = [sys.executable, __file__, "--run", name, "--shape", shape]
    return subprocess.run([*command, "-k", KERNELS, *again], stdout=subprocess.PIPE, text=True, check=True).stdout


def kernels_of(text: str) -> list[dict[str, float | str]]:
    """The counters of each kernel in what `ncu --csv --page raw` printed, in the order of their launches."""
    lines = list(csv.reader(io.StringIO(text)))
    start = next(index for index, line in enumerate(lines) if "Kernel Name" in line)
    names, units = lines[start : start + 2]
    kernels = []
    for line in lines[start + 2 :]:
        if len(line) != len(names):
            continue
        found: dict[str, float | str] = {"kernel": line[names.index("Kernel Name")]}
        for label, counter in COUNTERS.items():
            place = names.index(counter)
            scale = MICROSECONDS[units[place]] if label == "microseconds" else 1.0
            found[label] = round(float(line[place].replace(",", "")) * scale, 2)
        kernels.append(found)
    return kernels


def split_candidates(kernels: list[dict], names: list[str]) -> dict[str, list[dict]]:
    """The kernels of one `ncu` run over several candidates, by their names."""
    parts: list[list[dict]] = [[]]
    for found in kernels:
        parts[-1].append(found)
        if found["kernel"] == LAST_KERNEL:
            parts.append([])
    if len(parts) != len(names) + 1 or parts[-1]:
        raise ValueError(f"expected the kernels of {len(names)} candidates, found {len(parts) - 1}")
    return dict(zip(names, parts, strict=False))


def main(arguments: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="480p")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--csv", type=Path, help="of one ncu run over all candidates, instead of running it")
    parser.add_argument("--like", type=Path, help="a result whose machine is the one that --csv comes from")
    parser.add_argument("--run", metavar="NAME", help="run this candidate, as `ncu` is told to")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.run:
        run_candidate(options.run, options.shape)
        return None
    results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": options.shape,
        "counters": COUNTERS,
        "kernels": {},
    }
    if options.csv:
        if options.like is None:
            parser.error("--csv needs --like RESULT, to say which machine it comes from")
        results["machine"] = json.loads(options.like.read_text())["machine"]
        results["kernels"] = split_candidates(kernels_of(options.csv.read_text()), options.candidates)
    else:
        if shutil.which("ncu") is None:
            parser.error("ncu (Nsight Compute) is not on the path; --csv reads what it printed elsewhere")
        results["machine"] = machine(torch.device("cuda", 0), options.commit)
        for name in options.candidates:
            print(name, file=sys.stderr, flush=True)
            results["kernels"][name] = kernels_of(profiled(name, options.shape))
    path = options.output / f"counters-{file_name(results)}"
    write_json(path, results)
    for name, kernels in results["kernels"].items():
        for found in kernels:
            print(name, found)
    print(path)
    return path


if __name__ == "__main__":
    main()
