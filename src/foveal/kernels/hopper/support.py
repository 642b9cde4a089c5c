"""What the Hopper kernels can take, and with which releases of Triton. Importing it needs no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings

import torch
from torch import Tensor

from foveal.checks import cached_constant
from foveal.kernels import chips
from foveal.kernels.tma import ALIGNMENT, copyable

# Gluon is experimental: its names and semantics change between minor releases of Triton. With these the kernels
# compile, without spills in their loops; `gluon_names` has what differs.
TRITON_RELEASES = ("3.6", "3.7", "3.8", "3.9")
# With these the kernels have also run on a GPU, and all GPU tests passed: what impl="auto" trusts.
VERIFIED_RELEASES = ("3.6", "3.7", "3.9")
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)


@cached_constant
def missing_gluon() -> str | None:
    """Why Gluon cannot be used in this environment; None if it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "it needs Triton, which is not installed"
    if _release(version) not in TRITON_RELEASES:
        return f"it is written for Triton {', '.join(TRITON_RELEASES)}, got {version}"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"Triton {version} comes without Gluon for Hopper ({error})"
    return None


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


@cached_constant
def unverified_release() -> str | None:
    """Why impl="auto" passes over the kernels with the installed Triton, on which they can run; None if it does not.

    Whoever asks, on a Hopper GPU, will get slower kernels: a warning says so the first time.
    """
    version = importlib.metadata.version("triton")
    if _release(version) in VERIFIED_RELEASES:
        return None
    verified = ", ".join(VERIFIED_RELEASES)
    reason = f"its kernels were verified on a GPU with Triton {verified}, got {version}"
    _warn_once(
        f'impl="auto" runs slower kernels on this Hopper GPU, not "gluon": {reason}. Install a torch that comes with '
        'a verified Triton (2.11 has 3.6, 2.13 has 3.7, 2.15 has 3.9), or ask for impl="gluon", which runs them '
        "unverified"
    )
    return reason


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _why_not_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, got tensors on {device}"
    if chips.capability(device) != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), got {chips.capability(device)}"
    return None


def written_for(device: torch.device) -> bool:
    """Whether a device is of the kind that the kernels are for."""
    return _why_not_device(device) is None


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
                f"{ALIGNMENT} bytes"
            )
            # Strides may be symbols, which cannot be told.
            if torch.compiler.is_compiling():
                return needed
            return f"{needed}, got strides {tuple(x.stride())} and offset {x.storage_offset()}"
    return missing_gluon()
