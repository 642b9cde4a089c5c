"""Plants bugs one by one in a copy of the kernels and says which of them the tests without a GPU notice.

    python benchmarks/mutants.py                           # all of them: about an hour on two CPU cores
    python benchmarks/mutants.py --only "63 keys" --jobs 2
    python benchmarks/mutants.py --list

Each mutant is one exact replacement in a temporary copy of `src`, and names the tests that should notice it. They must
pass on the copy as it is, and one of them must fail with the bug. A replacement that no longer fits the source is an
error: bring it up to date with the code. The exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from mutants_planted import KINDS, Mutant  # noqa: E402

LIMIT = 900  # seconds for the tests of one mutant
MEMORY = 8 * 2**30  # bytes for each of their processes: a bug may well ask for all there is


class Verdict(NamedTuple):
    """What became of a mutant: the test that noticed it, or None; seconds."""

    noticed_by: str | None
    seconds: float


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the bug in it.

    Raises:
        ValueError: if the place is not there, or not the only one, or the result is not Python.
    """
    start = 0
    if mutant.after:
        if source.count(mutant.after) != 1:
            raise ValueError(
                f"{mutant.file}: expected {mutant.after!r} once, found it {source.count(mutant.after)} times"
            )
        start = source.index(mutant.after)
    elif source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: expected {mutant.old!r} once, found it {source.count(mutant.old)} times")
    place = source.find(mutant.old, start)
    if place < 0:
        raise ValueError(f"{mutant.file}: no {mutant.old!r} behind {mutant.after!r}")
    result = source[:place] + mutant.new + source[place + len(mutant.old) :]
    ast.parse(result)
    return result


def run_tests(source: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    """The tests with `foveal` from this folder; they stop at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-o", "addopts=", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def copied(folder: Path) -> Path:
    """A copy of `src` in this folder."""
    return Path(shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__")))


def check_baseline(tests: tuple[str, ...], jobs: int) -> None:
    """Stops the script unless the tests pass on a copy without bugs, and read that copy."""
    with tempfile.TemporaryDirectory() as folder:
        source = copied(Path(folder))
        where = subprocess.run(
            [sys.executable, "-c", "import foveal; print(foveal.__file__)"],
            env={**os.environ, "PYTHONPATH": str(source)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if not where.startswith(str(source)):
            sys.exit(f"tests would import {where}, not the copy in {source}")
        with ThreadPoolExecutor(jobs) as pool:
            results = pool.map(lambda test: run_tests(source, (test,)), tests)
        failed = [f"{x.args[-1]}: {x.stdout[-2000:]}{x.stderr[-500:]}" for x in results if x.returncode != 0]
        if failed:
            sys.exit("these tests fail without any bug:\n" + "\n".join(failed))


def verdict(mutant: Mutant) -> Verdict:
    """Plants one bug and runs its tests."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = copied(Path(folder))
        file = source / "foveal" / mutant.file
        file.write_text(mutated(file.read_text(), mutant))
        try:
            result = run_tests(source, mutant.tests)
        except subprocess.TimeoutExpired:
            return Verdict(f"a run of more than {LIMIT} s", time.monotonic() - began)
    seconds = time.monotonic() - began
    if result.returncode == 0:
        return Verdict(None, seconds)
    if result.returncode != 1:
        raise RuntimeError(f"{mutant.title}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    failed = re.search(r"^FAILED tests/(.*?)(?: - .*)?$", result.stdout, re.M)
    return Verdict(failed.group(1) if failed else "an error", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds or titles that contain this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="check that every bug can be planted, and list them")
    options = parser.parse_args()
    chosen = [
        (kind, mutant)
        for kind, mutants in KINDS.items()
        for mutant in mutants
        if options.only in kind or options.only in mutant.title
    ]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if not chosen:
        sys.exit(f"no mutant contains {options.only!r}")
    for _, mutant in chosen:
        mutated((ROOT / "src" / "foveal" / mutant.file).read_text(), mutant)
    if options.list:
        for kind, mutant in chosen:
            print(f"{kind} | {mutant.title} | {mutant.file}")
        return
    check_baseline(tuple(dict.fromkeys(test for _, mutant in chosen for test in mutant.tests)), options.jobs)
    print("| kind | mutant | noticed by | s |\n|---|---|---|---|", flush=True)
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (kind, mutant), found in zip(chosen, pool.map(verdict, [mutant for _, mutant in chosen]), strict=True):
            survivors += found.noticed_by is None
            print(
                f"| {kind} | {mutant.title} | {found.noticed_by or '**survived**'} | {found.seconds:.0f} |", flush=True
            )
    print(f"\n{len(chosen) - survivors} of {len(chosen)} noticed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
