"""What is compared: dense attention, block-sparse kernels, and whole methods, each as one thing to build and run.

Dense: `scaled_dot_product_attention` by cuDNN and by flash attention, and flash-attn-4 where it is installed. They get
contiguous [B, H, L, D] tensors (flash-attn-4 contiguous [B, L, H, D]), which suits them best; everything of ours gets
[B, H, L, D] views of [B, L, H, D] memory, as models hand them over.
Block-sparse: ours at three block sizes, the smallest in int8 too, and compiled FlexAttention at 128x128 with the same
blocks; it wants blocks that are multiples of 128. At 64x64 also the two of fastvideo-kernel, where it is installed and
the tokens are whole blocks. The block-sparse kernels of cudnn-frontend are not called.
Methods: the cases that each method names, whole, with the selection made inside the call and with one given.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection, lists_from_mask
from foveal.kernels.api import IMPLS, block_sparse_attention
from foveal.lab.bench.oracle import head_of, in_chunks
from foveal.lab.bench.shapes import Inputs, Shape
from foveal.methods.base import METHODS, Config
from foveal.methods.bench import BenchCase
from foveal.methods.cost import CostPart, attention_cost
from foveal.methods.sla.config import SLAConfig

QKV = ("query", "key", "value")
KERNEL_BLOCKS = ((64, 64), (128, 64), (128, 128))
KERNEL_KEEPS = (0.05, 0.125)
# The operators of fastvideo-kernel, which chooses one by environment variables.
FASTVIDEO = {"fastvideo-kernel Triton": "block_sparse_attn_triton", "fastvideo-kernel TK": "block_sparse_attn_sm90"}


@dataclass(frozen=True)
class Problem:
    """One candidate at one shape.

    Args:
        run: (*tensors) to the output, shaped and laid out like `grad`.
        tensors: what it is differentiated in, the [B, H, L, D] ones first.
        names: theirs.
        grad: the output's gradient.
        oracle: `run` by the reference, in any dtype, dense memory; None if only sampled heads are checked.
        head: (batch, head, dtype, *tensors) to one head's output, float64, by the reference in `dtype`; its tensors
            are float64 and those with a head dimension cut to that head. None if there is nothing to check.
        selection, select: for methods, the blocks that (query, key) -> selection chooses.
    """

    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    grad: Tensor
    oracle: Callable[..., Tensor] | None = None
    head: Callable[..., Tensor] | None = None
    selection: BlockSelection | None = None
    select: Callable[[Tensor, Tensor], BlockSelection] | None = None


@dataclass(frozen=True)
class Candidate:
    """One thing to compare.

    Args:
        task: what it computes; candidates with one task have one exact result.
        impl: who computes it.
        kind: "dense", "kernel" or "method".
        ours: whether it is part of foveal; a failure of others is a skip.
        build: `Inputs` to its `Problem`.
        flops: a shape to the FLOPs it executes, (forward, backward).
        options: its configuration, JSON-ready.
    """

    task: str
    impl: str
    kind: str
    ours: bool
    build: Callable[[Inputs], Problem]
    flops: Callable[[Shape], tuple[float, float]]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        given = ", selection given" if self.options.get("selection") == "given" else ""
        return self.task + given if self.kind == "dense" else f"{self.task}{given}, {self.impl}"


def dense_flops(shape: Shape) -> tuple[float, float]:
    """FLOPs of exact attention, (forward, backward)."""
    return _flops(attention_cost(None, **_sizes(shape)).parts)


def _part_flops(config: Config, shape: Shape, left_out: tuple[str, ...] = ()) -> tuple[float, float]:
    parts = attention_cost(config, **_sizes(shape)).parts
    return _flops([part for part in parts if part.name not in left_out])


def _sizes(shape: Shape) -> dict[str, Any]:
    length = {"query_length": shape.length} if shape.before else {"grid": shape.grid}
    return length | {"batch": shape.batch, "heads": shape.heads, "head_dim": shape.head_dim}


def _flops(parts: Sequence[CostPart]) -> tuple[float, float]:
    return float(sum(part.flops for part in parts)), float(sum(part.backward * part.flops for part in parts))


def candidates_for(
    device: str,
    *,
    only: str | None = None,
    impls: tuple[str, ...] = (),
    quick: bool = False,
    keep_ratios: tuple[float, ...] = KERNEL_KEEPS,
) -> list[Candidate]:
    """Everything to compare on a device of this type ("cuda" or "cpu"), the dense baselines first.

    Args:
        only: "kernels" or "methods"; None for both.
        impls: our implementations to run; by default each GPU implementation for the kernels ("torch" on the CPU) and
            "auto" for the methods.
        quick: leave out FlexAttention, which takes long to compile.
        keep_ratios: what the block-sparse kernels keep.
    """
    gpu_impls = tuple(impl for impl in IMPLS if impl not in ("auto", "reference", "torch"))
    chosen = [_sdpa("SDPA cuDNN"), _sdpa("SDPA flash"), _flash_attn_4()] if device == "cuda" else [_sdpa("SDPA")]
    if only != "methods":
        kernel_impls = impls or (gpu_impls if device == "cuda" else ("torch",))
        for block_q, block_k in KERNEL_BLOCKS:
            for keep_ratio in keep_ratios:
                chosen += [_kernel(block_q, block_k, keep_ratio, impl) for impl in kernel_impls]
        for keep_ratio in keep_ratios:  # "gluon" has no kernels in int8
            chosen += [_kernel(64, 64, keep_ratio, impl, "int8") for impl in kernel_impls if impl != "gluon"]
        if device == "cuda":
            chosen += [_fastvideo(impl, keep_ratio) for keep_ratio in keep_ratios for impl in FASTVIDEO]
        if device == "cuda" and not quick:
            chosen += [_flex_attention(128, keep_ratio) for keep_ratio in keep_ratios]
    if only != "kernels":
        for impl in impls or ("auto",):
            for given in (False, True):
                for method in METHODS.values():
                    chosen += [_method(case, impl, given) for case in method.bench_cases]
    return chosen


def _sdpa(name: str) -> Candidate:
    def build(inputs: Inputs) -> Problem:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if name not in backends:
                return F.scaled_dot_product_attention(query, key, value)
            with sdpa_kernel(backends[name]):
                return F.scaled_dot_product_attention(query, key, value)

        *tensors, grad = inputs.tensors(*QKV, "grad", contiguous=True)
        return Problem(run, tuple(tensors), QKV, grad)

    return Candidate(name, "torch", "dense", False, build, dense_flops)


def _flash_attn_4() -> Candidate:
    def build(inputs: Inputs) -> Problem:
        from flash_attn.cute import flash_attn_func

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
            # Some releases return the log-sum-exp too.
            return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

        *tensors, grad = inputs.tensors(*QKV, "grad")
        return Problem(run, tuple(tensors), QKV, grad, head=_sparse_head(inputs.random_selection(128, 128, 1.0)))

    return Candidate("flash-attn-4", "flash-attn-4", "dense", False, build, dense_flops)


def _sparse_reference(precision: str) -> Callable[..., Tensor]:
    return functools.partial(block_sparse_attention, impl="reference", precision=precision)


def _sparse_head(selection: BlockSelection, precision: str = "input") -> Callable[..., Tensor]:
    def head(batch: int, head: int, dtype: torch.dtype, *qkv: Tensor) -> Tensor:
        return in_chunks(_sparse_reference(precision), *qkv, head_of(selection, batch, head), dtype)

    return head


def _kernel_task(block_q: int, block_k: int, keep_ratio: float) -> str:
    return f"block-sparse {block_q}x{block_k} {100 * keep_ratio:g} %"


def _kernel_flops(block_q: int, block_k: int, keep_ratio: float) -> Callable[[Shape], tuple[float, float]]:
    config = SLAConfig(keep_ratio=keep_ratio, drop_ratio=0.0, block_q=block_q, block_k=block_k, linear_scope="none")
    return lambda shape: _part_flops(config, shape, ("selection",))


def _kernel_options(block_q: int, block_k: int, keep_ratio: float) -> dict[str, object]:
    return {"block_q": block_q, "block_k": block_k, "keep_ratio": keep_ratio, "selection": "random"}


def _kernel(block_q: int, block_k: int, keep_ratio: float, impl: str, precision: str = "input") -> Candidate:
    blocks = (block_q, block_k, keep_ratio)

    def build(inputs: Inputs) -> Problem:
        selection = inputs.random_selection(*blocks)
        *tensors, grad = inputs.tensors(*QKV, "grad")
        return Problem(
            lambda *qkv: block_sparse_attention(*qkv, selection, impl=impl, precision=precision),
            tuple(tensors),
            QKV,
            grad,
            oracle=lambda *qkv: _sparse_reference(precision)(*qkv, selection),
            head=_sparse_head(selection, precision),
        )

    task, options = _kernel_task(*blocks), _kernel_options(*blocks)
    if precision != "input":
        task, options = f"{task}, {precision}", options | {"precision": precision}
    return Candidate(task, impl, "kernel", True, build, _kernel_flops(*blocks), options)


def _fastvideo(impl: str, keep_ratio: float) -> Candidate:
    blocks = (64, 64, keep_ratio)

    def build(inputs: Inputs) -> Problem:
        # The package has a function of the module's name.
        operators = importlib.import_module("fastvideo_kernel.block_sparse_attn")
        if inputs.shape.length % 64:
            raise ValueError(f"fastvideo-kernel takes whole blocks of 64 tokens, got {inputs.shape.length} tokens")
        selection = inputs.random_selection(*blocks)
        sizes = torch.full((inputs.shape.length // 64,), 64, dtype=torch.int32, device=inputs.device)
        lists, operator = (selection.critical, selection.critical_count, sizes), getattr(operators, FASTVIDEO[impl])
        *tensors, grad = inputs.tensors(*QKV, "grad", contiguous=True)
        head = _sparse_head(selection)
        return Problem(lambda *qkv: operator(*qkv, *lists)[0], tuple(tensors), QKV, grad, head=head)

    return Candidate(
        _kernel_task(*blocks), impl, "kernel", False, build, _kernel_flops(*blocks), _kernel_options(*blocks)
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled backwards give up their buffers by default, and then refuse to run again over the same graph.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def flex_block_mask(selection: BlockSelection):
    """The critical blocks as FlexAttention's `BlockMask`, all of them full: nothing is masked inside a block."""
    from torch.nn.attention.flex_attention import BlockMask

    # FlexAttention transposes these lists, for which each must be as wide as there are key blocks.
    order, counts = lists_from_mask(selection.critical_mask())
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        order,
        counts,
        order,
        BLOCK_SIZE=(selection.block_q, selection.block_k),
        seq_lengths=(selection.query_length, selection.key_length),
    )


