"""The Hopper kernels compile without a GPU: no spills, shared memory that fits, no serialized tensor-core products.

With whichever Triton is installed, also with one that `support` does not know.
"""

import itertools
import re
import subprocess

import pytest
import torch

from foveal.kernels.hopper import launch, launch_linear
from foveal.kernels.hopper.support import BLOCK_SIZES, HEAD_DIMS, why_not
from foveal.kernels.tma import copyable

triton = pytest.importorskip("triton")

from launched_calls import BF16, sla, vsa  # noqa: E402
from launched_kernels import compiled as compiled_as_launched  # noqa: E402
from launched_kernels import figures, first_to_memory, noted_launches  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from foveal.kernels.hopper import (  # noqa: E402
    dkdv_kernel,
    dq_kernel,
    forward_kernel,
    forward_wide_kernel,
    linear_gradients,
)

SHARED_LIMIT = 227 * 1024  # bytes a program may have
SHARED_TOTAL = 228 * 1024  # bytes of a multiprocessor, of which each program takes 1 KiB on top of its own
REGISTERS = 65536
QUICK = [(128, 64, 64, False, "bf16"), (128, 64, 64, True, "bf16"), (128, 128, 128, False, "bf16")]
OTHERS = [
    case
    for case in itertools.product(HEAD_DIMS, BLOCK_SIZES, BLOCK_SIZES, (False, True), ("bf16", "fp16"))
    if case not in QUICK
]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in OTHERS]


def test_supports_says_why_not():
    x = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    assert "NVIDIA GPU" in why_not(x, x, x, 64, 64)


def test_which_strides_tma_takes():
    packed = torch.zeros(2, 100, 3, 4, 64, dtype=torch.bfloat16)
    assert copyable(packed[:, :, 1].transpose(1, 2))
    assert not copyable(packed.transpose(-1, -2)[:, :, 0])
    assert not copyable(torch.zeros(2, 4, 100, 65, dtype=torch.bfloat16)[..., :64])
    assert not copyable(torch.zeros(2 * 4 * 100 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 100, 64))
    assert not copyable(torch.zeros(1, dtype=torch.bfloat16).expand(2, 4, 100, 64))


# dK and dV take 247 to 254 of 255 registers with Triton 3.6, and a few more than there are with 3.9.
DKDV = {"spill_limit": 40, "loop_limit": 24}


def tiles(rows, head_dim, dtype):
    return f"tensordesc<{dtype}[1, 1, {rows}, {head_dim}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"


def compile_for_hopper(kernel, signature, plan):
    constants = dict(plan["constants"])
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    for name, type_ in types.items():
        if type_ is None:
            types[name], constants[name] = "constexpr", None
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, types, places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=plan["options"] | {"launch_pdl": True})


def serialized_products(compiled, folder):
    """What the assembler says of tensor-core products that it runs one after another."""
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "--gpu-name=sm_90a", ptx, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"C75\d\d[^\n]*serialized[^\n]*", report)


def assert_fits(compiled, folder, programs, threads, spill_limit=0, loop_limit=0):
    """Few spills, no serialized products, as many programs an SM as the plan counts on, barriers retired.

    Args:
        spill_limit: bytes a thread that are stored, all in all.
        loop_limit: bytes that are stored and loaded in loops around products.
    """
    initialized, retired = (len(re.findall(rf"mbarrier\.{word}\.", compiled.asm["ptx"])) for word in ("init", "inval"))
    assert initialized == retired, "shared memory of a live barrier goes to others"
    assert first_to_memory(compiled) == "griddepcontrol.wait"
    made = figures(compiled)
    assert made.loop_spills <= loop_limit
    assert made.spills <= spill_limit
    assert serialized_products(compiled, folder) == []
    assert made.shared <= SHARED_LIMIT
    assert programs * (made.shared + 1024) <= SHARED_TOTAL
    assert programs * threads * made.registers <= REGISTERS


# A mean of V's and its strides over pairs and blocks, and the weights of both branches with theirs over pairs.
MEAN, MIX = ("*fp32", "i32", "i32"), ("*fp32", "i32")


