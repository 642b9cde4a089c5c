"""Results to people and files: a table, a JSON file, a plot where matplotlib is installed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from foveal.lab.bench.run import COMMAND, BenchSettings, baselines_of, run_bench
from foveal.lab.extras import how_to_install
from foveal.lab.terminal import PlainConsole, Progress
from foveal.output_folder import OutputFolder

SECOND = "vs {second}"
HEADINGS = (
    "candidate",
    "pass",
    "rested ms",
    "sustained ms",
    "host ms",
    "executed TF/s",
    "dense-equiv. TF/s",
    "vs {baseline}",
    "sustained",
    "rate vs {baseline}",
    SECOND,
    "extra MiB",
)
# Peaks beyond inputs and results; a backward's is that of the forward before it and its own.
BYTES_OF_PASS = {"forward": "forward", "both": "forward_backward", "backward": "forward_backward"}


def bench(settings: BenchSettings, output: Path) -> int:
    """Run; after each shape print its table and write the figures so far as JSON into `output`; at the end plot them.

    Returns:
        How many candidates of ours failed.

    Raises:
        ValueError: for an output folder that cannot be made or written to.
    """
    OutputFolder(output, COMMAND).check()

    def keep(results: dict[str, Any]) -> None:
        path = output / file_name(results)
        OutputFolder(output, COMMAND).check([path.name, path.with_suffix(".png").name])
        write_json(path, results)
        print_table(results, results["results"][-1]["shape"])

    started = time.monotonic()

    with Progress(PlainConsole(), bars=False) as progress, progress.stage("bench", brief=True) as stage:

        def log(line: str) -> None:
            stage.note = line
            progress.say(f"{time.monotonic() - started:6.1f} s  {line}")

        results = run_bench(settings, log=log, keep=keep)
    print_break_even(results)
    path = output / file_name(results)
    print(path)
    try:
        from foveal.lab.bench.plot import write_plot

        plot = path.with_suffix(".png")
        with OutputFolder(output, COMMAND).writing(plot.name) as aside:
            write_plot(aside, results)
        print(plot)
    except ImportError:
        print(f"no plot: matplotlib is missing: {how_to_install('bench')}")
        print(f"later: python -m foveal.lab.bench.plot {path}")
    return sum(entry["ours"] and entry["status"] == "failed" for entry in results["results"])


def file_name(results: dict[str, Any]) -> str:
    """From the device and the time in UTC: nvidia-h100-80gb-hbm3-2026-01-31-235959.json."""
    device = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["device"]).lower()).strip("-")
    date, time = results["started"].split("+")[0].split("T")
    return f"{device}-{date}-{time.replace(':', '')}.json"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write a results file. A reader finds either the old file or the new one, complete.

    Raises:
        FileExistsError: the file exists, and no benchmark wrote it.
    """
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    with OutputFolder(path.parent, COMMAND).writing(path.name) as aside:
        aside.write_text(text, encoding="utf-8")


def table(results: dict[str, Any], shape: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows and notes (who failed or was skipped, and why) of one shape."""
    entries = [entry for entry in results["results"] if entry["shape"] == shape]
    baseline, second = (*baselines_of(entries), None, None)[:2]
    headings = [heading.format(baseline=baseline, second=second) for heading in HEADINGS if second or heading != SECOND]
    rows, notes = [], []
    for entry in entries:
        if entry["status"] != "ok":
            notes.append(f"{entry['status'].upper()} {entry['name']}: {entry['reason']}")
        for name, own in entry["passes"].items():
            first, other = (own["ratios"].get(task) for task in (baseline, second))
            memory = entry["memory"].get(BYTES_OF_PASS[name])
            rows.append(
                [
                    entry["name"],
                    name,
                    f"{own['rested_ms']:.3f}",
                    f"{own['sustained_ms']:.3f}",
                    f"{own['host_ms']:.2f}",
                    f"{own['executed_tflops']:.1f}",
                    f"{own['dense_equivalent_tflops']:.1f}",
                    f"{first['speedup']:.2f}x" if first else "-",
                    f"{first['sustained_speedup']:.2f}x" if first else "-",
                    f"{100 * first['share_of_rate']:.1f} %" if first and entry["kind"] != "method" else "-",
                    *([f"{other['speedup']:.2f}x" if other else "-"] if second else []),
                    f"{memory / 2**20:.0f}" if memory is not None else "-",
                ]
            )
    return headings, rows, notes


def print_table(results: dict[str, Any], shape: str) -> None:
    """The table of one shape, and its notes."""
    headings, rows, notes = table(results, shape)
    sizes = results["shapes"][shape]
    title = f"{shape}: B{sizes['batch']} H{sizes['heads']} L{sizes['length']} D{sizes['head_dim']}"
    title += f" {results['settings']['dtype']}, {results['machine']['device']}"
    _print_rows(title, headings, rows)
    for note in notes:
        print(note)


def break_even_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the lengths to break even; no rows where fewer than two lengths were timed."""
    rows = [
        [
            found["name"],
            found["pass"],
            f"vs {found['baseline']}: {found['verdict']}",
            ", ".join(f"{milliseconds:.2f} at {int(length):,}" for length, milliseconds in found["host_ms"].items()),
        ]
        for found in results["break_even"]
    ]
    return ["candidate", "pass", "break-even, back to back with launches", "host ms a call"], rows


def print_break_even(results: dict[str, Any]) -> None:
    """The lengths to break even, with what a call costs the host."""
    headings, rows = break_even_table(results)
    if rows:
        _print_rows(f"break-even, {results['machine']['device']}", headings, rows)


def _print_rows(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """With rich where it is installed, plain otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        print(f"\n{title}")
        for row in (headings, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    else:
        drawn = Table(title=title, title_justify="left")
        for index, heading in enumerate(headings):
            drawn.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index < 2)
        for index, row in enumerate(rows):
            drawn.add_row(*row, end_section=index + 1 == len(rows) or rows[index + 1][0] != row[0])
        console = Console()
        console.print(drawn) if console.is_terminal else Console(width=200).print(drawn)
