"""Shows whether foveal runs in the installed SGLang, through its own plugins: python -m foveal.hosts.sglang."""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch

from foveal.hosts.patching import import_host
from foveal.hosts.sglang import BACKENDS, HOW_TO_INSTALL, LAYOUT, packed_attention
from foveal.testing import relative_error

FRAMES, HEIGHT, WIDTH = 5, 16, 17
SEGMENTS, HEADS, HEAD_DIM, SPARSITY = (70, 9), 2, 64, 0.9
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def main() -> int:
    """Print whether SGLang applied foveal's hooks, and how far their output is from the reference. The exit code."""
    try:
        plugins = import_host("sglang.multimodal_gen.runtime.platforms.plugins", "SGLang", HOW_TO_INSTALL)
        plugins.apply_plugin_hooks()
        backend = import_host(f"{BACKENDS}.video_sparse_attn_h3", "SGLang", HOW_TO_INSTALL)
    except ImportError as error:
        print(error)
        return 1
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    metadata = backend.VideoSparseAttentionH3MetadataBuilder().build(
        current_timestep=0,
        raw_latent_shape=(FRAMES, 2 * HEIGHT, 2 * WIDTH),
        patch_size=(1, 2, 2),
        VSA_sparsity=SPARSITY,
        prefix_segments=SEGMENTS,
        device=torch.device(device),
    )
    layout = getattr(metadata, LAYOUT, None)
    print(
        f"SGLang {version('sglang')}: its VSA for MiniMax-H3 runs {'its own kernels' if layout is None else 'foveal'}"
    )
    if layout is None:
        print("Is foveal installed in this environment, and does SGLANG_PLUGINS, if set, name it?")
        return 1
    layer = backend.VideoSparseAttentionH3Impl(
        num_heads=HEADS, head_size=HEAD_DIM, causal=False, softmax_scale=HEAD_DIM**-0.5, prefix="blocks.0.attn"
    )
    rows = layout.num_tokens
    query, key, value, gate = (torch.randn(rows, HEADS, HEAD_DIM).to(device, dtype) for _ in range(4))
    bounds = (0, rows, rows)
    output = layer.forward_varlen(
        query,
        key,
        value,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        cu_seqlens_host=bounds,
        max_seqlen=rows,
        attn_metadata=metadata,
        gate_compress=gate,
    )
    exact = packed_attention(*(x.float() for x in (query, key, value, gate)), layout, SPARSITY, "reference")
    error = relative_error(output, exact)
    print(f"{rows:,} tokens on {device} in {dtype}: the relative error against the reference is {error:.1e}")
    return 0 if error < LIMITS[dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
