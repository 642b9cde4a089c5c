"""A picture of a results file: speed-ups of the methods, and what the block-sparse kernels keep of dense speed.

    python -m foveal.bench.plot benchmarks/results/FILE.json

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foveal.bench.report import baselines_of

COLORS = {"forward": "#2a7f8e", "backward": "#d19a2e"}


def write_plot(path: Path, results: dict[str, Any]) -> None:
    """One row a shape: kernels on the left, methods on the right."""
    shapes = list(results["shapes"])
    figure = Figure(figsize=(14, 1.2 + 4.2 * len(shapes)), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots(len(shapes), 2, squeeze=False)
    for row, shape in zip(axes, shapes, strict=True):
        entries = [entry for entry in results["results"] if entry["shape"] == shape and entry["status"] == "ok"]
        baseline = (*baselines_of(entries), None)[0]
        kernels, methods = ([entry for entry in entries if entry["kind"] == kind] for kind in ("kernel", "method"))
        _bars(row[0], kernels, baseline, "share_of_rate", f"{shape}: executed TFLOP/s over those of {baseline}")
        _bars(row[1], methods, baseline, "speedup", f"{shape}: times faster than {baseline}")
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
    write_plot(source.with_suffix(".png"), json.loads(source.read_text(encoding="utf-8")))
    print(source.with_suffix(".png"))
