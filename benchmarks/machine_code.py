"""A hash of the machine code (PTX) of every kernel variant that the launch code asks for, to compare two commits.

    PYTHONPATH=src python benchmarks/machine_code.py before.json        # in a checkout of the one
    PYTHONPATH=src python benchmarks/machine_code.py after.json         # in a checkout of the other
    PYTHONPATH=src python benchmarks/machine_code.py --compare before.json after.json

No GPU is needed: launches are noted on CPU tensors, as the compile tests do, and compiled for sm_89 and sm_90, the
Gluon kernels only for sm_90. `--all` takes every case that users can ask for; without it few cases cover every value of
each constant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton
from triton import knobs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import launched_calls
from launched_kernels import compiled, noted_launches

from foveal.kernels.hopper.support import missing_gluon

CHIPS = ("sm_89", "sm_90")


def variants(every: bool) -> Iterator[tuple[str, object]]:
    """Each variant with a name of its own that does not depend on where the source lies."""
    cases = [(chip, list(launched_calls.all_calls()) if every else launched_calls.FEW) for chip in CHIPS]
    if missing_gluon() is None:
        cases.append(("sm_90", launched_calls.on_hopper(cases[0][1])))
    seen = set()
    for chip, calls in cases:
        with pytest.MonkeyPatch.context() as monkeypatch, noted_launches(monkeypatch, chip) as launched:
            for call in calls:
                call()
        for one in launched.values():
            options = {
                name: str(getattr(one.options, name, None))
                for name in ("num_warps", "num_stages", "maxnreg", "launch_pdl")
            }
            facts = [chip, one.name, one.types, sorted(one.source.attrs.items()), one.constants, options]
            name = " | ".join(map(str, facts))
            if name not in seen:
                seen.add(name)
                yield name, one


def code_hash(one) -> str:
    return hashlib.sha256(compiled(one).asm["ptx"].encode()).hexdigest()


def hashes(every: bool) -> dict[str, str]:
    knobs.compilation.disable_line_info = True  # where a kernel stands in its file is not its code
    found = list(variants(every))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((name for name, _ in found), pool.map(code_hash, (one for _, one in found)), strict=True))


def compare(before: dict, after: dict) -> str:
    first, second = before["variants"], after["variants"]
    lines = [f"{len(first)} variants before (Triton {before['triton']}), {len(second)} after ({after['triton']})"]
    changed = [name for name in first.keys() & second.keys() if first[name] != second[name]]
    for title, names in (
        ("only before", first.keys() - second.keys()),
        ("only after", second.keys() - first.keys()),
        ("other code", changed),
    ):
        lines += [f"{title}: {name}" for name in sorted(names)]
    lines.append(f"{len(first.keys() & second.keys()) - len(changed)} variants have equal machine code")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="every case that users can ask for: thousands of variants")
    parser.add_argument("--compare", action="store_true", help="compare two files")
    options = parser.parse_args()
    if options.compare:
        print(compare(*(json.loads(path.read_text()) for path in options.files)))
        return
    (target,) = options.files
    result = {"triton": triton.__version__, "variants": hashes(options.all)}
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(result['variants'])} variants, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
