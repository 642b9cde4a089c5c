"""Processes and devices: accelerate says which there are, and the model is placed, copied (DDP) or sharded (FSDP2).

Either goes with context parallelism: neighboring processes divide a sample's tokens. Each computes the whole loss, and
its backward gives its part of every gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.lab.train.checkpoint import Peers
from foveal.lab.train.config import TrainingConfig
from foveal.models.families.table import family_of


def build_accelerator(config: TrainingConfig) -> Any:
    """An `Accelerator` for this run.

    Raises:
        ValueError: for processes that do not divide into groups of `context_parallel`, and for a batch that does not
            divide among the groups.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=config.device == "cpu",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(config.output),
    )
    processes, degree = accelerator.num_processes, config.context_parallel
    if processes % degree:
        raise ValueError(f"context_parallel must divide the number of processes, {processes}, got {degree}")
    unit = processes // degree * config.micro_batch_size
    if config.batch_size % unit:
        groups = "processes" if degree == 1 else "processes / context_parallel"
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size * {groups} = {unit}, got {config.batch_size}"
        )
    return accelerator


class DataPart(NamedTuple):
    """Which part of every batch a process has, `rank` of `parts`; those that share a sample's tokens have the same."""

    rank: int
    parts: int


def data_part(accelerator: Any, config: TrainingConfig) -> DataPart:
    degree = config.context_parallel
    return DataPart(accelerator.process_index // degree, accelerator.num_processes // degree)


def place(model: nn.Module, accelerator: Any, config: TrainingConfig, *, trained: bool = True) -> nn.Module:
    """The model on its device: wrapped by DDP, sharded in place, or neither with one process.

    Args:
        model: on the CPU, or empty where `starts_empty` says so. Its tokens are divided as `context_parallel` says.
        trained: False for a model that gets no gradient, a teacher.

    Raises:
        ValueError: for heads that `context_parallel` does not divide.
    """
    if config.context_parallel > 1:
        _divide_tokens(model, accelerator, config.context_parallel)
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        return shard(model, accelerator, bf16=config.precision == "bf16")
    model.to(accelerator.device)
    if not trained or accelerator.num_processes == 1:
        return model
    if config.model.compile:
        # The gradients of a block, which is compiled by itself, come together anyway; cut at DDP's buckets it becomes
        # five graphs instead of one, and the host falls behind the device.
        torch._dynamo.config.optimize_ddp = False
    annealing = config.sparsity.annealing
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        # While attention is still dense, the sparse parameters get no gradient.
        find_unused_parameters=annealing is not None and annealing.dense_steps > 0,
    )


def _divide_tokens(model: nn.Module, accelerator: Any, degree: int) -> None:
    """Context parallelism over groups of `degree` neighboring processes, by diffusers and our processors."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    heads = model.config.num_attention_heads
    if heads % degree:
        raise ValueError(f"context_parallel must divide the model's heads, {heads}, got {degree}")
    processes, kind = accelerator.num_processes, accelerator.device.type
    mesh = init_device_mesh(kind, (processes // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    with _counted_devices(processes) if kind == "cpu" else contextlib.nullcontext():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))


@contextlib.contextmanager
def _counted_devices(count: int) -> Iterator[None]:
    """Without an accelerator torch counts none, and diffusers divides by their number."""
    original = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: count
    try:
        yield
    finally:
        torch.accelerator.device_count = original


def check_tokens(degree: int, tokens: int, shape: tuple[int, ...]) -> None:
    """Raises a ValueError for a sample whose tokens do not divide among so many processes.

    Args:
        shape: the shape of its latents.
    """
    if tokens % degree:
        raise ValueError(
            f"context_parallel must divide the tokens of every sample, got {degree} and latents {list(shape)} "
            f"with {tokens} tokens"
        )


def shard(model: nn.Module, accelerator: Any, *, bf16: bool) -> nn.Module:
    """FSDP2 over all processes, a unit a transformer block. Parameters become DTensors of the same names.

    Args:
        model: with its weights in the main process; the others' do not count and may be on the meta device, so that
            one copy is in memory and not one a process.
        accelerator: the run's accelerator.
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


def peers_of(accelerator: Any) -> Peers:
    """The run's processes, which write checkpoints together."""
    from accelerate.utils import gather_object

    return Peers(accelerator.process_index, lambda value: gather_object([value]))


def mean_of(accelerator: Any, value: Tensor) -> Tensor:
    """A tensor's mean over processes."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value, "mean")


def sum_of(accelerator: Any, value: Tensor) -> Tensor:
    """A tensor's sum over processes."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value, "sum")
