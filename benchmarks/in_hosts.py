"""A step of Wan2.1-1.3B in diffusers, ComfyUI, and vLLM-Omni, dense and with foveal in them, on one GPU.

    python3 benchmarks/in_hosts.py --comfyui FOLDER --output benchmarks/results/in-hosts.json
    python3 benchmarks/in_hosts.py --page benchmarks/results/in-hosts.json

The first command measures. FOLDER is ComfyUI's; vLLM-Omni 0.30 and diffusers must be importable. A host that cannot be
loaded is left out, and the results say why. The second command puts the table of such a file into docs/hosts.md.

What is timed: a step of each host's own Wan model with random weights at the size of Wan2.1-1.3B, all 30 layers, in
bfloat16 and eager, for one video of 480p and 81 frames (32,760 tokens) without guidance.

    diffusers   a call of `WanTransformer3DModel`, with `_native_cudnn` and `set_attention_backend("foveal")`
    ComfyUI     two steps of its sampler (euler), halved, with the model as it is and behind the node Sparse Attention
                (training-free)
    vLLM-Omni   a call of its `WanTransformer3DModel`, with CUDNN_ATTN and with foveal in FASTVIDEO_VSA, whose gates are
                zero, as for checkpoints without gates

Where vLLM's compiled kernels are absent, its RMS norms run as the host's fallback in PyTorch, dense and sparse alike.

All of a host take turns, round by round, and medians count. A time counts only if foveal gives, in the first
self-attention of the model, what dense attention gives where it keeps everything, and something else where it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_page import ROOT, ResultPage
from torch import Tensor, nn

import foveal
from foveal import SLAConfig, VideoGrid
from foveal.hosts.diffusers import register_attention_backend
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.bench.timing import CpuTimer, CudaTimer, Timer
from foveal.testing import relative_error

DENSE, FULL = "dense", "1.3b, 480p"
TRAINING_FREE = (0.3, 0.1)  # the node's default, and a third of it
VSA_TILE, VSA_TOPK = (4, 8, 8), (64, 21)  # the host's cube; its default of the 168 cubes at 480p, and an eighth
PATCH, CHANNELS, TEXT_DIM, FREQUENCIES, HEAD_DIM = (1, 2, 2), 16, 4096, 256, 128
STEPS = 2  # of ComfyUI's sampler in one call
# Of the norm: two kernels in bfloat16 that add up in different orders differ by a fraction of it.
SAME = 0.03
PAGE = ResultPage("in_hosts", ROOT / "docs" / "hosts.md")


@dataclass(frozen=True)
class Size:
    """A Wan model, the grid of its tokens, and the tokens of its text."""

    name: str
    layers: int
    heads: int
    ffn_dim: int
    grid: VideoGrid
    text: int = 512

    @property
    def latent(self) -> tuple[int, ...]:
        sides = (side * edge for side, edge in zip(self.grid.shape, PATCH, strict=True))
        return (1, CHANNELS, *sides)

    def topk(self, topk: int) -> int:
        """The share that `topk` is of the cubes at 480p, in cubes of this grid."""
        cubes = SIZES[FULL].grid.num_cubes(VSA_TILE)
        return max(1, round(topk / cubes * self.grid.num_cubes(VSA_TILE)))


SIZES = {
    size.name: size
    for size in (
        Size(FULL, 30, 12, 8960, VideoGrid(21, 30, 52)),
        Size("smoke", 1, 1, 64, VideoGrid(5, 8, 17), 8),
    )
}


@dataclass(frozen=True)
class Candidate:
    """One way to compute a step.

    Args:
        active: a context in which `call` computes it so.
        attention: the first self-attention of the model.
    """

    call: Callable[[], object]
    attention: nn.Module
    active: Callable[[], AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Host:
    """A host with its model loaded.

    Args:
        version: of the host.
        candidates: by name, `DENSE` first.
        whole: foveal where it keeps everything.
        steps: of one call.
    """

    version: str
    candidates: dict[str, Candidate]
    whole: Candidate
    steps: int = 1


def fill(parameters: dict[str, Tensor]) -> None:
    """Random weights that keep the size of what passes through them: no bias, and norms that scale by 1."""
    for name, x in parameters.items():
        if x.dim() > 1:
            x.normal_(std=x[0].numel() ** -0.5)
        else:
            x.fill_(float("norm" in name and name.endswith("weight")))


def latent_and_text(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = size.latent, (1, size.text, TEXT_DIM)
    return tuple(torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)


def sparse_config(keep_ratio: float) -> SLAConfig:
    return SLAConfig(keep_ratio=keep_ratio, drop_ratio=0.0, linear_scope="none", projection=False)


def blocks_name(keep_ratio: float) -> str:
    return f"foveal, training-free, {keep_ratio:.0%} of the blocks"


@contextlib.contextmanager
def diffusers_host(size: Size, device: torch.device, options: argparse.Namespace) -> Iterator[Host]:
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of each choice of a backend
    sizes = {"num_layers": size.layers, "num_attention_heads": size.heads, "ffn_dim": size.ffn_dim}
    with torch.device(device):
        model = WanTransformer3DModel(attention_head_dim=HEAD_DIM, **sizes).eval().requires_grad_(False)
    kept = tuple(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    fill(dict(model.named_parameters()))
    latent, text = latent_and_text(size, device)
    timestep = torch.tensor([500.0], device=device)

    def call() -> object:
        with torch.no_grad():
            return model(latent, timestep, text, return_dict=False)

    @contextlib.contextmanager
    def backend(name: str) -> Iterator[None]:
        model.set_attention_backend(name)
        try:
            yield
        finally:
            model.reset_attention_backend()

    @contextlib.contextmanager
    def sparse(keep_ratio: float) -> Iterator[None]:
        with register_attention_backend(sparse_config(keep_ratio)), backend("foveal"):
            yield

    def candidate(active: Callable[[], AbstractContextManager]) -> Candidate:
        return Candidate(call, model.blocks[0].attn1, active)

    candidates = {DENSE: candidate(lambda: backend("_native_cudnn" if device.type == "cuda" else "native"))}
    for ratio in TRAINING_FREE:
        candidates[blocks_name(ratio)] = candidate(lambda ratio=ratio: sparse(ratio))
    yield Host(importlib.metadata.version("diffusers"), candidates, candidate(lambda: sparse(1.0)))


@contextlib.contextmanager
def comfyui_host(size: Size, device: torch.device, options: argparse.Namespace) -> Iterator[Host]:
    if options.comfyui is not None:
        sys.path.insert(0, str(options.comfyui))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    with tempfile.TemporaryDirectory() as workspace:
        args.base_directory = workspace
        yield _loaded_comfyui(size, device)


def _loaded_comfyui(size: Size, device: torch.device) -> Host:
    import comfy.ops
    import comfy.sample
    import comfy.sd
    from comfy.ldm.wan.model import WanModel

    spec = importlib.util.spec_from_file_location("foveal_nodes", ROOT / "integrations_comfyui" / "nodes.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    dim = size.heads * HEAD_DIM
    shape = {"num_layers": size.layers, "num_heads": size.heads, "dim": dim, "ffn_dim": size.ffn_dim}
    bare = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    weights = {
        name: torch.empty(x.shape, dtype=torch.bfloat16, device=device)
        for name, x in WanModel(model_type="t2v", text_dim=TEXT_DIM, **shape, **bare).state_dict().items()
    }
    fill(weights)
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.bfloat16})
    del weights
    _, text = latent_and_text(size, torch.device("cpu"))
    prompt, empty = [[text.float(), {}]], torch.zeros(size.latent)
    noise = comfy.sample.prepare_noise(empty, 0)
    attention = model.model.diffusion_model.blocks[0].self_attn

    def candidate(patched: Any) -> Candidate:
        def call() -> object:
            with torch.inference_mode():
                return comfy.sample.sample(
                    patched, noise, STEPS, 1.0, "euler", "simple", prompt, prompt, empty, disable_pbar=True, seed=0
                )

        return Candidate(call, attention)

    def sparse(keep_ratio: float) -> Candidate:
        node, blocks = pack.TrainingFree(), {"token_order": "raster", "block_q": 64, "block_k": 64}
        running = {"min_tokens": 0, "preview_step": 0, "strict": True, "impl": "auto"}
        return candidate(node.apply(model, keep_ratio, **blocks, **running)[0])

    candidates = {DENSE: candidate(model)} | {blocks_name(ratio): sparse(ratio) for ratio in TRAINING_FREE}
    version = importlib.import_module("comfyui_version").__version__
    return Host(version, candidates, sparse(1.0), STEPS)


@contextlib.contextmanager
def vllm_omni_host(size: Size, device: torch.device, options: argparse.Namespace) -> Iterator[Host]:
    import vllm_omni.platforms
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    if device.type == "cpu":
        vllm_omni.platforms._current_omni_platform = _cpu_platform()
    from vllm_omni.diffusion.distributed import parallel_state

    config = VllmConfig(device_config=DeviceConfig(device=device.type))
    rank = {"backend": "gloo" if device.type == "cpu" else "nccl"}
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, **rank)
        parallel_state.initialize_model_parallel(**rank)
        try:
            yield _loaded_vllm_omni(size, device, config, folder)
        finally:
            torch.distributed.destroy_process_group()


def _cpu_platform() -> Any:
    """vLLM-Omni has no platform for CPUs: one that says it is Intel's, so that layers run in plain PyTorch."""
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class CpuPlatform(OmniPlatform):
        _omni_enum = OmniPlatformEnum.XPU
        device_name = device_type = "cpu"
        get_device_count = classmethod(lambda cls: 1)
        set_device = classmethod(lambda cls, device: None)
        get_torch_device = classmethod(lambda cls, local_rank=None: torch.device("cpu"))
        has_flash_attn_package = classmethod(lambda cls: False)

        @classmethod
        def get_diffusion_attn_backend_cls(
            cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = True
        ) -> str:
            return DiffusionAttentionBackendEnum[(selected_backend or "TORCH_SDPA").upper()].get_path()

    return CpuPlatform()


