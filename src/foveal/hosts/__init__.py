"""Other tools' public functions with foveal's behind them: `patch("fastvideo")`, `patch("sglang")`, ..."""

from __future__ import annotations

import importlib

from foveal.checks import check_choice
from foveal.hosts.patching import Patch
from foveal.kernels.api import IMPLS

__all__ = ["HOSTS", "Patch", "patch"]

HOSTS = ("fastvideo", "turbodiffusion", "vllm_omni", "sglang")


def patch(host: str, *, impl: str = "auto") -> Patch:
    """Put foveal's functions behind a host's public ones, for its models and checkpoints as they are.

    The host's functions change at once, in every module that has imported them, and their gradients become foveal's.
    vLLM-Omni and SGLang load foveal by themselves, through its entry points; for them this function is for a script.

    Args:
        host: "fastvideo" (`video_sparse_attn` and `block_sparse_attn_from_indices` of fastvideo-kernel) or
            "turbodiffusion" (`SparseLinearAttention.forward`, of instances that exist already too), "vllm_omni" (its
            attention backend FASTVIDEO_VSA, in models that are built from now on), or "sglang" (its VSA, its VSA for
            MiniMax-H3, and its SLA, in layers that exist already too).
        impl: see `block_sparse_attention`. A named one never falls back.

    Returns:
        A `Patch`. `undo()` brings the host's own functions back, and so does the end of a `with` block.

    Raises:
        ValueError: an unknown host or impl, or a host that is patched already.
        ImportError: the host is not installed (the message says how to install it), or its functions have other
            parameters than foveal knows.
    """
    check_choice("host", host, HOSTS)
    check_choice("impl", impl, IMPLS)
    return importlib.import_module(f"foveal.hosts.{host}").patch(impl)
