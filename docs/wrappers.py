"""Writes the table of docs/wrappers.md: which tests run a converted model under which wrapper of another library.

    python docs/wrappers.py

Tests say it themselves, by `@pytest.mark.wrapper(name)`. A case counts for the methods whose configurations it gets, or
whose names stand in its own name; a mark of a case of another kind names them: `wrapper(name, "sla", "vsa")`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "wrappers.md"
METHODS = ("sla", "vsa")

# The rows, and what to know of each. A mark with another name is an error.
WRAPPERS = {
    "DDP": "policies may differ by rank, as under FSDP",
    "FSDP2": "[units and dtypes](multi-gpu.md#fsdp2)",
    "FSDP1": "[units and dtypes](multi-gpu.md#fsdp1)",
    "DeepSpeed ZeRO-1": "[DeepSpeed](multi-gpu.md#deepspeed); skipped where it is not installed",
    "DeepSpeed ZeRO-2": "the same",
    "DeepSpeed ZeRO-3": "the same; policies must agree on all ranks",
    "context parallelism (Ulysses)": "[which families](multi-gpu.md#context-parallelism)",
    "accelerate offloading": "`device_map`, `cpu_offload`, `disk_offload`, `dispatch_model`",
    "group offloading": "convert first",
    "model and sequential offloading": "convert first",
    "checkpointing, non-reentrant": "diffusers' own, `checkpoint_wrapper`, selective",
    "checkpointing, reentrant": "by `enable_gradient_checkpointing`; refused where nothing tells the forward",
    "torch.export": "strict and not",
    "torch.compile, static shapes": "[compiled blocks](combinations.md)",
    "torch.compile, dynamic shapes": "[compiled blocks](combinations.md)",
}

# Runs in a process of its own: what pytest collects, one line "name | method" for each case and method.
COLLECT = """
import sys
import pytest
from foveal.methods.base import METHODS

class Marks:
    def pytest_collection_modifyitems(self, items):
        for item in items:
            for mark in item.iter_markers("wrapper"):
                given = getattr(item, "callspec", None)
                values = list(given.params.values()) if given else []
                found = set(mark.args[1:]) or {
                    name
                    for name, method in METHODS.items()
                    for value in values
                    if isinstance(value, method.config_type)
                    or (isinstance(value, str) and name in value.replace(",", " ").split())
                }
                print("wrapper:", mark.args[0], "|", item.nodeid, "|", *sorted(found))

sys.exit(pytest.main(sys.argv[1:], plugins=[Marks()]))
"""


def collected() -> list[tuple[str, str, tuple[str, ...]]]:
    """(wrapper, test case, methods) of every mark."""
    marked = re.compile(r"mark\.wrapper\(|\bmarked\(")
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    files = [path for path in tests if marked.search(path.read_text(encoding="utf-8"))]
    command = [sys.executable, "-c", COLLECT, "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(run.stdout + run.stderr)
    return [
        (name, case, tuple(methods.split()))
        for name, case, methods in re.findall(r"^wrapper: (.*?) \| (.*?) \|(.*)$", run.stdout, re.MULTILINE)
    ]


def table() -> str:
    """The table as Markdown.

    Raises:
        ValueError: a mark that names no row, or no method.
    """
    counts, files = Counter(), {name: set() for name in WRAPPERS}
    for name, case, methods in collected():
        if name not in WRAPPERS or not methods:
            raise ValueError(
                f"{case} is marked for {name!r} and {methods}; expected one of {list(WRAPPERS)}, and a method"
            )
        files[name].add(case.partition("::")[0].removeprefix("tests/"))
        counts.update((name, method) for method in methods)
    lines = ["| | SLA | VSA | tests | |", "|---|---|---|---|---|"]
    for name, note in WRAPPERS.items():
        cells = [str(counts[name, method] or "not tested") for method in METHODS]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {', '.join(f'`{file}`' for file in sorted(files[name]))} | {note} |"
        )
    return "\n".join(lines)


def page() -> str:
    """The whole page with the table as it would be now."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- table: wrappers -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{table()}\n\n{m[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
