"""`foveal calibrate`: measure a pipeline on a few prompts, choose, and write the policy file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveal.checks import check_choice
from foveal.lab.calibrate.choose import Budget, Choice, choose, least_tokens
from foveal.lab.calibrate.measure import LayerErrors, measure
from foveal.lab.generate.run import GenerationSettings, environment
from foveal.lab.generate.sparse import configs_of
from foveal.lab.pipelines import LoadedPipeline, step_callback
from foveal.layout import VideoGrid
from foveal.methods.base import METHODS, Config, method_of
from foveal.models.families.table import components_of, family_of
from foveal.models.files.policy_file import ComponentPolicy, policy_text
from foveal.models.policy import Policy
from foveal.output_folder import OutputFolder

POLICY_FILE = "policy.json"
RATIOS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
MASSES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
BUDGETS = {"ratio": RATIOS, "head": RATIOS, "mass": MASSES}


@dataclass(frozen=True)
class CalibrationSettings:
    """What to measure and to allow.

    Args:
        error: the largest relative error of a layer's output in a step where it is sparse.
        config: the configuration whose budget is varied; see `training_free`.
        by: "ratio" gives each layer a `keep_ratio`; "head" gives it one for each head, if that is less work; "mass" a
            `keep_mass`, so that heads and rows keep as many blocks as each of them needs.
        min_tokens: of the policy; None for where sparse attention begins to be less work than dense attention.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    error: float
    config: Config
    by: str = "ratio"
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.error, bool) or not isinstance(self.error, int | float):
            raise TypeError(f"error must be a number, got {self.error!r}")
        if not 0 < self.error < 1:
            raise ValueError(f"error must be above 0 and below 1, got {self.error}")
        check_choice("by", self.by, tuple(BUDGETS))
        if self.by == "head":
            try:
                self.of_heads((0, 1))
            except TypeError as error:
                raise ValueError(f'by="head" needs a method whose heads may keep different shares: {error}') from None
        if self.min_tokens is not None:
            Policy(min_tokens=self.min_tokens)

    @property
    def configs(self) -> list[Config]:
        """The configurations to measure, one for each budget."""
        method = method_of(self.config)
        if self.by in ("ratio", "head"):
            return [method.follow(self.config, keep_ratio=ratio) for ratio in RATIOS]
        least = method.follow(self.config, keep_ratio=RATIOS[0])
        return [least.replace(keep_mass=mass, max_keep_ratio=RATIOS[-1]) for mass in MASSES]

    def of_heads(self, budgets: tuple[int, ...]) -> Config:
        """The configuration with a budget for each head."""
        return method_of(self.config).follow(self.config, keep_ratio=tuple(RATIOS[budget] for budget in budgets))

    def at(self, budget: Budget) -> Config:
        """The configuration of a budget, of all heads or of each."""
        return self.configs[budget] if isinstance(budget, int) else self.of_heads(budget)


def training_free(method: str, **fields: Any) -> Config:
    """The configuration of a method that is best without training, with some fields changed; None leaves one.

    Raises:
        TypeError, ValueError: an unknown method, a field that it does not have, or a value out of its range.
    """
    check_choice("method", method, tuple(METHODS))
    given = {name: value for name, value in fields.items() if value is not None}
    return METHODS[method].configure(METHODS[method].training_free, **given)


def check_request(loaded: LoadedPipeline, output: str | Path, settings: GenerationSettings) -> None:
    """Check what can be checked before weights are loaded.

    Raises:
        FileExistsError, ValueError: as `calibrate` does.
    """
    OutputFolder(output, "calibrate").check([POLICY_FILE])
    settings.call_arguments(loaded)