def _loaded_vllm_omni(size: Size, device: torch.device, config: Any, folder: str) -> Host:
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

    sizes = {"num_attention_heads": size.heads, "attention_head_dim": HEAD_DIM, "num_layers": size.layers}
    sizes |= {"ffn_dim": size.ffn_dim, "in_channels": CHANNELS, "out_channels": CHANNELS}
    sizes |= {"text_dim": TEXT_DIM, "freq_dim": FREQUENCIES}
    native = "CUDNN_ATTN" if device.type == "cuda" else "TORCH_SDPA"

    def built(backend: str) -> tuple[nn.Module, Any]:
        """A model whose self-attention runs a backend, and the host's settings."""
        roles = {"self": {"backend": backend}, "cross": {"backend": native}}
        settings = OmniDiffusionConfig(model=folder, diffusion_attention_config={"per_role": roles})
        with set_current_diffusion_config(settings), torch.device(device):
            model = WanTransformer3DModel(**sizes).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return model, settings

    dense = built(native)
    with foveal.patch("vllm_omni"):
        sparse = built("FASTVIDEO_VSA")
    fill(dict(dense[0].named_parameters()))
    fill(dict(sparse[0].named_parameters()))
    # Its gates stay: they are zero, as the host makes them.
    state = dense[0].state_dict()
    gates = {name: torch.zeros_like(x) for name, x in sparse[0].state_dict().items() if name not in state}
    sparse[0].load_state_dict(state | gates)
    latent, text = latent_and_text(size, device)
    timestep = torch.tensor([500.0], device=device)

    def candidate(model: nn.Module, settings: Any, **attributes: Any) -> Candidate:
        def call() -> object:
            context = set_forward_context(vllm_config=config, omni_diffusion_config=settings)
            with context, torch.inference_mode():
                return model(latent, timestep, text, return_dict=False)

        @contextlib.contextmanager
        def active() -> Iterator[None]:
            model.preserve_vsa_all_blocks = True
            for block in model.blocks:
                vars(block.attn1.attn.attention).update(attributes)
            yield

        return Candidate(call, model.blocks[0].attn1, active)

    cubes = size.grid.num_cubes(VSA_TILE)
    candidates = {DENSE: candidate(*dense)}
    for topk in map(size.topk, VSA_TOPK):
        candidates[f"foveal, VSA, {topk} of {cubes} cubes"] = candidate(*sparse, topk=topk)
    return Host(importlib.metadata.version("vllm-omni"), candidates, candidate(*sparse, topk=cubes))


