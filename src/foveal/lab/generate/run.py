"""The generation run: every prompt with every seed, dense and sparse, each output once."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.checks import check_choice
from foveal.lab.data.sound import Sound
from foveal.lab.generate.outputs import (
    beside,
    beside_name,
    finished,
    frames_of,
    media_suffix,
    output_name,
    write_exact,
    write_media,
    write_record,
)
from foveal.lab.generate.page import PAGE, write_page
from foveal.lab.generate.sparse import SparseChoice, configs_of, fingerprint
from foveal.lab.pipelines import TRANSFORMERS, LoadedPipeline, default_size
from foveal.layout import VideoGrid
from foveal.models import dense, summary
from foveal.models.record import ON_FALLBACK
from foveal.models.report import set_on_fallback
from foveal.models.shipped import local_path
from foveal.output_folder import OutputFolder

DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class GenerationSettings:
    """What all outputs of a run share; None takes the pipeline's own.

    Args:
        frames, height, width: the size of the video, in frames and pixels; an image has one frame.
        steps: the number of denoising steps.
        guidance_scale: the scale of classifier-free guidance, or what the model embeds.
        negative_prompt: what guidance leads away from.
        fps: the frame rate of the file that is written.
        exact: keep each video bit for bit too, as a Matroska file.
        on_fallback: what happens where a sparse layer falls back, see `sparsify`.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    fps: float | None = None
    exact: bool = False
    on_fallback: str = "allow"

    def __post_init__(self) -> None:
        check_choice("on_fallback", self.on_fallback, ON_FALLBACK)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")

    def call_arguments(self, loaded: LoadedPipeline) -> dict[str, Any]:
        """The arguments of the pipeline's call, all but prompt and seed, each with a value.

        Raises:
            ValueError: for a size that the pipeline cannot make, or an option that it does not have.
        """
        accepted = inspect.signature(loaded.pipe.__call__).parameters
        size = default_size(loaded)
        given = {"num_frames": self.frames, "height": self.height, "width": self.width}
        arguments = {
            name: default if value is None else value
            for (name, value), default in zip(given.items(), size, strict=True)
        }
        for name, value in arguments.items():
            if value is None:
                raise ValueError(f"{loaded.kind.name} does not say its {name}; give one")
        if loaded.kind.is_image and arguments["num_frames"] != 1:
            raise ValueError(f"{loaded.kind.name} makes images, which have 1 frame, got {self.frames} frames")
        loaded.sizes.check(arguments["num_frames"], arguments["height"], arguments["width"])
        if loaded.kind.sound and self.fps not in (None, loaded.kind.fps):
            raise ValueError(
                f"fps must be {loaded.kind.fps} for {loaded.kind.name}, whose sound has it, got {self.fps}"
            )
        options = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "frame_rate": self.fps,
        }
        for name, value in options.items():
            if name in accepted:
                arguments[name] = loaded.default(name) if value is None else value
            elif name == "negative_prompt" and value is not None:
                raise ValueError(f"{loaded.kind.name} takes no negative prompt")
            elif name == "guidance_scale" and value is not None and loaded.kind.sound:
                raise ValueError(f"{loaded.kind.name} takes no guidance scale: its weights are distilled for guidance")
        if arguments["num_inference_steps"] < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        return arguments

    def frame_rate(self, loaded: LoadedPipeline) -> float:
        return self.fps or loaded.kind.fps or 1


@dataclass(frozen=True)
class Job:
    """One output: a prompt, a seed, "dense" or "sparse", and what its file name calls that."""

    prompt: str
    seed: int
    arm: str
    label: str

    @property
    def name(self) -> str:
        return output_name(self.prompt, self.seed, self.label)

    def media(self, loaded: LoadedPipeline, *, exact: bool) -> list[str]:
        """The output's files: the one to watch, and with `exact` the lossless one."""
        image = loaded.kind.is_image
        return [self.name + media_suffix(image), *([f"{self.name}.mkv"] if exact and not image else [])]

    def beside_dense(self, loaded: LoadedPipeline) -> str:
        """The file that shows the output side by side with the dense one."""
        return beside_name(self.name, is_image=loaded.kind.is_image)


