"""The optimiser of a run: groups of parameters with rates of their own, a schedule, and one step of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    fast_parameters: Iterable[nn.Parameter] = (),
    fast_learning_rate: float | None = None,
) -> list[dict]:
    """Groups for an optimiser: the fast parameters with their own rate, the others with `learning_rate`."""
    fast = {id(p) for p in fast_parameters} if fast_learning_rate is not None else set()
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if id(p) not in fast], "lr": learning_rate},
        {"params": [p for p in parameters if id(p) in fast], "lr": fast_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict], *, name: str = "adamw", betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or "adamw8bit" of bitsandbytes.

    Raises:
        ImportError: for "adamw8bit" without bitsandbytes.
    """
    if name == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise ImportError('optimizer.name="adamw8bit" needs bitsandbytes: pip install bitsandbytes') from None
        return bitsandbytes.optim.AdamW8bit(groups, betas=betas, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True)


def warmup_and_decay(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, decay: bool = True, floor: float = 0.0
) -> LambdaLR:
    """Every group's rate rises linearly over `warmup` steps; with `decay` it falls linearly to `floor` of its peak."""

    def rate(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup) if decay else 1.0
        return min((step + 1) / warmup if warmup else 1.0, floor + (1 - floor) * min(1.0, left))

    return LambdaLR(optimizer, rate)


def set_steps_taken(schedule: LambdaLR, steps: int) -> None:
    """Puts a new schedule and its optimiser's rates where so many steps leave them, to the last bit."""
    schedule.last_epoch = steps
    groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, peak, rate in groups:
        group["lr"] = peak * rate(steps)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Args:
        loss: its mean over the batch.
        gradient_norm: before clipping.
        taken: False where the step was refused, and the parameters stayed as they were.
    """

    loss: float
    gradient_norm: float
    taken: bool


def optimizer_step(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    losses: Iterable[Tensor],
    *,
    accept: Callable[[float, float], bool],
    max_gradient_norm: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> StepReport:
    """Gradients of the sum of some losses, clipped, and a step of the optimiser and the schedule unless it is refused.

    Args:
        losses: scalars, one a micro-batch, each made when the one before has had its backward.
        accept: (loss, gradient norm) to whether to take the step.
        backward: of one loss.
        mean: of the loss over processes.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parameters[0].device)
    for loss in losses:
        backward(loss)
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    loss, gradient_norm = mean(total).item(), norm.item()
    taken = accept(loss, gradient_norm)
    if taken:
        optimizer.step()
        schedule.step()
    return StepReport(loss, gradient_norm, taken)
