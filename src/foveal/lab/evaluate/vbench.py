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

from foveal.lab.generate.run import Job
from foveal.lab.pipelines import LoadedPipeline
from foveal.output_folder import OutputFolder

FOLDER, README_FILE = "vbench", "README.txt"

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


def names(jobs: list[Job], loaded: LoadedPipeline) -> list[str]:
    """Every file that `lay_out` makes for the outputs of a run."""
    videos = [f"{FOLDER}/{job.arm}/{job.media(loaded, exact=False)[0]}" for job in jobs]
    lists = [f"{FOLDER}/{arm}.json" for arm in dict.fromkeys(job.arm for job in jobs)]
    return [*videos, *lists, f"{FOLDER}/{README_FILE}"]


def lay_out(output: OutputFolder, records: dict[Job, dict[str, Any]]) -> None:
    """Link the videos of a run as `vbench/ARM/NAME.mp4`, and write `vbench/ARM.json` with the prompt of each.

    The names are readable and unique, not the prompts: prompts may be longer than file names. Videos of a former run
    that are not part of this one are removed.
    """
    prompts: dict[str, dict[str, str]] = {}
    with output.renewing(below=FOLDER, last=README_FILE) as folder:
        for job, record in records.items():
            file = record["outputs"][0]["file"]
            (folder / job.arm).mkdir(exist_ok=True)
            _link(output.path / file, folder / job.arm / file)
            prompts.setdefault(job.arm, {})[file] = job.prompt
        for arm, by_file in prompts.items():
            text = json.dumps(by_file, indent=2, ensure_ascii=False) + "\n"
            (folder / f"{arm}.json").write_text(text, encoding="utf-8")
        (folder / README_FILE).write_text(README, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without hard links.
        shutil.copy2(source, target)
