"""What a transformer's sparse layers need to know of the forward in progress: its grid, and what is dense in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from foveal.layout import VideoGrid
from foveal.methods.base import Config, method_of
from foveal.models.families.table import FAMILIES


class Phase(NamedTuple):
    """What a policy asks of a transformer's sparse layers for one forward; the default asks nothing.

    Args:
        dense: run the original processors.
        keep_ratio, drop_ratio: instead of those of the layers' configurations; None leaves them.
    """

    dense: bool = False
    keep_ratio: float | None = None
    drop_ratio: float | None = None

    def apply(self, config: Config) -> Config:
        """A layer's configuration with these ratios."""
        return method_of(config).follow(config, keep_ratio=self.keep_ratio, drop_ratio=self.drop_ratio)


class ForwardState:
    """What the sparse layers of one transformer share: the grid of the forward in progress, and what is dense in it.

    The hooks are bound methods, not closures, so that `copy.deepcopy` of a model gives the copy a state of its own.

    Args:
        family: name in the table of families.
        parameters: names of the parameters of the transformer's forward, in order.

    Attributes:
        grid: the grid of the latest forward; None before the first.
        dense: run the original processors for now.
        phase: what the policy asks of the latest forward.
        held: names of the layers that the policy keeps dense.
        clock: the policy and where it reads the denoising step, a `PolicyClock`; None without a policy.
        recomputed: (grid, phase) of the forward that gradient checkpointing runs again; None outside of that.
        handles: of the hooks, by the name of the module that has them.
    """

    def __init__(self, family: str, parameters: tuple[str, ...]) -> None:
        self.family = family
        self.parameters = parameters
        self.grid: VideoGrid | None = None
        self.dense = False
        self.phase = Phase()
        self.held: frozenset[str] = frozenset()
        self.clock: Any = None
        self.recomputed: tuple[VideoGrid | None, Phase] | None = None
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def begin_forward(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the transformer."""
        if not torch.compiler.is_compiling():
            self._go_first()
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.grid = FAMILIES[self.family].read_grid(transformer, arguments)
        if self.clock is not None and not self.dense:
            self.phase = self.clock.phase(transformer, arguments.get("timestep"))

    def begin_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on a block of layers.

        Gradient checkpointing runs a block again during the backward, maybe after a forward on another grid or past
        the end of `with dense(model)`. The block's first argument, which it keeps for that, carries both.
        """
        if torch.compiler.is_compiling():
            return
        carrier = args[0] if args else kwargs["hidden_states"]
        if _in_backward():
            self.recomputed = getattr(carrier, "_foveal_forward", None)
        else:
            carrier._foveal_forward = (self.grid, self._phase())

    def _go_first(self) -> None:
        """Puts the hooks of the blocks before any that came later and replaces their arguments, as FSDP2's does."""
        for handle in self.handles.values():
            hooks = handle.hooks_dict_ref()
            if next(iter(hooks)) != handle.id:
                hooks.move_to_end(handle.id, last=False)

    def current(self) -> tuple[VideoGrid | None, Phase]:
        """(grid, phase) for the block that runs."""
        if not torch.compiler.is_compiling() and self.recomputed is not None and _in_backward():
            return self.recomputed
        return self.grid, self._phase()

    def _phase(self) -> Phase:
        return Phase(dense=True) if self.dense else self.phase


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
