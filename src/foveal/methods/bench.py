"""`BenchCase`: a call of a method that `foveal bench` checks against its reference and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.methods.config import MethodConfig


@dataclass(frozen=True, eq=False)  # compared by identity
class BenchCase:
    """One call, which is timed both with the selection made inside and with one given.

    Shape legend: B batch, H heads, L tokens of the video, D head dimension.

    Args:
        name: the name of the task in tables and in files of results.
        config: the method's configuration.
        call: (query, key, value, *, config, grid, selection, impl, **extras) to the output, [B, H, L, D]: the method as
            a function. Without a selection it makes its own. impl="reference" is what the others are held to.
        select: (query, key, *, config, grid) to the selection that `call` makes.
        extras: what else the call is differentiated in, by argument, with its dimensions: "BHLD", in the dtype of the
            query, or "DD" or "D", float32. Those with heads come first.
        head: (in_chunks, (query, key, value), *, config, grid, selection, dtype, **extras) to the output of a single
            head, float64 [1, 1, L, D], computed in `dtype` by the reference. All tensors are float64. `in_chunks` takes
            (attention, query, key, value, selection, dtype) and calls attention(query, key, value, selection) for a few
            query blocks at a time, so that a whole video fits into memory. None leaves the timed size unchecked.
        left_out: parts of the method's cost that the model around the call has, not the call.
    """

    name: str
    config: MethodConfig
    call: Callable[..., Tensor]
    select: Callable[..., BlockSelection]
    extras: dict[str, str] = field(default_factory=dict)
    head: Callable[..., Tensor] | None = None
    left_out: tuple[str, ...] = ()
