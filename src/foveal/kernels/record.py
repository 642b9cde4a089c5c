"""A recorded call: its steps, and the function that they are written out as.

A replay should cost the host little beyond what PyTorch and the launches cost. So a `Record` becomes one Python
function with a line for each step, in which all numbers but addresses are constants: no step is looked at twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.host import remember

# Small memory is taken at once: no more than so many bytes, each part at a multiple of what PyTorch's own are at.
POOL_BYTES, ALIGNMENT = 4 * 2**20, 512

# What PyTorch reaches in 1 to 3 us less by another name.
SHORTER = {
    torch.ops.aten.bmm.out: torch.bmm,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.zeros.default: torch.zeros,
}

Results = tuple[Tensor | None, ...]


class Place(NamedTuple):
    """A tensor of a recorded call.

    slot: the tensor whose memory it is in: an input, a constant, or what a step makes.
    offset: bytes from that tensor's first.
    lies: its size and stride if it is a view of the slot's tensor; else None.
    dtype: that of a view of a slot of bytes; None if it is that of the slot's tensor.
    """

    slot: int
    offset: int
    lies: tuple[torch.Size, tuple[int, ...]] | None
    dtype: torch.dtype | None = None


class Tiles(NamedTuple):
    """A TMA descriptor of a tensor."""

    descriptor: Any
    place: Place


class Source:
    """The lines of a function, and the values that they name.

    Args:
        values: constants by slot, None for the others.
    """

    def __init__(self, values: Sequence[Tensor | None]) -> None:
        self.lines: list[str] = []
        self.depth = 1
        self.names: dict[str, Any] = {f"v{slot}": x for slot, x in enumerate(values) if x is not None}
        self.new: dict[int, torch.dtype] = {}  # of slots that begin where their storage does
        self._addressed: set[int] = set()

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def constant(self, x: Any) -> str:
        if x is None or type(x) in (bool, int):
            return repr(x)
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name

    def address(self, place: Place) -> str:
        """An expression for the address of a tensor's first byte. The function asks each slot for its address once."""
        if place.slot not in self._addressed:
            self._addressed.add(place.slot)
            self.line(f"a{place.slot} = v{place.slot}.data_ptr()")
        return f"a{place.slot} + {place.offset}" if place.offset else f"a{place.slot}"

    def tensor(self, place: Place) -> str:
        base = f"v{place.slot}"
        if place.lies is None:
            return base
        size, stride = map(tuple, place.lies)
        if place.slot in self.new:
            start = place.offset // (place.dtype or self.new[place.slot]).itemsize
        elif place.dtype is None:
            start = f"{base}.storage_offset() + {place.offset} // {base}.itemsize"
        else:
            start = f"({base}.storage_offset() + {place.offset}) // {place.dtype.itemsize}"
        if place.dtype is not None:
            base = f"{base}.view({self.constant(place.dtype)})"
        return f"{base}.as_strided({size}, {stride}, {start})"

    def value(self, template: Any) -> str:
        """A template with its places filled in."""
        kind = type(template)
        if kind is Place:
            return self.tensor(template)
        if kind in (list, tuple):
            parts = "".join(f"{self.value(x)}, " for x in template)
            return f"[{parts}]" if kind is list else f"({parts})"
        if kind is Tiles:
            return f"{self.constant(_tiles_of)}({self.constant(template.descriptor)}, {self.tensor(template.place)})"
        return self.constant(template)


def _tiles_of(descriptor: Any, x: Tensor) -> Any:
    """The same descriptor of another tensor."""
    descriptor = copy.copy(descriptor)
    descriptor.base = x
    return descriptor


