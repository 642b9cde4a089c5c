"""SGLang's VSA for MiniMax-H3 against foveal's behind the same layer, on one GPU.

    python3 benchmarks/sglang_h3.py --sglang FOLDER --output benchmarks/results/sglang-h3.json
    python3 benchmarks/sglang_h3.py --page benchmarks/results/sglang-h3.json

The second command puts the table of a file of results into docs/sglang.md.

FOLDER is the site-packages of SGLang 0.5.23, if it cannot be imported. Where it lacks what the rest of SGLang needs,
`--files-only` loads only the files of its attention backends, with names in the place of what they import from
elsewhere. Of the wheel, four files of `sglang/multimodal_gen/runtime/layers/attention/backends/` must then be there:
`video_sparse_attn_h3.py`, `video_sparse_attn.py`, `vsa_h3_kernels.py`, and `sparse_linear_attn.py`, which the patch
needs. Their kernels are Triton's.

What is timed: one call of SGLang's `VideoSparseAttentionH3Impl.forward_varlen`, the metadata of the step made before,
in bfloat16, with 56 heads of 128 (one GPU) and 7 (one of 8 under Ulysses), a gate, and 10 % or 20 % of the cubes kept.
That is the whole attention of a layer: packing, selection, the coarse branch, the sparse kernel, the gates, and the way
back. On Hopper SGLang's kernels are Triton's. Both take turns, round by round; medians count. A time counts only if the
outputs agree, and with them the cubes that both select.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from result_page import ROOT, ResultPage
from torch import Tensor

import foveal
from foveal.hosts.sglang import BACKENDS
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.bench.timing import CudaTimer, in_turns
from foveal.testing import relative_error

# 1,008 tokens in each of the latent frames of 768 lines. The totals are those that others measured at: 37,760 (5 s) and
# 109,632 (15 s).
CLIPS = {"5 s": ((37, 24, 42), (256, 208)), "15 s": ((108, 24, 42), (256, 512))}
HEADS, HEAD_DIM = (56, 7), 128
SPARSITIES = (0.9, 0.8)
# Of the norm: two kernels in bfloat16 that add up in different orders differ by a fraction of it.
SAME = 0.02
PAGE = ResultPage("sglang_h3", ROOT / "docs" / "sglang.md")


def load_backend(folder: Path | None, files_only: bool) -> types.ModuleType:
    """SGLang's module `video_sparse_attn_h3`."""
    if folder is not None:
        sys.path.append(str(folder))
    if files_only:
        _stand_in_for_the_rest(folder)
    return importlib.import_module(f"{BACKENDS}.video_sparse_attn_h3")


