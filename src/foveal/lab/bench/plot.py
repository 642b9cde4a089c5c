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
    """For each shape the kernels and below them the methods, as far as the run had them."""
    shapes, ran = list(results["shapes"]), [entry for entry in results["results"] if entry["status"] == "ok"]
    drawn = {
        "kernel": ("share_of_rate", "executed TFLOP/s over those of"),
        "method": ("speedup", "times faster than"),
    }
    kinds = [kind for kind in drawn if any(entry["kind"] == kind for entry in ran)] or ["method"]
    counts = [max(1, sum((e["shape"], e["kind"]) == (shape, kind) for e in ran)) for shape in shapes for kind in kinds]
    # About as wide as a page shows it, so that the letters keep their size there.
    figure = Figure(figsize=(9.4, 1 + sum(0.8 + 0.32 * n for n in counts)), dpi=160, layout="constrained")
    axes = figure.subplots(len(counts), 1, squeeze=False, gridspec_kw={"height_ratios": [2.5 + n for n in counts]})
    axes = axes.reshape(len(shapes), len(kinds))
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
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axis.axvline(1, color="#33415c", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=9)
    axis.set_title(title, loc="left", fontsize=10)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot = source.with_suffix(".png")
    with OutputFolder(plot.parent, COMMAND).writing(plot.name) as aside:
        write_plot(aside, json.loads(source.read_text(encoding="utf-8")))
    print(plot)
