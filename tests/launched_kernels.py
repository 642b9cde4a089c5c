"""What the launch code compiles for a GPU that is not there: launches noted, kernels compiled and read as machine code.

The production code runs on CPU tensors with every kernel launch replaced by a note of what Triton would compile for it:
the very constants, types, divisibilities and options of production.
"""

import bisect
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from foveal.kernels import chips, host
from foveal.kernels.chips import Chip
from foveal.kernels.hopper import cubes, launch_linear
from foveal.kernels.hopper import launch as gluon_launch

# SMs that the launch code counts on; it decides only about run-time integers.
NUM_SMS = 132

# GPUs by their compilers' names, and the shared memory that each gives to one program.
CHIPS = {
    "sm_80": Chip("sm_80", 163 * 1024),
    "sm_86": Chip("sm_86", 99 * 1024),
    "sm_89": Chip("sm_89", 99 * 1024),
    "sm_90": Chip("sm_90", 227 * 1024),
    "sm_100": Chip("sm_100", 227 * 1024),
    "sm_120": Chip("sm_120", 99 * 1024),
    "gfx942": Chip("gfx942", 64 * 1024, warp_size=64),
    "gfx1100": Chip("gfx1100", 64 * 1024),
}


def target_of(chip: str) -> GPUTarget:
    """What Triton compiles for."""
    if chip.startswith("gfx"):
        return GPUTarget("hip", chip, CHIPS[chip].warp_size)
    return GPUTarget("cuda", int(chip.removeprefix("sm_")), CHIPS[chip].warp_size)


class Launched(NamedTuple):
    """One variant of a kernel for a chip of `CHIPS`; `constants` by name."""

    name: str
    chip: str
    constants: dict[str, Any]
    types: tuple[str, ...]
    source: ASTSource
    target: GPUTarget
    options: Any

    @property
    def key(self) -> tuple:
        """What tells variants apart."""
        return self.name, self.types, repr(sorted(self.source.attrs.items())), repr(self.constants), str(self.options)


# What Triton adds to a launch.
ADDED = {"debug": False, "instrumentation_mode": ""}


def _bind(kernel, backend, arguments, named):
    """Arguments by name, what of them a variant is compiled for, and options."""
    return create_function_from_signature(kernel.signature, kernel.params, backend)(*arguments, **named, **ADDED)


