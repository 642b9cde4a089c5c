"""Sparse attention in a hand-written DiT: a self-attention like the Wan repository's, converted in three lines.

`DenseSelfAttention` is what such a code base has: linear layers q, k, v and o, normed queries and keys, a rotary
position embedding, and one call of scaled_dot_product_attention. `SparseSelfAttention` is the same text with three
lines changed, each marked; `VideoSparseSelfAttention` does the same with VSA, which reads the hidden states as well.
A checkpoint of the dense module loads into either: the new parameters start where they change nothing.

    python examples/wan_repository_block.py

Shape legend: B batch, L tokens in raster order, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveal


class DenseSelfAttention(nn.Module):
    """Self-attention of a video DiT.

    Args:
        dim: C.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[B, L, C] and [L, D / 2] to [B, L, C]."""
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        query, key = rotate(query, rotation), rotate(key, rotation)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.o(out.transpose(1, 2).flatten(2))


class SparseSelfAttention(nn.Module):
    """The same with sparse-linear attention.

    Args:
        dim: C.
        num_heads: H.
        config: see `foveal.SLAConfig`.
    """

    def __init__(self, dim: int, num_heads: int, config: foveal.SLAConfig) -> None:  # 1: a configuration
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attention = foveal.SparseLinearAttention(dim // num_heads, config)  # 2: the module

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[B, L, C] and [L, D / 2] to [B, L, C]."""
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        query, key = rotate(query, rotation), rotate(key, rotation)
        out = self.attention(query, key, value)  # 3: the call
        return self.o(out.transpose(1, 2).flatten(2))


class VideoSparseSelfAttention(DenseSelfAttention):
    """The same with video sparse attention, which needs the hidden states for its gate and the video's shape.

    Args:
        dim: C.
        num_heads: H.
        config: see `foveal.VSAConfig`.
    """

    def __init__(self, dim: int, num_heads: int, config: foveal.VSAConfig) -> None:
        super().__init__(dim, num_heads)
        self.attention = foveal.VideoSparseAttention(dim, num_heads, dim // num_heads, config)

    def forward(self, x: Tensor, rotation: Tensor, grid: foveal.VideoGrid) -> Tensor:
        """[B, L, C], [L, D / 2] and the grid of the L tokens to [B, L, C]."""
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        query, key = rotate(query, rotation), rotate(key, rotation)
        out = self.attention(query, key, value, x, grid=grid)
        return self.o(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of neighboring pairs: [B, H, L, D] by angles [L, D / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.cos(), rotation.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def angles(grid: foveal.VideoGrid, head_dim: int) -> Tensor:
    """[L, D / 2]: the angles of each token's place in (t, h, w)."""
    pairs = head_dim // 2
    parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    places = torch.meshgrid(*(torch.arange(side) for side in grid.shape), indexing="ij")
    axes = []
    for place, part in zip(places, parts, strict=True):
        frequencies = 10000.0 ** (-torch.arange(part) / max(part, 1))
        axes.append(place.flatten()[:, None] * frequencies)
    return torch.cat(axes, 1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Converts one block each way, and returns how far each is from dense attention, relative to its size."""
    parser = argparse.ArgumentParser(description="Convert a hand-written self-attention.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    grid = foveal.VideoGrid(8, 16, 16)
    sizes = {"dim": options.dim, "num_heads": options.heads}
    x = torch.randn(1, grid.num_tokens, options.dim).to(options.device)
    rotation = angles(grid, options.dim // options.heads).to(options.device)
    dense = DenseSelfAttention(**sizes).to(options.device)
    blocks = {
        "SLA, every block kept": SparseSelfAttention(**sizes, config=foveal.SLAConfig(keep_ratio=1.0, drop_ratio=0.0)),
        "SLA, a quarter kept": SparseSelfAttention(**sizes, config=foveal.SLAConfig(keep_ratio=0.25)),
        "VSA, every cube kept": VideoSparseSelfAttention(**sizes, config=foveal.VSAConfig(keep_ratio=1.0)),
        "VSA, a quarter kept": VideoSparseSelfAttention(**sizes, config=foveal.VSAConfig(keep_ratio=0.25)),
    }
    distances = {}
    with torch.no_grad():
        expected = dense(x, rotation)
        for name, block in blocks.items():
            missing, unexpected = block.load_state_dict(dense.state_dict(), strict=False)
            assert not unexpected
            assert all(key.startswith("attention.") for key in missing)
            block.to(options.device)
            extra = (grid,) if isinstance(block, VideoSparseSelfAttention) else ()
            distances[name] = ((block(x, rotation, *extra) - expected).norm() / expected.norm()).item()
            print(f"{name:<24} {distances[name]:.1e} from dense")
    return distances


if __name__ == "__main__":
    main()
