"""What the forwards of a model ran: counted on the host, without a wait for the device.

A layer's call leaves only a `Ran` in its `LayerRecord`. What that means for a user is worked out once for each kind of
forward, when its first one ends.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from foveal.kernels.api import Ran
from foveal.layout import VideoGrid
from foveal.methods.base import Config, method_of

if TYPE_CHECKING:
    from foveal.models.state import Phase

ON_FALLBACK = ("allow", "warn", "raise")
MOST_KINDS = 256  # of forwards that are told apart by their grids and ratios

SWITCHED_OFF = "dense(model)"  # why a forward was dense that a user switched: no fallback
DENSE = Ran("dense")
HELD_DENSE = Ran("dense", "the policy's dense_layers")
UNTOLD = Ran("")  # of a method whose module has no `ran`


class FallbackError(RuntimeError):
    """A layer fell back whose `on_fallback` is "raise"."""


class LayerRecord:
    """What one sparse layer did since the last forward of its transformer ended.

    Attributes:
        ran: what its call ran; None if there was none.
        config: the layer's configuration; see `note_configs`.
        on_fallback: one of `ON_FALLBACK`.
    """

    def __init__(self, config: Config, on_fallback: str) -> None:
        self.ran: Ran | None = None
        self.config = config
        self.on_fallback = on_fallback


class Forward(NamedTuple):
    """One kind of forward.

    grid: the video's grid, in tokens; None where all of it was dense by the user's switch, or not told apart by it.
    packed: whether protected segments stand around the video.
    phase: what was asked of the layers.
    ran: what each layer ran, by layer; empty if all of them were dense.
    """

    grid: tuple[int, int, int] | None
    packed: bool
    phase: Phase
    ran: tuple[Ran | None, ...]


@dataclasses.dataclass(frozen=True)
class LayersRan:
    """Layers that ran in the same way in one kind of forward.

    Args:
        layers: their names.
        method: the name of the method, or "dense".
        impl: the implementation, "dense" for the original attention; empty where the method's module does not say.
        kept: how many of the video's key blocks each query block read exactly, and of how many; None where the method
            does not say.
        why: what was slower than asked for, or why the layers were dense; None if nothing was.
        fallback: whether `on_fallback` minds it: not what the user named, nor what `dense(model)` switched off.
    """

    layers: tuple[str, ...]
    method: str
    impl: str
    kept: tuple[int, int] | None
    why: str | None
    fallback: bool


def layers_that_ran(forward: Forward, layers: dict[str, LayerRecord]) -> list[LayersRan]:
    """The layers of one kind of forward, those that ran alike together; without those that it did not reach."""
    if forward.phase.dense:
        why = forward.phase.why
        return [LayersRan(tuple(layers), "dense", "dense", None, why, fallback=why != SWITCHED_OFF)]
    groups: dict[tuple, list[str]] = {}
    for (name, layer), ran in zip(layers.items(), forward.ran, strict=True):
        if ran is not None:
            groups.setdefault((_said(ran, layer.config, forward)), []).append(name)
    return [LayersRan(tuple(names), *said) for said, names in groups.items()]


def _said(ran: Ran, config: Config, forward: Forward) -> tuple[str, str, tuple[int, int] | None, str | None, bool]:
    if ran.impl == DENSE.impl:
        return "dense", ran.impl, None, ran.why, True
    method, config = method_of(config), forward.phase.apply(config)
    kept = None if forward.grid is None else method.kept_blocks(config, VideoGrid(*forward.grid), forward.packed)
    if kept is not None and kept[0] == kept[1] and not _asks_for_all(config):
        ran = ran.but(f"as much work as dense attention: what it keeps covers all blocks, {kept[1]}")
    return method.name, ran.impl, kept, ran.why, ran.why is not None


def _asks_for_all(config: Config) -> bool:
    schedule = method_of(config).schedule
    return schedule.kept is not None and schedule.kept(config) == "keep_ratio" and schedule.amount(config) >= 1


class _Kind:
    """How often one kind of forward ran, and the error that each of them raises."""

    def __init__(self, error: str | None) -> None:
        self.count, self.error = 0, error


class ForwardRecord:
    """The forwards of one transformer, by kind.

    Threads that run a transformer at once share it, and what they run may then be told of one another.

    Attributes:
        kinds: how often each ran.
    """

    def __init__(self) -> None:
        self.kinds: dict[Forward, _Kind] = {}

    def add(self, forward: Forward, layers: dict[str, LayerRecord]) -> None:
        """Counts a forward.

        Raises:
            FallbackError: a layer fell back whose `on_fallback` is "raise".
        """
        kind = self.kinds.get(forward)
        if kind is None:
            if len(self.kinds) >= MOST_KINDS:
                forward = forward._replace(grid=None, phase=forward.phase._replace(keep_ratio=None, drop_ratio=None))
                kind = self.kinds.get(forward)
            if kind is None:
                kind = self.kinds[forward] = _Kind(self._tell(layers_that_ran(forward, layers), layers))
        kind.count += 1
        if kind.error is not None:
            raise FallbackError(kind.error)

    def clear(self) -> None:
        self.kinds.clear()

    @staticmethod
    def _tell(groups: Iterable[LayersRan], layers: dict[str, LayerRecord]) -> str | None:
        """Warns of fallbacks, once for each kind of forward; the message of those that are errors."""
        messages: dict[str, list[str]] = {"warn": [], "raise": []}
        for group in groups:
            if not group.fallback:
                continue
            for mode, lines in messages.items():
                names = [name for name in group.layers if layers[name].on_fallback == mode]
                if names:
                    where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
                    ran = "" if group.impl == group.method else f" ({group.impl})"
                    lines.append(f"{where} ran {group.method}{ran}: {group.why}")
        for line in messages["warn"]:
            warnings.warn(f"a sparse layer fell back: {line}", stacklevel=2)
        if not messages["raise"]:
            return None
        return f'on_fallback="raise", and sparse layers fell back: {"; ".join(messages["raise"])}'
