"""`block_sparse_attention`: validate once, then run the implementation that was named or that fits best."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import (
    cached_constant,
    check_choice,
    check_head_ratios,
    check_positive_int,
    check_ratio,
    check_scale,
    validate_qkv,
    without_autocast,
)
from foveal.kernels import chips, int8
from foveal.kernels.backend import name_of
from foveal.kernels.choice import check_rule, choose_blocks
from foveal.rules import Choosing, FixedBlocks, SelectionRule, ratios_of, selection_rule
from foveal.symbols import ceil_div

IMPLS = ("auto", "reference", "torch", "triton", "gluon")
BACKENDS = ("gluon", "triton")  # those with kernels, the fastest first


class Ran(NamedTuple):
    """What a call ran, told on the host.

    impl: the implementation; "dense" for a layer that ran its original attention.
    why: why that, or a part of it, is slower than what was asked for; None if it is not.
    """

    impl: str
    why: str | None = None

    def but(self, why: str) -> Ran:
        """The same with one more reason."""
        return Ran(self.impl, why if self.why is None else f"{self.why}; {why}")


# Why a call on a GPU's kernels may be slower than others, in `Ran`.
SLOW_SELECTION = "the blocks are chosen in PyTorch: the kernels that choose do not take these inputs"


def may_note() -> bool:
    """Whether a call may leave a note of what it ran. A checkpoint in a graph takes none, and comes with gradients."""
    return not (torch.compiler.is_compiling() and torch.is_grad_enabled())


_AS_ASKED = {name: Ran(name) for name in IMPLS[1:]}
# What the registers of one program hold: at 64 tokens a block, a million keys.
KERNEL_MAX_BLOCKS = 16384
OLDEST_TRITON = (3, 6)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


# For type checkers: `return_lse` decides what comes back.
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
    precision: str = "input",
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
    precision: str = "input",
) -> tuple[Tensor, Tensor]: ...
@without_autocast
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    precision: str = "input",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over only each query block's critical key blocks.

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
        precision: of the products of queries and keys: "input", that of the tensors; or "int8", eight bits with a
            scale for each block and keys less their mean (docs/precision.md). "gluon" has no kernels for it. Gradients
            are then those of the rounded queries and keys, and pass straight through the rounding.

    Returns:
        [B, H, Lq, D] in the dtype of `query`; with `return_lse` also the natural log-sum-exp [B, H, Lq] in float32
        (float64 for float64 inputs). A row without a critical key is 0, and its log-sum-exp -inf.
        Gradients are exact for the given selection.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    validate_qkv(query, key, value)
    validate_selection(selection, query, key)
    check_choice("precision", precision, int8.PRECISIONS)
    scale = check_scale(scale, query.shape[-1])
    inputs = query, key, value
    impl = choose_impl(impl, *inputs, selection.block_q, selection.block_k, precision).impl
    if precision == "int8" and impl not in BACKENDS:
        inputs = *int8.dequantized(query, key, selection), value
    match impl:
        case "reference":
            from foveal.kernels.reference import block_sparse_attention_reference as run
        case "torch":
            from foveal.kernels.cpu import block_sparse_attention_torch as run
        case backend:
            from foveal.kernels.sparse import SparseCall, SparseOptions, block_sparse_attention_gpu

            def run(query, key, value, selection, scale):
                options = SparseOptions(scale, name_of(backend, precision))
                return block_sparse_attention_gpu(SparseCall(query, key, value, selection), options)

    output, lse = run(*inputs, selection, scale)
    output = output.to(query.dtype)
    if not return_lse:
        return output
    return output, lse if precision == "input" else lse + int8.lse_shift(query, key, selection, scale)


def choose_impl(
    impl: str, query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int, precision: str = "input"
) -> Ran:
    """The implementation that `impl` stands for, for tensors like these and these block sizes, and why no faster one.

    "auto" prefers "gluon" to "triton" wherever it can run: it was faster forward and backward at every shape measured
    (docs/performance.md). It is no fallback where a backend is written for other devices than that of the tensors.

    Raises:
        ValueError: for an unknown name, and for a named implementation that cannot take these inputs.
    """
    check_choice("impl", impl, IMPLS)
    if impl in ("reference", "torch"):
        return _AS_ASKED[impl]
    if impl != "auto":
        reason = why_not(impl, query, key, value, block_q, block_k, precision, named=True)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="auto" takes what fits')
        return _AS_ASKED[impl]
    refused = None
    for name in BACKENDS:
        reason = why_not(name, query, key, value, block_q, block_k, precision)
        if reason is None:
            return _AS_ASKED[name] if refused is None else Ran(name, refused)
        if _written_for(name, query.device):
            refused = f"not {name}: {reason}"
    return Ran("torch", refused)


def _written_for(backend: str, device: torch.device) -> bool:
    if backend != "gluon":
        return True
    from foveal.kernels.hopper.support import written_for

    return written_for(device)


def why_not(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    precision: str = "input",
    *,
    named: bool = False,
) -> str | None:
    """Why "auto" does not run a backend on these inputs, or if it is `named` why it cannot run; None if it does."""
    if backend == "gluon":
        from foveal.kernels.hopper import support

        reason = support.why_not(query, key, value, block_q, block_k)
        if reason is None and precision != "input":
            reason = f'it has no kernels for precision="{precision}"'
        return reason if named or reason is not None else support.unverified_release()
    return _why_no_triton(query, block_q, block_k)


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
    return _why_no_kernels(query.device)


@cached_constant
def _why_no_kernels(device: torch.device) -> str | None:
    """Why no kernel of ours can run on this GPU, or with this Triton; None if some can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # AMD's builds of torch bring it under another name
        version = None
    if version is not None and tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return (
            f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, which comes with torch 2.10, got {version}"
        )
    if torch.version.hip is None and int(chips.capability(device).partition(".")[0]) < chips.OLDEST:
        return f"it needs a GPU of compute capability {chips.OLDEST}.0 or newer, got {chips.capability(device)}"
    return None


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


