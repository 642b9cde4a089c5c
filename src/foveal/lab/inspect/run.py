"""`foveal inspect`: run a model or a pipeline once, look at a few of its denoising steps, write a report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import foveal
from foveal.lab.inspect.advice import Advice, advise
from foveal.lab.inspect.probe import InspectSettings, LayerObservation, observe
from foveal.lab.inspect.report import FILES, PAGE, write_report
from foveal.models.families.table import components_of, family_of
from foveal.models.files.persist import check_saved
from foveal.output_folder import OutputFolder


def head_shape(model: Any) -> tuple[int, int]:
    """(heads, head_dim) of the first self-attention layer."""
    transformer: nn.Module = next(iter(components_of(model).values()))
    family = family_of(transformer)
    layer = next(iter(family.self_attention_layers(transformer).values()))
    return family.dimensions(layer)[1:]


def check_request(folder: Path, tolerance: float) -> None:
    """Check that a report can be written into a folder and that an error can be within the tolerance.

    Raises:
        ValueError: the folder is a file or cannot be created, or no error can be within the tolerance.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    OutputFolder(folder, "inspect").check(FILES)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")


def inspect_model(
    model: Any,
    run: Callable[[], object],
    folder: Path,
    *,
    calls: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    settings: InspectSettings | None = None,
    tolerance: float = 0.1,
    facts: dict[str, Any] | None = None,
    on_observation: Callable[[LayerObservation], None] = lambda observation: None,
) -> tuple[Path, Advice, list[LayerObservation]]:
    """Look at a model while `run` runs it, and write the report.

    Args:
        model, run, calls, steps, layers, settings: see `foveal.lab.inspect.probe.observe`.
        folder: the folder for `index.html`, `inspect.json`, and the figures.
        tolerance: the relative output error, before fine-tuning, that the recommendation allows the median layer.
        facts: more about the run, JSON-ready, for the report.

    Returns:
        The page, the recommendation and the observations.

    Raises:
        FileExistsError, TypeError, ValueError: see `observe` and `check_request`.
    """
    settings = settings or InspectSettings()
    folder = Path(folder)
    check_request(folder, tolerance)
    device = next(next(iter(components_of(model).values())).parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    observations = observe(
        model, run, calls=calls, steps=steps, layers=layers, settings=settings, on_observation=on_observation
    )
    known = {"seconds": round(time.perf_counter() - start, 2), "device": str(device)}
    if device.type == "cuda":
        known["device"] = torch.cuda.get_device_name(device)
        known["peak_gib"] = round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 2)
    known |= {"foveal": foveal.__version__, "torch": torch.__version__}
    heads, head_dim = head_shape(model)
    advice = advise(observations, settings, heads=heads, head_dim=head_dim, tolerance=tolerance)
    with OutputFolder(folder, "inspect").renewing(last=PAGE) as new:
        write_report(new, observations, settings, advice, (facts or {}) | known)
    return folder / PAGE, advice, observations


def inspect_pipeline(
    source: str,
    folder: Path,
    *,
    prompt: str,
    sparse: Path | None = None,
    size: tuple[int, int, int] | None = None,
    num_inference_steps: int = 20,
    steps: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    layers: Sequence[str] | None = None,
    settings: InspectSettings | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    on_observation: Callable[[LayerObservation], None] = lambda observation: None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Path, Advice, list[LayerObservation]]:
    """Look at a diffusers pipeline from a folder or the hub while it generates from a prompt.

    Args:
        source: a folder that a pipeline was saved to, or a hub id.
        folder: the folder for the report.
        prompt: the text to generate from.
        sparse: a folder that `foveal.save` wrote, to look at the converted model on its own path; None for dense.
        size: (frames, height, width) in pixels; None for the pipeline's own.
        num_inference_steps: denoising steps of the schedule; all are run.
        steps: which steps to look at; None for the first, the middle and the last.
        guidance_scale: None for the pipeline's own.
        layers, settings, tolerance: see `inspect_model`.
        seed: the seed of the noise.
        device, dtype: the name of a device and of a dtype, or "auto".
        on_observation: called with each observation as it is made.
        on_step: called after each denoising step.

    Raises:
        FileNotFoundError, TypeError, ValueError: the pipeline cannot be loaded, or does not take the size, or its
            schedule does not have the steps; and what `check_request` raises.
    """
    from foveal.lab.pipelines import (
        LoadedPipeline,
        choose_device,
        choose_dtype,
        default_size,
        load_pipeline,
        step_callback,
    )

    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if steps is None:
        steps = sorted({0, num_inference_steps // 2, num_inference_steps - 1})
    wrong = [step for step in steps if not 0 <= step < num_inference_steps]
    if wrong or not steps:
        raise ValueError(f"steps must be in [0, {num_inference_steps}), got {wrong or list(steps)}")
    check_request(Path(folder), tolerance)
    if sparse is not None:
        check_saved(sparse)
    chosen = choose_device(device)

    def size_of(outline: LoadedPipeline) -> tuple[int, int, int]:
        frames, height, width = size or default_size(outline)
        if None in (frames, height, width):
            raise ValueError(f"{outline.kind.name} has no size of its own; give frames, height and width")
        outline.sizes.check(frames, height, width)
        return frames, height, width

    loaded = load_pipeline(source, device=chosen, dtype=choose_dtype(dtype, chosen), check=size_of)
    if sparse is not None:
        foveal.load(loaded.pipe, sparse)
    arguments: dict[str, Any] = {"prompt": prompt, "num_inference_steps": num_inference_steps, "output_type": "latent"}
    arguments |= dict(zip(("num_frames", "height", "width"), size_of(loaded), strict=True))
    if loaded.kind.is_image:
        del arguments["num_frames"]
    if guidance_scale is None:
        guidance_scale = loaded.defaults.get("guidance_scale")
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale

    def run() -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        loaded.pipe(**arguments, generator=generator, callback_on_step_end=step_callback(on_step))

    facts = {"model": source, "sparse": None if sparse is None else str(sparse), "dtype": str(loaded.dtype)[6:]}
    facts |= {name: value for name, value in arguments.items() if name != "output_type"} | {"seed": seed}
    return inspect_model(
        loaded.pipe,
        run,
        folder,
        steps=steps,
        layers=layers,
        settings=settings,
        tolerance=tolerance,
        facts=facts,
        on_observation=on_observation,
    )
