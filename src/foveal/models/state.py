"""What a transformer's sparse layers need to know of the forward that they are part of: its grid, and what is dense.

That belongs to the forward, not to the model: two threads may run one transformer on videos of two shapes, and a copy
of a model is nobody's forward. So the hook that opens a forward puts a `Call` where only its own thread sees it, and
the hook that closes it takes it away. Gradient checkpointing runs blocks again, after that: what it calls is bound to
the `Call` of the first time.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.kernels.api import Ran
from foveal.layout import PlannedGrid, TokenLayout, VideoGrid
from foveal.methods.base import Config, method_of
from foveal.models.families.table import FAMILIES
from foveal.models.record import HELD_DENSE, SWITCHED_OFF, UNTOLD, Forward, ForwardRecord, LayerRecord


class Phase(NamedTuple):
    """What a policy asks of a transformer's sparse layers for one forward; the default asks nothing.

    Args:
        dense: run the original processors.
        keep_ratio, drop_ratio: instead of those of the layers' configurations; None leaves them.
        why: what asked for `dense`, for reports; None where nothing did.
    """

    dense: bool = False
    keep_ratio: float | tuple[float, ...] | None = None
    drop_ratio: float | None = None
    why: str | None = None

    def as_text(self) -> tuple[str, str, str]:
        """The fields that layers follow as text, for `from_text`."""
        keep = ",".join(map(str, self.keep_ratio)) if isinstance(self.keep_ratio, tuple) else str(self.keep_ratio)
        return str(self.dense), keep, str(self.drop_ratio)

    @classmethod
    def from_text(cls, fields: tuple[str, str, str]) -> Phase:
        """The inverse of `as_text`."""
        ratios = [None if text == "None" else tuple(map(float, text.split(","))) for text in fields[1:]]
        keep, drop = (x[0] if x is not None and len(x) == 1 else x for x in ratios)
        return cls(fields[0] == "True", keep, drop)

    def apply(self, config: Config) -> Config:
        """A layer's configuration with these ratios."""
        return method_of(config).follow(config, keep_ratio=self.keep_ratio, drop_ratio=self.drop_ratio)


class Call(NamedTuple):
    """One forward of one transformer.

    Args:
        state: the transformer's state.
        grid: the grid of this forward's tokens, with what compiled blocks need of it unless it is sharded. None where
            all of it is dense.
        layout: the layout of its packed sequence, around this grid; None where the method gets only the video, or text
            as keys.
        phase: what its sparse layers do.
        phase_text: the phase as text. A graph takes text from outside of a module as a constant, where a float might
            become one of its inputs.
        outer: the call that this one interrupts, of another transformer; None without one.
    """

    state: ForwardState
    grid: VideoGrid | None
    layout: TokenLayout | None
    phase: Phase
    phase_text: tuple[str, str, str]
    outer: Call | None


