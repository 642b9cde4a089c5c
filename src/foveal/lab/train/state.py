"""What a checkpoint holds beside the weights: the optimizer, the schedule, the average, random numbers; to and fro.

Each is split into tensors, by name, and values that JSON holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.data.dataset import BatchStream
from foveal.lab.train.checkpoint import Checkpoint, CheckpointError, CheckpointStore, restore, spread
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.evaluation import DivergenceAlarm
from foveal.lab.train.faults import LossGuard
from foveal.lab.train.optimization import build_optimizer, parameter_groups, set_steps_taken, warmup_and_decay
from foveal.lab.train.parallel import peers_of
from foveal.models import sparse_parameters
from foveal.models.parameters import of_router


@dataclass
class RunState:
    """All that a run changes as it goes.

    Args:
        parameters: those that are trained, by name.
        optimizer, schedule: over them.
        average: diffusers' `EMAModel` over them, or None.
        stream, guard, alarm: the run's stream, guard, and alarm.
        accelerator: the run's accelerator.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: Any
    stream: BatchStream
    guard: LossGuard
    alarm: DivergenceAlarm
    accelerator: Any

    def save(self, store: CheckpointStore, step: int, *, config: dict[str, Any], held_out_loss: float | None) -> None:
        """Writes a checkpoint; every process calls it.

        Args:
            store: gets it.
            step: optimizer steps taken.
            config: the run's settings, for people and for comparison.
            held_out_loss: the held-out loss of this state, if it was evaluated.

        Raises:
            CheckpointError: in every process, if one of them could not write its part.
        """
        groups = {
            "model": self.parameters.items(),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
        }
        average = None
        if self.average is not None:
            groups["ema"] = zip(self.parameters, self.average.shadow_params, strict=True)
            average = {key: value for key, value in self.average.state_dict().items() if key != "shadow_params"}
        peers = peers_of(self.accelerator)
        randoms = peers.gather((random_tensors(), random_values()))
        groups["rng"] = [
            (f"{name}/{rank}", state) for rank, (states, _) in enumerate(randoms) for name, state in states.items()
        ]
        values = {
            "config": config,
            "data": self.stream.state_dict(),
            "optimizer": optimizer_values(self.optimizer, self.parameters),
            "steps_taken": self.schedule.last_epoch,
            "average": average,
            "random": [state for _, state in randoms],
            "guard": self.guard.state_dict(),
            "alarm": self.alarm.state_dict(),
        }
        store.save(step, groups, values, held_out_loss=held_out_loss, peers=peers)

    def restore(self, checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
        """The inverse of `save`; every process calls it.

        Args:
            checkpoint: a checkpoint of this run, or of one with the same data, parameters, and optimizer.
            say: gets a line where the number of processes has changed.

        Raises:
            CheckpointError, ValueError: for a checkpoint of another run.
        """
        values, source = checkpoint.state, str(checkpoint.folder)
        self.stream.load_state_dict(values["data"])
        restore(self.parameters, checkpoint.tensors("model"), source)
        restore_optimizer(self.optimizer, self.parameters, checkpoint.tensors("optimizer"), values["optimizer"], source)
        set_steps_taken(self.schedule, values["steps_taken"])
        if self.average is not None:
            if values["average"] is None:
                raise CheckpointError(f"{source} has no average, but optimizer.ema_decay is set")
            shadows = dict(zip(self.parameters, self.average.shadow_params, strict=True))
            restore(shadows, checkpoint.tensors("ema"), source)
            self.average.optimization_step = values["average"]["optimization_step"]
        self.guard.load_state_dict(values["guard"])
        self.alarm.load_state_dict(values["alarm"])
        self._restore_random(checkpoint, say)

    def _restore_random(self, checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        values = checkpoint.state["random"]
        if len(values) != world:
            say(
                f"  {len(values)} processes before, {world} now: batches, noise and noise levels stay the same, "
                "dropout does not"
            )
        if rank < len(values):
            names = {name: state for name, state in checkpoint.tensors("rng") if name.endswith(f"/{rank}")}
            restore_random({name.split("/")[0]: state for name, state in names.items()}, values[rank])
        else:
            torch.manual_seed(torch.initial_seed() + rank)


def build_state(
    config: TrainingConfig,
    transformer: nn.Module,
    parameters: dict[str, nn.Parameter],
    stream: BatchStream,
    guard: LossGuard,
    alarm: DivergenceAlarm,
    accelerator: Any,
) -> RunState:
    """What a run changes, at its start: the optimizer, its schedule, and the average as the configuration says."""
    settings = config.optimizer
    new = sparse_parameters(transformer)
    groups = parameter_groups(
        parameters.values(),
        (new.values(), settings.new_learning_rate),
        ((p for name, p in new.items() if of_router(name)), settings.router_learning_rate),
        learning_rate=settings.learning_rate,
    )
    optimizer = build_optimizer(groups, name=settings.name, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = warmup_and_decay(
        optimizer,
        steps=config.steps,
        warmup=settings.warmup,
        decay=settings.decay,
        floor=settings.final_learning_rate / settings.learning_rate,
    )
    average = None
    if settings.ema_decay is not None:
        from diffusers.training_utils import EMAModel

        average = EMAModel(parameters.values(), decay=settings.ema_decay)
    return RunState(parameters, optimizer, schedule, average, stream, guard, alarm, accelerator)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the optimizer's state as "key/parameter name"."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key}/{name}", value


def optimizer_values(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """What is no tensor in the optimizer's state, by parameter name.

    The groups' settings are not in it: the run's configuration has them, and may change.
    """
    values = {}
    for name, parameter in parameters.items():
        scalars = {k: v for k, v in optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
        if scalars:
            values[name] = scalars
    return values


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: Iterable[tuple[str, Tensor]],
    values: dict[str, Any],
    source: str,
) -> None:
    """The inverse of `optimizer_tensors` and `optimizer_values`.

    Raises:
        CheckpointError: for parameters other than this run's.
    """
    optimizer.state.clear()
    for full_name, tensor in tensors:
        key, name = full_name.split("/", 1)
        if name not in parameters:
            raise CheckpointError(f"{source} has {full_name}, which this run does not train")
        parameter = parameters[name]
        # Step counts and tables are whole on every device; what has the parameter's shape is spread as it is.
        placed = spread(tensor, parameter) if tensor.shape == parameter.shape and tensor.dim() else tensor
        if placed is tensor and (optimizer.defaults.get("fused") or tensor.dim()):
            placed = tensor.to(parameter.device)
        optimizer.state[parameter][key] = placed
    for name, scalars in values.items():
        optimizer.state[parameters[name]].update(scalars)


def random_tensors() -> dict[str, Tensor]:
    """The states of this process's generators of torch."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def random_values() -> list:
    """The state of Python's own generator."""
    version, words, gauss = random.getstate()
    return [version, list(words), gauss]


def restore_random(tensors: dict[str, Tensor], values: list) -> None:
    """The inverse of `random_tensors` and `random_values`."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    random.setstate((values[0], tuple(values[1]), values[2]))
