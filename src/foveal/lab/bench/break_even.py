"""From which length on sparse attention is faster than dense attention.

`foveal doctor` asks it of one method's forward, `foveal bench` of every pass of every candidate, where it has timed
several lengths. A benchmark counts calls back to back with their launches, since short calls wait for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from foveal.lab.bench.timing import PASSES


def break_even(speedups: Sequence[tuple[int, float]]) -> tuple[int | None, str]:
    """From which length on sparse attention is faster, between the measured ones by a line through the logarithms.

    Args:
        speedups: (tokens, dense time over sparse time), by ascending tokens.

    Returns:
        The token count, None where the measured lengths do not enclose it, and a sentence.
    """
    if not speedups:
        return None, "nothing was measured"
    slower = [index for index, (_, speedup) in enumerate(speedups) if speedup <= 1.0]
    if not slower:
        return None, f"faster at every measured length, from {speedups[0][0]:,} tokens on"
    if slower[-1] == len(speedups) - 1:
        return None, f"no faster at the longest measured length, {speedups[-1][0]:,} tokens"
    (tokens, speedup), (more, faster) = speedups[slower[-1] : slower[-1] + 2]
    share = -math.log(speedup) / (math.log(faster) - math.log(speedup))
    crossing = round(math.exp(math.log(tokens) + share * (math.log(more) - math.log(tokens))))
    return crossing, f"faster from about {crossing:,} tokens on"


def break_evens(results: dict[str, Any], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Each method's lengths to break even in the results of a benchmark, against the first baseline of all its shapes.

    Only shapes that differ in nothing but their grids are compared. One of a kind has no length to break even.

    Args:
        results: what `run_bench` returns.
        baselines: the tasks of dense candidates, the preferred one first.

    Returns:
        By pass and candidate {"name", "pass", "baseline", "tokens" or None, "verdict", "host_ms": by tokens}.
    """
    kinds: dict[tuple, list[str]] = {}
    for name, sizes in results["shapes"].items():
        if not sizes.get("before"):
            kinds.setdefault((sizes["batch"], sizes["heads"], sizes["head_dim"]), []).append(name)
    found = []
    for names in kinds.values():
        if len(names) < 2:
            continue
        length_of = {name: results["shapes"][name]["length"] for name in names}
        methods: dict[str, list[dict[str, Any]]] = {}
        for entry in results["results"]:
            if entry["shape"] in length_of and entry["kind"] == "method" and entry["status"] == "ok":
                methods.setdefault(entry["name"], []).append(entry)
        for name, entries in methods.items():
            entries.sort(key=lambda entry: length_of[entry["shape"]])
            for which in PASSES:
                timed = [(length_of[x["shape"]], x["passes"][which]) for x in entries if which in x["passes"]]
                task = next((task for task in baselines if timed and all(task in x["ratios"] for _, x in timed)), None)
                if task is None:
                    continue
                speedups = [(length, x["ratios"][task]["sustained_speedup"]) for length, x in timed]
                tokens, verdict = break_even(speedups)
                host = {str(length): x["host_ms"] for length, x in timed}
                facts = {"name": name, "pass": which, "baseline": task, "tokens": tokens}
                found.append({**facts, "verdict": verdict, "host_ms": host})
    return found
