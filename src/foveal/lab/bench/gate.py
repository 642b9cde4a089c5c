"""The gate before the clock: a candidate that fails here is not timed.

Relative Euclidean errors may be twice those of the plain PyTorch reference at the same dtype, both against float64, and
the error of the largest entry four times. The gate checks outputs and all gradients at a small size with partial
blocks, and those of one or two heads at the size that is timed. At that size it skips gradients of what all heads share
(the projection). At the small size these may be off by 1% where they are float32 in a half-precision call, because
plain PyTorch sums in float32 what kernels sum from half-precision states. Selections must match those of float64
inputs, except that rounding may swap blocks whose scores are almost equal.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.lab.bench.candidates import Candidate, Problem
from foveal.lab.bench.oracle import head_of
from foveal.testing import assert_close_to_reference, output_and_gradients, poison_empty, relative_error

FACTOR = 2.0
FACTOR_OF_LARGEST = 4.0
OTHER_LABELS = 0.001
SHARED_ERROR = 0.01


class Gate:
    """Checks candidates at one shape. Exact results are computed once for all candidates with the same task."""

    def __init__(self) -> None:
        self._exact: dict[Any, tuple[tuple[Tensor, ...], ...]] = {}

    def check_whole(self, candidate: Candidate, problem: Problem) -> dict[str, float]:
        """Compare output and all gradients with the reference implementation, for small shapes.

        Returns:
            The relative error of each, by name.

        Raises:
            AssertionError: an error is above its limit; the message has both.
        """
        with poison_empty():
            ours = output_and_gradients(problem.run, problem.tensors)
        if candidate.task not in self._exact:
            exact = output_and_gradients(problem.oracle, [x.double() for x in problem.tensors])
            self._exact[candidate.task] = (exact, output_and_gradients(problem.oracle, problem.tensors))
        if problem.select is not None:
            _check_selection(problem.selection, problem)
        return _compare(problem, ours, *self._exact[candidate.task])

    def check_heads(
        self, candidate: Candidate, problem: Problem, heads: tuple[tuple[int, int], ...]
    ) -> dict[str, float]:
        """Compare output and gradients of some heads, given as (sample, head), at any length.

        Returns, raises:
            As in `check_whole`, with the largest error over the heads.
        """
        leaves = [x.detach().requires_grad_() for x in problem.tensors]
        with poison_empty() if candidate.ours else contextlib.nullcontext():
            output = problem.run(*leaves)
            grads = torch.autograd.grad(output, leaves, problem.grad)
        ours = (output.detach(), *grads)
        errors: dict[str, float] = {}
        for batch, head in heads:
            chosen = (slice(batch, batch + 1), slice(head, head + 1))
            key = (candidate.task, batch, head)
            if key not in self._exact:
                dtypes = (torch.float64, problem.grad.dtype)
                self._exact[key] = tuple(_exact_head(problem, batch, head, dtype) for dtype in dtypes)
            if problem.select is not None:
                _check_selection(head_of(problem.selection, batch, head), problem, chosen)
            mine = [x[chosen] for x in ours if x.dim() == 4]
            found = _compare(problem, mine, *self._exact[key])
            errors = {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
        return errors


def _exact_head(problem: Problem, batch: int, head: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and [1, 1, L, D] gradients of one head, computed in `dtype` and stored on the host, which has room."""

    def cut(x: Tensor) -> Tensor:
        return x.detach()[batch : batch + 1, head : head + 1].double() if x.dim() == 4 else x.detach().double()

    leaves = [cut(x).requires_grad_() for x in problem.tensors]
    output = problem.head(batch, head, dtype, *leaves)
    per_head = [x for x in leaves if x.dim() == 4]
    grads = torch.autograd.grad(output, per_head, cut(problem.grad))
    # Rounded to the dtype of the plain implementation, as it would return them.
    return tuple(x.detach().to(dtype).cpu() for x in (output, *grads))


def _compare(problem: Problem, ours, exact, plain) -> dict[str, float]:
    """Compare outputs, then all gradients that exist, and return their relative errors by name."""
    labels = ("output", *(f"grad_{name}" for name in problem.names))[: len(ours)]
    half = problem.grad.dtype.itemsize < 4
    errors = {}
    for label, x, y, z in zip(labels, ours, exact, plain, strict=True):
        errors[label] = relative_error(x, y)
        limit = SHARED_ERROR
        if not (half and x.dtype == torch.float32):
            limit = max(FACTOR * relative_error(z, y), 2 * torch.finfo(x.dtype).eps)
            assert_close_to_reference(x, y, z, name=label, factor=FACTOR_OF_LARGEST)
        if not errors[label] <= limit:
            raise AssertionError(f"{label}: relative error {errors[label]:.3e} exceeds {limit:.3e}")
    return errors


def _check_selection(selection: BlockSelection, problem: Problem, chosen=(slice(None), slice(None))) -> None:
    exact = problem.select(*(x[chosen].detach().double() for x in problem.tensors[:2]))
    other = selection.labels() != exact.labels()
    wrong, limit = int(other.sum()), max(2, int(OTHER_LABELS * other.numel()))
    if wrong > limit:
        raise AssertionError(f"selection: {wrong} of {other.numel()} labels differ from float64 (limit {limit})")