class Progress:
    """What a run reports to. This one drops the reports; the command line's draws a bar."""

    def start(self, jobs: int, done: int, steps: int) -> None:
        """Report the number of jobs, how many of them former runs have done, and the steps of each."""

    def begin(self, job: Job, again: str | None) -> None:
        """Report that a job begins, with the reason if an output exists that does not count."""

    def step(self) -> None:
        """Report that a denoising step is done, or the comparison of a pair."""

    def compare(self, pairs: int) -> None:
        """Report that all outputs exist, and how many pairs of them are to be compared."""


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a text file, which has one on each line. Blank lines do not count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not UTF-8 text, has no prompt, or has one twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such prompt file: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prompt file {path} is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} has no prompt; expected one a line")
    for place, prompt in enumerate(prompts):
        if prompt in prompts[:place]:
            raise ValueError(f"prompt file {path} has a prompt twice: {prompt!r}")
    return prompts


def plan(
    loaded: LoadedPipeline,
    prompts: list[str],
    seeds: list[int],
    sparse: SparseChoice | None,
    *,
    compare_dense: bool,
) -> tuple[list[Job], SparseChoice | None]:
    """Return all outputs of a run, dense ones first, and what makes the pipeline sparse (None for a dense run).

    Raises:
        ValueError: there is no prompt or seed, one is given twice, or there is nothing to compare with dense.
    """
    for name, values in (("prompt", prompts), ("seed", seeds)):
        if not values or len(set(values)) != len(values) or "" in values:
            raise ValueError(f"give at least one {name}, none of them empty or twice, got {values}")
    if configs_of(loaded.pipe):
        if sparse is not None:
            raise ValueError(
                f"{loaded.source} is a sparse pipeline already; it takes no other sparse weights or method"
            )
        sparse = SparseChoice()
    if compare_dense and sparse is None:
        raise ValueError(f"{loaded.source} is dense, nothing to compare; give sparse weights or a method")
    arms = [DENSE] if sparse is None else [DENSE, SPARSE] if compare_dense else [SPARSE]
    labels = {DENSE: DENSE, SPARSE: None if sparse is None else sparse.label}
    return [Job(prompt, seed, arm, labels[arm]) for arm in arms for prompt in prompts for seed in seeds], sparse


def check_request(
    loaded: LoadedPipeline, output: str | Path, settings: GenerationSettings, sparse: SparseChoice | None
) -> tuple[dict[str, Any], VideoGrid]:
    """Check what can be checked before a video is made, and before weights are loaded.

    Args:
        loaded: the pipeline, or its outline.
        output, settings, sparse: as in `generate`.

    Returns:
        The arguments of the pipeline's call, and the token grid.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as in `generate`.
    """
    OutputFolder(output, "generate").check()
    arguments = settings.call_arguments(loaded)
    grid = loaded.sizes.grid(arguments["num_frames"], arguments["height"], arguments["width"])
    if sparse is not None:
        sparse.check()
    if sparse is not None and sparse.config is not None:
        sparse.check_grid(grid, [sparse.config])
    return arguments, grid


