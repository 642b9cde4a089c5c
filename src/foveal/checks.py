"""Checks of user input, shared by all public functions. Each error names the argument and what came."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_constants: list[dict[tuple, Any]] = []
MOST_CONSTANTS = 64  # of one function


def cached_constant(function):
    """Computes once per arguments; `torch.compile` takes the result as it is, where it would trace through a cache.

    Never in inference mode: whoever trains after a first call there would meet tensors that autograd refuses. While
    tensors are traced as fakes or functional ones (as in `torch.export`), wrapped by a transform of `torch.func`, or a
    CUDA graph is captured, the cache is left out: what is made then is of no use afterwards. `clear_constants` empties
    all caches.
    """
    make = torch.inference_mode(False)(function)
    known: dict[tuple, Any] = {}
    _constants.append(known)

    @functools.wraps(function)
    def call(*arguments):
        if _traced():
            return make(*arguments)
        result = known.get(arguments, known)
        if result is known:
            result = make(*arguments)
            if not _capturing():
                if len(known) >= MOST_CONSTANTS:
                    known.clear()
                known[arguments] = result
        return result

    # All that torch.compiler.assume_constant_result does, which would import torch._dynamo, and Triton with it.
    call._dynamo_marked_constant = True
    return call


def clear_constants() -> None:
    """Forgets what every `cached_constant` has computed."""
    for known in _constants:
        known.clear()


def _traced() -> bool:
    """Whether tensors that are made now are fakes, functional ones, proxies, or wrapped by a transform."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Runs a function of tensors in the dtypes that they have, also inside of `torch.autocast`."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        known = _first_tensor((*arguments, *named.values()))
        device = "meta" if known is None else known.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return call


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    """Also one inside of a sequence."""
    for x in values:
        found = x if isinstance(x, Tensor) else _first_tensor(x) if isinstance(x, tuple | list) else None
        if found is not None:
            return found
    return None


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of `torch.func` is active, or one of the tensors has a forward-mode derivative on it."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():  # which autograd functions refuse, whatever their tensors are
        return True
    given = [x for x in tensors if x is not None]
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given)


@without_autocast
def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, with equal batch dimensions, in their dtype even where the backward runs inside of autocast."""
    if torch.compiler.is_compiling() or is_transformed(left, right):
        return left @ right
    return _Product.apply(left, right)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        grad_left = product(grad, right.mT) if ctx.needs_input_grad[0] else None
        return grad_left, product(left.mT, grad) if ctx.needs_input_grad[1] else None


def check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {valid}")


def check_positive(name: str, value: object) -> None:
    """Raises a TypeError or ValueError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_ratio(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__})")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_head_ratios(name: str, value: Any) -> None:
    """Raise a TypeError or ValueError unless this is a number in [0, 1], or a tuple of them, one for each head."""
    if not isinstance(value, tuple):
        check_ratio(name, value)
        return
    if not value:
        raise ValueError(f"{name} must be a number in [0, 1], or a tuple of one for each head, got ()")
    for head, ratio in enumerate(value):
        check_ratio(f"{name}[{head}]", ratio)


def check_triple(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 3:
        raise TypeError(f"{name} must be a tuple of three ints (frames, height, width), got {value!r}")
    for axis, side in zip(("frames", "height", "width"), value, strict=True):
        check_positive_int(f"{name} {axis}", side)


def check_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or 1 / sqrt(head_dim) for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)


def check_kv_lengths(kv_lengths: Any, batch: int, shortest: int, longest: int, limits: str = "in [{}, {}]") -> None:
    """Raise a TypeError or ValueError unless these are numbers of valid keys, int [batch], within both limits."""
    if not isinstance(kv_lengths, Tensor) or kv_lengths.is_floating_point():
        raise TypeError(f"kv_lengths must be an integer tensor, got {getattr(kv_lengths, 'dtype', type(kv_lengths))}")
    if tuple(kv_lengths.shape) != (batch,):
        raise ValueError(f"kv_lengths must have shape [{batch}], got {list(kv_lengths.shape)}")
    # Elsewhere a look at the values would make the host wait for the device.
    readable = kv_lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and ((kv_lengths < shortest) | (kv_lengths > longest)).any():
        raise ValueError(f"kv_lengths must be {limits.format(shortest, longest)}, got {kv_lengths.tolist()}")


def validate_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a TypeError or ValueError unless query, key, and value fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be non-empty and have shape [B, H, L, D], got {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value must have one dtype, got {query.dtype} and {x.dtype} ({name})")
        if x.device != query.device:
            raise ValueError(f"query, key and value must be on one device, got {query.device} and {x.device} ({name})")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, got strides {x.stride()}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}")
    (batch, heads, _, head_dim), (key_batch, key_heads, _, key_head_dim) = query.shape, key.shape
    if batch != key_batch or heads != key_heads or head_dim != key_head_dim:  # slices of a shape take longer
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
