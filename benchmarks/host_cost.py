"""What a call of SLA, SLA2, or VSA costs the host, and where the time goes.

    PYTHONPATH=src python benchmarks/host_cost.py [--profile] [--gpu [--out FILE]]

Without a GPU this is production code on CPU tensors, with launches left out. Everything up to a compiled kernel's own
launch runs and is timed: validation, the choice of the implementation, autograd, views, memory, descriptors, and the
search for the variant. Gluon's kernels need Triton 3.6.

With `--gpu`, calls at 4,096 tokens run whole, back to back and behind other work, and every launch is timed by itself.
Autograd runs a backward on the GPU in another thread, for which each call waits. So there are two more figures: the
same in the calling thread, and a chain of eight layers with one backward, by layer, as in a model.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import itertools
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from launched_kernels import as_if_on

from foveal import SLA2Config, SLAConfig, VideoGrid, VSAConfig, sla2_attention, sla_attention, vsa_attention
from foveal.kernels import host
from foveal.kernels.hopper import support
from foveal.lab.bench.machine import machine
from foveal.lab.bench.timing import HOST_CALLS, CudaTimer
from foveal.methods.sla import attention as sla
from foveal.methods.sla2 import blocks as sla2_blocks

CALLS = 200
LAYERS = 8
ONE_THREAD, CHAIN = "both, in one thread", f"both, in {LAYERS} layers"


class Launched:
    """In a compiled kernel's place."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


def unlaunched(compiled, device, names, named) -> host.DirectKernel:
    """The compiled kernel for a replay: its C launcher does nothing, and a TMA map is an address."""
    parameters = [(name, hasattr(named[name], "base") or None) for name in names]
    direct = host.DirectKernel(compiled, device, None, parameters)
    direct.launch_with = lambda grid: lambda arguments: None
    direct.tensor_map = lambda descriptor, known: (lambda address: address, [*descriptor.shape, *descriptor.strides])
    return direct


@contextlib.contextmanager
def without_launches():
    """Tensors count as a Hopper GPU's, and neither Triton's kernels nor the large products run."""
    with pytest.MonkeyPatch.context() as patch, as_if_on(patch, "sm_90"):
        patch.setattr(JITFunction, "run", lambda kernel, *arguments, grid, warmup, **named: Launched())
        patch.setattr(sla, "fits_kernel", lambda *_: True)
        patch.setattr(sla2_blocks, "fits_kernel", lambda *_: True)
        patch.setattr(support, "_why_not_device", lambda device: None)
        patch.setattr(torch, "bmm", lambda a, b, out: out)
        patch.setattr(host.DOORS["replay"], "on", True)
        patch.setattr(host.DirectKernel, "of", unlaunched)
        patch.setattr(host.DOORS["direct"], "releases", (".".join(triton.__version__.split(".")[:2]),))
        patch.delattr(host.DOORS["direct"], "fits", raising=False)
        yield


def cases() -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    grid, heads, head_dim = VideoGrid(4, 4, 8), 1, 64  # small: what PyTorch computes should not count
    query, key, value, gate = (
        torch.randn(1, grid.num_tokens, heads, head_dim).bfloat16().transpose(1, 2) for _ in range(4)
    )
    weight, bias = torch.randn(head_dim, head_dim), torch.randn(head_dim)

    def sla_of(scope: str) -> Callable[..., torch.Tensor]:
        config = SLAConfig(linear_scope=scope)

        def run(query, key, value, weight, bias):
            return sla_attention(query, key, value, config=config, proj_weight=weight, proj_bias=bias, impl="gluon")

        return run

    def vsa(query, key, value, gate):
        return vsa_attention(query, key, value, config=VSAConfig(), grid=grid, gate_coarse=gate, impl="gluon")

    return {
        "SLA marginal": (sla_of("marginal"), [query, key, value, weight, bias]),
        "SLA all": (sla_of("all"), [query, key, value, weight, bias]),
        "SLA2": (sla2_of("noncritical", "gluon"), [query, key, value, weight, weight.t().contiguous()]),
        "SLA2, router only": (sla2_of("none", "gluon"), [query, key, value, *torch.randn(2, heads, *weight.shape)]),
        "VSA": (vsa, [query, key, value, gate]),
    }


def sla2_of(scope: str, impl: str = "auto") -> Callable[..., torch.Tensor]:
    """SLA2 with a router that learns where its projections have gradients."""
    config = SLA2Config(block_q=64, linear_scope=scope)

    def run(query, key, value, proj_query, proj_key):
        return sla2_attention(query, key, value, config=config, proj_query=proj_query, proj_key=proj_key, impl=impl)

    return run


def milliseconds(function: Callable[[], object]) -> float:
    """The median of `CALLS` calls, in CPU time of this thread, which other processes do not lengthen."""
    times = []
    for _ in range(CALLS + 20):
        start = time.thread_time()
        function()
        times.append(1e3 * (time.thread_time() - start))
    return statistics.median(times[20:])


