"""Helpers for tests on the CPU and on GPUs: inputs, selections, tolerances from data, and poisoned buffers.

It needs only torch. Failures are AssertionErrors that hold the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from foveal.blocks import BlockSelection


def make_inputs(
    *,
    batch: int = 1,
    heads: int = 2,
    query_length: int,
    key_length: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    layout: str = "BHLD",
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, Lq, D], key and value [B, H, Lk, D], standard normal.

    The values depend only on the shape and the seed: they are drawn on the CPU in float64, then cast and moved.

    Args:
        layout: "BHLD" for contiguous tensors, "BLHD" for transposed views of contiguous [B, L, H, D] ones, the way
            transformers hold them.
        requires_grad: make all three leaves of autograd.
    """
    if layout not in ("BHLD", "BLHD"):
        raise ValueError(f"unknown layout {layout!r}; expected one of ('BHLD', 'BLHD')")
    generator = torch.Generator().manual_seed(seed)
    key_length = query_length if key_length is None else key_length
    inputs = []
    for length in (query_length, key_length, key_length):
        x = torch.randn(batch, heads, length, head_dim, dtype=torch.float64, generator=generator)
        x = x.to(dtype=dtype, device=device)
        if layout == "BLHD":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        inputs.append(x.requires_grad_(requires_grad))
    return tuple(inputs)


def random_selection(
    *,
    batch: int = 1,
    heads: int = 2,
    query_length: int,
    key_length: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
    critical: float = 0.3,
    negligible: float = 0.3,
    kv_lengths: Tensor | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """A selection with random labels, so that the counts differ from row to row.

    Every fourth row has no critical block and every third row no marginal block, if there are that many.

    Args:
        critical, negligible: how likely each label is.
        kv_lengths: int [B], valid keys at the front of each sample; None for all.
    """
    key_length = query_length if key_length is None else key_length
    rows, columns = -(-query_length // block_q), -(-key_length // block_k)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch, heads, rows, columns, generator=generator)
    labels = (draw < critical).to(torch.int8) - (draw > 1 - negligible).to(torch.int8)
    labels[:, :, 3::4] = labels[:, :, 3::4].clamp(max=0)
    labels[:, :, 2::3] = torch.where(labels[:, :, 2::3] == 0, -1, labels[:, :, 2::3])
    sizes = None
    if kv_lengths is not None:
        starts = torch.arange(columns) * block_k
        sizes = (kv_lengths.cpu()[:, None] - starts).clamp(0, block_k).to(device=device, dtype=torch.int32)
    return BlockSelection.from_labels(
        labels.to(device),
        block_q=block_q,
        block_k=block_k,
        query_length=query_length,
        key_length=key_length,
        key_block_sizes=sizes,
    )


def output_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *, seed: int = 1
) -> tuple[Tensor, ...]:
    """`function(*inputs)` and the gradients of its output's inner product with a fixed random tensor.

    Args:
        function: differentiable. Each of several outputs meets its own random tensor, with values that every floating
            dtype holds exactly. Infinite entries (the log-sum-exp of an empty row) are left out of the product.
        inputs: leaves or not. The function runs on detached copies that keep their strides.

    Returns:
        The outputs, then one gradient per input (zeros where an input has no effect).
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype)
        finite = torch.isfinite(output.detach())
        total = total + (torch.where(finite, output, 0) * weight).sum(dtype=torch.float64)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = (torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves, strict=True))
    return (*(output.detach() for output in outputs), *grads)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in float64; |actual| where expected is zero."""
    actual, expected = _doubles(actual, expected)
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm or 1.0)


def _doubles(first: Tensor, *others: Tensor) -> list[Tensor]:
    """All in float64: on the first one's device if that is CUDA, else on the host, since MPS has no float64."""
    device = first.device if first.is_cuda else torch.device("cpu")
    return [x.detach().to(device=device, dtype=torch.float64) for x in (first, *others)]


def assert_close_to_reference(
    output: Tensor, reference: Tensor, plain: Tensor, *, name: str = "output", factor: float = 2.0
) -> None:
    """Assert that the error of `output` is at most `factor` times that of plain PyTorch at the same precision.

    The tolerance thus comes from the data and not from a table. It applies to two errors against the float64
    reference: the relative Euclidean error and the error of the largest entry. A floor of two units in the last place,
    of the norm and of the largest entry, covers a plain result that happens to be exact. Entries that are infinite in
    the reference must be infinite in `output`. NaN fails.

    Args:
        output: what is tested, any floating dtype.
        reference: the same math in float64.
        plain: the same math in plain PyTorch at the precision of `output`.
        name: what to call it in the message.
        factor: how many times plain's error is allowed.

    Raises:
        AssertionError: with both errors and their limits.
    """
    if reference.dtype != torch.float64:
        raise TypeError(f"reference must be float64, got {reference.dtype}")
    if not output.shape == reference.shape == plain.shape:
        raise AssertionError(
            f"{name}: shapes differ: {tuple(output.shape)}, reference {tuple(reference.shape)}, "
            f"plain {tuple(plain.shape)}"
        )
    epsilon = torch.finfo(output.dtype).eps
    output, reference, plain = _doubles(output, reference, plain)
    infinite = torch.isinf(reference)
    if not torch.equal(output[infinite], reference[infinite]):
        raise AssertionError(f"{name}: infinite entries of the reference are not infinite in the output")
    output, reference, plain = (x[~infinite] for x in (output, reference, plain))
    if not torch.isfinite(output).all():
        raise AssertionError(f"{name}: {int((~torch.isfinite(output)).sum())} of {output.numel()} entries not finite")
    if not output.numel():
        return
    errors = {
        "relative error": (relative_error(output, reference), relative_error(plain, reference), 1.0),
        "largest error": (
            (output - reference).abs().max().item(),
            (plain - reference).abs().max().item(),
            reference.abs().max().item(),
        ),
    }
    for kind, (ours, theirs, size) in errors.items():
        limit = max(factor * theirs, 2 * epsilon * size)
        if not ours <= limit:
            raise AssertionError(f"{name}: {kind} {ours:.3e} exceeds {limit:.3e} (plain PyTorch: {theirs:.3e})")


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Inside, uninitialized tensors hold NaN (the largest value for integers), so that unwritten entries show.

    PyTorch fills them as part of its deterministic mode, for torch.empty and all its relatives on any device.
    Operations without a deterministic variant warn and run as usual.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
