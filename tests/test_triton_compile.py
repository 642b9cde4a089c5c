"""Compile-only: what the launch code compiles for GPUs of several kinds, with limits on spills and shared memory."""

import functools
import importlib
import itertools
import pkgutil

import pytest
import torch

triton = pytest.importorskip("triton")

from launched_calls import FEW, all_calls, vsa  # noqa: E402
from launched_kernels import CHIPS, compiled, figures, first_to_memory, noted_launches  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from foveal import block_sparse_attention  # noqa: E402
from foveal.kernels import chips  # noqa: E402
from foveal.kernels import triton as kernels  # noqa: E402
from foveal.kernels.triton import pooled  # noqa: E402
from foveal.testing import make_inputs, random_selection  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a program may have: A100, and H100 and B200 so that two programs fit a multiprocessor.
SHARED_LIMIT = {80: 163 * 1024, 90: 113 * 1024, 100: 113 * 1024}
# Kernels that run one program a multiprocessor there: (kernel, architecture, some constants).
ALONE = [
    *((f"_pooled_{name}_kernel", arch, {}) for name in ("fwd", "dq", "dkdv") for arch in (90, 100)),
    *(("_pick_kernel", arch, {"COLUMNS": 16384}) for arch in (90, 100)),
    ("_block_sparse_dkdv_kernel", 100, {}),
    ("_key_state_kernel", 90, {"D": 128, "HAS_SIZES": True}),
]


def kernel_names():
    """Every kernel of the Triton backend: what is compiled by itself, by its name."""
    for module in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values():
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
                yield value.__name__


def choices(launched, how_many):
    """Every `how_many` of a variant's constants and its dtype, with their values."""
    dtype = next((kind for kind in ("fp16", "bf16") if any(kind in x for x in launched.types)), None)
    facts = [*sorted((name, str(value)) for name, value in launched.constants.items()), ("dtype", dtype)]
    return {(launched.name, *some) for some in itertools.combinations(facts, how_many)}


def covering(launched, how_many):
    """So many variants that what `choices` gives of all of them occurs among them."""
    rest, seen, taken = [(x, choices(x, how_many)) for x in launched], set(), []
    while rest:
        best, facts = max(rest, key=lambda pair: len(pair[1] - seen))
        if facts <= seen:
            break
        taken.append(best)
        seen |= facts
    return taken