class Allocation(NamedTuple):
    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    done: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        make, dtype, device = map(source.constant, (torch.empty_strided, self.dtype, self.device))
        lies = f"{tuple(self.size)}, {tuple(self.stride)}"
        source.new[self.slot] = self.dtype
        source.line(f"v{self.slot} = {make}({lies}, dtype={dtype}, device={device})")

    @property
    def made(self) -> tuple[int, ...]:
        return (self.slot,)

    @property
    def nbytes(self) -> int:
        """What its memory spans."""
        if 0 in self.size:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Operator(NamedTuple):
    """An operator of PyTorch's; `made` are the slots of its results, None for what is not new.

    several: it returns a sequence of results, not one.
    """

    function: Callable[..., Any]
    arguments: tuple
    named: tuple[tuple[str, Any], ...]
    made: tuple[int | None, ...]
    several: bool
    done: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        named = [f"{name}={source.value(x)}" for name, x in self.named]
        function = source.constant(SHORTER.get(self.function, self.function))
        call = f"{function}({', '.join([*map(source.value, self.arguments), *named])})"
        if all(slot is None for slot in self.made):
            source.line(call)
            return
        results = ", ".join("_" if slot is None else f"v{slot}" for slot in self.made)
        source.line(f"{results}{',' if self.several else ''} = {call}")
        if None in self.made:
            source.line("del _")


class Launch(NamedTuple):
    """A kernel launched as `host.launch` does it."""

    launcher: Callable[[tuple[int, ...], dict[str, Any]], None]
    grid: tuple[int, ...]
    named: tuple[tuple[str, Any], ...]
    done: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        named = ", ".join(f"{name!r}: {source.value(x)}" for name, x in self.named)
        source.line(f"{source.constant(self.launcher)}({self.grid}, {{{named}}})")


class DirectLaunch(NamedTuple):
    """A compiled kernel launched by its C launcher, with numbers for addresses.

    arguments: a `Place` stands for its address.
    """

    launch: Callable[[list], None]
    arguments: tuple
    done: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        arguments = ", ".join([self._argument(x, source) for x in self.arguments])
        source.line(f"{source.constant(self.launch)}([{arguments}])")

    @staticmethod
    def _argument(x: Any, source: Source) -> str:
        if type(x) is Place:
            return source.address(x)
        if type(x) is tuple:
            return f"({''.join(f'{DirectLaunch._argument(y, source)}, ' for y in x)})"
        if type(x) is Map:
            known = Maps(x.make)
            address = source.address(x.place)
            return f"{source.constant(known.get)}({address}) or {source.constant(known.new)}({address})"
        return source.constant(x)


class Map(NamedTuple):
    """A TMA map of the memory at a place, among the arguments of a `DirectLaunch`."""

    place: Place
    make: Callable[[int], Any]


