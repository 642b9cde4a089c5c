"""FastVideo's and TurboDiffusion's public functions with foveal behind them, beside their own kernels, on one GPU.

    python3 benchmarks/patched_hosts.py --turbodiffusion FOLDER --output benchmarks/results/patched-hosts.json
    python3 benchmarks/patched_hosts.py --page benchmarks/results/patched-hosts.json

The first command measures. FOLDER holds TurboDiffusion's package `SLA` (the folder `turbodiffusion/` of its
repository), if it cannot be imported; its kernels are Triton's. A host that is not installed is left out, and the
results say why. The second command puts the tables of such a file into docs/hosts.md.

What is timed: one call of `fastvideo_kernel.video_sparse_attn`, of `block_sparse_attn_from_indices`, and of
`SLA.SparseLinearAttention`, and its backward over a graph built once, in bfloat16, for 480p videos of Wan 2.1 (12 heads
of 128; 21 x 30 x 52 tokens). A call has all that the host's function does: pooling, selection, both branches, and the
copies that it makes. FastVideo's functions run its ThunderKittens kernels where they load, and its Triton kernels.

All take turns, round by round, and medians count. A time counts only if the output and all gradients agree with the
host's own. For that the blocks come in groups of the size of a row's choice: the pooled scores of a query block with
the key blocks of its own group are far above all others. Rounding cannot change the selection then, and the kept blocks
are spread over the sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_page import ROOT, ResultPage
from torch import Tensor

import foveal
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.bench.shapes import SHAPES, Shape
from foveal.lab.bench.timing import CudaTimer, Timer, in_turns
from foveal.testing import relative_error

CUBE = (4, 4, 4)
BLOCK = 64
VSA_KEEP = 0.125
SLA_KEEP = 0.05
SLA_BLOCKS = ((64, 64), (128, 64))  # as TurboDiffusion trains, and as it serves
# Of the norm. All compute in bfloat16, and the hosts round their coarse stages to it too. A row that chose one block of
# 78 differently would differ by 0.1.
SAME = 0.03
# How far the blocks of a group lie from the others, in standard deviations of a token's entries.
GROUP = 0.5
FASTVIDEO_BACKENDS = {"tk": "fastvideo-kernel TK", "triton": "fastvideo-kernel Triton"}
PASSES = ("forward", "backward")
PAGE = ResultPage("patched_hosts", ROOT / "docs" / "hosts.md")
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One public function of a host, with the same arguments for everyone who computes it.

    Args:
        name: the function, and what it was asked for.
        tensors: what it is differentiated in.
        grad: the gradient of its output.
        functions: {who: (*tensors) to output}; the host's own first.
        valid: bool [L], the tokens that count in tensors with tokens; the others are padding. None for all.
    """

    name: str
    tensors: tuple[Tensor, ...]
    grad: Tensor
    functions: dict[str, Function]
    valid: Tensor | None = None


def grouped_blocks(shape: tuple[int, int, int], blocks: Tensor, directions: Tensor, generator: torch.Generator):
    """Normal tokens [H, L, D], those of a block all shifted in the direction of its group.

    Args:
        shape: H, L, and D.
        blocks: int [L], each token's group; -1 for none.
        directions: [groups, D].
    """
    noise = torch.randn(shape, generator=generator, device=directions.device)
    shift = torch.where((blocks >= 0)[:, None], directions[blocks.clamp(min=0)], 0)
    return noise + GROUP * shift


