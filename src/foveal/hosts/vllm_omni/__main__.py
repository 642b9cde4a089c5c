"""Shows whether foveal runs in the installed vLLM-Omni, through its own plugins: python -m foveal.hosts.vllm_omni."""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch

from foveal.hosts.vllm_omni import import_part, is_ours, vsa_slot
from foveal.hosts.vllm_omni.function import sparse_attention
from foveal.testing import relative_error

GRID, HEADS, HEAD_DIM, TOPK = (5, 16, 17), 2, 64, 3
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def main() -> int:
    """Print what the slot runs, and how far its output is from the reference. Returns the exit code."""
    try:
        import_part("vllm_omni.plugins").load_omni_general_plugins()
        slot = vsa_slot()
    except ImportError as error:
        print(error)
        return 1
    print(f"vLLM-Omni {version('vllm-omni')}: the slot FASTVIDEO_VSA runs {slot.get_path()}")
    if not is_ours(slot.get_path()):
        print("That is not foveal. Is it installed in this environment, and does VLLM_PLUGINS, if set, name it?")
        return 1
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

    layer = slot.get_class().get_impl_cls()(
        num_heads=HEADS, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5, backend_kwargs={"topk": TOPK}
    )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokens = GRID[0] * GRID[1] * GRID[2]
    query, key, value, gate = (torch.randn(1, tokens, HEADS, HEAD_DIM).to(device, dtype) for _ in range(4))
    extra = {"vsa_dit_seq_shape": GRID, "gate_compress": gate}
    output = layer.forward(query, key, value, AttentionMetadata(extra=extra))
    params = {**extra, "topk": TOPK, "tile": layer.block_size, "impl": "reference"}
    params["gate_compress"] = gate.float()
    exact = sparse_attention(query.float(), key.float(), value.float(), params, False, HEAD_DIM**-0.5)
    error = relative_error(output, exact)
    print(f"{tokens:,} tokens on {device} in {dtype}: the relative error against the reference is {error:.1e}")
    return 0 if error < LIMITS[dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
