"""Which denoising step a forward is: by its own timestep, in the schedule that its caller goes through."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foveal.models.families.table import PIPELINE_COMPONENTS


class TimestepScale(NamedTuple):
    """How the timesteps that a transformer is called with relate to those of its schedule and of a policy.

    Args:
        divisor: what the pipeline divides the schedule's timesteps by before it calls the transformer.
        rising: the schedule goes from 0, pure noise, up to 1; otherwise from 1000 down to 0.
    """

    divisor: float = 1.0
    rising: bool = False

    def in_schedule(self, timestep: Any) -> float:
        """That of the most noise among a transformer's timesteps, on the host, as the schedule has it."""
        if isinstance(timestep, Tensor):
            timestep = timestep.min() if self.rising else timestep.max()
        return float(timestep) * self.divisor

    def in_policy(self, timestep: Any) -> float | None:
        """The same as policies have it, 1000 for pure noise; None for None."""
        if timestep is None:
            return None
        return 1000.0 * (1.0 - self.in_schedule(timestep)) if self.rising else self.in_schedule(timestep)


# Those of the other families are the schedule's, from 1000 down.
TIMESTEP_SCALES = {"flux": TimestepScale(divisor=1000.0), "minimax_h3": TimestepScale(rising=True)}

# What a method of a pipeline calls the pipeline; blocks of a modular one get it as an argument.
_PIPELINE_NAMES = ("self", "components")

# Pipelines whose loops leave out the last timestep of the schedule without saying so in their `num_timesteps`.
WITHOUT_LAST = ("LTXI2VLongMultiPromptPipeline",)

_SAID: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("foveal_step", default=None)


@dataclass
class _Schedule:
    """A generation's timesteps on the host; `set_timesteps` begins another generation.

    Attributes:
        values: the timesteps.
        end: how many of them have noise to take away: a last sigma of 0 is the end of the way and no step of it.
        begin: the first that the generation goes through; None before it is known.
    """

    values: list[float]
    end: int
    begin: int | None = None


_SCHEDULES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor of the timesteps


@contextlib.contextmanager
def say_step(step: int | None, num_steps: int | None) -> Iterator[None]:
    """Forwards inside, in this context, are this denoising step of so many; nothing is said if either is None."""
    if step is None or num_steps is None:
        yield
        return
    former = _SAID.get()
    _SAID.set((step, num_steps))
    try:
        yield
    finally:
        _SAID.set(former)


def said_step() -> tuple[int, int] | None:
    """(step, how many) by `say_step`; None outside of it."""
    return _SAID.get()


def calling_pipeline(transformer: nn.Module) -> Any:
    """The pipeline whose method calls this transformer, found on the stack; None without one.

    A transformer may be shared by pipelines, each with a scheduler of its own, and only the caller knows which it is.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        for name in _PIPELINE_NAMES:
            if name not in code.co_varnames[: code.co_argcount]:
                continue
            owner = frame.f_locals.get(name)
            if not isinstance(owner, nn.Module) and hasattr(getattr(owner, "scheduler", None), "timesteps"):
                parts = (getattr(owner, component, None) for component in PIPELINE_COMPONENTS)
                if any(_unwrapped(part) is transformer for part in parts):
                    return owner
        frame = frame.f_back
    return None


def _unwrapped(part: Any) -> Any:
    """The model inside of torch.compile's wrapper and of those for data parallelism."""
    while isinstance(part, nn.Module):
        inner = getattr(part, "_orig_mod", None)
        if inner is None and "module" in part._modules and len(part._modules) == 1:
            inner = part.module
        if inner is None:
            break
        part = inner
    return part


def place_in(scheduler: Any, timestep: Any, scale: TimestepScale, *, pipeline: Any = None) -> tuple[int, int] | None:
    """(denoising step, how many) of a forward, from 0; None if the schedule does not have its timestep.

    The generation may begin after the schedule does (video to video) and end before it (sliding windows leave out the
    last timestep). A pipeline says how many timesteps it goes through; a scheduler may say the first; else the first
    that is seen is the first.

    Args:
        scheduler: a scheduler of diffusers.
        timestep: what the transformer was called with; None if it was not given.
        scale: the timestep scale of the transformer's family.
        pipeline: the pipeline that calls; None in your own loop.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        return None
    schedule = _SCHEDULES.get(timesteps)
    if schedule is None:
        schedule = _SCHEDULES[timesteps] = _Schedule(*_read_schedule(scheduler, timesteps))
    index = _index_in(scheduler, schedule.values, timesteps, timestep, scale)
    if index is None:
        return None
    begin, end = schedule.begin, schedule.end
    count = getattr(pipeline, "_num_timesteps", None)
    if not isinstance(count, int) or not 0 < count <= len(schedule.values):
        count = None
    if begin is None:
        begin = getattr(scheduler, "begin_index", None)
        if begin is None and getattr(scheduler, "step_index", None) is None:
            begin = index  # nothing was stepped through yet
        elif begin is None:
            begin = 0 if count is None else len(schedule.values) - count
        schedule.begin = begin
    if count is not None:
        end = min(end, begin + count)
    if any(base.__name__ in WITHOUT_LAST for base in type(pipeline).__mro__):
        end = min(end, len(schedule.values) - 1)
    end = max(end, begin + 1)
    order = getattr(scheduler, "order", 1)
    return max(0, index - begin) // order, -(-(end - begin) // order)


def _read_schedule(scheduler: Any, timesteps: Any) -> tuple[list[float], int]:
    values = [float(t) for t in timesteps.tolist()]
    sigmas, end = getattr(scheduler, "sigmas", None), len(values)
    if isinstance(sigmas, Tensor) and len(sigmas) == end + 1:
        noise = sigmas.tolist()
        while end > 1 and noise[end - 1] == 0.0:
            end -= 1
    return values, end


def _index_in(scheduler: Any, values: list[float], timesteps: Any, timestep: Any, scale: TimestepScale) -> int | None:
    """Which of the schedule's timesteps a forward has; None if none."""
    expected = getattr(scheduler, "step_index", None)
    if expected is None:
        expected = getattr(scheduler, "begin_index", None)
    if timestep is None:
        return expected if expected is not None and expected < len(values) else None
    if isinstance(timestep, Tensor) and isinstance(timesteps, Tensor):
        index = _index_of_view(timesteps, timestep)
        if index is not None:
            return index
    now = scale.in_schedule(timestep)
    tolerance = 1e-6 * (1 + abs(now))
    if isinstance(timestep, Tensor):
        # Pipelines cast it to the latents' dtype, or cut off its fraction.
        dtype = timestep.dtype
        tolerance = max(tolerance, torch.finfo(dtype).eps * abs(now) if dtype.is_floating_point else 0.999)
    near = [index for index, value in enumerate(values) if abs(value - now) <= tolerance]
    # Second-order schedules have timesteps twice; then the scheduler knows which of the two it is at.
    return expected if expected in near else min(near, key=lambda index: abs(values[index] - now), default=None)


def _index_of_view(timesteps: Tensor, timestep: Tensor) -> int | None:
    """The place of a timestep that was taken from the schedule as it is: known without a wait for the device."""
    if timestep.numel() == 0 or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
        return None
    if any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1):
        return None
    index, between = divmod(timestep.storage_offset() - timesteps.storage_offset(), timesteps.stride(0) or 1)
    return index if between == 0 and 0 <= index < len(timesteps) else None
