"""What a kernel backend provides: a folder that fills a `Backend` is one. Needs no Triton.

The rest of the kernels (pooling, selection, lists, key states, moving cubes) is Triton's on every GPU.
Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, W the width of the lists.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.spans import Spans
from foveal.kernels.values import LOG2_E, LinearTerm, Problem, packable, size_stride

# Where each backend lies, the fastest first; then those of other precisions than that of the inputs, see `name_of`.
FOLDERS = {
    "gluon": f"{__package__}.hopper",
    "triton": f"{__package__}.triton",
    "triton_int8": f"{__package__}.triton_int8",
}


class ColumnLists(NamedTuple):
    """The critical lists transposed: for each key block the query blocks that attend to it, ascending.

    offsets: int64 [B * H * Tk], where each key block's list starts in `rows`.
    counts: int32 [B * H * Tk].
    rows: int32 [B * H * Tq * W], query blocks; what no list covers is undefined.
    """

    offsets: Tensor
    counts: Tensor
    rows: Tensor


@packable
class Cubes(NamedTuple):
    """Where the tokens of a VSA call stand: cubes in slots of equal size, in tile order, then blocks of text.

    Tokens may also come in tile order, padding included: what is raster order elsewhere is then tile order itself.

    places: int64 [C * slot], where each slot's tokens stand in raster order; -1 for none.
    cube_sizes: int32 [1, C], tokens of each cube.
    key_sizes: int32 [B or 1, C + text blocks], valid keys of each block.
    slot: tokens that a block takes up, 64 or 128.
    whole: tokens of a whole cube; 0 for tokens that come in tile order.
    length: tokens of the video.
    spans: where cubes have more tokens than a slot: which slots belong to which cube. What is a cube above is then a
        slot. None where each cube has a slot of its own.
    """

    places: Tensor
    cube_sizes: Tensor
    key_sizes: Tensor
    slot: int
    whole: int
    length: int
    spans: Spans | None = None

    @property
    def num_cubes(self) -> int:
        return self.cube_sizes.shape[1]

    @property
    def num_ranked(self) -> int:
        """How many cubes there are to pool and to choose from."""
        return self.num_cubes if self.spans is None else self.spans.cubes

    @property
    def num_listed(self) -> int:
        """How many blocks a choice can name: cubes, then blocks of text as large."""
        return self.key_sizes.shape[1] if self.spans is None else self.spans.slots.shape[0]

    def lists_of_slots(self, critical: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of what a choice names and their counts, as those of slots."""
        return (critical, counts) if self.spans is None else self.spans.lists(critical, counts)

    def of_slots(self, x: Tensor) -> Tensor:
        """What each cube has, [B, H, C, ...], for each of its slots."""
        return x if self.spans is None else self.spans.of_slots(x)

    @property
    def uniform(self) -> int:
        """The size of every block; 0 where they differ: some cube is partial, or there is text."""
        blocks = self.key_sizes.shape[1]
        return self.whole if blocks == self.num_cubes and blocks * self.whole == self.length else 0

    def new_like(self, x: Tensor) -> Tensor:
        """Memory for a tensor like x in raster order: zeros where rows are padding, which no kernel writes."""
        return torch.empty_like(x) if self.whole else torch.zeros_like(x)

    def selection(self, critical: Tensor, counts: Tensor) -> BlockSelection:
        """Lists of blocks, [B, H, C, W] and [B, H, C], over tensors in tile order; without sizes if blocks are full."""
        return BlockSelection(
            critical=critical,
            critical_count=counts,
            marginal=None,
            block_q=self.slot,
            block_k=self.slot,
            query_length=self.num_cubes * self.slot,
            key_length=self.key_sizes.shape[1] * self.slot,
            key_block_sizes=None if self.uniform == self.slot else self.key_sizes,
        )