@contextlib.contextmanager
def as_if_on(monkeypatch, chip: str):
    """Production code takes CPU tensors for those of this chip of `CHIPS`, and has launched nothing yet.

    It replays no call: each works out its launches.
    """
    with monkeypatch.context() as patch:
        patch.setattr(host.DOORS["replay"], "on", False)
        patch.setattr(host, "_launchers", {})
        patch.setattr(chips, "chip_of", lambda device: CHIPS[chip])
        patch.setattr(torch.version, "hip", "6.4" if chip.startswith("gfx") else None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        for module in (gluon_launch, launch_linear, cubes):
            patch.setattr(module, "num_sms", lambda device: NUM_SMS)
        yield


@contextlib.contextmanager
def _instead_of_launches(monkeypatch, chip: str, run: Callable):
    """Production code runs as if on this chip of `CHIPS`, and every first launch of a variant is a call of `run`."""
    with monkeypatch.context() as patch, as_if_on(patch, chip):
        patch.setattr(JITFunction, "run", run)
        yield


@contextlib.contextmanager
def noted_launches(monkeypatch, chip: str):
    """A dict of `Launched`, without repetitions, that fills while production code runs as if on a chip of `CHIPS`."""
    target = target_of(chip)
    backend = make_backend(target)
    launched = {}

    def note(kernel, *arguments, grid, warmup, **named):
        bound, specialization, options = _bind(kernel, backend, arguments, named)
        packed = kernel._pack_args(backend, named | ADDED, bound, specialization, options)
        options, signature, constants, attributes = packed
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
        by_name = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
        one = Launched(kernel.__name__, chip, by_name, tuple(map(str, signature.values())), source, target, options)
        launched.setdefault(one.key, one)

    with _instead_of_launches(monkeypatch, chip, note):
        yield launched


class Variant:
    """In a compiled variant's place: it checks that what it is launched with is what it was compiled for."""

    def __init__(self, kernel, backend, arguments, named, calls: list) -> None:
        bound, self.compiled_for, _ = _bind(kernel, backend, arguments, named)
        self.kernel, self.backend, self.calls, self.named = kernel, backend, calls, named
        self.constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
        self.note("first", len(bound) - len(self.constants))

    def note(self, which: str, arguments: int) -> None:
        self.calls.append((self.kernel.__name__, which, tuple(map(str, self.compiled_for)), arguments))

    def __getitem__(self, grid):
        def run(*arguments) -> None:
            assert len(grid) == 3
            options = {name: value for name, value in self.named.items() if name not in self.kernel.arg_names}
            bound, compiled_for, _ = _bind(self.kernel, self.backend, arguments, options)
            assert compiled_for == self.compiled_for, self.kernel.__name__
            assert {name: bound[name] for name in self.constants} == self.constants, self.kernel.__name__
            self.note("again", len(arguments) - len(self.constants))

        return run


@contextlib.contextmanager
def checked_launches(monkeypatch, chip: str):
    """A list that fills with launches, ("kernel", "first" or "again", what the variant is for, how many arguments).

    Production code runs as if on a chip of `CHIPS`; all but first launches go to the variant that it took for theirs.
    """
    backend, calls = make_backend(target_of(chip)), []

    def run(kernel, *arguments, grid, warmup, **named):
        return Variant(kernel, backend, arguments, named, calls)

    with _instead_of_launches(monkeypatch, chip, run):
        yield calls


@contextlib.contextmanager
def guarded_launches(monkeypatch, chip: str):
    """A list that fills with launches, ("kernel", the tensor whose device was made the current one or None)."""
    guards, calls = [None], []

    @contextlib.contextmanager
    def device_of(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    def run(kernel, *arguments, grid, warmup, **named):
        calls.append((kernel.__name__, guards[-1]))

    with _instead_of_launches(monkeypatch, chip, run), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        yield calls


def first_to_memory(binary) -> str:
    """The first instruction that touches global memory, or that waits for the kernel before this one to end."""
    return re.search(r"\b(?:griddepcontrol\.wait|(?:ld|st|red|atom)\.global|cp\.async)\b", binary.asm["ptx"]).group()


class Figures(NamedTuple):
    """What a compiled kernel takes: registers a thread, bytes of shared memory, and spills in bytes a thread.

    loop_spills: stores to and loads from local memory in innermost loops around tensor-core products.
    spills: all stores to local memory.
    """

    registers: int
    shared: int
    loop_spills: int
    spills: int


def compiled(launched: Launched):
    return triton.compile(launched.source, target=launched.target, options=launched.options.__dict__)


def figures(binary) -> Figures:
    """Read from the machine code that a launch would load."""
    used = _dump(binary, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", used).group(1)) for name in ("REG", "STACK"))
    spills = _spills(machine_code(binary)) if stack else (0, 0)  # the instructions take half a second to dump
    return Figures(registers, binary.metadata.shared, *spills)


def machine_code(binary) -> str:
    """What `cuobjdump` says of a kernel: what it takes, and its instructions."""
    return _dump(binary, "--dump-resource-usage", "--dump-sass")


def _dump(binary, *what: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, *what, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def product_loops(sass: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Instructions with their addresses, and where each innermost loop around tensor-core products begins and ends."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass, re.M)]
    assert instructions, "no machine code found"
    products = [at for at, text in instructions if re.search(r"\b(?:HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA)\b", text)]
    loops = {}  # where each begins and ends, of those with products
    before = ("", "")
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        # Waits that must spin do so behind all code, and jump back to where they came from.
        spun = "SYNCS" in before[0] and "BRA" in before[1] and not text.startswith("@")
        before = (before[1], text)
        if target is not None and int(target.group(1), 16) < at and not spun:
            first = int(target.group(1), 16)
            if bisect.bisect_left(products, first) < bisect.bisect_right(products, at):
                loops[first] = max(at, loops.get(first, 0))
    innermost = [
        (first, last)
        for first, last in loops.items()
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops.items())
    ]
    return instructions, innermost


def _spills(sass: str) -> tuple[int, int]:
    instructions, innermost = product_loops(sass)
    in_loops = total = 0
    for at, text in instructions:
        access = re.search(r"\b(STL|LDL)((?:\.\w+)*)", text)
        if access is not None:
            size = next((int(bits) // 8 for bits in re.findall(r"\.(64|128)", access.group(2))), 4)
            total += size * (access.group(1) == "STL")
            in_loops += size * any(first <= at <= last for first, last in innermost)
    return in_loops, total
