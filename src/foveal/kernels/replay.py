"""Replays a call: the second one like it is recorded, and those after it go through the record.

What the host does for a call of SLA or VSA is the same for all calls whose tensors have the same shapes and strides:
the same memory is taken, the same products and kernels are launched with the same numbers, and only addresses change.
To work all that out in Python takes longer than the kernels of a short sequence run. So a `Record` keeps the steps, and
a replay does nothing but take memory, fill in addresses and launch.

Recorded are the operators that PyTorch runs, by a dispatch mode, and the kernels, by `host.launch`. Views are not
steps: a view is an offset into the tensor that it is of. What waits for the device, or changes streams, is not
recorded, and such calls go on as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from foveal.kernels import host

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
# Small memory is taken at once: no more than so many bytes, each part at a multiple of what PyTorch's own are at.
POOL_BYTES, ALIGNMENT = 4 * 2**20, 512
# What reads a tensor's values on the host.
READS = (aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.equal.default)

Results = tuple[tuple[Tensor | None, ...], Hashable]


class Place(NamedTuple):
    """A tensor of a recorded call.

    slot: the tensor whose memory it is in: an input, a constant, or what a step makes.
    offset: bytes from that tensor's first.
    lies: its size and stride where it is another tensor than that of the slot; else None.
    """

    slot: int
    offset: int
    lies: tuple[torch.Size, tuple[int, ...]] | None

    def tensor(self, values: list) -> Tensor:
        """The tensor itself, in a replay."""
        base = values[self.slot]
        if self.lies is None:
            return base
        return base.as_strided(*self.lies, base.storage_offset() + self.offset // base.element_size())

    def address(self, values: list) -> int:
        return values[self.slot].data_ptr() + self.offset


def _filled(template: Any, values: list) -> Any:
    """A template with its places filled in."""
    kind = type(template)
    if kind is Place:
        return template.tensor(values)
    if kind in (list, tuple):
        return kind([_filled(x, values) for x in template])
    if kind is _Tiles:
        return template.filled(values)
    return template


class _Tiles(NamedTuple):
    """A TMA descriptor of a tensor."""

    descriptor: Any
    place: Place

    def filled(self, values: list) -> Any:
        descriptor = copy.copy(self.descriptor)
        descriptor.base = self.place.tensor(values)
        return descriptor


class _Allocation(NamedTuple):
    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    done: tuple[int, ...] = ()

    def run(self, values: list) -> None:
        values[self.slot] = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class _Operator(NamedTuple):
    """An operator of PyTorch's; `made` are the slots of its results, None for what is not new."""

    function: Callable[..., Any]
    arguments: tuple
    named: tuple[tuple[str, Any], ...]
    made: tuple[int | None, ...]
    done: tuple[int, ...] = ()

    def run(self, values: list) -> None:
        named = {name: _filled(x, values) for name, x in self.named}
        results = self.function(*_filled(self.arguments, values), **named)
        for slot, result in zip(self.made, results if type(results) in (tuple, list) else (results,), strict=True):
            if slot is not None:
                values[slot] = result


class _Launch(NamedTuple):
    """A kernel launched as `host.launch` does it."""

    launcher: Callable[[tuple[int, ...], dict[str, Any]], None]
    grid: tuple[int, ...]
    named: tuple[tuple[str, Any], ...]
    done: tuple[int, ...] = ()

    def run(self, values: list) -> None:
        self.launcher(self.grid, {name: _filled(x, values) for name, x in self.named})


class _DirectLaunch(NamedTuple):
    """A compiled kernel launched by its C launcher, with numbers for addresses.

    fixed: its arguments; those at `addresses`, `tuples` and `maps` are filled in.
    """

    launch: Callable[[list], None]
    fixed: list
    addresses: tuple[tuple[int, Place], ...]
    tuples: tuple[tuple[int, tuple], ...]
    maps: tuple[tuple[int, Place, Callable[[int], Any], dict[int, Any]], ...]
    done: tuple[int, ...] = ()

    def run(self, values: list) -> None:
        arguments = self.fixed.copy()
        for position, (slot, offset, _) in self.addresses:
            arguments[position] = values[slot].data_ptr() + offset
        for position, parts in self.tuples:
            arguments[position] = tuple([x.address(values) if type(x) is Place else x for x in parts])
        for position, (slot, offset, _), make, known in self.maps:
            address = values[slot].data_ptr() + offset
            found = known.get(address)
            if found is None:
                if len(known) >= host.MOST:
                    known.clear()
                found = known[address] = make(address)
            arguments[position] = found
        self.launch(arguments)