class Gates(NamedTuple):
    """The gates of VSA's branches, [B, H, L, D] in raster order, any strides; None for 1."""

    coarse: Tensor | None
    fine: Tensor | None


class CubesCall(NamedTuple):
    """What `Backend.attend_cubes` gets.

    query: [B, H, L, D], raster order.
    copies: those of `cube_copies` in tile order, [B, H, blocks * slot, D], contiguous, zeros behind each block's
        tokens; they may be overwritten.
    selection: from `Cubes.selection`.
    coarse: Oc, float32 [B, H, C, D], contiguous.
    save_fine: whether Of is wanted.
    """

    query: Tensor
    copies: tuple[Tensor, ...]
    cubes: Cubes
    selection: BlockSelection
    coarse: Tensor
    gates: Gates
    scale: float
    save_fine: bool


class RasterGradients(NamedTuple):
    """Where gradients go whose tensors stand in tile order, and what is added to them there.

    grads: the gradients of query, key, and value in raster order, [B, H, L, D] and [B, H, L + text, D] twice, any dense
        strides.
    pooled: gradients of pooled query, key and value, float32 [B, H, C, D], contiguous: each token takes its share.
    """

    grads: tuple[Tensor, Tensor, Tensor]
    pooled: tuple[Tensor, Tensor, Tensor]
    cubes: Cubes


class SharedGradients(NamedTuple):
    """What the query side gives where all query blocks of a head share one H.

    state, norm: G in bfloat16 [B * H, 1, D, D] and z in float32 [B * H, 1, D].
    weight, bias: the projection's gradients, float32 [D, D] and [D]; None without a projection.
    """

    state: Tensor
    norm: Tensor
    weight: Tensor | None
    bias: Tensor | None


class BackwardCall(NamedTuple):
    """What `Backend.backward` gets.

    grad: [B, H, Lq, D], the gradient of the output, contiguous last dimension.
    delta: float32 [B, H, Lq], rowsum(grad * output) less the gradient of the LSE.
    lse: float32 [B, H, Lq], natural log.
    grad_query: a gradient to add dQ to, in place; None for a new tensor.
    linear: the key side of the linear branch, to add to dK and dV.
    raster: tensors to write the gradients to instead, where the backend `writes_raster`; not with `linear`.
    """

    problem: Problem
    grad: Tensor
    delta: Tensor
    lse: Tensor
    columns: ColumnLists
    grad_query: Tensor | None = None
    linear: LinearTerm | None = None
    raster: RasterGradients | None = None


class QuerySide(NamedTuple):
    """What the query side of the linear branch's backward gets.

    query, output, grad: [B, H, Lq, D], the last two of the forward's output.
    term: the linear branch; its states may be those of only the pairs that a launch takes.
    grad_query, delta: where dQ of the linear branch and delta of the sparse one, float32 [B, H, Lq], are written.
    linear: where O^l is written, bfloat16 [B, H, Lq, D], contiguous; None if nobody wants it.
    grad_norm: where dZ is written, float32 [B * H, rows, D]; None where all query blocks of a head share one H.
    linear_dot: where rowsum(dO * O^l) is written, O^l as it is added, float32 [B, H, Lq]; None without a `mix`.
    """

    query: Tensor
    output: Tensor
    grad: Tensor
    term: LinearTerm
    block_q: int
    grad_query: Tensor
    delta: Tensor
    linear: Tensor | None = None
    grad_norm: Tensor | None = None
    linear_dot: Tensor | None = None