@functools.cache
def variants(arch, every):
    """Variants by kernel: few that take each constant through its values, or pairs of constants through all of theirs.

    On sm_100 few are one of each kernel: that the compiler takes it.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, noted_launches(monkeypatch, f"sm_{arch}") as launched:
        for call in all_calls() if every else FEW:
            call()
    found = covering(launched.values(), 2 if every else 0 if arch == 100 else 1)
    return {name: [x for x in found if x.name == name] for name in {x.name for x in found}}


# Variants that spill, the first that fits counts: (kernel, architecture, some constants, bytes in loops, bytes in all),
# the most that Triton 3.6 and 3.9 made of them. What is not here spills nothing.
SPILLS = [
    ("_exact_gain_kernel", 100, {"D": 64, "HAS_SIZES": True}, 4, 4),
    ("_block_sparse_fwd_kernel", 80, {"D": 128, "BLOCK_Q": 64}, 0, 128),
    ("_block_sparse_fwd_kernel", 80, {"D": 64, "BLOCK_Q": 128}, 0, 12),
    ("_block_sparse_fwd_kernel", 90, {"D": 128, "BLOCK_Q": 128, "HAS_SIZES": False}, 64, 64),
    ("_block_sparse_fwd_kernel", 90, {"D": 128, "BLOCK_Q": 128}, 164, 124),
    ("_block_sparse_dq_kernel", 80, {"D": 64, "ADD": True}, 0, 24),
    # The row of V's mean, which the compiler gives each thread an address a column for.
    ("_key_state_kernel", 90, {"D": 128, "PER_BLOCK": True, "PARTS_OF_BLOCK": 4}, 264, 228),
    ("_key_state_kernel", 90, {"D": 128, "PER_BLOCK": True}, 160, 128),
    ("_key_state_kernel", 90, {"D": 128}, 40, 80),
    ("_masked_sum_kernel", 90, {"D": 64}, 0, 8),
    ("_key_state_kernel", 100, {"D": 128, "PER_BLOCK": True}, 48, 64),
    ("_key_state_kernel", 100, {"D": 128}, 32, 32),
    ("_masked_sum_kernel", 100, {"D": 128}, 0, 16),
    # Straight-line code over one or two tiles of 64 rows, three products of 128 x 128 each.
    ("_query_grad_kernel", 80, {"D": 128, "BLOCK_Q": 128}, 0, 38400),
    ("_query_grad_kernel", 80, {"D": 128}, 0, 2048),
    ("_query_grad_kernel", 80, {"D": 64}, 0, 336),
    ("_query_grad_kernel", 90, {"D": 128, "BLOCK_Q": 128}, 0, 400),
    ("_query_grad_kernel", 90, {"D": 64, "BLOCK_Q": 128}, 0, 148),
    ("_query_grad_kernel", 90, {"D": 64}, 0, 64),
    ("_key_grad_kernel", 80, {"D": 128, "FEATURE_MAP": "elu"}, 0, 7424),
    ("_key_grad_kernel", 80, {"D": 128}, 0, 48),
    ("_projection_grad_kernel", 80, {"D": 128}, 4, 20),
    ("_projection_grad_kernel", 80, {}, 0, 8),
    ("_pooled_dq_kernel", 80, {"D": 128}, 0, 8),
    ("_pooled_dq_kernel", 90, {"D": 128}, 0, 36),
    ("_pooled_dkdv_kernel", 80, {"D": 64}, 0, 44),
    ("_pooled_dkdv_kernel", 80, {"D": 128}, 0, 32),
    ("_pooled_dkdv_kernel", 90, {"D": 128}, 240, 260),
    ("_tail_dq_kernel", 80, {"D": 128}, 12, 40),
    ("_tail_means_kernel", 90, {"D": 128}, 0, 8),
    ("_tail_means_kernel", 100, {"D": 128}, 0, 4),
    ("_gather_cubes_kernel", 100, {"QUARTERS": True}, 0, 20),
    ("_pool_kernel", 90, {}, 8, 8),
    ("_pool_kernel", 100, {"SPREAD": True}, 8, 8),
    *(("_pick_kernel", arch, {"COLUMNS": 16384, "RANGES": True}, 0, 660) for arch in ARCHITECTURES),
    *(("_pick_kernel", arch, {"COLUMNS": 16384, "MASS": True}, 0, 588) for arch in ARCHITECTURES),
    *(("_pick_kernel", arch, {"COLUMNS": 16384}, 0, 448) for arch in ARCHITECTURES),
    *(("_pick_kernel", arch, {"RANGES": True}, 0, 180) for arch in ARCHITECTURES),
    *(("_pick_kernel", arch, {}, 0, 96) for arch in ARCHITECTURES),
]


def fits(launched, name, arch, some):
    return (launched.name, launched.target.arch) == (name, arch) and some.items() <= launched.constants.items()


def allowed_spills(launched):
    """Bytes that a variant may spill: in its main loops, and in all."""
    return next((case[3:] for case in SPILLS if fits(launched, *case[:3])), (0, 0))


def shared_limit(launched):
    return 227 * 1024 if any(fits(launched, *case) for case in ALONE) else SHARED_LIMIT[launched.target.arch]


def check(name, arch, every):
    for launched in variants(arch, every)[name]:
        binary = compiled(launched)
        assert (first_to_memory(binary) == "griddepcontrol.wait") == launched.options.launch_pdl == (arch >= 90)
        made = figures(binary)
        in_loops, total = allowed_spills(launched)
        assert made.loop_spills <= in_loops, launched.constants
        assert made.spills <= total, launched.constants
        assert made.shared <= shared_limit(launched), launched.constants


@pytest.mark.parametrize("name", sorted(set(kernel_names())))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_fit(arch, name):
    check(name, arch, every=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(set(kernel_names())))
@pytest.mark.parametrize("arch", [80, 90])
def test_pairs_of_constants_fit(arch, name):
    check(name, arch, every=True)


@pytest.mark.exhaustive
def test_few_calls_take_every_constant_through_its_values():
    few, every = (
        set().union(*(choices(x, 1) for some in variants(90, e).values() for x in some)) for e in (False, True)
    )
    assert every - few == set()


REST = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "gfx1100")
# Where variants may not spill in loops around products. The others have limits of their own, in `SPILLS`, or a compiler
# whose code is not read here.
NO_LOOP_SPILLS = ("sm_80", "sm_86", "sm_89", "sm_120")
# Bytes that some variants may, all the same: (kernel, some constants, bytes).
LOOP_SPILLS = [
    ("_tail_dq_kernel", {}, 64),
    ("_projection_grad_kernel", {"D": 128}, 8),
    ("_block_sparse_fwd_kernel", {"D": 128, "BLOCK_Q": 128, "INT8": True}, 20),
]


def oversize(chip, calls=FEW, every=True, kernel=None):
    """What few calls compile for a chip and does not fit it: (kernel, its figures, constants).

    every: each variant, and not only so many of the larger head dimension that each constant has all of its values.
    kernel: the one to compile; None for all.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, noted_launches(monkeypatch, chip) as launched:
        for call in calls:
            call()
    large = [x for x in launched.values() if x.constants.get("D", 128) == 128]
    for one in launched.values() if every else covering(large, 1):
        if kernel not in (None, one.name):
            continue
        binary = compiled(one)
        loop_spills = figures(binary).loop_spills if chip in NO_LOOP_SPILLS else 0
        allowed = (most for name, some, most in LOOP_SPILLS if fits(one, name, one.target.arch, some))
        threads = one.options.num_warps * CHIPS[chip].warp_size
        if binary.metadata.shared > CHIPS[chip].shared_memory or threads > 1024 or loop_spills > next(allowed, 0):
            yield one.name, {"shared": binary.metadata.shared, "loop_spills": loop_spills}, one.constants


@pytest.mark.parametrize(
    ("chip", "every"),
    [("sm_120", False), *(pytest.param(chip, True, marks=pytest.mark.exhaustive) for chip in ("sm_120", *REST))],
)
def test_every_kernel_fits_the_chip(chip, every):
    assert list(oversize(chip, every=every)) == []


def test_what_is_said_of_chips_is_what_is_compiled_here():
    assert set(CHIPS) == {*chips.RAN, *chips.COMPILED}


def test_an_oversize_tile_is_found(monkeypatch):
    monkeypatch.setitem(pooled.FORWARD_PLANS, 128, pooled.FORWARD_PLANS[128][:1])
    calls = [call for call in FEW if call.func is vsa]
    assert list(oversize("sm_120", calls, kernel="_pooled_fwd_kernel"))


def test_hopper_kernels_use_its_units():
    for launched in variants(90, False)["_block_sparse_fwd_kernel"]:
        ptx = compiled(launched).asm["ptx"]
        assert "wgmma" in ptx
        assert "cp.async.bulk.tensor" in ptx


def test_named_never_falls_back():
    inputs = make_inputs(query_length=64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='impl="triton" cannot run here: it needs a GPU'):
        block_sparse_attention(*inputs, random_selection(query_length=64), impl="triton")
