"""What the host does around kernels: launches, descriptors, streams and facts about devices. Importing it needs torch.

This is the only file that goes through private doors of Triton and torch. Each is a `Door` that names the releases it
was written for: with another release, or with `DOORS[name].on = False`, the public way is taken, which is slower.
`clear` empties every cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.checks import clear_constants
from foveal.kernels import chips

MOST = 1024  # entries of a cache before it starts anew

# Launchers by their kernels' identities, and every other cache that `clear` empties.
_launchers: dict[int, Any] = {}
CACHES: list[dict] = [_launchers]


def remember(cache: dict, key: Hashable, value: Any) -> Any:
    """Puts `value` into a cache, which forgets all else if it is full, and returns it."""
    if len(cache) >= MOST:
        cache.clear()
    cache[key] = value
    return value


class _Recording(threading.local):
    """Who records the launches of this thread (see `foveal.kernels.replay`); None for nobody."""

    recorder: Any = None


RECORDING = _Recording()


@dataclass
class Door:
    """A way around a library's public interface.

    library: the package.
    releases: "major.minor" releases that the way was read and tested with.
    on: whether to take it; False is the off switch.
    """

    library: str
    releases: tuple[str, ...]
    on: bool = True

    @functools.cached_property
    def fits(self) -> bool:
        """Whether one of the releases is installed."""
        try:
            installed = importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return False
        return ".".join(installed.split(".")[:2]) in self.releases

    @property
    def open(self) -> bool:
        return self.on and self.fits


DOORS = {
    # A variant that was compiled is launched by its own C launcher; Triton would look at every argument anew.
    "launch": Door("triton", ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")),
    # Its C launcher is called without the hooks of profilers, where none are set.
    "run": Door("triton", ("3.6", "3.9")),
    # That launcher takes addresses for tensors and ready-made TMA maps; Triton would look each of them up again.
    "direct": Door("triton", ("3.6",)),
    # Calls after the second of a kind go through a record of its operators and launches.
    "replay": Door("torch", ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13")),
    # A descriptor of a tensor with the shape and strides of an earlier one copies its fields without checking them.
    "descriptor": Door("triton", ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")),
    # Whether a mode, a transform, or a hook on saved tensors is active, from the stacks that torch keeps.
    "modes": Door("torch", ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13")),
}


# --- Facts about devices ---------------------------------------------------------------------------------------------


@functools.cache
def num_sms(device: torch.device) -> int:
    """SMs of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def register_limit(registers: int) -> dict[str, int]:
    """The launch option that caps a kernel's registers, so that more programs share an SM; only on NVIDIA."""
    return {} if torch.version.hip else {"maxnreg": registers}


# --- Streams and the current device -----------------------------------------------------------------------------------

_NOTHING = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, on which Triton launches; costs little where it is that already."""
    if x.device.type == "cuda" and torch.cuda.current_device() == x.device.index:
        return _NOTHING
    return torch.cuda.device_of(x)


def current_device_of(x: Tensor) -> int | None:
    """The index of the device of `x` if it is the current one, -1 for a CPU; None for any other."""
    device = x.device
    if device.type == "cpu":
        return -1
    return device.index if device.type == "cuda" and torch.cuda.current_device() == device.index else None


# --- How a call comes in ----------------------------------------------------------------------------------------------


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors come in eager mode without a mode, a transform or a trace that must see custom operators.

    Then one autograd function does what costs PyTorch's operator registry 100 to 200 us a call.
    """
    if torch.compiler.is_compiling() or not DOORS["modes"].open:
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return _PLAIN.issuperset(map(type, tensors))


def has_saved_tensor_hooks() -> bool:
    """Whether hooks see what autograd saves, as those of checkpointing do; also where there is no way to know."""
    return not DOORS["modes"].open or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raises a NotImplementedError for tensors that carry forward-mode tangents: kernels have no such derivative."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "the GPU kernels have no forward-mode derivative (jvp); "
                'impl="reference" has one, at the cost of dense attention'
            )


# --- Descriptors ------------------------------------------------------------------------------------------------------