def generate(
    loaded: LoadedPipeline,
    prompts: list[str],
    seeds: list[int],
    output: str | Path,
    settings: GenerationSettings,
    *,
    sparse: SparseChoice | None = None,
    compare_dense: bool = False,
    progress: Progress | None = None,
) -> dict[Job, dict[str, Any]]:
    """Make every output that is not finished yet: a video or image, and a JSON record of how it was made.

    `index.html` shows all outputs in the folder, and is renewed after each.

    Dense outputs come first, from the pipeline as it was loaded; then it is made sparse, and stays so. With
    `compare_dense`, each pair is also written side by side, dense on the left. The seed's noise is drawn on the CPU, so
    that it is the same on every device.

    Args:
        loaded: a pipeline, dense, or sparse as it was saved.
        prompts, seeds: each with each.
        output: the folder; outputs in it whose records match are left as they are.
        settings: what all outputs share.
        sparse: how to make the pipeline sparse; None generates with it as it is.
        compare_dense: generate dense too.
        progress: what to report each output and step to.

    Returns:
        The record of every output, former ones included, in order.

    Raises:
        ValueError: no prompt or seed, one that is given twice, nothing to compare with dense, a size that the pipeline
            cannot make or that is too small for sparse attention, or an output path that is a file;
            FileNotFoundError, TypeError and ValueError as `SparseChoice.check` and `install` do.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
        FloatingPointError: for an output that is not finite.
    """
    folder, progress = OutputFolder(output, "generate"), progress or Progress()
    jobs, sparse = plan(loaded, prompts, seeds, sparse, compare_dense=compare_dense)
    if sparse is None and settings.on_fallback != "allow":
        raise ValueError(f"on_fallback={settings.on_fallback!r} needs sparse attention: {loaded.source} is dense")
    arguments, grid = check_request(loaded, output, settings, sparse)
    shared = _shared_settings(loaded, settings, arguments)
    described = {DENSE: None, SPARSE: None if sparse is None else sparse.describe()}
    wanted = {
        job: {**shared, "prompt": job.prompt, "seed": job.seed, "arm": job.arm, "sparse": described[job.arm]}
        for job in jobs
    }
    states = {job: finished(folder.path, job.name, wanted[job]) for job in jobs}
    records = {job: record for job, (record, _) in states.items() if record is not None}
    pairs = list(zip(jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :], strict=True)) if compare_dense else []
    left = [job for job in jobs if job not in records]
    folder.check(name for job in left for name in (*job.media(loaded, exact=settings.exact), f"{job.name}.json"))
    stale = [pair for pair in pairs if {*pair} & {*left} or not _is_beside(folder.path, *pair, loaded)]
    folder.check((PAGE, *(pair[1].beside_dense(loaded) for pair in stale)))
    progress.start(len(jobs), len(records), arguments["num_inference_steps"])
    reduction, installed = 1.0, False
    already = bool(configs_of(loaded.pipe))
    for job in left:
        if job.arm == SPARSE and not installed:
            sparse.install(loaded.pipe)
            set_on_fallback(loaded.pipe, settings.on_fallback)
            sparse.check_grid(grid, configs_of(loaded.pipe))
            reduction, installed = summary(loaded.pipe, grid).reduction, True
        progress.begin(job, states[job][1])
        with dense(loaded.pipe) if already and job.arm == DENSE else contextlib.nullcontext():
            made, seconds, memory = _generate_one(loaded, job, arguments, progress.step)
        record = {
            "settings": wanted[job],
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "attention_flops_reduction": reduction if job.arm == SPARSE else 1.0,
            "tokens": list(grid.shape),
            "environment": environment(loaded.device),
        }
        records[job] = _write(folder, job, *made, record, loaded, settings)
        write_page(folder)
    for pair in stale:
        _write_side_by_side(folder, *pair, records, loaded)
    write_page(folder)
    return {job: records[job] for job in jobs}


def environment(device: torch.device) -> dict[str, str]:
    """Where a run takes place."""
    import diffusers

    import foveal

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "foveal": foveal.__version__}
    return {"device": name, "python": platform.python_version(), **versions}