def compile_forward(
    head_dim,
    block_q,
    block_k,
    has_sizes,
    dtype,
    feature_map,
    projected=False,
    norm="*fp32",
    mean=MEAN,
    mix=None,
    uniform=None,
):
    plan = launch.forward_plan(head_dim, block_q, block_k, has_sizes, feature_map, projected, uniform)
    tile = tiles(64, head_dim, dtype)
    scalars = (
        "heads", "first_pair", "num_blocks", "total", "query_length", "key_length", "width", "uniform",
        "size_stride", "state_step", "norm_pair_stride", "norm_block_stride",
    )  # fmt: skip
    signature = {
        "query": tile, "key": tile, "value": tile, "output": tile, "lse_ptr": "*fp32", "critical_ptr": "*i32",
        "count_ptr": "*i32", "size_ptr": "*i32" if has_sizes else None, "scale_log2": "fp32",
        **dict.fromkeys(("state", "weight", "norm_ptr", "mean", "mix", "bias_ptr")), **dict.fromkeys(scalars, "i32"),
    }  # fmt: skip
    if feature_map is not None:
        box = plan["state_box"]
        signature["state"] = tiles(*box, "bf16")
        if not projected:
            signature["weight"] = f"tensordesc<bf16{list(box)},{gl.NVMMASharedLayout(128, 16, 2)!r}>"
        signature |= {"norm_ptr": norm, "mean": mean, "mix": mix, "bias_ptr": "*fp32"}
    if plan["wide"]:
        return compile_for_hopper(forward_wide_kernel.block_sparse_fwd_wide_kernel, signature, plan), 1, 384
    return compile_for_hopper(forward_kernel.block_sparse_fwd_kernel, signature, plan), 3, 128


@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), CASES)
def test_forward(tmp_path, head_dim, block_q, block_k, has_sizes, dtype):
    compiled, programs, threads = compile_forward(head_dim, block_q, block_k, has_sizes, dtype, None)
    # Where warps are specialized, Triton 3.8 keeps five scalars in local memory from one query block to the next.
    assert_fits(compiled, tmp_path, programs, threads, spill_limit=24 if threads == 384 else 0)


@pytest.mark.parametrize(
    "feature_map",
    ["softmax", pytest.param("elu", marks=pytest.mark.exhaustive), pytest.param("relu", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), CASES)
def test_forward_with_the_linear_branch(tmp_path, head_dim, block_q, block_k, has_sizes, dtype, feature_map):
    compiled, programs, threads = compile_forward(head_dim, block_q, block_k, has_sizes, dtype, feature_map)
    # The epilogue may put a few registers aside, once a program; Triton 3.8 and 3.9 also two of the loop.
    assert_fits(compiled, tmp_path, programs, threads, spill_limit=96, loop_limit=16)


@pytest.mark.parametrize(
    "feature_map",
    ["softmax", pytest.param("elu", marks=pytest.mark.exhaustive), pytest.param("relu", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), CASES)
@pytest.mark.parametrize("mix", [MIX, pytest.param(None, marks=pytest.mark.exhaustive)], ids=["mixed", "added"])
def test_forward_with_projected_states(tmp_path, head_dim, block_q, block_k, has_sizes, dtype, feature_map, mix):
    options = {"projected": True, "mix": mix}
    compiled, *programs = compile_forward(head_dim, block_q, block_k, has_sizes, dtype, feature_map, **options)
    assert_fits(compiled, tmp_path, *programs, spill_limit=96, loop_limit=16)


@pytest.mark.parametrize("projected", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), QUICK)
def test_forward_in_inference(tmp_path, head_dim, block_q, block_k, has_sizes, dtype, projected):
    """Where Z comes from the product that sums H, in bfloat16, and H is that of V with its mean.

    Key blocks with sizes have 60 tokens each and zeros behind them, as cubes in slots of 64 have.
    """
    options = {"projected": projected, "norm": "*bf16", "mean": None, "mix": MIX if projected else None}
    options["uniform"] = 60 if has_sizes else None
    compiled, *programs = compile_forward(head_dim, block_q, block_k, has_sizes, dtype, "softmax", **options)
    assert_fits(compiled, tmp_path, *programs, spill_limit=96, loop_limit=16)


@pytest.mark.parametrize("add", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), CASES)
def test_dq(tmp_path, head_dim, block_q, block_k, has_sizes, dtype, add):
    plan = launch.dq_plan(block_q, block_k, has_sizes)
    query, key = tiles(64, head_dim, dtype), tiles(plan["tile_k"], head_dim, dtype)
    scalars = ("query_length", "key_length", "width", "size_stride", "uniform", "video_length")
    signature = {
        "query": query, "key": key, "value": key, "grad": query, "grad_query": query, "statistics_ptr": "*fp32",
        "critical_ptr": "*i32", "count_ptr": "*i32", "size_ptr": "*i32" if has_sizes else None, "scale": "fp32",
        "scale_log2": "fp32", "video": None, "grad_query_strides": None, **dict.fromkeys(scalars, "i32"),
    }  # fmt: skip
    plan = {**plan, "constants": {**plan["constants"], "ADD": add}}
    compiled = compile_for_hopper(dq_kernel.block_sparse_dq_kernel, signature, plan)
    pair = plan["constants"]["CONSUMERS"] == 2
    assert_fits(compiled, tmp_path, programs=1 if pair else 2, threads=384 if pair else 256)


