"""Sparse parameters in models whose parameters are sharded: by FSDP2 (DTensors), FSDP1 (flat parameters), or ZeRO-3.

FSDP2 leaves every parameter under its name. FSDP1 cuts those of a unit, a block say, out of one flat parameter, whose
parts must have one dtype; whole ones exist only while the unit runs, or inside of `summon_full_params`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

# What FSDP1 puts into the names of the modules that it wraps.
FSDP1_PREFIX = "_fsdp_wrapped_module."

# What to do where only the outermost wrapper of FSDP1 can gather parameters.
REMEDY = (
    "save and load on every rank inside of `with FullyShardedDataParallel.summon_full_params(wrapper):`, or shard with "
    "FSDP2 (fully_shard)"
)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, which need not be imported for that."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on all ranks that hold it; another tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def copy_into(target: Tensor, tensor: Tensor) -> None:
    """Fill a parameter, or this rank's part of a DTensor, from a whole tensor that every rank has."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has read the file: nothing to send.
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)


def in_flat_parameters(module: nn.Module) -> bool:
    """Whether FSDP1 keeps parameters of this module, or of a part of it, in a flat parameter."""
    if _fsdp1() is None:
        return False
    parts, parameters = list(module.modules()), list(module.parameters())
    if any(isinstance(part, _fsdp1()) for part in parts):
        return True
    if not parameters:  # without `use_orig_params` they are plain tensors
        return any(isinstance(value, Tensor) for part in parts for value in vars(part).values())
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters)


@contextlib.contextmanager
def whole_parameters(transformer: nn.Module, part: nn.Module, *, write: bool = False) -> Iterator[bool]:
    """Inside, the parameters of a part of a transformer are whole on every rank, where FSDP1 or ZeRO-3 has cut them.

    All ranks enter this together.

    Args:
        transformer: the module inside of FSDP1's outermost wrapper, which it does not know.
        part: one of its modules.
        write: keep what is written to the parameters inside.

    Yields:
        Whether one of them has: the parameters are then gone after this. If that is so and they are not whole, FSDP1's
        outermost wrapper has them.

    Raises:
        ValueError: FSDP1 has them and did not run yet.
    """
    partitioned = [parameter for parameter in part.parameters() if hasattr(parameter, "ds_id")]
    if partitioned:
        zero = sys.modules["deepspeed"].zero
        with zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
            yield True
        return
    units = [unit for unit in _units(transformer) if _holds(unit, part) or _holds(part, unit)]
    if not units and not in_flat_parameters(part):
        yield False
        return
    closed = [unit for unit in units if unit.training_state.name != "SUMMON_FULL_PARAMS"]
    if any(unit._is_root is None for unit in closed):
        # To open one now would make it the outermost, and FSDP would refuse to run the model after that.
        raise ValueError(f"FSDP has not run the model yet; {REMEDY}")
    with contextlib.ExitStack() as stack:
        for unit in closed:
            stack.enter_context(_fsdp1().summon_full_params(unit, recurse=False, writeback=write))
        yield True


def own_unit(attn: nn.Module, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP1's policy inside of a block: parts of a sparse layer in another dtype than the layer get their own units.

    Args:
        attn: the layer, whose first parameter has the block's dtype; bound by `functools.partial`.
        module, recurse, nonwrapped_numel: as FSDP1 passes them.
    """
    if recurse or all(module is not part for part in attn.processor.modules()):
        return recurse
    dtype = next(attn.parameters()).dtype
    return any(parameter.dtype != dtype for parameter in module.parameters(recurse=False))


class Overrides(Mapping):
    """What FSDP1 (torch 2.13) looks up as `_wrap_overrides` in a module that a function tells it to wrap.

    PyTorch's other wrappers, of checkpointing for one, look it up in the same place and take no such argument. The
    caller's `wrapper_cls` says which of them it is.

    Args:
        attn: the sparse layer in the module.
    """

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn

    def __getitem__(self, name: str) -> Callable[..., bool]:
        if name != "auto_wrap_policy":
            raise KeyError(name)
        return functools.partial(own_unit, self.attn)

    def __iter__(self) -> Iterator[str]:
        return iter(("auto_wrap_policy",))

    def __len__(self) -> int:
        return 1

    def keys(self) -> tuple[str, ...]:
        wrapper = sys._getframe(1).f_locals.get("wrapper_cls")
        return ("auto_wrap_policy",) if wrapper is not None and wrapper is _fsdp1() else ()


def _units(transformer: nn.Module) -> list[nn.Module]:
    return [] if _fsdp1() is None else [part for part in transformer.modules() if isinstance(part, _fsdp1())]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in module.modules())


def _fsdp1() -> type[nn.Module] | None:
    """The class of FSDP1's wrappers; None where nobody has imported it, and nothing is wrapped then."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