def _flex_attention(block: int, keep_ratio: float) -> Candidate:
    blocks = (block, block, keep_ratio)

    def build(inputs: Inputs) -> Problem:
        selection = inputs.random_selection(*blocks)
        block_mask = flex_block_mask(selection)
        flex_attention = _compiled_flex_attention()
        *tensors, grad = inputs.tensors(*QKV, "grad", contiguous=True)
        return Problem(
            lambda *qkv: flex_attention(*qkv, block_mask=block_mask),
            tuple(tensors),
            QKV,
            grad,
            head=_sparse_head(selection),
        )

    return Candidate(
        _kernel_task(*blocks),
        "FlexAttention",
        "kernel",
        False,
        build,
        _kernel_flops(*blocks),
        _kernel_options(*blocks),
    )


def _method(case: BenchCase, impl: str, given: bool) -> Candidate:
    def build(inputs: Inputs) -> Problem:
        chosen = {"config": case.config, "grid": inputs.shape.grid}
        extras = tuple(inputs.extra(name, dims) for name, dims in case.extras.items())
        *qkv, grad = inputs.tensors(*QKV, "grad")
        select = functools.partial(case.select, **chosen)
        selection = select(*qkv[:2])

        def run(*tensors: Tensor, selection: BlockSelection | None, impl: str) -> Tensor:
            named = dict(zip(case.extras, tensors[3:], strict=True))
            return case.call(*tensors[:3], selection=selection, impl=impl, **chosen, **named)

        def head(batch: int, head: int, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
            named = dict(zip(case.extras, tensors[3:], strict=True))
            rest = {"selection": head_of(selection, batch, head), "dtype": dtype}
            return case.head(in_chunks, tensors[:3], **rest, **chosen, **named)

        return Problem(
            functools.partial(run, selection=selection if given else None, impl=impl),
            (*qkv, *extras),
            (*QKV, *case.extras),
            grad,
            oracle=functools.partial(run, selection=selection, impl="reference"),
            head=None if case.head is None else head,
            selection=selection,
            select=select,
        )

    options = case.config.to_dict() | {"selection": "given" if given else "inside"}
    left_out = (*case.left_out, "selection") if given else case.left_out
    return Candidate(
        case.name, impl, "method", True, build, lambda shape: _part_flops(case.config, shape, left_out), options
    )