@pytest.mark.parametrize(
    "feature_map",
    [
        "softmax",
        pytest.param(None, marks=pytest.mark.exhaustive),
        pytest.param("elu", marks=pytest.mark.exhaustive),
        pytest.param("relu", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(("head_dim", "block_q", "block_k", "has_sizes", "dtype"), CASES)
def test_dkdv(tmp_path, head_dim, block_q, block_k, has_sizes, dtype, feature_map):
    plan = launch.dkdv_plan(block_q, block_k, has_sizes)
    tile = tiles(64, head_dim, dtype)
    statistics = f"tensordesc<fp32[128],{gl.NVMMASharedLayout(0, 32, 1)!r}>"
    scalars = (
        "query_length", "key_length", "size_stride", "state_step", "norm_pair_stride", "norm_block_stride",
        "video_length", "video_key_length",
    )  # fmt: skip
    signature = {
        **dict.fromkeys(("video", "grad_key_strides", "grad_value_strides")),
        "query": tile, "key": tile, "value": tile, "grad": tile, "statistics": statistics, "grad_key": tile,
        "grad_value": tile, "offset_ptr": "*i64", "count_ptr": "*i32", "row_ptr": "*i32",
        "size_ptr": "*i32" if has_sizes else None, "scale": "fp32", "scale_log2": "fp32",
        "grad_state": tiles(64, head_dim, "bf16") if feature_map else None,
        **dict.fromkeys(("grad_norm_ptr", "mean_ptr"), "*fp32" if feature_map else None),
        **dict.fromkeys(scalars, "i32"),
    }  # fmt: skip
    plan = {**plan, "constants": {**plan["constants"], "FEATURE_MAP": feature_map}}
    compiled = compile_for_hopper(dkdv_kernel.block_sparse_dkdv_kernel, signature, plan)
    assert_fits(compiled, tmp_path, programs=2, threads=128, **DKDV)


# Without a projection the branches have weights here.
QUERY_SIDE = [("softmax", 128, 64, "bf16", False), ("softmax", 128, 128, "bf16", True)]
QUERY_SIDE += [
    pytest.param(*case, marks=pytest.mark.exhaustive)
    for case in itertools.product(("softmax", "elu", "relu"), HEAD_DIMS, BLOCK_SIZES, ("bf16", "fp16"), (False, True))
    if case not in QUERY_SIDE
]


@pytest.mark.parametrize(("feature_map", "head_dim", "block_q", "dtype", "projected"), QUERY_SIDE)
def test_linear_query_gradient(tmp_path, feature_map, head_dim, block_q, dtype, projected):
    rows = tiles(block_q, head_dim, dtype)
    pointers = dict.fromkeys(("norm_ptr", "bias_ptr", "delta_ptr", "grad_norm_ptr"), "*fp32")
    scalars = ("heads", "query_length", "first_pair", "norm_pair_stride", "norm_block_stride")
    mixed = not projected
    weight = f"tensordesc<bf16[{head_dim}, {head_dim}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    signature = {
        "query": rows, "output": rows, "grad": rows, "state": tiles(head_dim, head_dim, "bf16"),
        "weight": weight if projected else None, "grad_query": rows,
        "linear": tiles(block_q, head_dim, "bf16") if projected else None,
        "grad_state": tiles(min(block_q, head_dim), head_dim, "bf16"), "mean": MEAN, **pointers,
        "mix": MIX if mixed else None, "linear_dot_ptr": "*fp32" if mixed else None, **dict.fromkeys(scalars, "i32"),
    }  # fmt: skip
    plan = {"constants": {"FEATURE_MAP": feature_map}, "options": {"num_warps": block_q // 16}}
    compiled = compile_for_hopper(linear_gradients.linear_query_grad_kernel, signature, plan)
    assert_fits(compiled, tmp_path, programs=128 // block_q, threads=2 * block_q)


@pytest.mark.parametrize(
    ("feature_map", "head_dim", "dtype"),
    [
        ("softmax", 128, "bf16"),
        pytest.param("elu", 128, "fp16", marks=pytest.mark.exhaustive),
        pytest.param("relu", 64, "bf16", marks=pytest.mark.exhaustive),
        pytest.param("softmax", 64, "fp16", marks=pytest.mark.exhaustive),
    ],
)
def test_shared_query_gradient(tmp_path, feature_map, head_dim, dtype):
    rows = tiles(launch_linear.SHARED_ROWS, head_dim, dtype)
    pointers = ("grad_state_ptr", "norm_ptr", "mean_ptr", "bias_ptr", "delta_ptr", "grad_norm_ptr", "grad_bias_ptr")
    scalars = ("heads", "query_length", "num_blocks", "per_program")
    signature = {
        "query": rows, "output": rows, "grad": rows, "state": tiles(head_dim, head_dim, "bf16"), "grad_query": rows,
        **dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(scalars, "i32"),
    }  # fmt: skip
    plan = {"constants": {"FEATURE_MAP": feature_map}, "options": {"num_warps": launch_linear.SHARED_ROWS // 16}}
    compiled = compile_for_hopper(linear_gradients.shared_query_grad_kernel, signature, plan)
    # A hundred registers of the sum over all rows wait in the L1 cache while a block's rows are worked on.
    assert_fits(compiled, tmp_path, programs=1, threads=256, spill_limit=1000, loop_limit=1000)


def test_sums_of_a_shared_gradient(monkeypatch):
    """The one Triton kernel that only Hopper's launch code asks for; with a projection and without."""
    with noted_launches(monkeypatch, "sm_90") as launched:
        for projected in (True, False):
            sla(64, 64, 64, BF16, False, "softmax", "all", projected, backend="gluon")
    found = [one for one in launched.values() if one.name == "_shared_sum_kernel"]
    assert len(found) == 2
    for one in found:
        binary = compiled_as_launched(one)
        assert first_to_memory(binary) == "griddepcontrol.wait"
        assert figures(binary).spills == 0


def test_row_statistics(tmp_path):
    pointers = dict.fromkeys(("lse_ptr", "delta_ptr", "statistics_ptr"), "*fp32")
    signature = {**pointers, "query_length": "i32", "num_tiles": "i32"}
    plan = {"constants": {}, "options": {"num_warps": 4}}
    compiled = compile_for_hopper(dkdv_kernel.row_statistics_kernel, signature, plan)
    assert_fits(compiled, tmp_path, programs=4, threads=128)


# Bytes that spill: masks of any size take a register or two more than there are.
CUBES = {
    "full slots": 0,
    "whole cubes in slots": 0,
    "partial cubes": 64,
    "wide slots": 0,
    "whole wide cubes in slots": 0,
    "partial wide cubes": 24,
}


@pytest.mark.parametrize(
    "cubes", [pytest.param(x, marks=() if "partial" in x else pytest.mark.exhaustive) for x in CUBES]
)
@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_vsa_without_a_fine_gate(tmp_path, monkeypatch, head_dim, cubes):
    """Training and inference run the same fine stage: it stores nothing for the backward but the LSE."""
    with noted_launches(monkeypatch, "sm_90") as launched:
        for train in (False, True):
            vsa(head_dim, BF16, cubes, True, False, train, backend="gluon")
    wide = "wide" in cubes
    (fine,) = (x for x in launched.values() if x.name == ("cubes_fwd_wide_kernel" if wide else "cubes_fwd_kernel"))
    assert not fine.constants["SAVE_FINE"]
    programs, threads = (1, 384) if wide else (3, 128)
    spills = {"spill_limit": CUBES[cubes], "loop_limit": CUBES[cubes]}
    assert_fits(compiled_as_launched(fine), tmp_path, programs=programs, threads=threads, **spills)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("cubes", CUBES)
@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_vsa(tmp_path, monkeypatch, head_dim, cubes, train):
    with noted_launches(monkeypatch, "sm_90") as launched:
        vsa(head_dim, BF16, cubes, True, True, train, backend="gluon")
    wide = "wide" in cubes
    (fine,) = (x for x in launched.values() if x.name == ("cubes_fwd_wide_kernel" if wide else "cubes_fwd_kernel"))
    assert fine.constants["SAVE_FINE"] == train
    programs, threads = (1, 384) if wide else (3, 128)
    spills = {"spill_limit": CUBES[cubes], "loop_limit": CUBES[cubes]}
    assert_fits(compiled_as_launched(fine), tmp_path, programs=programs, threads=threads, **spills)
    backward = {
        x.name: x for x in launched.values() if x.name in ("block_sparse_dq_kernel", "block_sparse_dkdv_kernel")
    }
    assert bool(backward) == train
    if not train:
        return
    programs, threads = (1, 384) if wide else (2, 256)
    dq, dkdv = backward["block_sparse_dq_kernel"], backward["block_sparse_dkdv_kernel"]
    assert dq.constants["TAIL"] == ("in slots" in cubes)
    assert_fits(compiled_as_launched(dq), tmp_path, programs=programs, threads=threads)
    assert_fits(compiled_as_launched(dkdv), tmp_path, programs=2, threads=128, **DKDV)