@without_autocast
def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    keep_ratio: float | tuple[float, ...],
    drop_ratio: float = 0.0,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    protected_keys: tuple[int, int] | None = None,
    protected_queries: tuple[int, int] | None = None,
    score: str = "mean",
    keep_mass: float | None = None,
    max_keep_ratio: float = 1.0,
    fixed: FixedBlocks | None = None,
) -> BlockSelection:
    """Choose the critical, marginal and negligible key blocks of every query block.

    Per row of the pooled score matrix, the `max(1, floor(keep_ratio * Tk))` largest are critical (none if keep_ratio is
    0), the `floor(drop_ratio * Tk)` smallest negligible, the others marginal (SLA, arXiv 2509.24006, eq. 4-6, with
    the bottom labeled -1). Not differentiated through.

    Args:
        query: [B, H, Lq, D], floating point, any strides.
        key: [B, H, Lk, D].
        block_q, block_k: block sizes in tokens; the last block may be partial.
        keep_ratio, drop_ratio: in [0, 1], together at most 1. A tuple of one keep_ratio for each head lets them differ.
        scale: softmax scale; None for 1 / sqrt(D).
        kv_lengths: int [B], valid keys at the front of each sample, at most Lk; the rest is padding. The ratios
            then count each sample's own blocks.
        protected_keys: token range [start, stop), such as text, whose key blocks are critical for every row, beside
            those picked.
        protected_queries: token range [start, stop) whose query blocks attend to every valid key.
        score: what the blocks of a row are ranked by: "mean", the product of the blocks' means; "mean_spread", which
            adds half the variance of the mean query's scores over the keys of the block, so that one important key in
            a dull block shows; or "log_sum_exp", which cuts each block into quarters and takes the log-sum-exp of the
            16 products of their means, so that a quarter may stand out. That needs block sizes that are multiples of 4.
        keep_mass: in (0, 1], each row keeps further blocks, the best first, until those kept by rank have this share of
            the softmax of the row's scores. `keep_ratio` is then the least. None for no more.
        max_keep_ratio: the most that `keep_mass` may keep, and the width of the lists.
        fixed: key blocks that rows keep whatever their scores, beside those picked, from `foveal.fixed_blocks`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be non-empty and have shape [B, H, L, D], got {tuple(x.shape)}")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.device != key.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    check_positive_int("block_q", block_q)
    check_positive_int("block_k", block_k)
    check_head_ratios("keep_ratio", keep_ratio)
    check_ratio("drop_ratio", drop_ratio)
    if max(ratios_of(keep_ratio)) + drop_ratio > 1.0 + 1e-9:
        raise ValueError(f"keep_ratio + drop_ratio must be at most 1, got {keep_ratio} + {drop_ratio}")
    check_rule(score, keep_mass, max_keep_ratio, keep_ratio, block_q, block_k)
    scale = check_scale(scale, query.shape[-1])
    limits = {"kv_lengths": kv_lengths, "protected_keys": protected_keys, "protected_queries": protected_queries}
    kept = {"keep_ratio": keep_ratio, "drop_ratio": drop_ratio, "score": score, "fixed": fixed}
    choosing = Choosing(**kept, keep_mass=keep_mass, max_keep_ratio=max_keep_ratio)
    return choose(query, key, selection_rule(query, key, (block_q, block_k), choosing, **limits), scale, drop_ratio > 0)


@without_autocast
def choose(query: Tensor, key: Tensor, rule: SelectionRule, scale: float, with_marginal: bool) -> BlockSelection:
    """What a rule chooses over query and key, [B, H, L, D]; the marginal mask only where it is wanted."""
    run = _select_on_device if fits_kernel(query, key, rule.block_k) else choose_blocks
    return BlockSelection.by_rule(rule, query, key, *run(query, key, scale, rule, with_marginal))


def fits_kernel(query: Tensor, key: Tensor, block_k: int) -> bool:
    """Whether the selection kernels take these: the same rule, on the device."""
    return (
        _HAS_TRITON
        and query.device.type == "cuda"
        and query.dtype == key.dtype
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and query.shape[-1] in (64, 128)
        and query.stride(-1) == key.stride(-1) == 1
        and ceil_div(key.shape[2], block_k) <= KERNEL_MAX_BLOCKS
        and _why_no_kernels(query.device) is None
    )


def _select_on_device(
    query: Tensor, key: Tensor, scale: float, rule: SelectionRule, with_marginal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from foveal.kernels.triton.select import select_blocks_gpu

    rows, columns = ceil_div(query.shape[2], rule.block_q), ceil_div(key.shape[2], rule.block_k)
    critical, counts, marginal = select_blocks_gpu(query, key, rule, scale, with_marginal)
    return critical, counts, marginal[:, :, :rows, :columns] if with_marginal else None