class Maps(dict):
    """TMA maps by address."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def new(self, address: int) -> Any:
        return remember(self, address, self._make(address))


class Call(NamedTuple):
    """Something else that the host does."""

    function: Callable[[], object]
    done: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        source.line(f"{source.constant(self.function)}()")


class Enter(NamedTuple):
    """The steps from this one to the next `Leave` run in a context."""

    context: AbstractContextManager
    done: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        source.line(f"with {source.constant(self.context)}:")
        source.depth += 1


class Leave(NamedTuple):
    done: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def write(self, source: Source) -> None:
        source.depth -= 1


class Part(NamedTuple):
    """A tensor in a tensor of bytes that begins `offset` bytes from its first."""

    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.offset :].view(self.dtype).as_strided(self.size, self.stride)


class Packing(NamedTuple):
    """How results are packed: the last tensor has those with a `Part`, and the others come before it."""

    parts: tuple[Part | None, ...]

    @property
    def length(self) -> int:
        """How many tensors the results are when packed."""
        return self.parts.count(None) + 1

    def unpacked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        *others, whole = tensors
        rest = iter(others)
        return [next(rest) if part is None else part.of(whole) for part in self.parts]


class Record:
    """The steps of a call.

    Args:
        steps: what it does, in order; `done` of each are the slots that no later step reads.
        values: constants by slot, None for the others; the inputs come first.
        results: the places of what it returns, None for None.
        packing: how the last of the results are packed; None if they are not.

    Attributes:
        run: the call's results for other tensors of the same shapes, strides, and dtypes as when it was recorded.
    """

    def __init__(
        self,
        steps: Sequence[Any],
        values: list[Tensor | None],
        results: Sequence[Place | None],
        packing: Packing | None = None,
    ) -> None:
        self.steps, self.packing = tuple(steps), packing
        source = Source(values)
        for step in self.steps:
            step.write(source)
            for slot in step.done:
                source.line(f"del v{slot}")
        source.line(f"return {source.value(tuple(results))}")
        made = {slot for step in self.steps for slot in step.made}
        read = {slot for step in (*self.steps, tuple(results)) for slot in slots_of(step)}
        given = [f"    v{slot} = tensors[{slot}]" for slot in sorted(read - made) if values[slot] is None]
        text = "\n".join(["def replay(tensors):", *given, *source.lines])
        exec(compile(text, "<replay>", "exec"), source.names)
        self.run: Callable[[Sequence[Tensor | None]], Results] = source.names["replay"]


def pooled(steps: Sequence[Any], values: list[Tensor | None], returned: set[int]) -> tuple[list[Any], list]:
    """The steps and values with one allocation for all small memory that only kernels see, by its address.

    It is taken as long as the call runs, which is what `POOL_BYTES` bounds.
    """
    seen = {slot for step in steps if not isinstance(step, Allocation | DirectLaunch) for slot in slots_of(step)}
    chosen, total = [], 0
    for step in steps:
        if isinstance(step, Allocation) and step.slot not in seen | returned:
            size = _aligned(step.nbytes)
            if total + size <= POOL_BYTES and (not chosen or chosen[0].device == step.device):
                chosen.append(step)
                total += size
    return _at_once(steps, values, chosen)[:2]


def packed(
    steps: Sequence[Any], values: list[Tensor | None], places: Sequence[Place | None], own: int
) -> tuple[list[Any], list[Tensor | None], list[Place | None], Packing | None]:
    """The steps, values, and results with one allocation for all that is returned after the first `own` results.

    The packing is of what comes after these; None if there is too little to pack.
    """
    slots = [None if place is None else place.slot for place in places]
    allocations = {step.slot: step for step in steps if isinstance(step, Allocation)}
    chosen = [allocations[slot] for slot in slots[own:] if slot in allocations and slots.count(slot) == 1]
    if len(chosen) < 2 or len({one.device for one in chosen}) > 1:
        return list(steps), values, list(places), None
    steps, values, move = _at_once(steps, values, chosen)
    packing, rest = [], list(places[:own])
    for place in places[own:]:
        moved = move(place)
        if moved is place:
            packing.append(None)
            rest.append(place)
        else:
            packing.append(Part(moved.offset, *moved.lies, moved.dtype))
    return steps, values, [*rest, Place(len(values) - 1, 0, None)], Packing(tuple(packing))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _at_once(
    steps: Sequence[Any], values: list[Tensor | None], chosen: Sequence[Allocation]
) -> tuple[list[Any], list[Tensor | None], Callable[[Any], Any]]:
    """The steps and values with one allocation, in a last slot, for several; and what moves places there."""
    if len(chosen) < 2:
        return list(steps), values, lambda x: x
    whole, total, moved = len(values), 0, {}
    for one in chosen:
        moved[one.slot] = total, one
        total += _aligned(one.nbytes)

    def move(x: Any) -> Any:
        kind = type(x)
        if kind is Place:
            if x.slot not in moved:
                return x
            offset, one = moved[x.slot]
            return Place(whole, offset + x.offset, x.lies or (one.size, one.stride), x.dtype or one.dtype)
        if kind is Map:
            return Map(move(x.place), x.make)
        if kind is Tiles:
            return Tiles(x.descriptor, move(x.place))
        return kind([move(y) for y in x]) if kind in (list, tuple) else x

    kept = [Allocation(whole, torch.Size([total]), (1,), torch.uint8, chosen[0].device)]
    for step in steps:
        if isinstance(step, Allocation) and step.slot in moved:
            continue
        step = step._replace(done=tuple(slot for slot in step.done if slot not in moved))
        if isinstance(step, DirectLaunch | Operator):
            step = step._replace(arguments=move(step.arguments))
        if isinstance(step, Launch | Operator):
            step = step._replace(named=move(step.named))
        kept.append(step)
    return kept, [*values, None], move


def slots_of(template: Any) -> list[int]:
    """The slots that a step reads."""
    if type(template) is Place:
        return [template.slot]
    if isinstance(template, list | tuple):
        return [slot for x in template for slot in slots_of(x)]
    return []
