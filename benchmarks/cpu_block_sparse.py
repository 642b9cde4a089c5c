"""Block-sparse attention in plain PyTorch against scaled_dot_product_attention, on the CPU.

    python benchmarks/cpu_block_sparse.py --json benchmarks/results/cpu_block_sparse.json

Times `block_sparse_attention(impl="torch")` with a selection made beforehand: choosing the blocks is left out, and so
is everything else of SLA or VSA. Dense and sparse runs alternate, so that a busy machine slows both; the medians count.
Nothing is timed unless keeping every block gives the dense result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal import block_sparse_attention, select_blocks
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.testing import make_inputs, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def forward_and_backward(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(attend(*inputs), inputs, grad)


def measure(options: argparse.Namespace) -> dict[str, object]:
    inputs = make_inputs(
        batch=options.batch,
        heads=options.heads,
        query_length=options.length,
        head_dim=options.head_dim,
        dtype=DTYPES[options.dtype],
        requires_grad=True,
    )
    selection = select_blocks(*inputs[:2], block_q=options.block, block_k=options.block, keep_ratio=options.keep_ratio)
    attends = {
        "dense": F.scaled_dot_product_attention,
        "sparse": lambda *qkv: block_sparse_attention(*qkv, selection, impl="torch"),
    }
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    with torch.no_grad():
        everything = select_blocks(*inputs[:2], block_q=options.block, block_k=options.block, keep_ratio=1.0)
        error = relative_error(
            block_sparse_attention(*inputs, everything, impl="torch"), F.scaled_dot_product_attention(*inputs)
        )
    if not error < LARGEST_ERROR[options.dtype]:
        raise SystemExit(f"keeping every block differs from dense attention by {error:.1e}: nothing was timed")

    def forward(attend: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            attend(*inputs)

    passes = {
        "forward": forward,
        "forward_backward": lambda attend: forward_and_backward(attend, inputs, grad),
    }
    results = {}
    for name, run in passes.items():
        for attend in attends.values():
            run(attend)
        times = {kind: [] for kind in attends}
        for _ in range(options.repeats):
            for kind, attend in attends.items():
                times[kind].append(seconds(lambda run=run, attend=attend: run(attend)))
        medians = {f"{kind}_seconds": statistics.median(values) for kind, values in times.items()}
        results[name] = medians | {"ratio": medians["dense_seconds"] / medians["sparse_seconds"], "all_seconds": times}
    return {"relative_error_keeping_everything": error, **results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64, help="tokens per block, query and key alike")
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures, the shape and the machine here")
    options = parser.parse_args()

    results = measure(options)
    for name in ("forward", "forward_backward"):
        dense, sparse, ratio = (results[name][key] for key in ("dense_seconds", "sparse_seconds", "ratio"))
        print(f"{name:17} dense {1e3 * dense:8.1f} ms   sparse {1e3 * sparse:8.1f} ms   {ratio:5.1f}x")
    print(f"relative error with every block kept: {results['relative_error_keeping_everything']:.1e}")
    if options.json:
        shape = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"shape": shape, "machine": machine(torch.device("cpu")), **results})


if __name__ == "__main__":
    main()
