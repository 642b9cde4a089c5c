"""A differentiable operator on GPU kernels: one forward and one backward, reached in two ways.

Plain eager calls go through one autograd function, and through the records of `replayed`. Under `torch.compile`, modes,
and transforms the same two functions are a pair of custom operators: opaque, capturable, with fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.host import is_plain, on_device_of, refuse_forward_mode
from foveal.kernels.replay import replayed
from foveal.kernels.values import flatten, unflatten

Tensors = tuple[Tensor, ...]
FORWARD = "(Tensor[] tensors, SymInt[] numbers, float[] factors, str words, bool save) -> Tensor[]"
BACKWARD = "(Tensor[] tensors, SymInt[] numbers, float[] factors, str words, bool[] given) -> Tensor[]"


class KernelOperator:
    """Calls `forward`, and `backward` for its gradients.

    A call is a packable value (`foveal.kernels.values`) whose first fields are the tensors that have gradients, or
    None. Its options are a NamedTuple of floats, then strings.

    Args:
        name: "namespace::name" of the custom operators, which add `_fwd` and `_bwd`.
        inputs: how many of a call's fields have gradients.
        outputs: how many outputs there are.
        options: the type of a call's options.
        forward: (call, options, save) to its outputs and what else the backward reads: new tensors, none if not `save`.
        backward: (call, options, outputs, saved, grads) to the gradients of the inputs, None for None. A gradient of an
            output may be None where there are several.
        fake: (call, options) to tensors like the outputs, and like what is saved.
        keeps: call to whether its backward reads the outputs. Else it gets none.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: int,
        outputs: int = 1,
        options: type,
        forward: Callable[[Any, Any, bool], tuple[Tensors, Tensors]],
        backward: Callable[[Any, Any, Tensors, Tensors, Sequence[Tensor | None]], Sequence[Tensor | None]],
        fake: Callable[[Any, Any], tuple[Tensors, Tensors]],
        keeps: Callable[[Any], bool] = lambda call: True,
    ) -> None:
        self._inputs, self._outputs, self._options = inputs, outputs, options
        self._factors = sum(getattr(x, "__forward_arg__", x) == "float" for x in options.__annotations__.values())
        self._forward, self._backward, self._fake, self._keeps = forward, backward, fake, keeps
        self._forward_op = torch.library.custom_op(f"{name}_fwd", self._of_op, mutates_args=(), schema=FORWARD)
        self._forward_op.register_fake(self._fake_of_op)
        self._forward_op.register_autograd(self._backward_of_op, setup_context=self._setup_context)
        self._backward_op = torch.library.custom_op(f"{name}_bwd", self._gradients_op, mutates_args=(), schema=BACKWARD)
        self._backward_op.register_fake(self._fake_gradients)

    def __call__(self, call: Any, options: Any) -> Tensors:
        """The outputs; differentiable.

        Raises:
            NotImplementedError: for inputs that carry forward-mode tangents.
        """
        inputs = call[: self._inputs]
        refuse_forward_mode(*inputs)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        tensors, numbers = flatten(call)
        if is_plain(*tensors):
            given = tuple(numbers), options, save
            if save:
                return _Plain.apply(self, given, self._keeps(call), *tensors)
            return replayed(self.run, tensors, given)
        factors, words = list(options[: self._factors]), ",".join(options[self._factors :])
        return tuple(self._forward_op(tensors, numbers, factors, words, save)[: self._outputs])

    def run(self, tensors: Sequence[Tensor], given: tuple) -> Tensors:
        """The outputs, then what is saved, of a flat call; for `replayed`."""
        numbers, options, save = given
        with on_device_of(tensors[0]):  # Triton launches on the current device
            outputs, saved = self._forward(unflatten(tensors, numbers), options, save)
        return (*outputs, *saved) if save else outputs

    def gradients(self, tensors: Sequence[Tensor | None], given: tuple) -> Tensors:
        """The gradients of the inputs that there are, of the outputs' gradients and what was saved; for `replayed`."""
        numbers, options, keeps = given
        grads, saved = tensors[: self._outputs], iter(tensors[self._outputs :])
        call, outputs, saved = self._restored(saved, numbers, keeps)
        with on_device_of(call[0]):
            found = self._backward(call, options, outputs, saved, grads)
        return tuple([grad for x, grad in zip(call[: self._inputs], found, strict=True) if x is not None])

    def _restored(self, tensors: Iterator[Tensor], numbers: Sequence[int], keeps: bool) -> tuple[Any, Tensors, Tensors]:
        """The call, its outputs, and what was saved, of a flat call's tensors and those behind them."""
        call = unflatten(tensors, numbers)
        outputs = tuple([next(tensors) for _ in range(self._outputs)]) if keeps else ()
        return call, outputs, tuple(tensors)

    def _read(self, factors: list[float], words: str) -> Any:
        return self._options(*factors, *words.split(","))

    def _of_op(self, tensors, numbers, factors, words, save) -> list[Tensor]:
        return list(self.run(tensors, (numbers, self._read(factors, words), save)))

    def _fake_of_op(self, tensors, numbers, factors, words, save) -> list[Tensor]:
        outputs, saved = self._fake(unflatten(tensors, numbers), self._read(factors, words))
        return [*outputs, *saved] if save else list(outputs)

    def _setup_context(self, ctx, inputs, output) -> None:
        tensors, ctx.numbers, *ctx.options, _ = inputs
        ctx.num_tensors, ctx.keeps = len(tensors), self._keeps(unflatten(tensors, ctx.numbers))
        ctx.save_for_backward(*tensors, *output[0 if ctx.keeps else self._outputs :])
        ctx.mark_non_differentiable(*output[self._outputs :])
        ctx.set_materialize_grads(False)

    def _backward_of_op(self, ctx, grads: list[Tensor | None]) -> tuple:
        grads = grads[: self._outputs]
        given = [x is not None for x in grads]
        tensors = [*(x for x in grads if x is not None), *ctx.saved_tensors]
        found = self._backward_op(tensors, ctx.numbers, *ctx.options, [*given, ctx.keeps])
        return [*found, *[None] * (ctx.num_tensors - len(found))], None, None, None, None

    def _gradients_op(self, tensors, numbers, factors, words, given) -> list[Tensor]:
        *given, keeps = given
        saved = iter(tensors)
        grads = [next(saved) if there else None for there in given]
        return list(self.gradients([*grads, *saved], (numbers, self._read(factors, words), keeps)))

    def _fake_gradients(self, tensors, numbers, factors, words, given) -> list[Tensor]:
        call, *_ = self._restored(iter(tensors[sum(given[:-1]) :]), numbers, given[-1])
        # Those of [B, H, L, D] lie as the inputs do, and those of parameters are contiguous.
        inputs = [x for x in call[: self._inputs] if x is not None]
        return [torch.empty_like(x) if x.dim() == 4 else x.new_empty(x.shape) for x in inputs]


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator: KernelOperator, given: tuple, keeps: bool, *tensors: Tensor):
        results = replayed(operator.run, tensors, given)
        outputs = results[: operator._outputs]
        ctx.operator, ctx.num_tensors, ctx.given = operator, len(tensors), (*given[:2], keeps)
        ctx.save_for_backward(*tensors, *(results if keeps else results[len(outputs) :]))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        found = replayed(ctx.operator.gradients, (*grads, *saved), ctx.given)
        return None, None, None, *found, *[None] * (ctx.num_tensors - len(found))
