"""Writes the tables of docs/families.md from a run of the tests: what each family passes, and why not the rest.

    python docs/features.py

Runs the tests of the families and of the combinations (a few minutes), and replaces what stands between
`<!-- table: features -->` or `<!-- table: combinations -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"

# A family's row: where its own tests are, a file and a class of it.
ROWS = {
    "Wan 2.1, 2.2": ("test_wan", None),
    "Wan VACE": ("test_wan_variants", "TestWanVACE"),
    "Wan Animate": ("test_wan_variants", "TestWanAnimate"),
    "Wan-Animate-2": ("test_wan_animate_2", "TestWanAnimate2"),
    "SkyReels-V2": ("test_wan_variants", "TestSkyReelsV2"),
    "ChronoEdit": ("test_wan_variants", "TestChronoEdit"),
    "AnyFlow": ("test_wan_variants", "TestAnyFlow"),
    "HunyuanVideo": ("test_hunyuan_video", "TestHunyuanVideo"),
    "FramePack": ("test_hunyuan_video", "TestFramepack"),
    "HunyuanVideo 1.5": ("test_hunyuan_video15", "TestHunyuanVideo15"),
    "CogVideoX": ("test_cogvideox", "TestCogVideoX"),
    "LTX-Video": ("test_ltx_video", "TestLTXVideo"),
    "LTX-2": ("test_ltx2", "TestLTX2"),
    "MiniMax-H3": ("test_minimax_h3", "TestMiniMaxH3"),
    "Flux": ("test_flux", "TestFlux"),
}
# A column: the tests that stand for it, by the beginnings of their names.
COLUMNS = {
    "equals dense": ("test_keeping_everything_equals_dense",),
    "gradients": ("test_gradients_reach", "test_keeping_everything_has_the_dense_gradients"),
    "checkpointing": ("test_gradient_checkpointing",),
    "half precision": ("test_half_precision", "test_autocast_matches_dense"),
    "text and padding": ("test_text_counts_and_padding",),
    "compiled blocks": ("test_compiled_blocks",),
    "save, load, copy": ("test_save_load_and_copy",),
    "offloading": ("test_sequential_offloading",),
    "pipeline": ("test_pipeline",),
}
# Wan was first, and has tests of its own for what the others share.
OF_WAN = {
    "save, load, copy": (("test_pretrained", "test_pipeline_round_trip"), ("test_combinations", "test_a_copy_as")),
    "offloading": (("test_combinations", "test_group_offload"), ("test_combinations", "test_model_offload")),
}
WITHOUT = {
    ("text and padding", "Wan 2.1, 2.2"): "no text in it",
    ("pipeline", "Wan VACE"): "transformer only",
    ("pipeline", "Wan Animate"): "transformer only",
    ("checkpointing", "Wan-Animate-2"): "not in diffusers",
    ("offloading", "Wan-Animate-2"): "not in diffusers",
    ("pipeline", "Wan-Animate-2"): "transformer only",
    ("pipeline", "SkyReels-V2"): "transformer only",
    ("pipeline", "ChronoEdit"): "transformer only",
    ("pipeline", "AnyFlow"): "transformer only",
    ("pipeline", "FramePack"): "transformer only",
    ("pipeline", "HunyuanVideo 1.5"): "transformer only",
    ("pipeline", "LTX-2"): "transformer only",
    ("pipeline", "MiniMax-H3"): "its loop",
}
COMBINATIONS = {
    "compiled blocks of several kinds, checkpointed": ("test_combinations", "test_compiled_blocks"),
    "fused projections": ("test_combinations", "test_fusing_projections"),
    "group offloading": ("test_combinations", "test_group_offload"),
    "model offloading of a pipeline": ("test_combinations", "test_model_offload"),
    "layerwise casting": ("test_wan", "test_layerwise_casting"),
    "LoRA: frozen, unfrozen, saved separately": ("test_combinations", "test_lora"),
    "torchao": ("test_combinations", "test_torchao"),
    "bitsandbytes: which layers it replaces": ("test_combinations", "test_bitsandbytes"),
    "FirstBlockCache": ("test_combinations", "test_first_block_cache"),
    "guidance in one batch": ("test_combinations", "test_guidance_in_one_batch"),
    "a copy as a dense teacher": ("test_combinations", "test_a_copy_as_a_dense_teacher"),
    "moving averages of weights": ("test_combinations", "test_an_average"),
    "policies by step and timestep": ("test_policy", "test_"),
    "`save_pretrained`, `from_pretrained`": ("test_pretrained", "test_"),
    "FSDP2 and FSDP1": ("test_fsdp", "test_"),
    "context parallelism": ("test_context_parallel", "test_"),
}


def outcomes() -> dict[tuple[str, str | None, str], Counter]:
    """(file, class, test) to how its cases ended: "passed", "failed", or why they were skipped."""
    files = {file for file, _ in ROWS.values()} | {file for file, _ in COMBINATIONS.values()}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        paths = sorted(str(ROOT / "tests" / f"{file}.py") for file in files)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
        subprocess.run(command, cwd=ROOT, check=False)
        found: dict[tuple[str, str | None, str], Counter] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            _, file, *rest = case.get("classname").split(".")
            key = (file, rest[0] if rest else None, case.get("name").split("[")[0])
            ended = "passed"
            for child in case:
                if child.tag in ("failure", "error"):
                    ended = "failed"
                elif child.tag == "skipped":
                    ended = child.get("message", "skipped")
            found.setdefault(key, Counter())[ended] += 1
    return found


def cell(found: dict, wanted: list[tuple[str, str | None, str]]) -> str | None:
    """The cell for the tests whose names begin as wanted; None if there are none."""
    total: Counter = Counter()
    for file, owner, beginning in wanted:
        for (in_file, in_class, name), counts in found.items():
            if (in_file, in_class) == (file, owner) and name.startswith(beginning):
                total += counts
    if not total:
        return None
    if total["failed"]:
        return f"{total['failed']} of {total.total()} fail"
    reasons = [reason for reason in total if reason != "passed"]
    if not total["passed"]:
        return f"not run: {reasons[0]}"
    rest = f", {total.total() - total['passed']} not run: {reasons[0]}" if reasons else ""
    return f"{total['passed']} pass{rest}"


def tables() -> dict[str, str]:
    """Both tables as Markdown."""
    found = outcomes()
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, (file, owner) in ROWS.items():
        cells = []
        for column, beginnings in COLUMNS.items():
            wanted = [(file, owner, beginning) for beginning in beginnings]
            if owner is None:
                wanted += [(other, None, beginning) for other, beginning in OF_WAN.get(column, ())]
            cells.append(cell(found, wanted) or WITHOUT[column, row])
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    others = ["| with | on Wan |", "|---|---|"]
    for name, (file, beginning) in COMBINATIONS.items():
        others.append(f"| {name} | {cell(found, [(file, None, beginning)])} |")
    return {"features": "\n".join(lines), "combinations": "\n".join(others)}


def main() -> None:
    made = tables()
    marked = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(marked.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[4]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