def measure_pipeline(
    loaded: LoadedPipeline,
    prompts: Sequence[str],
    generation: GenerationSettings,
    configs: Sequence[Config],
    *,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> list[LayerErrors]:
    """`measure` for a dense pipeline that makes one video of each prompt.

    Args:
        loaded: the pipeline, which stays as it is.
        prompts: the video of each has the seed of its number after `seed`.
        generation: the size, the steps and the guidance.
        configs: the budgets.
        on_step: called after each denoising step.

    Raises:
        ValueError: no prompt, a pipeline that is sparse already, or a size that it cannot make.
    """
    if not prompts:
        raise ValueError("give at least one prompt")
    if configs_of(loaded.pipe):
        raise ValueError(f"{loaded.source} is a sparse pipeline already; calibrate the dense one")
    arguments = generation.call_arguments(loaded)
    call = {name: value for name, value in arguments.items() if not (loaded.kind.is_image and name == "num_frames")}

    def run(prompt: str, place: int) -> None:
        generator, callback = torch.Generator().manual_seed(seed + place), step_callback(on_step)
        loaded.pipe(prompt=prompt, generator=generator, output_type="latent", callback_on_step_end=callback, **call)

    runs = [functools.partial(run, prompt, place) for place, prompt in enumerate(prompts)]
    return measure(loaded.pipe, runs, configs, arguments["num_inference_steps"])


def calibrate(
    loaded: LoadedPipeline,
    prompts: Sequence[str],
    output: str | Path,
    generation: GenerationSettings,
    settings: CalibrationSettings,
    *,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Path, Choice, list[LayerErrors]]:
    """Measure a dense pipeline on a few prompts, and write the policy file with the least work within the error.

    Args:
        loaded, prompts, generation, seed, on_step: as in `measure_pipeline`.
        output: the folder, which gets `policy.json`.
        settings: what to measure and to allow.

    Returns:
        The policy file, the choice, and what it was made from.

    Raises:
        ValueError: as in `measure_pipeline`, and for an error that no budget is within.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    OutputFolder(output, "calibrate").check([POLICY_FILE])
    layers = measure_pipeline(loaded, prompts, generation, settings.configs, seed=seed, on_step=on_step)
    facts = {"prompts": list(prompts), "seed": seed}
    return *write_policy(loaded, layers, output, generation, settings, facts), layers


def write_policy(
    loaded: LoadedPipeline,
    layers: Sequence[LayerErrors],
    output: str | Path,
    generation: GenerationSettings,
    settings: CalibrationSettings,
    facts: dict[str, Any],
) -> tuple[Path, Choice]:
    """Choose from what was measured with the configurations of `settings`, and write the policy file.

    Args:
        facts: what the file says about the measurement, JSON-ready.

    Raises:
        FileExistsError, ValueError: as in `calibrate`.
    """
    arguments = generation.call_arguments(loaded)
    chosen = choose_budgets(layers, settings, arguments["num_inference_steps"])
    facts = {
        "model": loaded.source,
        "revision": loaded.revision,
        "arguments": json.loads(json.dumps(arguments)),
        "environment": environment(loaded.device),
        **facts,
    }
    text = describe(loaded.pipe, layers, chosen, settings, facts)
    folder = OutputFolder(output, "calibrate")
    with folder.writing(POLICY_FILE) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return folder.path / POLICY_FILE, chosen


def choose_budgets(layers: Sequence[LayerErrors], settings: CalibrationSettings, steps: int) -> Choice:
    """`choose` for what was measured."""
    errors = [{step: found.layer() for step, found in layer.steps.items()} for layer in layers]
    work = [[layer.work(config, index) for index, config in enumerate(settings.configs)] for layer in layers]
    shares = None
    if settings.by == "head":
        shares = [{step: found.shares() for step, found in layer.steps.items()} for layer in layers]
    return choose(errors, work, steps, settings.error, shares)


def _work(layer: LayerErrors, budget: Budget, settings: CalibrationSettings, grid: VideoGrid) -> float:
    """What a layer takes on another grid, over dense attention."""
    indices = (budget,) if isinstance(budget, int) else budget
    return sum(layer.work(settings.at(index), index, grid) for index in indices) / len(indices)


def describe(
    model: Any,
    layers: Sequence[LayerErrors],
    chosen: Choice,
    settings: CalibrationSettings,
    facts: dict[str, Any],
) -> str:
    """The text of the policy file: what `sparsify` reads, and what was measured."""
    sparse = [(layer, budget) for layer, budget in zip(layers, chosen.budgets, strict=True) if budget is not None]
    min_tokens = settings.min_tokens
    if min_tokens is None:
        min_tokens = least_tokens(
            sparse[0][0].grid, lambda grid: max(_work(layer, budget, settings, grid) for layer, budget in sparse)
        )
    policy = Policy(
        dense_first_steps=chosen.dense_first_steps, dense_last_steps=chosen.dense_last_steps, min_tokens=min_tokens
    )
    components = {}
    for name, transformer in components_of(model).items():
        found = {layer.layer: settings.at(budget) for layer, budget in sparse if layer.component == name}
        if found:
            components[name] = ComponentPolicy(family_of(transformer).name, found, policy)
    measured = {
        f"{layer.component}.{layer.layer}": {
            str(step): {
                "error": _rounded(seen.layer()),
                "heads": _rounded(seen.heads().tolist()),
                "int8_error": _rounded(seen.int8_error()),
            }
            for step, seen in sorted(layer.steps.items())
        }
        for layer in layers
    }
    return policy_text(
        components,
        calibration={
            "error": settings.error,
            "largest_error": _rounded(chosen.error),
            "work": _rounded(chosen.work),
            "by": settings.by,
            "budgets": list(BUDGETS[settings.by]),
            **facts,
        },
        measured=measured,
    )


def _rounded(value: Any) -> Any:
    return [_rounded(x) for x in value] if isinstance(value, list) else float(f"{value:.4g}")


def table(layers: Sequence[LayerErrors], chosen: Choice, settings: CalibrationSettings) -> str:
    """What was chosen, for people."""
    steps = 1 + max(step for layer in layers for step in layer.steps)
    sparse = range(chosen.dense_first_steps, steps - chosen.dense_last_steps)
    ends = f"first {chosen.dense_first_steps} and last {chosen.dense_last_steps} steps dense"
    lines = [
        f"{1 / chosen.work:.2f}x less attention work than dense attention; {ends}; largest error {chosen.error:.3f}",
        f"{'layer':<32}{settings.by:>8}{'error':>8}{'worst head':>12}{'int8 error':>12}",
    ]
    for layer, budget in zip(layers, chosen.budgets, strict=True):
        name = f"{layer.component}.{layer.layer}"
        if budget is None:
            lines.append(f"{name:<32}{'dense':>8}")
            continue
        seen = [found for step, found in layer.steps.items() if step in sparse]
        error, head = max(x.at(budget)[0] for x in seen), max(max(x.at(budget)[1]) for x in seen)
        indices = (budget,) if isinstance(budget, int) else budget
        mean = sum(BUDGETS[settings.by][index] for index in indices) / len(indices)
        int8 = max(x.int8_error() for x in seen)
        lines.append(f"{name:<32}{mean:>8.3g}{error:>8.3f}{head:>12.3f}{int8:>12.4f}")
    return "\n".join(lines)