def grouped_attention(
    heads: int, length: int, head_dim: int, block_q: int, block_k: int, kept: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Query, key, value, gate, and the output's gradient [1, H, L, D] in bfloat16: every query block's `kept` best key
    blocks are those of its group."""
    generator = torch.Generator(device).manual_seed(0)
    key_blocks, query_blocks = -(-length // block_k), -(-length // block_q)
    groups = key_blocks // kept
    directions = torch.randn(groups, head_dim, generator=generator, device=device).sign()
    # `kept` key blocks in each group, wherever they stand; what is left over is in none.
    of_key = torch.full((key_blocks,), -1, device=device)
    order = torch.randperm(key_blocks, generator=generator, device=device)[: groups * kept]
    of_key[order] = torch.arange(groups, device=device).repeat_interleave(kept)
    of_query = torch.randint(groups, (query_blocks,), generator=generator, device=device)
    shape = (heads, length, head_dim)
    query = grouped_blocks(shape, of_query.repeat_interleave(block_q)[:length], directions, generator)
    key = grouped_blocks(shape, of_key.repeat_interleave(block_k)[:length], directions, generator)
    others = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    return tuple(x.bfloat16().unsqueeze(0) for x in (query, key, *others))


@contextlib.contextmanager
def fastvideo_backend(name: str) -> Iterator[None]:
    """FastVideo's choice of kernels, which it reads from the environment at each call."""
    variable = f"FASTVIDEO_VSA_{name.upper()}"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def why_no_thunderkittens(device: torch.device) -> str | None:
    """Why fastvideo-kernel would run its Triton kernels on this device; None if it does not."""
    try:
        importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops")
    except ImportError as error:
        return str(error)
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else f"it needs compute capability 9.0, got {capability}"


def fastvideo_cases(shape: Shape, device: torch.device, left_out: dict[str, str]) -> Iterator[Case]:
    """VSA over cubes, and attention over given lists, by fastvideo-kernel and by foveal behind it."""
    host = importlib.import_module("fastvideo_kernel")
    backends = dict(FASTVIDEO_BACKENDS)
    if reason := why_no_thunderkittens(device):
        left_out[backends.pop("tk")] = reason
    metadata = host.build_vsa_metadata(shape.grid.shape, CUBE, device)
    sizes = metadata["variable_block_sizes"].to(torch.int32)
    blocks = sizes.numel()
    kept = int(VSA_KEEP * blocks)
    valid = torch.arange(BLOCK, device=device).repeat(blocks) < sizes.repeat_interleave(BLOCK)
    made = grouped_attention(shape.heads, BLOCK * blocks, shape.head_dim, BLOCK, BLOCK, kept, device)
    *tensors, grad = (x * valid[:, None] for x in made)

    def by(call: Function) -> dict[str, Function]:
        """`call(host, ...)` with each of the host's kernels, and with foveal's."""

        def with_backend(name: str) -> Function:
            def run(*given: Tensor) -> Tensor:
                with fastvideo_backend(name):
                    return call(own, *given)

            return run

        own = {name: getattr(host, name) for name in ("video_sparse_attn", "block_sparse_attn_from_indices")}
        with foveal.patch("fastvideo"):
            patched = {name: getattr(host, name) for name in own}
        return {label: with_backend(name) for name, label in backends.items()} | {
            "foveal": lambda *given: call(patched, *given)
        }

    def vsa(functions: dict[str, Function], query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return functions["video_sparse_attn"](query, key, value, sizes, sizes, kept, CUBE, gate)

    tensors = tuple(x.requires_grad_() for x in tensors)
    yield Case(f"`video_sparse_attn`, {VSA_KEEP:.1%} of {blocks} cubes", tensors, grad, by(vsa), valid)

    generator = torch.Generator(device).manual_seed(1)
    draw = torch.rand(1, shape.heads, blocks, blocks, generator=generator, device=device)
    lists = draw.topk(kept, -1).indices.sort(-1).values.to(torch.int32).contiguous()
    counts = torch.full(lists.shape[:3], kept, dtype=torch.int32, device=device)

    def attention(functions: dict[str, Function], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functions["block_sparse_attn_from_indices"](query, key, value, lists, counts, sizes)[0]

    name = f"`block_sparse_attn_from_indices`, {VSA_KEEP:.1%} of {blocks} blocks"
    yield Case(name, tensors[:3], grad, by(attention), valid)


def turbodiffusion_cases(shape: Shape, device: torch.device, left_out: dict[str, str]) -> Iterator[Case]:
    """SLA by TurboDiffusion's module, and by foveal behind it, from the same parameters."""
    host = importlib.import_module("SLA")
    own = host.SparseLinearAttention.forward
    with foveal.patch("turbodiffusion"):
        patched = host.SparseLinearAttention.forward
    for block_q, block_k in SLA_BLOCKS:
        torch.manual_seed(0)
        module = host.SparseLinearAttention(shape.head_dim, SLA_KEEP, BLKQ=block_q, BLKK=block_k).to(device)
        torch.nn.init.normal_(module.proj_l.weight, std=shape.head_dim**-0.5)
        key_blocks = -(-shape.length // block_k)
        kept = int(SLA_KEEP * key_blocks)
        made = grouped_attention(shape.heads, shape.length, shape.head_dim, block_q, block_k, kept, device)
        # The module takes [B, L, H, D].
        query, key, value, _, grad = (x.transpose(1, 2).contiguous() for x in made)
        inputs = [x.requires_grad_() for x in (query, key, value)]
        yield Case(
            f"`SparseLinearAttention`, {SLA_KEEP:.0%} of {key_blocks} blocks, {block_q}x{block_k}",
            (*inputs, *module.proj_l.parameters()),
            grad,
            {"TurboDiffusion": _by_module(own, module), "foveal": _by_module(patched, module)},
        )


def _by_module(forward: Function, module: torch.nn.Module) -> Function:
    """A module's forward as a function of its inputs and its parameters, which it has already."""
    return lambda query, key, value, *parameters: forward(module, query, key, value)


def differences(case: Case) -> dict[str, list[float]]:
    """Of everyone's output and gradients from those of the first, in the order of the tensors."""
    found = {}
    for who, function in case.functions.items():
        output = function(*case.tensors)
        gradients = torch.autograd.grad(output, case.tensors, case.grad)
        found[who] = [x if case.valid is None else x[:, :, case.valid] for x in (output.detach(), *gradients)]
    first, *others = found
    return {who: [relative_error(x, y) for x, y in zip(found[who], found[first], strict=True)] for who in others}


def time_case(case: Case, timer: Timer, rounds: int, calls: int) -> dict[str, Any]:
    """Median milliseconds of each pass; none of someone whose results differ from the host's own."""
    found = differences(case)
    equal = {who for who, errors in found.items() if all(error < SAME for error in errors)}
    names = [who for who in case.functions if who in equal or who not in found]
    graphs = {who: case.functions[who](*case.tensors) for who in names}

    def forward(who: str) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return case.functions[who](*case.tensors)

        return run

    def backward(who: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(graphs[who], case.tensors, case.grad, retain_graph=True)

    times = {}
    for name, make in (("forward", forward), ("backward", backward)):
        times[name] = in_turns(timer, {who: make(who) for who in names}, rounds=rounds, calls=calls)
    return {
        "case": case.name,
        # JSON has no NaN.
        "differences": {
            who: [error if math.isfinite(error) else None for error in errors] for who, errors in found.items()
        },
        "milliseconds": {
            name: {who: statistics.median(spans) for who, spans in of_all.items()} for name, of_all in times.items()
        },
        "spans": times,
    }


def tables(results: dict[str, Any], file: str) -> str:
    """What the page shows."""
    lines = ["| function | computed by | forward, ms | backward, ms |", "|---|---|---|---|"]
    for case in results["cases"]:
        times = case["milliseconds"]
        for who in times["forward"]:
            cells = [f"{times[name][who]:.2f}" for name in PASSES]
            lines.append(f"| {case['case']} | {who} | {' | '.join(cells)} |")
    shape, found = results["shape"], results["machine"]
    # Of a library that does not load, the name and not its folder.
    reasons = {name: re.sub(r"/\S*/", "", why) for name, why in results["left_out"].items()}
    left_out = "".join(f" {name} was left out: {why}." for name, why in reasons.items())
    lines += [
        "",
        f"*One sample of 480p: {shape['heads']} heads of {shape['head_dim']}, {shape['length']:,} tokens, bfloat16; "
        f"{found['device']}, PyTorch {found['torch']}, Triton {found['triton']}; `{file}`.{left_out}*",
    ]
    return "\n".join(lines)


def measure(options: argparse.Namespace, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Every case of every host, written after each."""
    started = time.monotonic()
    shape, hosts = SHAPES[options.shape], {"fastvideo": fastvideo_cases, "turbodiffusion": turbodiffusion_cases}
    results: dict[str, Any] = {
        "machine": machine(device, options.commit),
        "shape": shape.to_dict(),
        "rounds": options.rounds,
        "calls": options.calls,
        "left_out": {},
        "cases": [],
    }
    for host, cases in hosts.items():
        if host not in options.hosts:
            continue
        try:
            for case in cases(shape, device, results["left_out"]):
                results["cases"].append(time_case(case, timer, options.rounds, options.calls))
                made = results["cases"][-1]
                print(f"{time.monotonic() - started:6.1f} s", *(made[name] for name in list(made)[:3]), flush=True)
                _write(options.output, results)
        except ImportError as error:
            results["left_out"][host] = str(error)
            print(f"{host}: {error}", flush=True)
    _write(options.output, results)
    return results


def _write(output: Path | None, results: dict[str, Any]) -> None:
    if output is not None:
        write_json(output, results)


def main(arguments: list[str] | None = None) -> None:
    """Measure, or renew the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turbodiffusion", type=Path, metavar="FOLDER", help="the folder that holds SLA/")
    parser.add_argument("--hosts", nargs="+", choices=("fastvideo", "turbodiffusion"), help="default: both")
    parser.add_argument("--shape", choices=SHAPES, default="480p")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables of this file into docs/hosts.md")
    options = parser.parse_args(arguments)
    if options.page is not None:
        PAGE.show(options.page, tables)
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    options.hosts = options.hosts or ("fastvideo", "turbodiffusion")
    if options.turbodiffusion is not None:
        sys.path.append(str(options.turbodiffusion))
    device = torch.device("cuda")
    measure(options, device, CudaTimer(device))


if __name__ == "__main__":
    main()
