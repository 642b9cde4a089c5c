"""What the layers of one sampling run did: which ran sparse, which did not, and why."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from foveal.hosts.comfyui.layers import described
from foveal.layout import TokenLayout, VideoGrid


@dataclass
class LayerRecord:
    """One layer.

    Attributes:
        sparse: how many calls ran sparse, by implementation, kept share, and why it was no faster one.
        dense: how many ran dense, by the reason.
        kept: float [Tq, Tk] on the model's device: the share of the heads whose row reads the block, at the step to
            look at; None before it.
        step: the denoising step of `kept`; None where nothing says it or needs it.
        kept_share: the mean of `kept` before it was made smaller, a tensor.
    """

    sparse: Counter[tuple[str, str, str | None]] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    kept: Tensor | None = None
    step: int | None = None
    kept_share: Tensor | None = None

    def cells(self) -> tuple[str, str]:
        """What ran sparse, and what ran dense or slower, and why, as text."""
        ran = [f"{_calls(times)}: {impl}, keep {kept}" for (impl, kept, _), times in self.sparse.items()]
        why = dict.fromkeys(f"{impl}: {why}" for impl, _, why in self.sparse if why is not None)
        dense = [f"{_calls(times)} dense: {reason}" for reason, times in self.dense.items()]
        return "; ".join(ran) or "-", "; ".join([*dense, *why])


@dataclass
class Record:
    """The latest sampling run; `str` of it is a table.

    Attributes:
        layers: by name, in order of depth.
        forwards: how often the model ran.
        layouts: of the layers' tokens.
        complete: the run has ended.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    forwards: int = 0
    layouts: list[VideoGrid | TokenLayout] = field(default_factory=list)
    complete: bool = False

    def of(self, name: str) -> LayerRecord:
        """A layer's record, made when it is first asked for."""
        return self.layers.setdefault(name, LayerRecord())

    @property
    def sparse_calls(self) -> int:
        """How many calls of layers ran sparse."""
        return sum(sum(layer.sparse.values()) for layer in self.layers.values())

    @property
    def dense_calls(self) -> int:
        """How many ran dense."""
        return sum(sum(layer.dense.values()) for layer in self.layers.values())

    def __str__(self) -> str:
        if not self.layers:
            return (
                "foveal: no self-attention layer has run (those of a model compiled as a whole are dense and not seen)"
            )
        total = self.sparse_calls + self.dense_calls
        lines = [
            f"foveal: {self.sparse_calls} of {total} calls of {len(self.layers)} self-attention layers ran sparse, "
            f"in {self.forwards} forwards of the model"
        ]
        lines += [f"tokens: {described(layout)}" for layout in self.layouts]
        rows = [(name, *layer.cells()) for name, layer in self.layers.items()]
        grouped = []
        for cells, group in itertools.groupby(rows, key=lambda row: row[1:]):
            names = [row[0] for row in group]
            grouped.append((names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", *cells))
        table = [("layer", "sparse", "dense or slower, and why"), *grouped]
        widths = [max(len(row[column]) for row in table) for column in range(2)]
        lines += [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in table]
        return "\n".join(lines)


def _calls(times: int) -> str:
    return "1 call" if times == 1 else f"{times} calls"
