"""Policies: when the sparse layers of a model run dense, and how much they keep, by denoising step and by timestep.

A `Policy` is data. `set_policy` gives it to a model, whose `PolicyClock` reads, once per forward and on the host, which
step this is; the layers then follow the `Phase` that comes out. Parameters are never touched.
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from foveal.checks import check_head_ratios, check_ratio
from foveal.methods.base import Config
from foveal.methods.choosing import ratio_cell
from foveal.models.families.table import components_of, family_of
from foveal.models.layers import choose_layers
from foveal.models.processor import sparse_processors, state_of
from foveal.models.schedules import TIMESTEP_SCALES, TimestepScale, calling_pipeline, place_in, said_step
from foveal.models.state import Phase

Model = TypeVar("Model")
Ratio = float | tuple[float, ...]  # of all heads, or of each
Table = tuple[tuple[float, Ratio], ...]

# A function of the timestep is tabulated here: the timesteps of diffusers' schedulers.
TABULATED = range(1001)

NOT_IN_SCHEDULE = (
    "the policy counts denoising steps, and the schedule does not have the timestep of this forward: its layers run "
    "sparse, as configured. Give set_policy the scheduler that the loop steps through, after its set_timesteps; or "
    "say the step by transformer.cache_context(name, step_index=..., num_inference_steps=...)"
)
UNKNOWN_STEP = (
    "the policy counts denoising steps, and nothing says which one this is: give set_policy the pipeline, or the "
    "transformer with scheduler=...; or run the transformer inside "
    "transformer.cache_context(name, step_index=..., num_inference_steps=...); or take the policy off with "
    "set_policy(model, None)"
)


@dataclass(frozen=True)
class Policy:
    """When sparse layers run dense, and how much they keep. Nothing is learned; any model takes any policy.

    Timesteps are those of diffusers' schedulers, 1000 for pure noise down to 0. A forward whose samples or tokens have
    several goes by the highest. What is dense for one reason is dense, whatever the ratios say.

    Args:
        dense_first_steps, dense_last_steps: so many denoising steps at the start and at the end of a generation are
            dense. A step of a second-order scheduler (Heun) is all its evaluations. They mean nothing in training: a
            model in train mode ignores them, unless a pipeline calls it.
        dense_above, dense_below: forwards at timesteps above the one and below the other are dense; None for none.
        dense_layers: these layers are always dense, by index or name; their sparse parameters wait.
        keep_ratio, drop_ratio: instead of those of the layers' configurations, by timestep. Either a table, {0: 0.1,
            800: 0.3} for 0.1 below timestep 800 and 0.3 from there on, where timesteps below the first entry leave
            only the configuration; or a function of the timestep, which is called at 0, 1, ... 1000 right away and
            kept as a table. `keep_ratio` takes the place of a `topk`, and may be a tuple of one ratio for each head.
            `drop_ratio` is SLA's.
        min_tokens: forwards of videos of fewer tokens are dense; protected segments do not count.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    dense_first_steps: int = 0
    dense_last_steps: int = 0
    dense_above: float | None = None
    dense_below: float | None = None
    dense_layers: tuple[int | str, ...] = ()
    keep_ratio: Mapping[float, Ratio] | Callable[[float], Ratio] | Table | None = None
    drop_ratio: Mapping[float, float] | Callable[[float], float] | Table | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("dense_first_steps", "dense_last_steps", "min_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("dense_above", "dense_below"):
            if getattr(self, name) is not None:
                _check_timestep(name, getattr(self, name))
        if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Iterable):
            raise TypeError(f"dense_layers must be an iterable of indices or names, got {self.dense_layers!r}")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("keep_ratio", "drop_ratio"):
            object.__setattr__(self, name, _as_table(name, getattr(self, name)))

    @property
    def counts_steps(self) -> bool:
        """Whether the policy needs to know the denoising step."""
        return bool(self.dense_first_steps or self.dense_last_steps)

    @property
    def reads_timestep(self) -> bool:
        """Whether the policy needs to know the timestep."""
        return any(x is not None for x in (self.dense_above, self.dense_below, self.keep_ratio, self.drop_ratio))

    def phase(
        self, step: int | None, num_steps: int | None, timestep: float | None, tokens: int | None = None
    ) -> Phase:
        """What the layers do in one forward.

        Args:
            step, num_steps: which denoising step of how many, from 0; None outside of a generation.
            timestep: None where `reads_timestep` is False.
            tokens: the video's; None where they are not known.
        """
        field = self._dense_by(step, num_steps, timestep, tokens)
        if field is not None:
            return Phase(dense=True, why=f"the policy's {field}")
        return Phase(False, _at(self.keep_ratio, timestep), _at(self.drop_ratio, timestep))

    def _dense_by(
        self, step: int | None, num_steps: int | None, timestep: float | None, tokens: int | None
    ) -> str | None:
        """The field that makes a forward dense; None if none does."""
        if tokens is not None and tokens < self.min_tokens:
            return "min_tokens"
        if step is not None and step < self.dense_first_steps:
            return "dense_first_steps"
        if step is not None and step >= num_steps - self.dense_last_steps:
            return "dense_last_steps"
        if timestep is not None and self.dense_above is not None and timestep > self.dense_above:
            return "dense_above"
        if timestep is not None and self.dense_below is not None and timestep < self.dense_below:
            return "dense_below"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as JSON-ready values."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: _as_lists(value) for name, value in changed.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Policy:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a key that is no field.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown Policy fields {unknown}; expected some of {known}")
        return cls(**values)

    def __str__(self) -> str:
        parts = []
        ends = {"first": self.dense_first_steps, "last": self.dense_last_steps}
        ends = [f"{end} {steps}" for end, steps in ends.items() if steps]
        if ends:
            parts.append(f"steps dense: {', '.join(ends)}")
        bounds = {"above": self.dense_above, "below": self.dense_below}
        bounds = [f"{word} {timestep:g}" for word, timestep in bounds.items() if timestep is not None]
        if bounds:
            parts.append(f"timesteps dense: {', '.join(bounds)}")
        if self.dense_layers:
            parts.append(f"layers dense: {', '.join(map(str, self.dense_layers))}")
        if self.min_tokens:
            parts.append(f"dense below {self.min_tokens} tokens")
        for name in ("keep_ratio", "drop_ratio"):
            table = getattr(self, name)
            if table is not None:
                shown = [f"{ratio_cell(ratio)} from {timestep:g}" for timestep, ratio in table[:3]]
                more = [f"and {len(table) - 3} more"] if len(table) > 3 else []
                parts.append(f"{name}: {', '.join(shown + more)}")
        return "; ".join(parts) or "none"


