"""Values that travel whole through both kernel backends, and the one place that takes them apart. Needs no Triton."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import cached_constant
from foveal.rules import SelectionRule

LOG2_E = 1.4426950408889634


class LinearTerm(NamedTuple):
    """The linear branch as the kernels see it.

    On the query side the forward adds O^l W^T + b to the sparse output: O^l = phi(Q_i) H_i / n with
    n = phi(Q_i) Z_i + eps, and (1 - eps / n) m more where H is the state of V - m. On the key side the backward adds
    dphi(K_j) = (V_j - m) G_j^T + z_j and dV_j = phi(K_j) G_j, with G and z in the place of H and Z.

    feature_map: "softmax", "elu" or "relu".
    weight: W, bfloat16 [D, D], contiguous; None for the identity, or where H is projected already.
    bias: b, float32 [D]; None on the key side.
    state: H, bfloat16 [B * H, blocks, D, D], each state contiguous; with one block, or a stride of 0, all blocks of a
        head share it. None where it comes with each launch.
    norm: Z, float32 [B * H, blocks, D].
    means: m, what was taken from V, and W m, float32 [2, B * H, blocks, D], with one block where all of a head share
        them. None in a forward that no backward follows: its H is that of V itself.
    mix: what O^s and O^l are multiplied by before they are added, float32 [B * H, rows, 2], contiguous, one pair for
        each query block and none of them 0; None for 1. It is that of all pairs, also where the states are of some.
    """

    feature_map: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    state: Tensor | None = None
    norm: Tensor | None = None
    means: Tensor | None = None
    mix: Tensor | None = None


class Problem(NamedTuple):
    """Block-sparse attention as the kernels see it.

    query, key, value: [B, H, L, D], bfloat16 or float16, D 64 or 128, contiguous last dimension.
    selection: its lists contiguous; the marginal blocks do not matter.
    uniform: where keys and values have zeros behind each key block's tokens, how many tokens every block has, 0 where
        blocks differ; None where anything may stand behind them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    selection: BlockSelection
    scale: float
    uniform: int | None = None


def needs_copy(weight: Tensor | None) -> bool:
    """Whether kernels take a copy of W, which a backward gets from its forward."""
    return weight is not None and not (weight.dtype == torch.bfloat16 and weight.is_contiguous())


def copied_weight(weight: Tensor | None, term: LinearTerm) -> tuple[Tensor, ...]:
    """The copy of W that kernels took, for the backward; nothing where there is none."""
    return (term.weight,) if needs_copy(weight) else ()


def linear_term(feature_map: str, weight: Tensor | None, bias: Tensor | None, query: Tensor) -> LinearTerm:
    """The term of a module's parameters W and b, [D, D] and [D] in any dtype or None, without its states."""
    if needs_copy(weight):
        weight = weight.to(torch.bfloat16).contiguous()
    if bias is None:
        bias = no_bias(query.shape[-1], query.device)
    elif not (bias.dtype == torch.float32 and bias.is_contiguous()):
        bias = bias.float().contiguous()
    return LinearTerm(feature_map, weight, bias)


@cached_constant
def no_bias(head_dim: int, device: torch.device) -> Tensor:
    """float32 zeros [D]."""
    return torch.zeros(head_dim, dtype=torch.float32, device=device)


@cached_constant
def identity(head_dim: int, device: torch.device) -> Tensor:
    """bfloat16 [D, D], for kernels that always multiply by a W."""
    return torch.eye(head_dim, dtype=torch.bfloat16, device=device)


def state_strides(*states: Tensor | None) -> tuple[int, ...]:
    """Strides over pairs and blocks of H, Z, and m, say, two for each; no step between blocks where there is one."""
    steps = ((0, 0) if x is None else (x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)) for x in states)
    return tuple(n for pair in steps for n in pair)


def size_stride(sizes: Tensor | None) -> int:
    """The batch stride of key block sizes, 0 where the batch shares them."""
    return 0 if sizes is None or sizes.shape[0] == 1 else sizes.stride(0)


# How custom operators get what they cannot take whole.
_packable: list[type] = []
_KINDS = {"Tensor": "tensor", "Tensor | None": "tensor", "int": "int", "tuple[int, int]": "range"}


def packable(kind: type) -> type:
    """Registers a NamedTuple or dataclass of tensors, ints, ranges of two ints, and packable values.

    Tensors and packable values may be None.
    """
    known = {"None", *(x.__name__ for x in _packable)}
    fields = []
    for name, annotation in kind.__annotations__.items():
        annotation = getattr(annotation, "__forward_arg__", annotation)  # a NamedTuple wraps it
        assert annotation in _KINDS or known.issuperset(annotation.split(" | ")), f"{name} is not packable"
        fields.append((name, _KINDS.get(annotation, "packed")))
    # On the class itself: Dynamo may have read a table before the import of a method's kernels adds to it.
    kind.packing = len(_packable), tuple(fields)
    _packable.append(kind)
    return kind


packable(SelectionRule)
packable(BlockSelection)


def flatten(value: Any) -> tuple[list[Tensor], list[int]]:
    """A packable value as tensors and ints, which custom operators take and autograd saves; see `unflatten`."""
    tensors, numbers = [], []
    _flatten(value, tensors, numbers)
    return tensors, numbers


def _flatten(value: Any, tensors: list[Tensor], numbers: list[int]) -> None:
    place, described = type(value).packing
    numbers.append(place)
    for name, what in described:
        field = getattr(value, name)
        if what == "int":
            numbers.append(field)
        elif what == "range":
            numbers.extend(field)
        elif field is None:
            numbers.append(0)
        else:
            numbers.append(1)
            if what == "tensor":
                tensors.append(field)
            else:
                _flatten(field, tensors, numbers)


def unflatten(tensors: Iterable[Tensor], numbers: Iterable[int]) -> Any:
    """The value that `flatten` took apart; of an iterator it takes no more tensors than the value has."""
    return _unflatten(iter(tensors), iter(numbers))


def _unflatten(tensors: Iterator[Tensor], numbers: Iterator[int]) -> Any:
    kind, fields = _packable[next(numbers)], {}
    for name, what in kind.packing[1]:
        if what == "int":
            fields[name] = next(numbers)
        elif what == "range":
            fields[name] = (next(numbers), next(numbers))
        elif not next(numbers):
            fields[name] = None
        else:
            fields[name] = next(tensors) if what == "tensor" else _unflatten(tensors, numbers)
    return kind(**fields)
