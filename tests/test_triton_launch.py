"""What `Launcher` tells variants of a kernel by is at least what Triton compiles variants for."""

import ast
import importlib
import inspect
import itertools
import pkgutil
import textwrap

import pytest
import torch

triton = pytest.importorskip("triton")

from launched_calls import BF16, FEW, on_hopper  # noqa: E402
from launched_calls import vsa as call_vsa  # noqa: E402
from launched_kernels import checked_launches, guarded_launches, noted_launches  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from foveal.kernels import api, chips, host, operator  # noqa: E402
from foveal.kernels.chips import Chip  # noqa: E402
from foveal.kernels.hopper.support import missing_gluon  # noqa: E402
from foveal.kernels.host import Descriptors  # noqa: E402
from foveal.kernels.triton import select  # noqa: E402

PACKAGES = ("triton", "hopper") if missing_gluon() is None else ("triton",)


def kernels():
    """Every kernel that is launched, by name; interpreted ones, too."""
    for package in PACKAGES:
        folder = importlib.import_module(f"foveal.kernels.{package}")
        for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if name.endswith("_kernel") and hasattr(value, "fn") and value.fn.__module__ == module.name:
                    yield name, value


KERNELS = dict(kernels())
INTEGERS = (0, 1, 2, 16, 17, -16, -1, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40)


def values():
    """Pairs of arguments of one kind; in each kind some that Triton compiles for apart."""
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    yield from itertools.combinations(INTEGERS, 2)
    yield from itertools.combinations([(x, 128, 7) for x in INTEGERS], 2)
    tensors = memory, memory[8:], memory[1:], memory.half(), memory.float(), memory.float()[1:], None
    yield from itertools.combinations(tensors, 2)
    nested = (memory, memory), (memory, memory[1:]), (memory.half(), memory), (None, None), (memory, 1), (memory, 2), ()
    yield from itertools.combinations(nested, 2)
    tiles = (memory, 64), (memory, 128), (memory.half(), 64), (memory[8:], 64)
    descriptors = [TensorDescriptor(x, [16, 16], [128, 1], [1, width]) for x, width in tiles]
    yield from itertools.combinations([*descriptors, memory], 2)
    yield 0.5, 1.0


@pytest.mark.parametrize("name", KERNELS)
def test_a_launcher_tells_apart_what_triton_does(name):
    kernel = KERNELS[name]
    if not isinstance(kernel, JITFunction):
        pytest.skip("kernels are interpreted")
    launcher = host.Launcher(kernel)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    names = [p.name for p in kernel.params]
    run_time = [p.name for p in kernel.params if not p.is_constexpr]
    # Called with its arguments and then its constants: these come last, then, and in the kernel's order.
    assert names == [*run_time, *launcher.constants]
    apart = 0
    for first, second in values():
        for place, matters in enumerate(launcher.specialized):
            facts, variants = [], []
            for x in (first, second):
                arguments = [0] * len(run_time)
                arguments[place] = x
                facts.append(host._facts(tuple(arguments), launcher.specialized))
                variants.append(bind(*arguments, *launcher.constants)[1])
            if variants[0] != variants[1]:
                apart += 1
                assert facts[0] != facts[1], f"{run_time[place]} (specialized: {matters}): {first} and {second}"
    assert apart > 0


# As they are, on chips with TMA and without, and through Hopper's kernels.
CALLS = [(call, chip) for call in FEW for chip in ("sm_80", "sm_90", "sm_120")]
if missing_gluon() is None:
    CALLS += [(call, "sm_90") for call in on_hopper(FEW)]


# What users call; the others are parts of it.
GUARDED = [
    call for call, chip in CALLS if chip == "sm_90" and call.func.__name__ in ("sparse", "sla", "vsa", "select_blocks")
]


@pytest.mark.parametrize("case", range(len(CALLS)))
def test_what_is_launched_again_fits_its_variant(case, monkeypatch):
    if not isinstance(next(iter(KERNELS.values())), JITFunction):
        pytest.skip("kernels are interpreted")
    run, chip = CALLS[case]
    with checked_launches(monkeypatch, chip) as calls:
        run()
        first = len(calls)
        run()
    assert {name for name, *_ in calls} <= KERNELS.keys()
    again = calls[first:]
    assert {which for _, which, *_ in again} == {"again"}
    assert [(name, *rest) for name, _, *rest in again] == [(name, *rest) for name, _, *rest in calls[:first]]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_first_await_the_one_before_them(name):
    """Or they could read what it has not written yet."""
    function = ast.parse(textwrap.dedent(inspect.getsource(KERNELS[name].fn))).body[0]
    first = next(x for x in function.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)))
    assert ast.unparse(first) == "await_previous()"


