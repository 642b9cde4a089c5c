"""A picture of a results file: speed-ups of the methods, and what the block-sparse kernels keep of dense speed.

    python -m foveal.lab.bench.plot benchmarks/results/FILE.json

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foveal.lab.bench.run import COMMAND, baselines_of
from foveal.output_folder import OutputFolder

COLORS = {"forward": "#2a7f8e", "backward": "#d19a2e"}


def write_plot(path: Path, results: dict[str, Any]) -> None:
    """One row a shape: kernels on the left, methods on the right; one column if the run had either alone."""
    shapes, ran = list(results["shapes"]), [entry for entry in results["results"] if entry["status"] == "ok"]
    drawn = {
        "kernel": ("share_of_rate", "executed TFLOP/s over those of"),
        "method": ("speedup", "times faster than"),
    }
    kinds = [kind for kind in drawn if any(entry["kind"] == kind for entry in ran)] or ["method"]
    size = (7 * len(kinds), 1.2 + 4.2 * len(shapes))
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots(len(shapes), len(kinds), squeeze=False)
    for row, shape in zip(axes, shapes, strict=True):
        entries = [entry for entry in ran if entry["shape"] == shape]
        baseline = (*baselines_of(entries), None)[0]
        for axis, kind in zip(row, kinds, strict=True):
            ratio, title = drawn[kind]
            of_kind = [entry for entry in entries if entry["kind"] == kind]
            _bars(axis, of_kind, baseline, ratio, f"{shape}: {title} {baseline}")
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, {results['settings']['dtype']}, rested, {results['started'][:10]}")
    figure.savefig(path)


def _bars(axis, entries: list[dict[str, Any]], baseline: str | None, ratio: str, title: str) -> None:
    if not entries or baseline is None:
        axis.set_visible(False)
        return
    for offset, (name, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        values = [entry["passes"].get(name, {}).get("ratios", {}).get(baseline, {}).get(ratio, 0) for entry in entries]
        bars = axis.barh([y + offset for y in range(len(entries))], values, height=0.38, color=color, label=name)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axis.axvline(1, color="#33415c", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=7)
    axis.set_title(title, loc="left", fontsize=10)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot = source.with_suffix(".png")
    with OutputFolder(plot.parent, COMMAND).writing(plot.name) as aside:
        write_plot(aside, json.loads(source.read_text(encoding="utf-8")))
    print(plot)
