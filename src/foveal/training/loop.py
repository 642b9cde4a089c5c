"""A flat training loop: batches in, optimiser steps out, a record of held-out losses kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class TrainingRecord:
    """What a run of `train` measured.

    Attributes:
        losses: training loss of every step.
        held_out: (steps taken, held-out loss), the state before the first step included.
        step_seconds: wall-clock seconds of every step, evaluation left out.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def median_step_seconds(self) -> float:
        return sorted(self.step_seconds)[len(self.step_seconds) // 2]


def train(
    model: nn.Module,
    batches: Iterator,
    loss_fn: Callable[[nn.Module, object], Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup: int,
    final_learning_rate: float = 0.0,
    fast_parameters: list[nn.Parameter] | None = None,
    fast_learning_rate: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingRecord:
    """Train every parameter that requires a gradient, with AdamW and a linear warm-up and decay.

    Args:
        batches: yields what `loss_fn` takes; one per step.
        loss_fn: (model, batch) to a scalar.
        steps: optimiser steps.
        learning_rate, warmup, final_learning_rate: the peak, the steps up to it, and where it decays to.
        fast_parameters, fast_learning_rate: parameters with a peak of their own, on the same schedule: those that
            start at zero, and have a longer way to go.
        evaluate: model to held-out loss, called before the first step, every `evaluate_every` steps and at the end.
        on_step: called with (steps taken, training loss).

    Raises:
        ValueError: for fast parameters without their rate, or a rate without them.
        FloatingPointError: when the training loss is not finite; the step is not taken.
    """
    if (fast_parameters is None) != (fast_learning_rate is None):
        raise ValueError("give fast_parameters and fast_learning_rate together")
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast = {id(p) for p in fast_parameters or ()}
    groups = [{"params": [p for p in parameters if id(p) not in fast], "lr": learning_rate}]
    if fast:
        groups.append({"params": [p for p in parameters if id(p) in fast], "lr": fast_learning_rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def rate(step: int) -> float:
        decay = (steps - step) / max(1, steps - warmup)
        floor = final_learning_rate / learning_rate
        return min((step + 1) / warmup if warmup else 1.0, floor + (1 - floor) * min(1.0, decay))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    record = TrainingRecord()
    device = parameters[0].device
    if evaluate is not None:
        record.held_out.append((0, evaluate(model)))
    model.train()
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loss = loss_fn(model, next(batches))
        value = loss.item()
        if not torch.isfinite(loss.detach()):
            raise FloatingPointError(f"training loss is {value} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        record.step_seconds.append(time.perf_counter() - start)
        record.losses.append(value)
        if on_step is not None:
            on_step(step, value)
        if evaluate is not None and (step == steps or (evaluate_every and step % evaluate_every == 0)):
            record.held_out.append((step, evaluate(model)))
            model.train()
    model.eval()
    return record