class PolicyClock:
    """A transformer's policy, and where the denoising step of each forward is read from.

    In this order: the schedule of the pipeline that calls the transformer; what was said by `cache_context(...,
    step_index=, num_inference_steps=)`; the scheduler that `set_policy` was given, or that of its pipeline. In a
    schedule, the timestep of the forward tells the step.

    Copies and pickles of a model keep the policy, and forget the pipeline and the scheduler, which are not theirs.

    Args:
        policy: the policy of one transformer.
        pipeline: the pipeline that has the transformer, for its `scheduler`, whichever it is at the time.
        scheduler: instead of the pipeline's.
    """

    def __init__(self, policy: Policy, *, pipeline: Any = None, scheduler: Any = None) -> None:
        self.policy = policy
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = scheduler

    def __getstate__(self) -> dict[str, Any]:
        # Without what belongs to others: a copy's own copy of a scheduler would never move.
        return vars(PolicyClock(self.policy))

    @property
    def scheduler(self) -> Any:
        """The scheduler that is followed where no pipeline calls the transformer; None without one."""
        if self._scheduler is not None:
            return self._scheduler
        return None if self._pipeline is None else getattr(self._pipeline(), "scheduler", None)

    def phase(self, transformer: nn.Module, timestep: Any, tokens: int | None = None) -> Phase:
        """What the policy asks of the forward that begins.

        Args:
            timestep: the transformer's argument, a number or a tensor of any shape; None if it was not given.
            tokens: how many tokens the video has.

        Raises:
            ValueError: the policy counts steps, and nothing tells the step.
        """
        if "torch._dynamo" in sys.modules:
            # Not traced either where a graph breaks for this: it walks the stack.
            return torch.compiler.disable(self._phase)(transformer, timestep, tokens)
        return self._phase(transformer, timestep, tokens)

    # All that torch.compiler.disable does, which would import torch._dynamo: a whole model that is compiled leaves the
    # graph here, and comes back to one that knows only the phase, not the step.
    phase._torchdynamo_disable = True

    def _phase(self, transformer: nn.Module, timestep: Any, tokens: int | None) -> Phase:
        policy = self.policy
        step = num_steps = None
        if policy.counts_steps:
            step, num_steps = self._step(transformer, timestep) or (None, None)
        timestep = _scale(transformer).in_policy(timestep) if policy.reads_timestep else None
        return policy.phase(step, num_steps, timestep, tokens)

    def _step(self, transformer: nn.Module, timestep: Any) -> tuple[int, int] | None:
        """(denoising step, how many) of this forward; None in training, and where the schedule does not have it."""
        pipeline = calling_pipeline(transformer)
        if pipeline is not None:
            place = place_in(pipeline.scheduler, timestep, _scale(transformer), pipeline=pipeline)
            if place is not None:
                return place
        said = said_step()
        if said is not None:
            return said
        if pipeline is None:
            if transformer.training:  # at timesteps, not in steps
                return None
            if self.scheduler is None:
                raise ValueError(UNKNOWN_STEP)
            place = place_in(self.scheduler, timestep, _scale(transformer))
            if place is not None:
                return place
        warnings.warn(NOT_IN_SCHEDULE, stacklevel=2)
        return None


