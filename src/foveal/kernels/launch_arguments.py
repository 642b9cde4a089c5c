"""What the launchers of both kernel backends share. Needs no Triton.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, W the width of the lists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


class LinearTerm(NamedTuple):
    """What the forward adds to the sparse output: (phi(Q_i) H_i / (phi(Q_i) Z_i + eps)) W^T + b.

    state: H, bfloat16 [B * H, Tq or more, D, D], each state contiguous; a stride of 0 shares one state among rows.
    norm: Z, float32 [B * H, Tq or more, D].
    feature_map: "softmax", "elu" or "relu".
    proj_weight: W, bfloat16 [D, D], contiguous.
    proj_bias: b, float32 [D].
    """

    state: Tensor
    norm: Tensor
    feature_map: str
    proj_weight: Tensor
    proj_bias: Tensor


def size_stride(sizes: Tensor | None) -> int:
    """The batch stride of key block sizes, 0 where the batch shares them."""
    return 0 if sizes is None or sizes.shape[0] == 1 else sizes.stride(0)


def copy_strides(x: Tensor) -> list[int]:
    """The strides of x [..., D] for the copy engine, the last 1.

    That of a dimension of size 1 is free, and may be one that the copy engine refuses: it becomes another.
    """
    return [
        *(stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)),
        1,
    ]


class Descriptors:
    """Makes descriptors of tensors for the copy engine; for tensors that lie alike all but the address is made once.

    Args:
        make: the descriptor, with the attribute `base`, of a tensor and further arguments.
    """

    MOST = 1024  # how many ways to lie are remembered

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._known: dict[tuple, tuple[type, dict[str, Any]]] = {}

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        key = (x.shape, x.stride(), x.dtype, *arguments)
        known = self._known.get(key)
        if known is None:
            descriptor = self._make(x, *arguments)
            if len(self._known) == self.MOST:
                self._known.clear()
            self._known[key] = type(descriptor), vars(descriptor) | {"base": None}
            return descriptor
        assert x.data_ptr() % 16 == 0, "the copy engine starts at multiples of 16 bytes"
        kind, attributes = known
        descriptor = object.__new__(kind)
        vars(descriptor).update(attributes, base=x)
        return descriptor


class ForwardCall(ABC):
    """The forward of one call, with all that its launches share; each launch takes some pairs of batch and head.

    Args:
        query, key, value: [B, H, L, D], bfloat16 or float16, D 64 or 128, contiguous last dimension.
        critical, counts: int32 [B, H, Tq, W] and [B, H, Tq], contiguous.
        sizes: int32 [B or 1, Tk], valid tokens at the front of each key block; None when all are full but the last.
        block_q, block_k: 64 or 128.
        projection: for the linear branch W, bfloat16 [D, D], contiguous, and b, float32 [D]; None without it. W may be
            None for the Hopper kernels, where states are projected already.
        feature_map: of the linear branch.
        results: memory for the two results, the second contiguous; new if None.

    Attributes:
        results: the output, strided like `query`, and the natural log-sum-exp, float32 [B, H, Lq]; 0 and -inf for empty
            rows.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        critical: Tensor,
        counts: Tensor,
        sizes: Tensor | None,
        block_q: int,
        block_k: int,
        scale: float,
        projection: tuple[Tensor | None, Tensor] | None = None,
        feature_map: str | None = None,
        results: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if results is None:
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
            results = torch.empty_like(query), lse
        self.results, self.lists = results, (critical, counts, sizes)
        self.scale_log2, self.heads = scale * LOG2_E, query.shape[1]
        self.lengths = query.shape[2], key.shape[2], critical.shape[3]
        self.size_stride = size_stride(sizes)
        self._prepare(query, key, value, block_q, block_k, projection, feature_map)

    @abstractmethod
    def _prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_q: int,
        block_k: int,
        projection: tuple[Tensor | None, Tensor] | None,
        feature_map: str | None,
    ) -> None:
        """What else the launches of this backend share."""

    @abstractmethod
    def run(self, pairs: range, state: Tensor | None = None, norm: Tensor | None = None) -> None:
        """Writes the results of these pairs; H and Z are of these alone, as in `LinearTerm`; Z may be bfloat16."""

    @classmethod
    def at_once(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        critical: Tensor,
        counts: Tensor,
        sizes: Tensor | None,
        block_q: int,
        block_k: int,
        scale: float,
        linear: LinearTerm | None = None,
        results: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All of it in one launch, and its results; `linear` is added to the output alone."""
        projection, feature_map = (None, None) if linear is None else (linear[3:], linear.feature_map)
        lists = critical, counts, sizes, block_q, block_k
        call = cls(query, key, value, *lists, scale, projection, feature_map, results)
        call.run(range(query.shape[0] * query.shape[1]), *(() if linear is None else linear[:2]))
        return call.results
