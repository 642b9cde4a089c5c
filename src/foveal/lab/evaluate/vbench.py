"""Videos laid out as VBench's evaluation of custom input takes them.

VBench (arXiv 2311.17982) has an environment of its own: it pins old packages, and downloads the weights of a dozen
models. So it is given folders and run apart; docs/evaluate.md has the commands.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from foveal.lab.data.shards import replacing
from foveal.lab.generate.run import Job

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
README = f"""Videos for VBench's evaluation of custom input. In an environment with VBench, for each folder here:

for dimension in {" ".join(DIMENSIONS)}; do
    vbench evaluate --mode=custom_input --videos_path FOLDER --dimension $dimension
done

dense.json and sparse.json have the prompt of each video.
"""


def lay_out(output: Path, records: dict[Job, dict[str, Any]]) -> Path:
    """Link the videos of a run as `vbench/ARM/NAME.mp4`, and write `vbench/ARM.json` with the prompt of each.

    The names are readable and unique, not the prompts: prompts may be longer than file names.

    Returns:
        The folder `vbench`.
    """
    folder = output / "vbench"
    shutil.rmtree(folder, ignore_errors=True)
    prompts: dict[str, dict[str, str]] = {}
    for job, record in records.items():
        arm = folder / job.arm
        arm.mkdir(parents=True, exist_ok=True)
        file = record["outputs"][0]["file"]
        _link(output / file, arm / file)
        prompts.setdefault(job.arm, {})[file] = job.prompt
    for arm, by_file in prompts.items():
        _write(folder / f"{arm}.json", json.dumps(by_file, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "README.txt", README)
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without hard links.
        shutil.copy2(source, target)


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