HOSTS = {"diffusers": diffusers_host, "ComfyUI": comfyui_host, "vLLM-Omni": vllm_omni_host}


def first_attention(candidate: Candidate) -> Tensor:
    """What the first self-attention gives in one call."""
    outputs = []
    handle = candidate.attention.register_forward_hook(lambda module, args, output: outputs.append(output.float()))
    try:
        with candidate.active():
            candidate.call()
    finally:
        handle.remove()
    return outputs[0]


def time_host(host: Host, timer: Timer, rounds: int, calls: int) -> dict[str, Any]:
    """Median milliseconds of a step of each candidate; none of foveal where it does not compute what it should."""
    exact = first_attention(host.candidates[DENSE])
    errors = {name: relative_error(first_attention(x), exact) for name, x in host.candidates.items() if name != DENSE}
    whole = relative_error(first_attention(host.whole), exact)
    counted = [DENSE, *(name for name, error in errors.items() if 0 < whole < SAME < error < math.inf)]
    spans: dict[str, list[float]] = {name: [] for name in counted}
    for _, (name, times) in itertools.product(range(rounds), spans.items()):
        candidate = host.candidates[name]
        with candidate.active():
            times += [span / host.steps for span in timer.burst(candidate.call, calls)]
    return {
        "version": host.version,
        # JSON has no NaN.
        "difference of everything": whole if math.isfinite(whole) else None,
        "differences": {name: error if math.isfinite(error) else None for name, error in errors.items()},
        "milliseconds": {name: statistics.median(times) for name, times in spans.items()},
        "spans": spans,
    }


