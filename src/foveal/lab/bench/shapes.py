"""The shapes that are timed, and the tensors of one: drawn on the device, laid out as transformers hold them."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import check_choice, check_positive_int
from foveal.layout import VideoGrid
from foveal.rules import count


@dataclass(frozen=True)
class Shape:
    """A self-attention call: `batch` x `heads` over the tokens of `grid`, `head_dim` wide.

    Args:
        before: the lengths of the segments that stand before the video, in tokens. With any, only kernels are timed,
            since the benchmark's references of the methods take videos only.
        keep_ratios: what the block-sparse kernels keep.
    """

    name: str
    batch: int
    heads: int
    grid: VideoGrid
    head_dim: int
    before: tuple[int, ...] = ()
    keep_ratios: tuple[float, ...] = (0.05, 0.125)

    @property
    def length(self) -> int:
        return sum(self.before) + self.grid.num_tokens

    def to_dict(self) -> dict[str, object]:
        """The fields and the length in tokens as JSON-ready values."""
        sizes = {"batch": self.batch, "heads": self.heads, "length": self.length, "head_dim": self.head_dim}
        return sizes | {"grid": list(self.grid.shape), "before": list(self.before)}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("480p", 1, 12, VideoGrid(21, 30, 52), 128),
        Shape("720p", 1, 12, VideoGrid(21, 45, 80), 128),
        Shape("paper", 2, 16, VideoGrid(21, 30, 52), 128),
        Shape("d64", 1, 24, VideoGrid(21, 30, 52), 64),
        Shape("4k", 1, 12, VideoGrid(4, 32, 32), 128),
        Shape("8k", 1, 12, VideoGrid(8, 32, 32), 128),
        Shape("16k", 1, 12, VideoGrid(16, 32, 32), 128),
        Shape("h3-5s", 1, 56, VideoGrid(37, 24, 42), 128, before=(256, 208), keep_ratios=(0.1,)),
        Shape("h3-15s", 1, 56, VideoGrid(108, 24, 42), 128, before=(256, 512), keep_ratios=(0.1,)),
    )
}
# Names for several shapes. Short sequences show what a call costs the host, and where dense attention is faster. Those
# of MiniMax-H3 have text and audio before the video: 37,760 and 109,632 tokens, whole blocks of 64.
SHAPE_SETS = {
    "long": ("480p", "720p", "paper", "d64"),
    "short": ("4k", "8k", "16k"),
    "h3": ("h3-5s", "h3-15s"),
}


def shape_of_length(length: int) -> Shape:
    """One sample of two heads, 64 wide, over `length` tokens: a grid of up to 4 frames, as near to square as it goes.

    Raises:
        TypeError, ValueError: for a length that is no positive int.
    """
    check_positive_int("length", length)
    frames = next(frames for frames in (4, 3, 2, 1) if length % frames == 0)
    area = length // frames
    height = next(side for side in range(math.isqrt(area), 0, -1) if area % side == 0)
    return Shape(f"length {length}", 1, 2, VideoGrid(frames, height, area // height), 64)


class Inputs:
    """Everything that the candidates at one shape are fed, made once and shared by all of them.

    Args:
        shape: B, H, L and D.
        dtype: the dtype of every [B, H, L, D] tensor; others are float32.
        seed: the seed, which with the shape and the device decides all values.
    """

    NAMES = ("query", "key", "value", "grad")

    def __init__(self, shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.device, self.dtype, self.seed = shape, device, dtype, seed
        self._tensors: dict[tuple[str, bool], Tensor] = {}
        self._selections: dict[tuple[int, int, float], BlockSelection] = {}

    def tensors(self, *names: str, contiguous: bool = False) -> tuple[Tensor, ...]:
        """Standard normal [B, H, L, D] tensors: views of [B, L, H, D] memory, or `contiguous` ones of the same values.

        Args:
            names: some of `NAMES`.
        """
        return tuple(self._tensor(name, contiguous) for name in names)

    def _tensor(self, name: str, contiguous: bool) -> Tensor:
        check_choice("name", name, self.NAMES)
        if (name, contiguous) not in self._tensors:
            made = self._tensor(name, False).contiguous() if contiguous else self._tokens(self.NAMES.index(name))
            self._tensors[name, contiguous] = made
        return self._tensors[name, contiguous]

    def _tokens(self, stream: int) -> Tensor:
        shape = self.shape
        size = (shape.batch, shape.length, shape.heads, shape.head_dim)
        made = torch.randn(size, generator=self._generator(stream), device=self.device, dtype=self.dtype)
        return made.transpose(1, 2)

    def extra(self, name: str, dims: str) -> Tensor:
        """What a method takes beside query, key and value, by its name (see `BenchCase.extras`).

        Args:
            dims: "BHLD", standard normal like `tensors`; or "DD" or "D", a weight of about unit norm a row or a bias to
                go with it, float32.
        """
        check_choice("dims", dims, ("BHLD", "DD", "D"))
        if (name, False) not in self._tensors:
            stream = len(self.NAMES) + 1 + zlib.crc32(name.encode())
            if dims == "BHLD":
                made = self._tokens(stream)
            else:
                size = (self.shape.head_dim,) * len(dims)
                made = torch.randn(size, generator=self._generator(stream), device=self.device)
                made = made / self.shape.head_dim**0.5
            self._tensors[name, False] = made
        return self._tensors[name, False]

    def random_selection(self, block_q: int, block_k: int, keep_ratio: float) -> BlockSelection:
        """Every row keeps `max(1, floor(keep_ratio * Tk))` key blocks, drawn evenly."""
        if (block_q, block_k, keep_ratio) not in self._selections:
            shape = self.shape
            rows, columns = -(-shape.length // block_q), -(-shape.length // block_k)
            kept = max(1, count(keep_ratio, columns))
            size = (shape.batch, shape.heads, rows, columns)
            draw = torch.rand(size, generator=self._generator(len(self.NAMES)), device=self.device)
            critical = draw.topk(kept, -1).indices.sort(-1).values.to(torch.int32).contiguous()
            self._selections[block_q, block_k, keep_ratio] = BlockSelection(
                critical=critical,
                critical_count=torch.full(size[:3], kept, dtype=torch.int32, device=self.device),
                marginal=None,
                block_q=block_q,
                block_k=block_k,
                query_length=shape.length,
                key_length=shape.length,
            )
        return self._selections[block_q, block_k, keep_ratio]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 16 + stream)