class _Running:
    """What runs in one thread.

    Attributes:
        call: the innermost forward in progress.
        recomputed: the call of the block that a checkpoint runs again, where the block's arguments told it.
        dense: the value of `_DENSE`, for a whole model that is compiled: a graph cannot read a `ContextVar`.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.recomputed: Call | None = None
        self.dense: tuple[ForwardState, ...] = ()


class _Thread(threading.local):
    def __init__(self) -> None:
        # An object of its own: Dynamo (torch 2.13) forgets what it wrote to an attribute of a threading.local.
        self.running = _Running()


_THREAD = _Thread()
_DENSE: contextvars.ContextVar[tuple[ForwardState, ...]] = contextvars.ContextVar("foveal_dense", default=())


@contextlib.contextmanager
def dense_forwards(states: Iterable[ForwardState]) -> Iterator[None]:
    """Forwards of the transformers with these states are dense inside, in this context (thread or task) only."""
    former = _DENSE.get(), _THREAD.running.dense
    now = (*former[0], *states)
    _DENSE.set(now)
    _THREAD.running.dense = now
    try:
        yield
    finally:
        _DENSE.set(former[0])
        _THREAD.running.dense = former[1]


class ForwardState:
    """What the sparse layers of one transformer share.

    The hooks are bound methods, not closures, so that `copy.deepcopy` of a model gives the copy a state of its own.

    Args:
        family: name in the table of families.
        parameters: names of the parameters of the transformer's forward, in order.

    Attributes:
        grid: the grid of the latest forward that had one, for reports; None before the first.
        packed: whether it had protected segments around it.
        configs: the different configurations of the sparse layers, see `note_configs`.
        layers: what each sparse layer ran, by name, see `note_configs`.
        record: the forwards so far, by kind.
        minds_fallbacks: whether a layer's `on_fallback` is another than "allow".
        compiled: forwards ran that were compiled with the whole model, which are not counted.
        held: names of the layers that the policy keeps dense.
        clock: the policy and where it reads the denoising step, a `PolicyClock`; None without a policy.
        handles: the handles of the hooks, by the name of the module that has them.
    """

    def __init__(self, family: str, parameters: tuple[str, ...]) -> None:
        self.family = family
        self.parameters = parameters
        self.grid: VideoGrid | None = None
        self.packed = False
        self.configs: tuple[Config, ...] = ()
        self.layers: dict[str, LayerRecord] = {}
        self.record = ForwardRecord()
        self.minds_fallbacks = False
        self.compiled = False
        self.held: frozenset[str] = frozenset()
        self.clock: Any = None
        self.handles: dict[str, tuple[torch.utils.hooks.RemovableHandle, ...]] = {}
        self._latest = Phase()

    @property
    def phase(self) -> Phase:
        """What the forward in progress asks of the layers, in this thread; without one the latest asked it."""
        call = self.current()
        return self._latest if call is None else call.phase

    def begin_forward(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the transformer."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._go_first()
        grid, layout, phase = None, None, Phase(dense=True, why=SWITCHED_OFF)
        switched = _THREAD.running.dense if compiling else _DENSE.get()
        if not any(state is self for state in switched):
            arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
            seen = FAMILIES[self.family].read_grid(transformer, arguments)
            packed = isinstance(seen, TokenLayout)
            self.grid, self.packed = seen.grid if packed else seen, packed
            # Sharded, blocks have a graph for each grid: where lengths are symbols, the backward exchanges tensors once
            # more, only to know how long they are.
            grid = self.grid
            if getattr(transformer, "_parallel_config", None) is None:
                grid = self._plan(grid, _device_of(arguments["hidden_states"]))
            layout = dataclasses.replace(seen, grid=grid) if packed else None
            phase = Phase()
            if self.clock is not None:
                phase = self.clock.phase(transformer, arguments.get("timestep"), self.grid.num_tokens)
        self._latest = phase
        _THREAD.running.call = Call(self, grid, layout, phase, phase.as_text(), self._outside(_THREAD.running.call))

    def _plan(self, seen: VideoGrid, device: torch.device) -> PlannedGrid:
        """A forward's grid, with all that its layers will ask of it."""
        grid = PlannedGrid.of(seen, device)
        for config in self.configs:
            method_of(config).plan(config, grid, device)
        return grid

    def end_forward(self, transformer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook on the transformer, called whether the forward succeeds or raises.

        Raises:
            RuntimeError: a layer fell back whose `on_fallback` is "raise".
        """
        call = self._running()
        _THREAD.running.call = self._outside(_THREAD.running.call)
        if call is None:
            return
        if torch.compiler.is_compiling() and not self.minds_fallbacks:
            self.compiled = True
        else:
            self._note(call, output is not None)

    def _note(self, call: Call, succeeded: bool) -> None:
        """Adds a forward that ended to the record, unless it raised."""
        layers = self.layers.values()
        forward = Forward(
            grid=None if call.grid is None else call.grid.shape,
            packed=call.layout is not None,
            phase=call.phase,
            ran=() if call.phase.dense else self._ran(),
        )
        for layer in layers:
            layer.ran = None
        if succeeded:
            self.record.add(forward, self.layers)

    def _ran(self) -> tuple[Ran | None, ...]:
        """What each layer ran; None for those that were not reached."""
        if not torch.is_grad_enabled():
            return tuple([layer.ran for layer in self.layers.values()])
        # Compiled blocks with gradients leave no notes.
        untold = ((layer.ran, HELD_DENSE if name in self.held else UNTOLD) for name, layer in self.layers.items())
        return tuple([otherwise if ran is None else ran for ran, otherwise in untold])

    # A graph that counted would be another one for each count.
    _note._torchdynamo_disable = True

    def begin_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on a block of layers.

        A checkpoint that is not diffusers' own, which `bind_checkpointing` sees to, may run a block again during the
        backward. The block's first argument, which most of them keep for that, carries the call.
        """
        if torch.compiler.is_compiling():
            return
        carrier = args[0] if args else kwargs["hidden_states"]
        call = self._running()
        if call is not None:
            carrier._foveal_call = call
        elif _in_backward():
            _THREAD.running.recomputed = getattr(carrier, "_foveal_call", None)

    def bind_checkpointing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A transformer's checkpointing function (block, *arguments) for the blocks of the forward in progress."""
        call = self._running()
        if call is None:
            return function
        return lambda block, *args, **kwargs: function(_BlockOfCall(block, call), *args, **kwargs)

    def current(self) -> Call | None:
        """The call that the block that runs belongs to; None outside of a forward."""
        call = self._running()
        if call is None and not torch.compiler.is_compiling() and _in_backward():
            call = _THREAD.running.recomputed
            return call if call is not None and call.state is self else None
        return call

    def _running(self) -> Call | None:
        call = _THREAD.running.call
        return call if call is not None and call.state is self else None

    def _outside(self, call: Call | None) -> Call | None:
        """`call`, or what it interrupts if it is this transformer's: no forward contains one of the same model."""
        return call.outer if call is not None and call.state is self else call

    def _go_first(self) -> None:
        """Puts the hooks of the blocks before any that came later and replaces their arguments, as FSDP2's does."""
        for handle, *_ in self.handles.values():
            hooks = handle.hooks_dict_ref()
            if next(iter(hooks)) != handle.id:
                hooks.move_to_end(handle.id, last=False)


class _BlockOfCall:
    """A block that belongs to one call, whenever it is called: what a checkpointing function gets in its place."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self._block, self._call = block, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        former, _THREAD.running.call = _THREAD.running.call, self._call
        try:
            return self._block(*args, **kwargs)
        finally:
            _THREAD.running.call = former

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _device_of(hidden_states: Tensor | Sequence[Tensor]) -> torch.device:
    """Some transformers take a list of samples."""
    return (hidden_states if isinstance(hidden_states, Tensor) else hidden_states[0]).device


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