def _stand_in_for_the_rest(folder: Path | None) -> None:
    """What the three files import from the rest of SGLang: names that the timed calls never use."""
    if folder is None:
        raise SystemExit("--files-only needs --sglang FOLDER")

    def module(name: str, **attributes: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(attributes)

    parts = BACKENDS.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module(name, __path__=[str(folder.joinpath(*parts[:depth]))])
    names = ("AttentionBackend", "AttentionImpl", "AttentionMetadata", "AttentionMetadataBuilder")
    bases = {name: type(name, (), {}) for name in names}
    bases["AttentionMetadata"] = _metadata_base()
    runtime = ".".join(parts[:3])
    module("sglang.kernels", __path__=[])
    module("sglang.kernels.ops", __path__=[])
    unused = {"_attn_fwd": None, "get_block_map": None}
    module("sglang.kernels.ops.diffusion", can_use_vsa_block_sparse_sm100=lambda *args: False, **unused)
    module(f"{BACKENDS}.attention_backend", **bases)
    module(f"{BACKENDS}.flash_attn", FlashAttentionImpl=lambda **kwargs: None)
    module(f"{runtime}.distributed", get_sp_group=None)
    module(f"{runtime}.platforms", AttentionBackendEnum=types.SimpleNamespace())
    module(f"{runtime}.utils", __path__=[])
    module(f"{runtime}.utils.logging_utils", init_logger=lambda name: None)


def _metadata_base() -> type:
    from dataclasses import make_dataclass

    return make_dataclass("AttentionMetadata", [("current_timestep", int)])


def make_call(
    backend: types.ModuleType, clip: str, heads: int, sparsity: float, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the metadata builder, and those of `forward_varlen` but for the metadata."""
    grid, segments = CLIPS[clip]
    step = {
        "current_timestep": 1,
        "raw_latent_shape": (grid[0], 2 * grid[1], 2 * grid[2]),
        "patch_size": (1, 2, 2),
        "VSA_sparsity": sparsity,
        "prefix_segments": segments,
        "device": device,
    }
    rows = grid[0] * grid[1] * grid[2] + sum(segments)
    generator = torch.Generator(device).manual_seed(0)

    def rows_of() -> Tensor:
        return torch.randn(rows, heads, HEAD_DIM, generator=generator, device=device, dtype=torch.bfloat16)

    bounds = (0, rows, rows)
    call = {
        "query": rows_of(),
        "key": rows_of(),
        "value": rows_of(),
        "gate_compress": rows_of(),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device),
        "cu_seqlens_host": bounds,
        "max_seqlen": rows,
    }
    return step, call


def time_case(
    backend: types.ModuleType, timer: CudaTimer, clip: str, heads: int, sparsity: float, rounds: int, calls: int
) -> dict[str, Any]:
    """Median milliseconds of both, and by how much their outputs differ."""
    step, call = make_call(backend, clip, heads, sparsity, timer.device)
    shape = {"num_heads": heads, "head_size": HEAD_DIM, "causal": False, "softmax_scale": HEAD_DIM**-0.5}
    layer = backend.VideoSparseAttentionH3Impl(**shape, prefix="blocks.0.attn")
    builder = backend.VideoSparseAttentionH3MetadataBuilder
    theirs, their_metadata = backend.VideoSparseAttentionH3Impl.forward_varlen, builder().build(**step)
    with foveal.patch("sglang"):
        ours, our_metadata = backend.VideoSparseAttentionH3Impl.forward_varlen, builder().build(**step)
    functions = {
        "sglang": lambda: theirs(layer, **call, attn_metadata=their_metadata),
        "foveal": lambda: ours(layer, **call, attn_metadata=our_metadata),
    }
    with torch.inference_mode():
        difference = relative_error(functions["foveal"](), functions["sglang"]())
        if not difference < SAME:
            raise SystemExit(f"{clip}, {heads} heads, sparsity {sparsity}: the outputs differ by {difference:.1e}")
        times = in_turns(timer, functions, rounds=rounds, calls=calls)
    medians = {name: statistics.median(spans) for name, spans in times.items()}
    return {
        "clip": clip,
        "tokens": call["max_seqlen"],
        "heads": heads,
        "sparsity": sparsity,
        "difference": difference,
        "milliseconds": medians,
        "ratio": medians["sglang"] / medians["foveal"],
        "spans": times,
    }


def tables(results: dict[str, Any], file: str) -> str:
    """What the page shows."""
    lines = [
        "| clip | tokens | heads | cubes kept | SGLang, ms | foveal, ms | foveal is |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        times = case["milliseconds"]
        lines.append(
            f"| {case['clip']} | {case['tokens']:,} | {case['heads']} | {1 - case['sparsity']:.0%} | "
            f"{times['sglang']:.2f} | {times['foveal']:.2f} | {case['ratio']:.2f}x as fast |"
        )
    found = results["machine"]
    lines += [
        "",
        f"*One layer's attention, forward, bfloat16; {found['device']}, PyTorch {found['torch']}, Triton "
        f"{found['triton']}; `{file}`.*",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Time every case, print a line each, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", type=Path, metavar="FOLDER", help="site-packages with SGLang")
    parser.add_argument("--files-only", action="store_true", help="load only this backend's files")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--heads", nargs="+", type=int, default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no case later")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table of this file into docs/sglang.md")
    started = time.monotonic()
    options = parser.parse_args(arguments)
    if options.page is not None:
        PAGE.show(options.page, tables)
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    device = torch.device("cuda")
    backend = load_backend(options.sglang, options.files_only)
    timer, cases = CudaTimer(device), []
    for clip, heads, sparsity in itertools.product(options.clips, options.heads, SPARSITIES):
        if time.monotonic() - started > options.budget_seconds:
            print(f"out of time before {clip}, {heads} heads, sparsity {sparsity}", flush=True)
            break
        case = time_case(backend, timer, clip, heads, sparsity, options.rounds, options.calls)
        cases.append(case)
        print(json.dumps({name: value for name, value in case.items() if name != "spans"}), flush=True)
        if options.output is not None:
            write_json(options.output, {"machine": machine(device, options.commit), "cases": cases})


if __name__ == "__main__":
    main()