def tables(results: dict[str, Any], file: str) -> str:
    """What the page shows."""
    lines = ["| tool | attention | a step, ms | |", "|---|---|---|---|"]
    for name, host in results["hosts"].items():
        times = host["milliseconds"]
        lines += [
            f"| {name} {host['version']} | {who} | {span:.0f} | {times[DENSE] / span:.2f}x |"
            for who, span in times.items()
        ]
    size, found = results["size"], results["machine"]
    left_out = "".join(f" {name} was left out: {why}." for name, why in results["left_out"].items())
    lines += [
        "",
        f"*Wan2.1-1.3B with random weights, {size['layers']} layers, {size['tokens']:,} tokens, bfloat16, eager; "
        f"{found['device']}, PyTorch {found['torch']}, Triton {found['triton']}; `{file}`.{left_out}*",
    ]
    return "\n".join(lines)


def page_of(files: list[Path]) -> str:
    """What the page shows of several files: a tool's rows are those of the last file that has it.

    Raises:
        ValueError: if the files differ in the model's size, the device, or the versions.
    """
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    setting, *others = (
        (made["size"], *(made["machine"][name] for name in ("device", "torch", "triton"))) for made in results
    )
    for file, other in zip(files[1:], others, strict=True):
        if other != setting:
            raise ValueError(f"--page takes files of one model and machine, got {setting} and, in {file}, {other}")
    hosts = {name: host for made in results for name, host in made["hosts"].items()}
    left_out = {name: why for made in results for name, why in made["left_out"].items() if name not in hosts}
    return tables({**results[0], "hosts": hosts, "left_out": left_out}, "`, `".join(file.name for file in files))


def measure(options: argparse.Namespace, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Every host, written after each."""
    started, size = time.monotonic(), SIZES[options.size]
    results: dict[str, Any] = {
        "machine": machine(device, options.commit),
        "size": {
            "name": size.name,
            "layers": size.layers,
            "heads": size.heads,
            "head_dim": HEAD_DIM,
            "ffn_dim": size.ffn_dim,
            "grid": list(size.grid.shape),
            "tokens": size.grid.num_tokens,
            "text": size.text,
        },
        "rounds": options.rounds,
        "calls": options.calls,
        "left_out": {},
        "hosts": {},
    }
    for name in options.hosts:
        try:
            with HOSTS[name](size, device, options) as host:
                print(f"{time.monotonic() - started:6.1f} s {name} {host.version} is loaded", flush=True)
                made = results["hosts"][name] = time_host(host, timer, options.rounds, options.calls)
            print(f"{time.monotonic() - started:6.1f} s", *(made[key] for key in list(made)[1:4]), flush=True)
        except ImportError as error:
            results["left_out"][name] = str(error)
            print(f"{name}: {error}", flush=True)
        if options.output is not None:
            write_json(options.output, results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure, or renew the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="ComfyUI, if it cannot be imported")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS), help="default: all")
    parser.add_argument("--size", choices=SIZES, default=FULL, help="smoke is for CPUs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell")
    parser.add_argument(
        "--page", type=Path, nargs="+", metavar="FILE", help="put the table of these files into docs/hosts.md"
    )
    options = parser.parse_args(arguments)
    if options.page is not None:
        PAGE.renew(page_of(options.page))
        return
    on_gpu = torch.cuda.is_available()
    if not on_gpu and options.size == FULL:
        raise SystemExit("needs a CUDA device, but for --size smoke")
    device = torch.device("cuda" if on_gpu else "cpu")
    measure(options, device, CudaTimer(device) if on_gpu else CpuTimer())


if __name__ == "__main__":
    main()
