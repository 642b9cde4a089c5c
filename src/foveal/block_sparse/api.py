"""`block_sparse_attention`: validate once, then run the implementation that was named or that fits best."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from foveal.types import IMPLS, BlockSelection, check_choice, check_scale

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over each query block's critical key blocks alone.

    The sparse part of SLA (arXiv 2509.24006, eq. 3) and the fine stage of VSA (arXiv 2505.13389, eq. 3).

    Args:
        query: [B, H, Lq, D], bfloat16, float16, float32 or float64, any strides with a contiguous last dimension.
        key, value: [B, H, Lk, D], same dtype and device.
        selection: from `select_blocks` or `BlockSelection.from_labels`, for the same B, H, Lq and Lk.
        scale: softmax scale; None for 1 / sqrt(D).
        impl: "reference" (dense mask, the oracle), "torch" (gathers the kept blocks; any device), "triton" (GPU,
            bfloat16 and float16, D and blocks of 64 and 128), "gluon" (the same on Hopper) or "auto": the last of
            these that can take the inputs. A named implementation never falls back.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        [B, H, Lq, D] in the dtype of `query`; with `return_lse` also the natural log-sum-exp [B, H, Lq] in float32
        (float64 for float64 inputs). A row without a critical key is 0, and its log-sum-exp -inf.
        Gradients are exact for the given selection.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    validate_qkv(query, key, value)
    validate_selection(selection, query, key)
    scale = check_scale(scale, query.shape[-1])
    match resolve_impl(impl, query, key, value, selection.block_q, selection.block_k):
        case "reference":
            from foveal.block_sparse.reference import block_sparse_attention_reference as run
        case "torch":
            from foveal.block_sparse.torch import block_sparse_attention_torch as run
        case "triton" | "gluon" as backend:
            from foveal.block_sparse.triton.ops import block_sparse_attention_gpu

            run = functools.partial(block_sparse_attention_gpu, hopper=backend == "gluon")
    output, lse = run(query, key, value, selection, scale)
    return (output, lse) if return_lse else output


def resolve_impl(impl: str, query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int) -> str:
    """The implementation that `impl` stands for, for tensors like these and these block sizes.

    "auto" prefers "gluon" to "triton" wherever it can run: it was faster forward and backward at every shape measured
    (docs/performance.md).

    Raises:
        ValueError: for an unknown name, and for a named implementation that cannot take these inputs.
    """
    check_choice("impl", impl, IMPLS)
    if impl in ("reference", "torch"):
        return impl
    from foveal.block_sparse.gluon.support import supports

    reasons = {
        "gluon": lambda: supports(query, key, value, block_q, block_k),
        "triton": lambda: _why_no_triton(query, block_q, block_k),
    }
    if impl == "auto":
        return next((name for name, reason in reasons.items() if reason() is None), "torch")
    reason = reasons[impl]()
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="auto" takes what fits')
    return impl


def _why_no_triton(query: Tensor, block_q: int, block_k: int) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if query.device.type != "cuda":
        return f"it needs a GPU, got tensors on {query.device.type!r}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"it takes head dimensions 64 and 128, got {query.shape[-1]}"
    if block_q not in (64, 128) or block_k not in (64, 128):
        return f"it takes blocks of 64 and 128 tokens, got {block_q}x{block_k}"
    return None


def validate_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises a TypeError or ValueError unless query, key and value fit together."""
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
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )


def validate_selection(selection: BlockSelection, query: Tensor, key: Tensor) -> None:
    """Raises a TypeError or ValueError unless the selection was made for tensors like these."""
    if not isinstance(selection, BlockSelection):
        raise TypeError(f"selection must be a BlockSelection, got {type(selection).__name__}")
    expected = (*query.shape[:3], key.shape[2])
    got = (*selection.critical.shape[:2], selection.query_length, selection.key_length)
    if got != expected:
        raise ValueError(f"selection was made for (B, H, Lq, Lk) = {got}, but query and key have {expected}")
    if selection.critical.device != query.device:
        raise ValueError(f"selection is on {selection.critical.device}, but query is on {query.device}")