class Descriptors:
    """Makes TMA descriptors of tensors; all but the address is made once for tensors with the same shape and strides.

    Args:
        make: the descriptor, with the attribute `base`, of a tensor and further arguments.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._known: dict[tuple, tuple[type, dict[str, Any]]] = {}
        CACHES.append(self._known)

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        key = (x.shape, x.stride(), x.dtype, *arguments)
        known = self._known.get(key)
        if known is None:
            descriptor = self._make(x, *arguments)
            if DOORS["descriptor"].open:
                remember(self._known, key, (type(descriptor), vars(descriptor) | {"base": None}))
            return descriptor
        assert x.data_ptr() % 16 == 0, "TMA starts at multiples of 16 bytes"
        kind, attributes = known
        descriptor = object.__new__(kind)
        fields = descriptor.__dict__
        fields.update(attributes)
        fields["base"] = x
        return descriptor


# --- Launches ---------------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], **named: Any) -> None:
    """`kernel[grid](**named)`, on the current device and stream.

    `kernel[grid](...)` looks at each argument in detail to find the compiled variant that fits: 40 to 80 us a launch,
    more than many of these kernels run. This looks at what a variant depends on, and no further.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made, for good; it begins with `await_previous`, and its constants
            follow its other parameters.
        grid: numbers of programs.
        named: all parameters of the kernel, by name: tensors, descriptors, ints, floats, tuples of such, or None; and
            options: num_warps and the like.
    """
    # By the kernel's identity: to hash a kernel, Triton reads and hashes its source.
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        launcher = _launchers[id(kernel)] = _launcher_of(kernel)
    launcher(grid, named)
    if RECORDING.recorder is not None:
        RECORDING.recorder.launched(launcher, grid, named)


def _launcher_of(kernel: Any) -> Callable[[tuple[int, ...], dict[str, Any]], None]:
    from triton.runtime.jit import JITFunction

    # Interpreted; or on AMD, where variants also depend on the size of each tensor's memory.
    if not isinstance(kernel, JITFunction) or torch.version.hip or not DOORS["launch"].open:

        def through_triton(grid: tuple[int, ...], named: dict[str, Any]) -> None:
            kernel[grid](**named)

        return through_triton
    return Launcher(kernel)


def _int_fact(x: int) -> int:
    """What a variant knows of an integer it is specialized on: that it is 1, or a multiple of 16; and its width."""
    return (2 if x == 1 else 1 if x % 16 == 0 else 0) + (0 if -(2**31) <= x < 2**31 else 4)


def _facts(arguments: tuple, specialized: tuple[bool, ...] | None = None) -> list:
    """What variants are told apart by, of each argument; all integers count as specialized by default."""
    facts = []
    for x, matters in zip(arguments, specialized or (True,) * len(arguments), strict=True):
        kind = type(x)
        if kind is int:
            if matters:
                facts.append(_int_fact(x))
            else:
                facts.append(-(2**31) <= x < 2**31)
        elif kind is Tensor or isinstance(x, Tensor):
            facts += x.dtype, x.data_ptr() % 16 == 0
        elif kind is tuple:
            facts.append(len(x))
            for y in x:
                if type(y) is int:
                    facts.append(_int_fact(y))
                else:
                    facts += _facts((y,))
        elif x is None:
            facts.append(None)
        elif kind is not float:
            facts += x.base.dtype, *x.block_shape
    return facts


class Launcher:
    """Launches one Triton or Gluon kernel.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.run_time = tuple(p.name for p in kernel.params if not p.is_constexpr)
        self.constants = tuple(p.name for p in kernel.params if p.is_constexpr)
        self.specialized = tuple(not p.do_not_specialize for p in kernel.params if not p.is_constexpr)
        self._take = operator.itemgetter(*self.run_time)
        # Names as a call site gives them, to the names of constants and options among them.
        self._others: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._variants: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        """As `launch` has it."""
        device = torch.cuda.current_device()
        arguments = self._take(named)
        variant = self._variant(device, named, arguments)
        known = self._variants.get(variant)
        if known is None:
            early = {"launch_pdl": True} if chips.chip_of(torch.device("cuda", device)).starts_early else {}
            compiled = self.kernel[grid](**named, **early)
            if compiled is not None:  # Triton's compile hooks may keep it from launching
                self._variants[variant] = compiled, _runner(compiled, device)
        else:
            known[1]((*grid, 1, 1)[:3], (*arguments, *[named[name] for name in self.constants]))

    def _variant(self, device: int, named: dict[str, Any], arguments: tuple) -> tuple:
        names = tuple(named)
        others = self._others.get(names)
        if others is None:
            others = self._others[names] = tuple(name for name in names if name not in self.run_time)
        return device, others, *[named[name] for name in others], *_facts(arguments, self.specialized)

    def direct(self, named: dict[str, Any]) -> DirectKernel | None:
        """The variant that these parameters take, for its C launcher; None where there is no way to that."""
        device = torch.cuda.current_device()
        known = self._variants.get(self._variant(device, named, self._take(named)))
        if known is None or not DOORS["direct"].open:
            return None
        return DirectKernel.of(known[0], device, (*self.run_time, *self.constants), named)


