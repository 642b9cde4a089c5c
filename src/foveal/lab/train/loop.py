"""The loop that every training run uses: the trainer's, the demo's, and those of the experiments.

`run_steps` is the loop. `train` is the short way into it, for experiments in one process that are cheap to restart.
`trainer.Trainer` adds data loading, several processes, checkpoints, and the handling of faults.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveal.lab.train.optimization import build_optimizer, optimizer_step, parameter_groups, warmup_and_decay


@dataclass(frozen=True)
class Action:
    """Something that the loop does between steps.

    Args:
        run: the function to call.
        every: the number of steps between two calls; 0 makes no calls along the way.
        at_start: call it before the first step too, unless the run resumes.
        at_end: call it after the last step too.
    """

    run: Callable[[], None]
    every: int = 0
    at_start: bool = False
    at_end: bool = False

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to call it after `step` of `steps` steps."""
        return (self.at_end and step == steps) or bool(self.every and step % self.every == 0)


def run_steps(
    take_step: Callable[[], None],
    *,
    steps: int,
    begin: int = 0,
    actions: Iterable[Action] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Take steps, with actions between them.

    Args:
        take_step: takes one step.
        steps: the total number of steps of the run.
        begin: the number of steps that were already taken, in a run that resumes.
        actions: what to do between steps. Actions that are due after the same step run in this order.
        stopped: called before each step; the loop ends when it returns True.
    """
    actions = list(actions)
    for action in actions:
        if action.at_start and begin == 0:
            action.run()
    step = begin
    while step < steps and not stopped():
        take_step()
        step += 1
        for action in actions:
            if action.is_due(step, steps):
                action.run()


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
        steps: optimizer steps.
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
    groups = parameter_groups(parameters, (fast_parameters or (), fast_learning_rate), learning_rate=learning_rate)
    optimizer = build_optimizer(groups)
    schedule = warmup_and_decay(optimizer, steps=steps, warmup=warmup, floor=final_learning_rate / learning_rate)
    record = TrainingRecord()
    device = parameters[0].device

    def take_step() -> None:
        model.train()
        start = time.perf_counter()
        losses = (loss_fn(model, batch) for batch in (next(batches),))
        report = optimizer_step(
            parameters, optimizer, schedule, losses, accept=lambda loss, gradient_norm: math.isfinite(loss)
        )
        if not report.taken:
            raise FloatingPointError(f"training loss is {report.loss} at step {len(record.losses) + 1}")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        record.step_seconds.append(time.perf_counter() - start)
        record.losses.append(report.loss)
        if on_step is not None:
            on_step(len(record.losses), report.loss)

    def measure() -> None:
        record.held_out.append((len(record.losses), evaluate(model)))

    actions = []
    if evaluate is not None:
        actions.append(Action(measure, every=evaluate_every, at_start=True, at_end=True))
    run_steps(take_step, steps=steps, actions=actions)
    model.eval()
    return record
