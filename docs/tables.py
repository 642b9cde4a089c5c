"""Writes the tables of docs/performance.md and the README from the JSON in benchmarks/results/.

    python docs/tables.py

Everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "choosing-sparsity.md", ROOT / "README.md")


def gpu_runs(only: str) -> list[dict]:
    """The runs of `foveal bench` of one sort ("kernels", "methods"), oldest first."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("nvidia-*.json"))]
    return [run for run in runs if run["settings"]["only"] == only]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def kernels() -> str:
    """Block-sparse kernels: milliseconds, and the share of dense cuDNN's rate that they keep."""
    run = gpu_runs("kernels")[-1]
    lines = [
        _row("candidate", "forward, ms", "share of cuDNN's TFLOP/s", "backward, ms", "share of cuDNN's TFLOP/s"),
        "|---|---|---|---|---|",
    ]
    for entry in run["results"]:
        if entry["status"] == "ok":
            cells = []
            for name in ("forward", "backward"):
                figures = entry["passes"][name]
                share = figures["ratios"]["SDPA cuDNN"]["share_of_rate"]
                cells += [f"{figures['rested_ms']:.3f}", f"{100 * share:.0f} %"]
            lines.append(_row(entry["name"], *cells))
    return "\n".join([*lines, "", _caption(run)])


def methods() -> str:
    """Whole methods: milliseconds, and how many times faster than dense attention."""
    run = gpu_runs("methods")[-1]
    lines = [
        _row("candidate", "forward, ms", "x cuDNN", "x flash", "backward, ms", "x cuDNN", "x flash", "extra MiB"),
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in run["results"]:
        if entry["status"] == "ok":
            cells = []
            for name in ("forward", "backward"):
                figures = entry["passes"][name]
                cells.append(f"{figures['rested_ms']:.3f}")
                cells += [f"{figures['ratios'][base]['speedup']:.1f}" for base in ("SDPA cuDNN", "SDPA flash")]
            cells.append(f"{entry['memory']['forward_backward'] / 2**20:.0f}")
            lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", _caption(run)])


def speed() -> str:
    """The README's short table: whole methods against dense attention."""
    run = gpu_runs("methods")[-1]
    lines = [_row("attention, Wan 480p (32,760 tokens)", "forward", "backward"), "|---|---|---|"]
    wanted = ("SLA 64x64 marginal, auto", "SLA 128x64 marginal, auto", "SLA 128x64 all, auto", "VSA 12.5 %, auto")
    for entry in run["results"]:
        if entry["name"] in ("SDPA cuDNN", *wanted):
            cells = [
                f"{entry['passes'][name]['rested_ms']:.2f} ms "
                f"({entry['passes'][name]['ratios']['SDPA cuDNN']['speedup']:.1f}x)"
                for name in ("forward", "backward")
            ]
            lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", _caption(run)])


def cpu() -> str:
    """The gathering implementation on a CPU."""
    run = json.loads((RESULTS / "cpu_block_sparse.json").read_text())
    lines = [_row("", "dense, ms", "sparse, ms", "speed-up"), "|---|---|---|---|"]
    for name, label in (("forward", "forward"), ("forward_backward", "forward and backward")):
        dense, sparse, ratio = (run[name][key] for key in ("dense_seconds", "sparse_seconds", "ratio"))
        lines.append(_row(label, f"{1e3 * dense:.0f}", f"{1e3 * sparse:.0f}", f"{ratio:.1f}x"))
    machine, options = run["machine"], run["shape"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; B{options['batch']} "
            f"H{options['heads']} L{options['length']} D{options['head_dim']}, {options['dtype']}, "
            f"{100 * options['keep_ratio']:g} % of the blocks, selection left out; commit {machine['commit'][:7]}.",
        ]
    )


def order() -> str:
    """Raster against tile order on the demo's trained model: means over the runs of each clip."""
    run = json.loads((RESULTS / "token_order.json").read_text())
    ratios = run["keep_ratios"]
    heads = [f"{name}, {100 * ratio:g} %" for name in ("recall", "error") for ratio in ratios]
    lines = [_row("clip", "order", *heads), "|---" * (len(heads) + 2) + "|"]
    for clip in dict.fromkeys(each["clip"] for each in run["runs"]):
        runs = [each for each in run["runs"] if each["clip"] == clip]
        for name in ("raster", "tile"):
            cells = [
                f"{sum(each[name][figure]['pooled'][index] for each in runs) / len(runs):.3f}"
                for figure in ("recall", "error")
                for index in range(len(ratios))
            ]
            lines.append(_row(clip, name, *cells))
    settings = run["settings"]
    caption = (
        f"The demo's model after {settings['pretrain_steps']} steps of dense pretraining, {len(run['runs'])} runs "
        f"(seeds 0 to {max(each['seed'] for each in run['runs'])} on each clip), all layers, heads and query blocks, "
        f"held-out windows; blocks of 64x64, pooled choice; torch {run['machine']['torch']}."
    )
    return "\n".join([*lines, "", caption])


def _caption(run: dict) -> str:
    machine = run["machine"]
    shape = ", ".join(f"B{s['batch']} H{s['heads']} L{s['length']} D{s['head_dim']}" for s in run["shapes"].values())
    commit = machine["commit"][:7] if machine["commit"] else "not recorded (no git on the machine)"
    return (
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}; "
        f"{shape}, {run['settings']['dtype']}; rested medians, {run['started'][:10]}; commit {commit}."
    )


TABLES = {"kernels": kernels, "methods": methods, "speed": speed, "cpu": cpu, "order": order}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """The page with its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[4]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