class DirectKernel:
    """A compiled variant as its C launcher takes it.

    Args:
        compiled: the variant.
        device: the device of its tensors.
        launcher: Triton's function in C.
        parameters: names, in order, with what Triton knows of the descriptor that each one is; None for another.
    """

    def __init__(
        self, compiled: Any, device: int, launcher: Callable[..., None], parameters: Sequence[tuple[str, Any]]
    ) -> None:
        self.parameters = tuple(parameters)
        self._compiled, self._device, self._launcher = compiled, device, launcher

    @classmethod
    def of(cls, compiled: Any, device: int, names: Sequence[str], named: dict[str, Any]) -> DirectKernel | None:
        """None for a variant that wants scratch memory, or descriptors that are no TMA maps."""
        from triton.compiler import CompiledKernel

        run = getattr(compiled, "run", None)
        if not isinstance(compiled, CompiledKernel) or run.global_scratch_size or run.profile_scratch_size:
            return None
        launcher, known = run.launch, []
        if getattr(launcher, "__closure__", None):
            cells = (cell.cell_contents for cell in launcher.__closure__)
            inside = dict(zip(launcher.__code__.co_freevars, cells, strict=True))
            launcher, known = inside["launcher"], list(inside["tensordesc_meta"])
        parameters = []
        for name in names:
            described = isinstance(getattr(named[name], "base", None), Tensor)
            if described and (not known or known[0] is None):
                return None
            parameters.append((name, known.pop(0) if described else None))
        return cls(compiled, device, launcher, parameters)

    def launch_with(self, grid: tuple[int, ...]) -> Callable[[list], None]:
        """What launches it over a grid, on the current stream, from its arguments."""
        launcher, run, device = self._launcher, self._compiled.run, self._device
        function, metadata = self._compiled.function, self._compiled.packed_metadata
        options = run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None
        stream_of, size = torch._C._cuda_getCurrentRawStream, (*grid, 1, 1)[:3]

        def launch(arguments: list) -> None:
            launcher(*size, stream_of(device), function, *options, *arguments)

        return launch

    @staticmethod
    def tensor_map(descriptor: Any, known: Any) -> tuple[Callable[[int], Any], list[int]]:
        """What makes the TMA map of a tensor with the descriptor's shape at an address, and the arguments after it."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        there = copy.copy(descriptor)

        def make(address: int) -> Any:
            here = copy.copy(there)
            here.base = _Address(address)
            return make_tensordesc_arg(here, known)[0]

        there.base = None
        return make, [*descriptor.shape, *descriptor.strides]


class _Address(NamedTuple):
    """In a tensor's place."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def observed() -> bool:
    """Whether a profiler has set hooks that are to see Triton's launches."""
    if not DOORS["run"].open:
        return False
    from triton import knobs

    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _runner(compiled: Any, device: int) -> Callable[[tuple[int, int, int], tuple], None]:
    """What launches a compiled variant on the current stream of this device, from its grid and all its parameters."""
    from triton import knobs
    from triton.compiler import CompiledKernel

    def through_variant(grid: tuple[int, int, int], arguments: tuple) -> None:
        compiled[grid](*arguments)

    if not (DOORS["run"].open and isinstance(compiled, CompiledKernel)):
        return through_variant
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks, stream_of = knobs.runtime, torch._C._cuda_getCurrentRawStream

    def at_once(grid: tuple[int, int, int], arguments: tuple) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        # A profiler's hooks want what Triton prepares for them. An empty chain of hooks is none.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled[grid](*arguments)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return at_once


def clear() -> None:
    """Empties every cache: compiled variants, descriptors, streams, facts about devices, and constant tensors."""
    for cache in CACHES:
        cache.clear()
    for function in (chips.chip_of, num_sms):
        function.cache_clear()
    clear_constants()
