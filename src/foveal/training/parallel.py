"""Processes and devices: accelerate says which there are, and the model is placed, copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveal.integrations.families import family_of
from foveal.training.config import TrainingConfig


def build_accelerator(config: TrainingConfig) -> Any:
    """An `Accelerator` for this run.

    Raises:
        ValueError: for a batch that does not divide among the processes.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=config.device == "cpu",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(config.output),
    )
    unit = accelerator.num_processes * config.micro_batch_size
    if config.batch_size % unit:
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size * processes = {unit}, got {config.batch_size}"
        )
    return accelerator


def place(model: nn.Module, accelerator: Any, config: TrainingConfig, *, trained: bool = True) -> nn.Module:
    """The model on its device: wrapped by DDP, sharded in place, or neither with one process.

    Args:
        model: on the CPU, or empty where `starts_empty` says so.
        trained: False for a model that gets no gradient, a teacher.
    """
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        return shard(model, accelerator, bf16=config.precision == "bf16")
    model.to(accelerator.device)
    if not trained or accelerator.num_processes == 1:
        return model
    annealing = config.sparsity.annealing
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        # While attention is still dense, the sparse parameters get no gradient.
        find_unused_parameters=annealing is not None and annealing.dense_steps > 0,
    )


def shard(model: nn.Module, accelerator: Any, *, bf16: bool) -> nn.Module:
    """FSDP2 over all processes, a unit a transformer block. Parameters become DTensors of the same names.

    Args:
        model: with its weights in the main process; the others' do not count and may be on the meta device, so that
            one copy is in memory and not one a process.
        accelerator: of the run.
        bf16: compute in bfloat16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Inputs stay as they are: bfloat16 would round the timesteps, up to 1000, and the blocks' rotary tables.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    weights = {name: tensor.detach() for name, tensor in _tensors(model)}
    model.to("meta")
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=accelerator.device)
    for name, tensor in _tensors(model):
        _scatter(weights.pop(name), tensor.detach(), accelerator)
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _scatter(source: Tensor, target: Tensor, accelerator: Any) -> None:
    """Fills a tensor, sharded or not, from the main process's whole one."""
    from torch.distributed.tensor import distribute_tensor

    if accelerator.is_main_process:
        full = source.to(accelerator.device)
    else:
        full = torch.empty(target.shape, dtype=target.dtype, device=accelerator.device)
    if hasattr(target, "device_mesh"):
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(full, src=0)
        target.copy_(full)


def starts_empty(accelerator: Any, config: TrainingConfig) -> bool:
    """Whether this process gets its weights from the main one."""
    return config.parallel == "fsdp" and not accelerator.is_main_process


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what holds the self-attention layers."""
    names = family_of(model).self_attention_layers(model)
    return [model.get_submodule(name.rpartition(".")[0]) for name in names]


@contextlib.contextmanager
def accumulating(model: nn.Module, accelerator: Any, *, last: bool):
    """A backward inside keeps its gradients to this process, unless it is the last one of its step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
    elif last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def any_of(accelerator: Any, *flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=accelerator.device), "sum")
    return [bool(count) for count in counts.tolist()]


def mean_of(accelerator: Any, value: Tensor) -> Tensor:
    """A tensor's mean over processes."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value, "mean")
