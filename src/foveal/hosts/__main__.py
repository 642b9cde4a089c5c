"""Shows whether foveal runs behind an installed tool's functions: python -m foveal.hosts fastvideo.

vLLM-Omni, SGLang, and ComfyUI have commands of their own: `python -m foveal.hosts.vllm_omni`,
`python -m foveal.hosts.sglang`, and the node pack's `try_it.py`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.hosts import fastvideo, patch, turbodiffusion
from foveal.hosts.diffusers import HOW_TO_INSTALL, NAME, register_attention_backend
from foveal.hosts.patching import import_host
from foveal.methods.sla.config import SLAConfig
from foveal.testing import output_and_gradients, relative_error

HEADS, HEAD_DIM = 2, 64
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# (device, dtype) to what ran, its output and gradients, and those of the reference in float32.
Shown = tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]


def show_fastvideo(device: torch.device, dtype: torch.dtype) -> Shown:
    """`video_sparse_attn` of fastvideo-kernel, with cubes that are partly empty."""
    sizes = torch.tensor([64, 40, 64, 1, 64, 64], device=device, dtype=torch.int32)
    valid = torch.arange(64, device=device).repeat(len(sizes)) < sizes.repeat_interleave(64)
    inputs = [x * valid[:, None] for x in _tensors(4, (1, HEADS, len(valid), HEAD_DIM), device, dtype)]
    with patch("fastvideo"):
        host = importlib.import_module("fastvideo_kernel")
        function = host.video_sparse_attn

        def run(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
            return function(query, key, value, sizes, sizes, 2, (4, 4, 4), gate) * valid[:, None]

        ours = output_and_gradients(run, inputs)

    def reference(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        made = fastvideo.vsa_over_tiles(query, key, value, sizes, sizes, 2, (4, 4, 4), gate, "reference")
        return made * valid[:, None]

    ran = f"fastvideo_kernel.video_sparse_attn is {function.__module__}'s"
    return ran, ours, output_and_gradients(reference, [x.float() for x in inputs])


def show_turbodiffusion(device: torch.device, dtype: torch.dtype) -> Shown:
    """TurboDiffusion's `SparseLinearAttention`."""
    inputs = _tensors(3, (1, 400, HEADS, HEAD_DIM), device, dtype)
    with patch("turbodiffusion"):
        host = importlib.import_module("SLA")
        module = host.SparseLinearAttention(HEAD_DIM, 0.3).to(device)
        torch.nn.init.normal_(module.proj_l.weight, std=HEAD_DIM**-0.5)
        module.dtype = dtype
        forward = type(module).forward
        ours = output_and_gradients(module, inputs)
    module.dtype = torch.float32

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return turbodiffusion.attention_of(module, query, key, value, "reference", topk=module.topk)[0]

    ran = f"SLA.SparseLinearAttention.forward is {forward.__module__}'s"
    return ran, ours, output_and_gradients(reference, [x.float() for x in inputs])


def show_diffusers(device: torch.device, dtype: torch.dtype) -> Shown:
    """The attention backend, through the function that diffusers' models call."""
    dispatch = import_host("diffusers.models.attention_dispatch", "diffusers", HOW_TO_INSTALL)
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, linear_scope="none", projection=False)
    inputs = _tensors(3, (1, 400, HEADS, HEAD_DIM), device, dtype)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch.dispatch_attention_fn(query, key, value, backend=dispatch.AttentionBackendName(NAME))

    with register_attention_backend(config):
        ours = output_and_gradients(run, inputs)
    with register_attention_backend(config, impl="reference"):
        exact = output_and_gradients(run, [x.float() for x in inputs])
    return f"diffusers has the attention backend {NAME!r}", ours, exact


HOSTS: dict[str, Callable[[torch.device, torch.dtype], Shown]] = {
    "diffusers": show_diffusers,
    "fastvideo": show_fastvideo,
    "turbodiffusion": show_turbodiffusion,
}


def _tensors(number: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(number)]


def main(arguments: list[str] | None = None) -> int:
    """Print what runs, and how far output and gradients are from the reference. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=HOSTS)
    host = parser.parse_args(arguments).host
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    try:
        ran, ours, exact = HOSTS[host](device, dtype)
    except ImportError as error:
        print(error)
        return 1
    output, *gradients = (relative_error(x, y) for x, y in zip(ours, exact, strict=True))
    print(ran)
    print(
        f"on {device} in {dtype}: the relative error against the reference is {output:.1e} of the output, and "
        f"{max(gradients):.1e} of the gradients"
    )
    return 0 if max(output, *gradients) < LIMITS[dtype] else 1


if __name__ == "__main__":
    raise SystemExit(main())