def gpu_cases() -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    grid, heads, head_dim = VideoGrid(16, 16, 16), 12, 128
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    query, key, value, gate = (make(1, grid.num_tokens, heads, head_dim).transpose(1, 2) for _ in range(4))
    weight, bias = make(head_dim, head_dim).float(), make(head_dim).float()

    def sla_of(scope: str) -> Callable[..., torch.Tensor]:
        config = SLAConfig(linear_scope=scope)

        def run(query, key, value, weight, bias):
            return sla_attention(query, key, value, config=config, proj_weight=weight, proj_bias=bias)

        return run

    def vsa(query, key, value, gate):
        return vsa_attention(query, key, value, config=VSAConfig(), grid=grid, gate_coarse=gate)

    def dense(query, key, value):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return scaled_dot_product_attention(query, key, value)

    return {
        "SLA marginal": (sla_of("marginal"), [query, key, value, weight, bias]),
        "SLA all": (sla_of("all"), [query, key, value, weight, bias]),
        "SLA2": (sla2_of("noncritical"), [query, key, value, weight, weight.t().contiguous()]),
        "SLA2, router only": (sla2_of("none"), [query, key, value, *make(2, heads, head_dim, head_dim).float()]),
        "VSA": (vsa, [query, key, value, gate]),
        "cuDNN": (dense, [query, key, value]),
    }


class Launches:
    """Times the launches of compiled variants, by kernel."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def runner(self, compiled, device: int) -> Callable[..., None]:
        run, times = _RUNNER(compiled, device), self.seconds.setdefault(compiled.name, [])

        def timed(*arguments) -> None:
            start = time.perf_counter()
            run(*arguments)
            times.append(time.perf_counter() - start)

        return timed

    def report(self, calls: int) -> str:
        lines = []
        for name, times in self.seconds.items():
            if times:
                share = len(times) / calls
                lines.append(f"    {name:28} {share:.1f} a call, {1e6 * statistics.median(times):.1f} us each")
                times.clear()
        return "\n".join(lines)


_RUNNER = host._runner


def on_gpu(profiled: bool, out: Path | None, commit: str | None) -> None:
    """Prints the host's milliseconds of calls, back to back and behind other work, and of each launch."""
    device = torch.device("cuda")
    launches, timer, found = Launches(), CudaTimer(device), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_runner", launches.runner)
        for (name, (run, tensors)), replays in itertools.product(gpu_cases().items(), (True, False)):
            if name == "cuDNN" and not replays:
                continue
            patch.setattr(host.DOORS["replay"], "on", replays)
            for label, function in passes(run, tensors).items():
                for _ in range(10):
                    function()
                launches.report(1)
                layers = calls_of(label)
                queued = timer.host(function) / layers
                per_launch, times = launches.report(HOST_CALLS * layers), []
                for _ in range(CALLS // 10):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(10):
                        function()
                    times.append(100 * (time.perf_counter() - start) / layers)
                figures = {"back_to_back_ms": statistics.median(times), "queued_ms": queued}
                way = "as it is" if name == "cuDNN" else "replayed" if replays else "worked out"
                found.setdefault(name, {}).setdefault(label, {})[way] = figures
                print(f"{name:18} {label:22} {way:10} " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
                print(per_launch, flush=True)
                if profiled:
                    torch.cuda.synchronize()
                    show_profile(function)
    if out is not None:
        settings = {"tokens": 4096, "heads": 12, "head_dim": 128, "calls": CALLS}
        out.write_text(json.dumps({"machine": machine(device, commit), "settings": settings, "calls": found}, indent=1))


def show_profile(function: Callable[[], object]) -> None:
    profile = cProfile.Profile()
    profile.runcall(lambda: [function() for _ in range(CALLS)])
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def passes(run, tensors) -> dict[str, Callable[[], object]]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.empty_like(tensors[0])

    def forward() -> None:
        with torch.no_grad():
            run(*tensors)

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, grad)

    def in_one_thread() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            both()

    def chain() -> None:
        output, *others = leaves
        for _ in range(LAYERS):
            output = run(output, *others)
        torch.autograd.grad(output, leaves, grad)

    return {
        "forward, inference": forward,
        "forward, training": lambda: run(*leaves),
        "forward and backward": both,
        ONE_THREAD: in_one_thread,
        CHAIN: chain,
    }


def calls_of(label: str) -> int:
    """How many layers one call of a pass runs."""
    return LAYERS if label == CHAIN else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--gpu", action="store_true", help="whole calls on this machine's GPU")
    parser.add_argument("--out", type=Path, help="with --gpu, a file for the figures, as JSON")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    options = parser.parse_args()
    if options.gpu:
        on_gpu(options.profile, options.out, options.commit)
        return
    torch.set_num_threads(1)
    with without_launches():
        for name, (run, tensors) in cases().items():
            for label, function in passes(run, tensors).items():
                print(f"{name:18} {label:22} {milliseconds(function) / calls_of(label):.3f} ms")
                if options.profile:
                    show_profile(function)


if __name__ == "__main__":
    main()
