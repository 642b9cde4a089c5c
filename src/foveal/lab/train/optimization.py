"""The optimizer of a run: groups of parameters with their own rates, a schedule, and one step of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    *own_rates: tuple[Iterable[nn.Parameter], float | None],
    learning_rate: float,
) -> list[dict]:
    """Groups for an optimizer, each with its learning rate.

    Args:
        parameters: all that are trained.
        own_rates: some of them with a rate of their own. A later pair goes before an earlier one; a rate of None
            changes nothing.
        learning_rate: of the others.
    """
    rates = [learning_rate, *(rate for _, rate in own_rates)]
    group_of = {id(p): at for at, (own, rate) in enumerate(own_rates, 1) if rate is not None for p in own}
    groups = [{"params": [], "lr": rate} for rate in rates]
    for parameter in parameters:
        groups[group_of.get(id(parameter), 0)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict], *, name: str = "adamw", betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """AdamW: torch's fused version, or "adamw8bit" from bitsandbytes.

    Raises:
        ImportError: "adamw8bit" without bitsandbytes.
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
    """Every rate rises linearly over `warmup` steps. With `decay` it then falls linearly to `floor` of its peak."""

    def rate(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup) if decay else 1.0
        return min((step + 1) / warmup if warmup else 1.0, floor + (1 - floor) * min(1.0, left))

    return LambdaLR(optimizer, rate)


def set_steps_taken(schedule: LambdaLR, steps: int) -> None:
    """Set a new schedule and its optimizer's rates to where this many steps leave them, to the last bit."""
    schedule.last_epoch = steps
    groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, peak, rate in groups:
        group["lr"] = peak * rate(steps)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Args:
        loss: the mean loss over the batch.
        gradient_norm: the gradient's norm before clipping.
        taken: False if the step was refused and the parameters stayed as they were.
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
    """Clip the gradients of the sum of some losses, and step the optimizer and the schedule unless refused.

    Args:
        losses: scalars, one per micro-batch, each computed after the backward of the previous one.
        accept: (loss, gradient norm) to whether to take the step.
        backward: runs the backward of one loss.
        mean: averages the loss over processes.
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