class ForwardCall(ABC):
    """The forward of one call, with all that its launches share; each launch takes some pairs of batch and head.

    Args:
        linear: what is added to the output; its states may come with each launch instead.
        results: memory for the two results, the second contiguous; new if None.

    Attributes:
        results: the output, strided like `query`, and the natural log-sum-exp, float32 [B, H, Lq]; 0 and -inf for empty
            rows.
        wants_means: whether each launch of `run` comes after `take_means`.
    """

    wants_means: bool = False

    def __init__(
        self, problem: Problem, linear: LinearTerm | None = None, results: tuple[Tensor, Tensor] | None = None
    ) -> None:
        query, key, value, selection, scale, self.uniform = problem
        if results is None:
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
            results = torch.empty_like(query), lse
        self.results, self.selection, self.linear = results, selection, linear
        self.scale_log2 = scale * LOG2_E
        self.heads, self.pairs = query.shape[1], query.shape[0] * query.shape[1]
        self.query_length, self.key_length = query.shape[2], key.shape[2]
        self.width = selection.critical.shape[3]
        self.size_stride = size_stride(selection.key_block_sizes)
        self.prepare(query, key, value)

    @abstractmethod
    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """What else the launches of this backend share."""

    @abstractmethod
    def run(
        self, pairs: range, state: Tensor | None = None, norm: Tensor | None = None, means: Tensor | None = None
    ) -> None:
        """Writes the results of these pairs.

        Args:
            state, norm, means: H, Z, and m with W m of only these pairs, as in `LinearTerm`; Z may be bfloat16.
        """

    def take_means(self, pairs: range, pooled: Tensor) -> None:
        """Gets the means of each block's keys, float32 [pairs, Tk, D], contiguous, of these pairs."""
        raise NotImplementedError

    def run_all(self) -> tuple[Tensor, Tensor]:
        """All of it in one launch, and its results."""
        linear = self.linear
        states = () if linear is None else (linear.state, linear.norm, linear.means)
        self.run(range(self.pairs), *states)
        return self.results


class Backend(ABC):
    """The kernels that differ from backend to backend.

    Attributes:
        name: the name that `impl=` takes.
        forward: the backend's `ForwardCall`.
        projects_early: whether states that a whole head shares should be projected before the forward.
        cube_copies: which of "qkv" `attend_cubes` wants in tile order.
        writes_raster: whether `backward` can write gradients of tensors in tile order to raster order.
        centers_keys: whether the forward's log-sum-exp is that of keys less their mean, see `int8.lse_shift`.
    """

    name: str
    forward: type[ForwardCall]
    projects_early: bool = False
    cube_copies: str = "qkv"
    writes_raster: bool = False
    centers_keys: bool = False

    def prepares_beside(self, block_q: int) -> bool:
        """Whether the forward of such blocks leaves room on the SMs to prepare the next heads beside it."""
        return False

    @abstractmethod
    def backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV, strided like query, key and value."""

    @abstractmethod
    def query_gradients(self, side: QuerySide, pairs: range) -> Tensor:
        """The query side of the linear branch's backward for these pairs of batch and head.

        Returns:
            dH, bfloat16 [pairs, rows, D, D]; rows past the last query block are zero.
        """

    @abstractmethod
    def shared_query_gradients(self, side: QuerySide) -> SharedGradients:
        """The same for all pairs where all query blocks of a head share one H, with the sums over those blocks."""

    @abstractmethod
    def attend_cubes(self, call: CubesCall) -> tuple[Tensor, Tensor | None, Tensor]:
        """VSA's fine stage, and what follows it: O = Gc * Oc + Gf * Of.

        Returns:
            O, strided like `query`; Of in tile order or None; the LSE of the fine stage in tile order, float32
            [B, H, C * slot].
        """


def name_of(impl: str, precision: str) -> str:
    """The name of the backend of an `impl`, "triton" or "gluon", for a `precision` that it has kernels for."""
    return impl if precision == "input" else f"{impl}_{precision}"


def backend_named(name: str) -> Backend:
    """The backend of a name: that of an `impl`, "triton" or "gluon", or what `name_of` returns."""
    backend = _loaded.get(name)
    if backend is None:
        backend = _loaded[name] = importlib.import_module(f"{FOLDERS[name]}.backend").BACKEND
    return backend


_loaded: dict[str, Backend] = {}
