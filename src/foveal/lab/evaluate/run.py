"""The evaluation: generate dense and sparse from the same seeds, compare each pair, and sum up."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.lab.data.sound import Sound
from foveal.lab.evaluate import vbench
from foveal.lab.evaluate.metrics import SMALLEST_SIDE, flicker, load_lpips, log_spectral_distance, psnr, ssim
from foveal.lab.evaluate.report import EvaluationReport, Row
from foveal.lab.evaluate.statistics import Estimate
from foveal.lab.generate import run
from foveal.lab.generate.outputs import frames_of, sound_of
from foveal.lab.generate.run import (
    DENSE,
    SPARSE,
    GenerationSettings,
    Job,
    Progress,
    generate,
    plan,
)
from foveal.lab.generate.sparse import SparseChoice
from foveal.lab.pipelines import LoadedPipeline
from foveal.output_folder import OutputFolder

RESULTS_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
OF_A_PAIR = ("prompt", "seed", "arm")


def check_request(
    loaded: LoadedPipeline, output: str | Path, settings: GenerationSettings, sparse: SparseChoice | None
) -> None:
    """Check what can be checked before a video is made, as `foveal.lab.generate.run.check_request` does.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as in `evaluate`.
    """
    if not settings.exact:
        raise ValueError("settings.exact must be True: the metrics compare frames bit for bit")
    arguments, _ = run.check_request(loaded, output, settings, sparse)
    if min(arguments["height"], arguments["width"]) < SMALLEST_SIDE:
        raise ValueError(f"height and width must be at least {SMALLEST_SIDE} for SSIM")
    OutputFolder(output, "eval").check([RESULTS_FILE, TABLE_FILE])


def evaluate(
    loaded: LoadedPipeline,
    prompts: list[str],
    seeds: list[int],
    output: str | Path,
    settings: GenerationSettings,
    *,
    sparse: SparseChoice | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Compare a sparse pipeline with the dense one that it was made from.

    Videos are generated as by `generate`, and those that are there already are used. The folder gets
    `evaluation.json`, `evaluation.md` and, for videos, `vbench/`.

    Args:
        loaded: a pipeline, dense, or sparse as it was saved; it is sparse afterwards.
        prompts, seeds: each with each is a pair.
        output: the folder.
        settings: what all outputs share; `exact` must be set, so that no codec comes between.
        sparse: how to make the pipeline sparse; None for one that is.
        progress: told about each output, step and pair.

    Raises:
        ValueError: settings without `exact`, or frames too small for SSIM; and what `generate` raises.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    check_request(loaded, output, settings, sparse)
    folder, output = OutputFolder(output, "eval"), Path(output)
    jobs, _ = plan(loaded, prompts, seeds, sparse, compare_dense=True)
    folder.check([RESULTS_FILE, TABLE_FILE, *([] if loaded.kind.is_image else vbench.names(jobs, loaded))])
    records = generate(loaded, prompts, seeds, output, settings, sparse=sparse, compare_dense=True, progress=progress)
    lpips, why_not = load_lpips(loaded.device)
    by_pair: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for job, record in records.items():
        by_pair.setdefault((job.prompt, job.seed), {})[job.arm] = record
    pairs, progress = [], progress or Progress()
    progress.compare(len(by_pair))
    for (prompt, seed), pair in by_pair.items():
        frames = {arm: frames_of(output, record) for arm, record in pair.items()}
        own = {arm: _own(record, frames[arm]) for arm, record in pair.items()}
        sounds = {arm: sound_of(output, record) for arm, record in pair.items()}
        pairs.append({"prompt": prompt, "seed": seed, **_distances(frames, lpips), **_of_sound(sounds), **own})
        progress.step()
    some = next(record for job, record in records.items() if job.arm == SPARSE)
    report = EvaluationReport(
        rows=_rows(pairs, is_image=loaded.kind.is_image),
        videos=len(pairs),
        notes=_notes(records, why_not),
        settings={key: value for key, value in some["settings"].items() if key not in OF_A_PAIR},
        pairs=pairs,
        environment=some["environment"],
    )
    if not loaded.kind.is_image:
        vbench.lay_out(folder, records)
    for name, text in (
        (RESULTS_FILE, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"),
        (TABLE_FILE, report.markdown()),
    ):
        with folder.writing(name) as aside:
            aside.write_text(text, encoding="utf-8")
    return report


def _distances(frames: dict[str, Tensor], lpips: Callable[[Tensor, Tensor], float] | None) -> dict[str, float]:
    video, reference = frames[SPARSE], frames[DENSE]
    found = {"psnr_db": psnr(video, reference), "ssim": ssim(video, reference)}
    return found if lpips is None else found | {"lpips": lpips(video, reference)}


def _of_sound(sounds: dict[str, Sound | None]) -> dict[str, float]:
    if sounds[DENSE] is None:
        return {}
    return {"sound_distance_db": log_spectral_distance(sounds[SPARSE].samples, sounds[DENSE].samples)}


def _own(record: dict[str, Any], frames: Tensor) -> dict[str, Any]:
    seconds = record["seconds"]
    return {
        "flicker": flicker(frames),
        # The first step compiles kernels and fills caches; the median is of those that follow, where there are any.
        "step_seconds": statistics.median(seconds["steps"][1:] or seconds["steps"]),
        "total_seconds": seconds["total"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "attention_flops_reduction": record["attention_flops_reduction"],
    }


def _rows(pairs: list[dict[str, Any]], *, is_image: bool) -> tuple[Row, ...]:
    def own(key: str, arm: str, scale: float = 1.0) -> Estimate:
        return Estimate.of([pair[arm][key] * scale for pair in pairs])

    def ratio(key: str) -> Estimate:
        return Estimate.of([pair[DENSE][key] / pair[SPARSE][key] for pair in pairs])

    rows = [
        Row("PSNR (dB)", None, None, Estimate.of([pair["psnr_db"] for pair in pairs]), 2),
        Row("SSIM", None, None, Estimate.of([pair["ssim"] for pair in pairs]), 4),
    ]
    if "lpips" in pairs[0]:
        rows.append(Row("LPIPS (AlexNet)", None, None, Estimate.of([pair["lpips"] for pair in pairs]), 4))
    if "sound_distance_db" in pairs[0]:
        distance = Estimate.of([pair["sound_distance_db"] for pair in pairs])
        rows.append(Row("log-spectral distance of the sound (dB)", None, None, distance, 2))
    if not is_image:
        change = Estimate.of([pair[SPARSE]["flicker"] - pair[DENSE]["flicker"] for pair in pairs])
        rows.append(Row("flicker", own("flicker", DENSE), own("flicker", SPARSE), change, 3))
    for name, key in (("seconds a step", "step_seconds"), ("seconds in all", "total_seconds")):
        rows.append(Row(name, own(key, DENSE), own(key, SPARSE), ratio(key), 3, "x"))
    if pairs[0][DENSE]["peak_memory_bytes"] is not None:
        key, gibibyte = "peak_memory_bytes", 2**-30
        rows.append(Row("peak memory (GiB)", own(key, DENSE, gibibyte), own(key, SPARSE, gibibyte), ratio(key), 2, "x"))
    rows.append(
        Row(
            "attention FLOPs",
            None,
            None,
            Estimate(pairs[0][SPARSE]["attention_flops_reduction"], None, None, len(pairs)),
            1,
            "x",
        )
    )
    return tuple(rows)


def _notes(records: dict[Job, dict[str, Any]], why_no_lpips: str | None) -> tuple[str, ...]:
    notes = []
    if why_no_lpips is not None:
        notes.append(f"LPIPS is left out: {why_no_lpips}")
    places = {json.dumps(record["environment"], sort_keys=True) for record in records.values()}
    if len(places) > 1:
        notes.append("The outputs were made in different environments: do not compare their seconds")
    if next(iter(records.values()))["peak_memory_bytes"] is None:
        notes.append("Memory is measured only on GPUs")
    return tuple(notes)