class Record:
    """The steps of a call.

    Args:
        steps: what it does, in order; `done` of each are the slots that no later step reads.
        values: constants by slot, None for the others; the inputs come first.
        results: the places of what it returns, None for None.
        rest: what it returns beside tensors.
    """

    def __init__(self, steps: Sequence[Any], values: list, results: Sequence[Place | None], rest: Hashable) -> None:
        self.steps, self.values, self.results, self.rest = tuple(steps), values, tuple(results), rest

    def run(self, tensors: Sequence[Tensor | None]) -> Results:
        """The call's results for other tensors that lie like those that were recorded."""
        values = self.values.copy()
        values[: len(tensors)] = tensors
        for step in self.steps:
            step.run(values)
            for slot in step.done:
                values[slot] = None
        return tuple([None if place is None else place.tensor(values) for place in self.results]), self.rest


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
        made = results if type(results) in (tuple, list) else (results,)
        if function in READS:
            self.why_not = f"{function} reads values on the host"
        elif function in ALLOCATIONS:
            (x,) = made
            slot = self._new_slot(x)
            self._steps.append(_Allocation(slot, x.shape, x.stride(), x.dtype, x.device))
        elif not all(type(x) is Tensor for x in made):
            self.why_not = f"{function} returns other things than tensors"
        else:
            self._operator(function, arguments, named, made)
        return results

    def _operator(self, function, arguments: tuple, named: dict[str, Any], made: Sequence[Tensor]) -> None:
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
                if x.dtype != base.dtype:
                    self.why_not = f"{function} reads a tensor in another dtype"
                self._places[x] = Place(place.slot, offset, (x.shape, x.stride()))
            else:
                slots.append(self._new_slot(x))
                is_view = False
        if not is_view:
            self._steps.append(_Operator(function, *before, tuple(slots)))

    def launched(self, launcher: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        """A kernel was launched."""
        template = {name: self._template(x) for name, x in named.items()}
        direct = launcher.direct(named) if isinstance(launcher, host.Launcher) else None
        if direct is None:
            self._steps.append(_Launch(launcher, grid, tuple(template.items())))
            return
        fixed, addresses, tuples, maps = [], [], [], []
        for name, tiles in direct.parameters:
            x = template[name]
            position = len(fixed)
            if type(x) is _Tiles:
                make, rest = direct.tensor_map(x.descriptor, tiles)
                maps.append((position, x.place, make, {}))
                fixed += None, *rest
                continue
            if type(x) is Place:
                addresses.append((position, x))
            elif type(x) is tuple and any(type(y) is Place for y in x):
                tuples.append((position, x))
            fixed.append(x)
        launch = direct.launch_with(grid)
        self._steps.append(_DirectLaunch(launch, fixed, tuple(addresses), tuple(tuples), tuple(maps)))

    def record(self, results: Sequence[Tensor | None], rest: Hashable) -> Record | None:
        """What was recorded, of a call that returned this; None if `why_not`."""
        places = [None if x is None else self._place(x) for x in results]
        if self.why_not is not None:
            return None
        last: dict[int, int] = {}
        for index, step in enumerate(self._steps):
            for slot in (*_slots(step), *([step.slot] if isinstance(step, _Allocation) else ())):
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
        values = [None] * self._inputs + self._values[self._inputs :]
        returned = {place.slot for place in places if place is not None}
        return Record(*_pooled(steps, values, returned), places, rest)

    def _new_slot(self, x: Tensor) -> int:
        slot = len(self._values)
        self._values.append(None)
        self._places[x] = Place(slot, 0, None)
        return slot

    def _place(self, x: Tensor) -> Place:
        """Where a tensor is; what was there before the call is a constant."""
        if x not in self._places:
            slot = len(self._values)
            self._values.append(x)
            self._places[x] = Place(slot, 0, None)
        return self._places[x]

    def _template(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._place(x)
        if type(x) in (list, tuple):
            return type(x)([self._template(y) for y in x])
        if isinstance(getattr(x, "base", None), Tensor):
            return _Tiles(x, self._place(x.base))
        return x


def _pooled(steps: list[Any], values: list, returned: set[int]) -> tuple[list[Any], list]:
    """The steps and values with one allocation for all small memory that only kernels see, by its address.

    It is taken as long as the call runs, which is what `POOL_BYTES` bounds.
    """
    seen = {slot for step in steps if not isinstance(step, _Allocation | _DirectLaunch) for slot in _slots(step)}
    offsets, total, device = {}, 0, None
    for step in steps:
        if isinstance(step, _Allocation) and step.slot not in seen | returned:
            size = -(-_bytes(step) // ALIGNMENT) * ALIGNMENT
            if total + size <= POOL_BYTES and device in (None, step.device):
                offsets[step.slot], total, device = total, total + size, step.device
    if len(offsets) < 2:
        return steps, values
    pool = len(values)

    def moved(x: Any) -> Any:
        if type(x) is Place:
            return Place(pool, offsets[x.slot] + x.offset, None) if x.slot in offsets else x
        return tuple([moved(y) for y in x]) if type(x) is tuple else x

    kept = [_Allocation(pool, torch.Size([total]), (1,), torch.uint8, device)]
    for step in steps:
        if isinstance(step, _Allocation) and step.slot in offsets:
            continue
        step = step._replace(done=tuple(slot for slot in step.done if slot not in offsets))
        if isinstance(step, _DirectLaunch):
            maps = tuple((position, moved(place), *rest) for position, place, *rest in step.maps)
            step = step._replace(addresses=moved(step.addresses), tuples=moved(step.tuples), maps=maps)
        kept.append(step)
    return kept, [*values, None]


def _bytes(step: _Allocation) -> int:
    """What the memory of an allocation spans."""
    if 0 in step.size:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(step.size, step.stride, strict=True))
    return (last + 1) * step.dtype.itemsize


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if type(arguments) in (list, tuple):
        return [x for part in arguments for x in _tensors(part)]
    return []


def _slots(template: Any) -> list[int]:
    """The slots that a step reads."""
    if type(template) is Place:
        return [template.slot]
    if isinstance(template, list | tuple):
        return [slot for x in template for slot in _slots(x)]
    return []


# By what a call is, its record; 1 after the first call, False for one that cannot be recorded.
_RECORDS: dict[Hashable, Record | int | bool] = {}
host.CACHES.append(_RECORDS)


def replayed(function: Callable[..., Results], tensors: Sequence[Tensor | None], options: Hashable) -> Results:
    """`function(tensors, options)`, from a record if there is one of such a call.

    The first call of its kind compiles kernels and fills caches, the second is recorded, later ones are replayed.

    Args:
        function: what to call, the same function for good. What it does may depend on how its tensors lie, not on what
            they hold. It returns tensors, and what else there is.
        tensors: all tensors that it reads and that are not constants, or None.
        options: all else that it depends on.
    """
    if not host.DOORS["replay"].open or torch.is_inference_mode_enabled():
        return function(tensors, options)
    kinds = tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors])
    device = host.current_device_of(tensors[0])
    identities = [id(x) for x in tensors]  # one tensor may be passed twice
    key = function, options, device, kinds, tuple([identities.index(x) for x in identities])
    record = _RECORDS.get(key)
    if type(record) is Record and not host.observed():
        return record.run(tensors)
    if record is None or record is False or device is None:
        if record is None and device is not None:
            if len(_RECORDS) >= host.MOST:
                _RECORDS.clear()
            _RECORDS[key] = 1
        return function(tensors, options)
    if host.RECORDING.recorder is not None:
        return function(tensors, options)
    with Recorder(tensors) as recorder:
        results, rest = function(tensors, options)
    _RECORDS[key] = recorder.record(results, rest) or False
    return results, rest
