"""What the Hopper kernels can take. The only module that asks which Triton is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import torch
from torch import Tensor

from foveal.checks import cached_constant

# Gluon is experimental: its names and semantics change between minor releases of Triton.
TRITON_RELEASE = "3.6"
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
COPY_ALIGNMENT = 16  # bytes; TMA needs it of starts and strides


@cached_constant
def missing_gluon() -> str | None:
    """Why Gluon cannot be used in this environment; None if it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "it needs Triton, which is not installed"
    if version.split(".")[:2] != TRITON_RELEASE.split("."):
        return f"it is written for Triton {TRITON_RELEASE}, got {version}"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"Triton {version} comes without Gluon for Hopper ({error})"
    return None


@cached_constant
def _capability(device: torch.device) -> str:
    # A string: torch.compile takes one as a constant, and stumbles over comparing tuples that it took as constants.
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _why_not_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, got tensors on {device}"
    if _capability(device) != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), got {_capability(device)}"
    return None


def written_for(device: torch.device) -> bool:
    """Whether a device is of the kind that the kernels are for."""
    return _why_not_device(device) is None


def copyable(x: Tensor) -> bool:
    """Whether TMA can read x [B, H, L, D] with the strides that it has."""
    # torch.compile cannot trace an offset; the launchers look again, and copy what turns out not to fit.
    if torch.compiler.is_compiling():
        return _strides_fit(x.shape, x.stride(), x.element_size())
    if x.storage_offset() * x.element_size() % COPY_ALIGNMENT:
        return False
    # The sizes of other kinds of tensors may be symbols, which no cache can look up.
    fit = _strides_known if type(x) is Tensor else _strides_fit
    return fit(x.shape, x.stride(), x.element_size())


def _strides_fit(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    steps = [stride for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    return strides[-1] == 1 and all(step > 0 and step * itemsize % COPY_ALIGNMENT == 0 for step in steps)


_strides_known = functools.lru_cache(maxsize=256)(_strides_fit)


def why_not(query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int) -> str | None:
    """Why the Hopper kernels cannot run on these inputs; None if they can.

    Args:
        query: [B, H, Lq, D]. key, value: [B, H, Lk, D]. block_q, block_k: tokens a block.
    """
    reason = _why_not_device(query.device)
    if reason is not None:
        return reason
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {query.dtype}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"it takes a head_dim in {HEAD_DIMS}, got {query.shape[-1]}"
    if block_q not in BLOCK_SIZES or block_k not in BLOCK_SIZES:
        return f"it takes blocks of {BLOCK_SIZES} tokens, got {block_q}x{block_k}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not copyable(x):
            needed = (
                f"{name} must be contiguous in its last dimension, with its start and its other strides multiples of "
                f"{COPY_ALIGNMENT} bytes"
            )
            # Strides may be symbols, which cannot be told.
            if torch.compiler.is_compiling():
                return needed
            return f"{needed}, got strides {tuple(x.stride())} and offset {x.storage_offset()}"
    return missing_gluon()
