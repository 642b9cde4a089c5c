"""The gate before the clock: what fails here gets no time.

Relative errors (Euclidean) are held to twice those of the plain PyTorch reference at the same dtype, both against
float64, and the largest entry's to four times: outputs and all gradients at a small size with partial blocks, and those
of one head or two at the size that is timed. There, gradients of what all heads share (the projection) are left out; at
the small size they are held to 1 % where they are float32 in a half-precision call: plain PyTorch sums in float32 what
kernels sum from half-precision states. Selections are held to those of float64 inputs; rounding may swap blocks whose
scores are next to equal.
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
    """Checks candidates at one shape; exact results are made once for all candidates with the same task."""

    def __init__(self) -> None:
        self._exact: dict[Any, tuple[tuple[Tensor, ...], ...]] = {}

    def check_whole(self, candidate: Candidate, problem: Problem) -> dict[str, float]:
        """Output and all gradients against the reference implementation, for small shapes.

        Returns:
            The relative error of each, by name.

        Raises:
            AssertionError: with the figures, for an error above its limit.
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
        """Output and gradients of some heads, (sample, head), at any length.

        Returns, raises:
            As `check_whole`; the largest error over the heads.
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
    """Output and [1, 1, L, D] gradients of one head, computed in `dtype`; on the host, where there is room."""

    def cut(x: Tensor) -> Tensor:
        return x.detach()[batch : batch + 1, head : head + 1].double() if x.dim() == 4 else x.detach().double()

    leaves = [cut(x).requires_grad_() for x in problem.tensors]
    output = problem.head(batch, head, dtype, *leaves)
    per_head = [x for x in leaves if x.dim() == 4]
    grads = torch.autograd.grad(output, per_head, cut(problem.grad))
    # As the plain implementation would hand them over: rounded to its dtype.
    return tuple(x.detach().to(dtype).cpu() for x in (output, *grads))


def _compare(problem: Problem, ours, exact, plain) -> dict[str, float]:
    """Compares outputs, then as many gradients as there are; their relative errors by name."""
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
        raise AssertionError(f"selection: {wrong} of {other.numel()} labels are not those of float64, over {limit}")