class Recorder(JITFunction):
    """A kernel that notes how it was called, and what it would have compiled."""

    def __init__(self, fn):
        super().__init__(fn, do_not_specialize=["n"])
        self.calls = []

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.calls.append((grid, arguments, named))
            return Compiled(self.calls)

        return run


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


def example(x_ptr, n, FIRST: "tl.constexpr", SECOND: "tl.constexpr"):  # noqa: F821
    pass


@pytest.mark.parametrize("early", [False, True])
def test_a_second_launch_takes_the_compiled_kernel(monkeypatch, early):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chips, "chip_of", lambda device: Chip("sm_90" if early else "sm_89", 99 * 1024))
    kernel = Recorder(example)
    x, named = torch.zeros(4), {"SECOND": 2, "FIRST": 1, "num_warps": 4}
    host.launch(kernel, (3,), x_ptr=x, n=5, **named)
    host.launch(kernel, (4,), x_ptr=x, n=6, **named)
    early = {"launch_pdl": True} if early else {}
    assert kernel.calls[0] == ((3,), (), {"x_ptr": x, "n": 5} | named | early)
    assert kernel.calls[1] == ((4, 1, 1), (x, 6, 1, 2))
    host.launch(kernel, (4,), x_ptr=x[1:], n=6, **named)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    host.launch(kernel, (4,), x_ptr=x, n=6, **named)
    host.launch(kernel, (4,), x_ptr=x, n=6, FIRST=2, SECOND=1, num_warps=4)
    host.launch(kernel, (4,), num_warps=4, SECOND=2, n=6, FIRST=1, x_ptr=x)
    assert [len(call) for call in kernel.calls] == [3, 2, 3, 3, 3, 3]
    other = Recorder(example)
    host.launch(other, (4,), x_ptr=x, n=6, **named)
    assert [len(call) for call in other.calls] == [3]


def test_amd_is_left_to_triton(monkeypatch):
    # There variants also depend on whether a tensor's memory is within 2 GiB.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Recorder(example)
    for _ in range(2):
        host.launch(kernel, (3,), x_ptr=torch.zeros(4), n=5, FIRST=1, SECOND=2, num_warps=4)
    assert [len(call) for call in kernel.calls] == [3, 3]


def test_descriptors_of_tensors_that_lie_alike():
    made = []

    def tiles(x, rows):
        made.append(rows)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 16])

    describe = Descriptors(tiles)
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    first, second = memory[:1024].view(64, 16), memory[1024:2048].view(64, 16)
    descriptors = [describe(x, 16) for x in (first, second, first)]
    for x, descriptor in zip((first, second, first), descriptors, strict=True):
        assert type(descriptor) is TensorDescriptor
        assert descriptor.base is x
        assert descriptor == tiles(x, 16)
    assert made == [16] * 4
    for other in (first.half(), first[:32], first[:, :8], first.t()[:, :16].t()):
        assert describe(other, 8).block_shape == [8, 16]
    assert made == [16] * 4 + [8] * 4
    with pytest.raises(AssertionError, match="multiples of 16 bytes"):
        describe(memory[1:1025].view(64, 16), 16)


def test_descriptors_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(host, "MOST", 3)
    describe = Descriptors(lambda x, rows: TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 16]))
    memory = torch.zeros(64, 16)
    for _ in range(2):
        for length in range(16, 24):
            assert describe(memory[:length], 16).shape == [length, 16]
            assert len(describe._known) <= 3
    assert all(attributes["base"] is None for _, attributes in describe._known.values())


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "custom ops"])
@pytest.mark.parametrize("call", GUARDED, ids=lambda call: call.func.__name__)
def test_launches_are_where_their_tensors_are(call, plain, monkeypatch):
    """Triton launches on the current device, which may be another one than the tensors'."""
    if not isinstance(next(iter(KERNELS.values())), JITFunction):
        pytest.skip("kernels are interpreted")
    if not plain:
        for module in (operator, select):
            monkeypatch.setattr(module, "is_plain", lambda *_: False)
    with guarded_launches(monkeypatch, "sm_90") as calls:
        call()
    assert calls
    assert {name for name, tensor in calls if tensor is None} == set()


@pytest.mark.parametrize("train", [True, False])
def test_pytorch_chooses_among_more_cubes_than_a_kernel_can(monkeypatch, train):
    """At a call's forward, and where the selection is asked for by itself."""
    for most, picks in ((api.KERNEL_MAX_BLOCKS, True), (3, False)):
        monkeypatch.setattr(api, "KERNEL_MAX_BLOCKS", most)
        with noted_launches(monkeypatch, "sm_90") as launched:
            call_vsa(64, BF16, "full slots", False, False, train)
        assert ("_pick_kernel" in {x.name for x in launched.values()}) == picks
