"""Replays a call: the second one like it is recorded, and those after it go through the record.

What the host does for a call of SLA or VSA is the same for all calls whose tensors have the same shapes and strides:
the same memory is taken, the same products and kernels are launched with the same numbers, and only addresses change.
To work all that out in Python takes longer than the kernels of a short sequence run. So a `Record` keeps the steps, and
a replay does nothing but take memory, fill in addresses and launch.

Results that only a backward reads can come packed in one tensor: each tensor that autograd keeps costs it time.

Recorded are the operators that PyTorch runs, by a dispatch mode, and the kernels, by `host.launch`. Views are not
steps: a view is an offset into the tensor that it is of. What runs on a `side_stream` does so in a replay, too. What
waits for the device is not recorded, and such calls go on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from foveal.kernels import host
from foveal.kernels.record import (
    Allocation,
    Call,
    DirectLaunch,
    Enter,
    Launch,
    Leave,
    Map,
    Operator,
    Packing,
    Place,
    Record,
    Results,
    Tiles,
    packed,
    pooled,
    slots_of,
)

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
# What reads a tensor's values on the host.
READS = (aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.equal.default)


class Recorder(TorchDispatchMode):
    """Records what runs inside of it, in this thread.

    Args:
        tensors: the inputs, or None.

    Attributes:
        why_not: why there can be no record; None if there can.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.why_not: str | None = None
        self._steps: list[Any] = []
        self._values: list[Tensor | None] = list(tensors)
        self._inputs = len(tensors)
        self._kinds = [None if x is None else (x.dtype, x.dim()) for x in tensors]
        # By identity; memory that the call gives back is not kept.
        self._places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for slot, x in enumerate(tensors):
            if x is not None and x not in self._places:
                self._places[x] = Place(slot, 0, None)

    def __enter__(self) -> Recorder:
        host.RECORDING.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        host.RECORDING.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), named=None) -> Any:
        named = named or {}
        results = function(*arguments, **named)
        several = type(results) in (tuple, list)
        made = results if several else (results,)
        if function in READS:
            self.why_not = f"{function} reads values on the host"
        elif function in ALLOCATIONS:
            (x,) = made
            slot = self._new_slot(x)
            self._steps.append(Allocation(slot, x.shape, x.stride(), x.dtype, x.device))
        elif not all(type(x) is Tensor for x in made):
            self.why_not = f"{function} returns other things than tensors"
        else:
            self._operator(function, arguments, named, made, several)
        return results

    def _operator(
        self, function, arguments: tuple, named: dict[str, Any], made: Sequence[Tensor], several: bool
    ) -> None:
        given = _tensors((arguments, tuple(named.values())))
        slots, is_view = [], not function._schema.is_mutable
        before = self._template((arguments, tuple(named.items())))
        for x in made:
            base = next((y for y in given if y.untyped_storage()._cdata == x.untyped_storage()._cdata), None)
            if x in self._places:
                slots.append(None)
            elif base is not None:
                slots.append(None)
                place = self._place(base)
                offset = place.offset + (x.data_ptr() - base.data_ptr() if x.numel() else 0)
                dtype, dims = self._kinds[place.slot]
                if x.dtype != dtype and (dtype, dims) != (torch.uint8, 1):
                    self.why_not = f"{function} reads a tensor in another dtype"
                lies = x.shape, x.stride()
                self._places[x] = Place(place.slot, offset, lies, None if x.dtype == dtype else x.dtype)
            else:
                slots.append(self._new_slot(x))
                is_view = False
        if not is_view:
            self._steps.append(Operator(function, *before, tuple(slots), several))

    def launched(self, launcher: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        """A kernel was launched."""
        template = {name: self._template(x) for name, x in named.items()}
        direct = launcher.direct(named) if isinstance(launcher, host.Launcher) else None
        if direct is None:
            self._steps.append(Launch(launcher, grid, tuple(template.items())))
            return
        arguments: list[Any] = []
        for name, tiles in direct.parameters:
            x = template[name]
            if type(x) is Tiles:
                make, rest = direct.tensor_map(x.descriptor, tiles)
                arguments += Map(x.place, make), *rest
            else:
                arguments.append(x)
        self._steps.append(DirectLaunch(direct.launch_with(grid), tuple(arguments)))

    def called(self, function: Callable[[], object]) -> None:
        """The host did something else, which a replay does too."""
        self._steps.append(Call(function))

    def entered(self, context: AbstractContextManager) -> None:
        """What follows, until `left`, runs in this context."""
        self._steps.append(Enter(context))

    def left(self) -> None:
        self._steps.append(Leave())

    def record(self, results: Sequence[Tensor | None], own: int | None = None) -> Record | None:
        """What was recorded, of a call that returned this; None if `why_not`. Results from `own` on may be packed."""
        places = [None if x is None else self._place(x) for x in results]
        if self.why_not is not None:
            return None
        last: dict[int, int] = {}
        for index, step in enumerate(self._steps):
            for slot in (*slots_of(step), *([step.slot] if isinstance(step, Allocation) else ())):
                last[slot] = index
        for place in places:
            if place is not None:
                last.pop(place.slot, None)
        constants = {slot for slot, x in enumerate(self._values) if x is not None}
        done: dict[int, list[int]] = {}
        for slot, index in last.items():
            if slot not in constants:
                done.setdefault(index, []).append(slot)
        steps = [step._replace(done=tuple(done.get(index, ()))) for index, step in enumerate(self._steps)]
        values, packing = [None] * self._inputs + self._values[self._inputs :], None
        if own is not None:
            steps, values, places, packing = packed(steps, values, places, own)
        returned = {place.slot for place in places if place is not None}
        return Record(*pooled(steps, values, returned), places, packing)

    def _new_slot(self, x: Tensor, value: Tensor | None = None) -> int:
        slot = len(self._values)
        self._values.append(value)
        self._kinds.append((x.dtype, x.dim()))
        self._places[x] = Place(slot, 0, None)
        return slot

    def _place(self, x: Tensor) -> Place:
        """Where a tensor is; what was there before the call is a constant."""
        if x not in self._places:
            self._new_slot(x, x)
        return self._places[x]

    def _template(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._place(x)
        if type(x) in (list, tuple):
            return type(x)([self._template(y) for y in x])
        if isinstance(getattr(x, "base", None), Tensor):
            return Tiles(x, self._place(x.base))
        return x


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if type(arguments) in (list, tuple):
        return [x for part in arguments for x in _tensors(part)]
    return []


def kind_of(tensors: Sequence[Tensor | None]) -> Hashable | None:
    """What tells calls on tensors apart that need records of their own; None where no call is to be recorded.

    Calls of a kind differ only in what their tensors hold and where they lie.
    """
    if not host.DOORS["replay"].open or torch.is_inference_mode_enabled():
        return None
    device = host.current_device_of(tensors[0])
    if device is None:
        return None
    identities = [id(x) for x in tensors]
    twice = None  # which tensors are one and the same
    if len(set(identities)) < len(identities):
        twice = tuple([identities.index(x) for x in identities])
    kinds = [None if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for x in tensors]
    return device, twice, *kinds


class Replays:
    """Calls of a function on tensors of one kind: the first compiles kernels and fills caches, the second is recorded,
    and later ones are replayed.

    Args:
        function: what to call. What it does may depend on the shapes and strides of its tensors, not on their values.
            It returns tensors, or None among them.
        own: results from here on, all tensors, may come packed; None if none may.
        called: whether the first call was made already.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor | None]], Results], own: int | None = None, *, called: bool = False
    ) -> None:
        self._function, self._own, self._called = function, own, called
        self._record: Record | bool | None = None  # False for what cannot be recorded

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Results, Packing | None]:
        """The function's results, and how they are packed; None if they are not."""
        record = self._record
        if type(record) is Record and not host.observed():
            return record.run(tensors), record.packing
        if record is not None or not self._called or host.RECORDING.recorder is not None:
            self._called = True
            return self._function(tensors), None
        with Recorder(tensors) as recorder:
            results = self._function(tensors)
        self._record = recorder.record(results, self._own) or False
        return results, None


# By what a call is.
_REPLAYS: dict[Hashable, Replays] = {}
host.CACHES.append(_REPLAYS)


def replayed(function: Callable[..., Results], tensors: Sequence[Tensor | None], options: Hashable) -> Results:
    """`function(tensors, options)`, from a record if there is one of such a call.

    Args:
        function: as that of `Replays`, the same function for good.
        tensors: all tensors that it reads and that are not constants, or None.
        options: all else that it depends on.
    """
    kind = kind_of(tensors)
    if kind is None:
        return function(tensors, options)
    key = function, options, kind
    replays = _REPLAYS.get(key)
    if replays is None:
        replays = host.remember(_REPLAYS, key, Replays(lambda tensors: function(tensors, options)))
    return replays(tensors)[0]