def set_policy(model: Model, policy: Policy | None, *, scheduler: Any = None) -> Model:
    """Gives the sparse layers of a model a policy, in place of the former one. It holds from the next forward on.

    Args:
        model: a sparse transformer, or a pipeline, whose `scheduler` then tells the step.
        policy: None takes the policy away.
        scheduler: a scheduler of diffusers that a loop of your own steps through, for a transformer without a
            pipeline.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        TypeError: an unsupported model, or a policy or scheduler of another type.
        ValueError: a model without a sparse layer; layers that do not exist; ratios that a layer's configuration does
            not take; a policy that counts steps where there is no scheduler.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy or None, got {policy!r} ({type(policy).__name__})")
    transformers = [part for part in components_of(model).values() if sparse_processors(part)]
    if not transformers:
        raise ValueError("model has no sparse layer for a policy; call sparsify first")
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(f"scheduler must be a scheduler of diffusers, with timesteps, got {scheduler!r}")
    pipeline = None if isinstance(model, nn.Module) else model
    if policy is not None:
        check_schedule(policy, pipeline, scheduler)
        for transformer in transformers:
            configs = {name: processor.config for name, processor in sparse_processors(transformer).items()}
            check_policy(transformer, policy, configs)
    for transformer in transformers:
        attach_policy(transformer, policy, pipeline=pipeline, scheduler=scheduler)
    return model


def get_policy(model: Any) -> Policy | None:
    """The policy that a model has; None for none.

    Raises:
        TypeError: an unsupported model.
        ValueError: a pipeline whose transformers have different policies.
    """
    clocks = {name: getattr(state_of(part), "clock", None) for name, part in components_of(model).items()}
    policies = {name: None if clock is None else clock.policy for name, clock in clocks.items()}
    if len(set(policies.values())) > 1:
        raise ValueError(f"model has different policies in {' and '.join(policies)}: ask for that of one of them")
    return next(iter(policies.values()))


def attach_policy(
    transformer: nn.Module, policy: Policy | None, *, pipeline: Any = None, scheduler: Any = None
) -> None:
    """Gives one sparse transformer a policy that was checked."""
    state = state_of(transformer)
    state.clock = None if policy is None else PolicyClock(policy, pipeline=pipeline, scheduler=scheduler)
    state.held = _held_layers(transformer, policy)
    for name, processor in sparse_processors(transformer).items():
        processor.held_dense = name in state.held


def _held_layers(transformer: nn.Module, policy: Policy | None) -> frozenset[str]:
    if policy is None or not policy.dense_layers:
        return frozenset()
    layers = family_of(transformer).self_attention_layers(transformer)
    return frozenset(choose_layers(layers, policy.dense_layers, argument="dense_layers"))


def check_schedule(policy: Policy, pipeline: Any, scheduler: Any = None) -> None:
    """Raises a ValueError if a policy counts steps where nothing tells them; `pipeline` is None for a transformer."""
    if policy.counts_steps and scheduler is None and getattr(pipeline, "scheduler", None) is None:
        raise ValueError(
            "dense_first_steps and dense_last_steps need a schedule: pass the pipeline, or scheduler=...; for a "
            "transformer without one, give timesteps, dense_above and dense_below"
        )


def check_policy(transformer: nn.Module, policy: Policy, configs: dict[str, Config]) -> None:
    """Raises a TypeError or ValueError unless sparse layers of these configurations can follow the policy."""
    _held_layers(transformer, policy)
    for name, config in configs.items():
        check_ratios(name, config, policy)


def check_ratios(name: str, config: Config, policy: Policy) -> None:
    """Raises a ValueError unless a layer's configuration takes the policy's ratios."""
    bounds = [timestep for table in (policy.keep_ratio, policy.drop_ratio) for timestep, _ in table or ()]
    for timestep in bounds:
        phase = Phase(False, _at(policy.keep_ratio, timestep), _at(policy.drop_ratio, timestep))
        try:
            phase.apply(config)
        except ValueError as error:
            raise ValueError(f"policy does not go with layer {name} from timestep {timestep:g}: {error}") from None


def _check_timestep(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a timestep, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a timestep, finite and at least 0, got {value}")


def _as_table(name: str, given: Any) -> Table | None:
    """(timestep, ratio) pairs, ascending, without repeats."""
    if given is None:
        return None
    if callable(given):
        pairs = [(timestep, given(float(timestep))) for timestep in TABULATED]
    else:
        if isinstance(given, Mapping):
            given = given.items()
        try:
            pairs = [(timestep, ratio) for timestep, ratio in given]
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} must be a table {{timestep: ratio}} or a function of the timestep, got {given!r}"
            ) from None
    if not pairs:
        raise ValueError(f"{name} is an empty table; None leaves the configurations' ratios")
    for timestep, ratio in pairs:
        _check_timestep(f"{name} entry", timestep)
        check = check_head_ratios if name == "keep_ratio" else check_ratio
        check(f"{name} at timestep {timestep:g}", tuple(ratio) if isinstance(ratio, list) else ratio)
    pairs.sort(key=lambda pair: pair[0])
    times = [timestep for timestep, _ in pairs]
    if len(set(times)) < len(times):
        raise ValueError(f"{name} has a timestep twice, got {sorted(t for t in set(times) if times.count(t) > 1)}")
    return tuple(
        (float(timestep), tuple(map(float, ratio)) if isinstance(ratio, tuple | list) else float(ratio))
        for index, (timestep, ratio) in enumerate(pairs)
        if index == 0 or ratio != pairs[index - 1][1]
    )


def _at(table: Table | None, timestep: float | None) -> Ratio | None:
    """A table's ratio at a timestep; None before its first entry."""
    if table is None or timestep is None:
        return None
    return next((ratio for start, ratio in reversed(table) if timestep >= start), None)


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, tuple) else value


def _scale(transformer: nn.Module) -> TimestepScale:
    return TIMESTEP_SCALES.get(family_of(transformer).name, TimestepScale())
