"""Which tensors TMA can copy, and the strides that it is told. Importing it needs no Triton."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.kernels import chips

ALIGNMENT = 16  # bytes; TMA needs it of starts and strides


def tma_strides(x: Tensor) -> list[int]:
    """The strides of x [..., D] for TMA, the last 1.

    That of a dimension of size 1 is free, and may be one that TMA refuses: it becomes another.
    """
    return [
        *(stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)),
        1,
    ]


def tma_takes(tensors: Sequence[Tensor]) -> bool:
    """Whether TMA is there and takes these tensors."""
    return all(chips.chip_of(x.device).uses_tma and x.data_ptr() % ALIGNMENT == 0 and _fits(x) for x in tensors)


def copyable(x: Tensor) -> bool:
    """Whether TMA can read x [..., D] with the strides that it has, by its offset in an aligned memory."""
    # torch.compile cannot trace an offset; the launchers look again, and copy what turns out not to fit.
    if torch.compiler.is_compiling():
        return _strides_fit(x.shape, x.stride(), x.element_size())
    return x.storage_offset() * x.element_size() % ALIGNMENT == 0 and _fits(x)


def _fits(x: Tensor) -> bool:
    # The sizes of other kinds of tensors may be symbols, which no cache can look up.
    fit = _strides_known if type(x) is Tensor else _strides_fit
    return fit(x.shape, x.stride(), x.element_size())


def _strides_fit(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    steps = [stride for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    return strides[-1] == 1 and all(step > 0 and step * itemsize % ALIGNMENT == 0 for step in steps)


_strides_known = functools.lru_cache(maxsize=256)(_strides_fit)
