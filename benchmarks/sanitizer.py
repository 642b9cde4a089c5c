"""Every kernel on small shapes with partial blocks, forward and backward, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python benchmarks/sanitizer.py
    compute-sanitizer --tool racecheck python benchmarks/sanitizer.py
    compute-sanitizer --tool racecheck python benchmarks/sanitizer.py --impl gluon --head-dim 128
    compute-sanitizer --tool racecheck python benchmarks/sanitizer.py --control

It needs an NVIDIA GPU, for the Gluon kernels Hopper. Of kernels that hand work to their warps (`warp_specialize`)
racecheck reports the words through which the compiler hands it over, although a barrier of all threads stands between
their writing and their reading. `--control` runs a kernel that does nothing else: it is reported in the same way, so
only hazards elsewhere are ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from foveal import (
    SLAConfig,
    VideoGrid,
    VSAConfig,
    block_sparse_attention,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.testing import output_and_gradients

BLOCKS = ((64, 64), (128, 64), (128, 128))
GRID = VideoGrid(5, 9, 10)


def run(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    """One forward and one backward.

    Raises:
        FloatingPointError: if the output or a gradient is not finite.
    """
    found = output_and_gradients(function, tensors)
    torch.cuda.synchronize()
    if not all(x.isfinite().all() for x in found):
        raise FloatingPointError("expected finite outputs and gradients, got others")


def run_kernels(impl: str, head_dim: int) -> None:
    """Block-sparse attention, SLA in its three scopes, and VSA with three kinds of cubes, one gate and both."""

    def tensors(*lengths: int) -> list[Tensor]:
        made = (torch.randn(1, n, 2, head_dim, device="cuda", dtype=torch.bfloat16) for n in lengths)
        return [x.transpose(1, 2) for x in made]

    weight = torch.randn(head_dim, head_dim, device="cuda") / head_dim**0.5
    for block_q, block_k in BLOCKS:
        blocks = {"block_q": block_q, "block_k": block_k}
        inputs = tensors(700, 900, 900)
        selection = select_blocks(*inputs[:2], keep_ratio=0.3, **blocks)
        run(lambda *x, chosen=selection: block_sparse_attention(*x, chosen, impl=impl), *inputs)
        for scope in ("marginal", "all", "noncritical"):
            config = SLAConfig(
                keep_ratio=0.2, drop_ratio=0.2 if scope == "marginal" else 0.0, linear_scope=scope, **blocks
            )
            run(lambda *x, c=config: sla_attention(*x[:3], config=c, proj_weight=x[3], impl=impl), *inputs, weight)
    for tile in ("auto", "wide", (4, 4, 4)):
        config = VSAConfig(keep_ratio=0.4, tile=tile)
        for gates in (("gate_coarse",), ("gate_coarse", "gate_fine")):

            def attend(query, key, value, *given, c=config, gates=gates):
                given = dict(zip(gates, given, strict=True))
                return vsa_attention(query, key, value, config=c, grid=GRID, impl=impl, **given)

            run(attend, *tensors(*[GRID.num_tokens] * (3 + len(gates))))


@gluon.jit
def _write(pointer, first: gl.constexpr, count: gl.constexpr, term):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = first + gl.arange(0, count, layout)
    gl.store(pointer + place, place + term)


@gluon.jit
def _hand_over_kernel(pointer, term):
    """A sum by the first four warps, whose own barrier it takes; then its result goes to both parts."""
    pointer += gl.program_id(0) * 160
    term = gl.sum(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0 + term, 0)
    gl.warp_specialize([(_write, (pointer, 0, 128, term)), (_write, (pointer, 128, 32, term))], [1], [24])


def run_control() -> None:
    """Only the hand-over.

    Raises:
        RuntimeError: if its results are wrong.
    """
    made = torch.zeros(64, 160, dtype=torch.int32, device="cuda")
    _hand_over_kernel[(64,)](made, 3, num_warps=4)
    if not torch.equal(made.cpu(), (torch.arange(160, dtype=torch.int32) + 3 * 128).expand(64, 160)):
        raise RuntimeError("expected the sums that were asked for, got others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", action="store_true", help="run only the control")
    parser.add_argument("--impl", nargs="+", choices=("triton", "gluon"), default=("triton", "gluon"))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(128, 64), default=(128, 64))
    options = parser.parse_args()
    if options.control:
        run_control()
        return
    torch.manual_seed(0)
    for impl in options.impl:
        for head_dim in options.head_dim:
            run_kernels(impl, head_dim)
            print(f"{impl}, D {head_dim}: ran", flush=True)


if __name__ == "__main__":
    main()