def _shared_settings(loaded: LoadedPipeline, settings: GenerationSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    source = Path(local_path(loaded.source))
    shared = {
        "pipeline": loaded.kind.name,
        "model": loaded.source,
        "model_fingerprint": fingerprint(source) if source.is_dir() else None,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        **arguments,
        "fps": settings.frame_rate(loaded),
        "exact": settings.exact,
    }
    if loaded.kind.sound:
        shared["sampling_rate"] = loaded.kind.sound.made_rate(loaded.pipe)
    return json.loads(json.dumps(shared))


def _generate_one(
    loaded: LoadedPipeline, job: Job, arguments: dict[str, Any], on_step: Callable[[], None]
) -> tuple[tuple[Tensor, Sound | None], dict[str, Any], int | None]:
    """((frames uint8 [F, 3, H, W], sound), seconds of each part, peak memory in bytes) of one call of the pipeline."""
    device = loaded.device
    on_gpu = device.type == "cuda"
    times: list[float] = []

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def first_forward(module: Any, args: Any) -> None:
        # The text is encoded by now; the first step begins.
        if not times:
            times.append(now())

    def end_of_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append(now())
        on_step()
        return tensors

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    call = {name: value for name, value in arguments.items() if not (loaded.kind.is_image and name == "num_frames")}
    parts = [getattr(loaded.pipe, name, None) for name in TRANSFORMERS]
    hooks = [part.register_forward_pre_hook(first_forward) for part in parts if part is not None]
    start = now()
    try:
        result, *rest = loaded.pipe(
            prompt=job.prompt,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="pt",
            return_dict=False,
            callback_on_step_end=end_of_step,
            **call,
        )
    finally:
        for hook in hooks:
            hook.remove()
    end = now()
    video = result if loaded.kind.is_image else result[0]
    sound, kind = None, loaded.kind.sound
    if kind is not None:
        sound = Sound(kind.made(loaded.pipe, rest[0]).float().cpu(), kind.made_rate(loaded.pipe))
    if not video.isfinite().all() or (sound is not None and not sound.samples.isfinite().all()):
        raise FloatingPointError(f"the {job.arm} output for prompt {job.prompt!r}, seed {job.seed}, is not finite")
    frames = (video.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    steps = [after - before for before, after in itertools.pairwise(times)]
    seconds = {"text_encoding": times[0] - start, "steps": steps, "decoding": end - times[-1], "total": end - start}
    return (frames, sound), seconds, torch.cuda.max_memory_allocated(device) if on_gpu else None


def _write(
    folder: OutputFolder,
    job: Job,
    frames: Tensor,
    sound: Sound | None,
    record: dict[str, Any],
    loaded: LoadedPipeline,
    settings: GenerationSettings,
) -> dict[str, Any]:
    # A former record must not stay beside an output that it does not describe.
    folder.remove(f"{job.name}.json")
    record["outputs"] = []
    for name, write in zip(job.media(loaded, exact=settings.exact), (write_media, write_exact), strict=False):
        with folder.writing(name) as aside:
            write(aside, frames, fps=settings.frame_rate(loaded), sound=sound)
            record["outputs"].append({"file": name, "bytes": aside.stat().st_size})
    with folder.writing(f"{job.name}.json") as aside:
        write_record(aside, record)
    return record


def _is_beside(folder: Path, left: Job, right: Job, loaded: LoadedPipeline) -> bool:
    """Whether there is a side-by-side file that is newer than both outputs."""
    path = folder / right.beside_dense(loaded)
    parts = [folder / f"{job.name}.json" for job in (left, right)]
    if not all(file.is_file() for file in (path, *parts)):
        return False
    return path.stat().st_mtime_ns >= max(part.stat().st_mtime_ns for part in parts)


def _write_side_by_side(
    folder: OutputFolder, left: Job, right: Job, records: dict[Job, dict[str, Any]], loaded: LoadedPipeline
) -> None:
    pair = [frames_of(folder.path, records[job]) for job in (left, right)]
    with folder.writing(right.beside_dense(loaded)) as aside:
        write_media(aside, beside(*pair), fps=records[left]["settings"]["fps"])
