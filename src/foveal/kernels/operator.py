"""A differentiable operator on GPU kernels: one forward and one backward, reached in two ways.

Plain eager calls go through one autograd function, and through the records of `replayed`. Under `torch.compile`, modes,
and transforms the same two functions are a pair of custom operators: opaque, capturable, with fakes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.checks import without_autocast
from foveal.kernels.host import CACHES, has_saved_tensor_hooks, is_plain, on_device_of, refuse_forward_mode, remember
from foveal.kernels.record import Packing
from foveal.kernels.replay import Replays, kind_of
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
        self.inputs, self.outputs, self._options = inputs, outputs, options
        self._factors = sum(getattr(x, "__forward_arg__", x) == "float" for x in options.__annotations__.values())
        self._forward, self._backward, self._fake, self.keeps = forward, backward, fake, keeps
        self._known: dict[Hashable, PlainCalls] = {}
        CACHES.append(self._known)
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
        inputs = call[: self.inputs]
        refuse_forward_mode(*inputs)
        tensors, numbers = flatten(call)
        if is_plain(*tensors):
            return self._plain_calls(call, options, tensors, numbers)(tensors)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        factors, words = list(options[: self._factors]), ",".join(options[self._factors :])
        return tuple(self._forward_op(tensors, numbers, factors, words, save)[: self.outputs])

    def worked_out(self, call: Any, options: Any) -> tuple[PlainCalls, tuple[Tensor, ...]]:
        """What a plain call was for later ones whose inputs are of the same kind, and its tensors after these."""
        tensors, numbers = flatten(call)
        calls = self._plain_calls(call, options, tensors, numbers)
        return calls, tuple(tensors[calls.given :])

    def _plain_calls(self, call: Any, options: Any, tensors: list[Tensor], numbers: list[int]) -> PlainCalls:
        kind = kind_of(tensors)
        key = tuple(numbers), options, kind
        calls = self._known.get(key)
        if calls is None:
            calls = PlainCalls(self, call, tuple(numbers), options)
            if kind is not None:
                remember(self._known, key, calls)
        return calls

    def run(self, tensors: Sequence[Tensor], given: tuple) -> Tensors:
        """The outputs, then what is saved, of a flat call."""
        numbers, options, save = given
        with on_device_of(tensors[0]):  # Triton launches on the current device
            outputs, saved = self._forward(unflatten(tensors, numbers), options, save)
        return (*outputs, *saved) if save else outputs

    def gradients(self, saved: Sequence[Tensor], grads: Sequence[Tensor | None], given: tuple) -> Tensors:
        """The gradients of the inputs that there are, of what was saved and the outputs' gradients."""
        numbers, options, keeps = given
        call, outputs, saved = self._restored(iter(saved), numbers, keeps)
        with on_device_of(call[0]):
            found = self._backward(call, options, outputs, saved, grads)
        return tuple([grad for x, grad in zip(call[: self.inputs], found, strict=True) if x is not None])

    def _restored(self, tensors: Iterator[Tensor], numbers: Sequence[int], keeps: bool) -> tuple[Any, Tensors, Tensors]:
        """The call, its outputs, and what was saved, of a flat call's tensors and those behind them."""
        call = unflatten(tensors, numbers)
        outputs = tuple([next(tensors) for _ in range(self.outputs)]) if keeps else ()
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
        ctx.num_tensors, ctx.keeps = len(tensors), self.keeps(unflatten(tensors, ctx.numbers))
        ctx.save_for_backward(*tensors, *output[0 if ctx.keeps else self.outputs :])
        ctx.mark_non_differentiable(*output[self.outputs :])
        ctx.set_materialize_grads(False)

    def _backward_of_op(self, ctx, grads: list[Tensor | None]) -> tuple:
        grads = grads[: self.outputs]
        given = [x is not None for x in grads]
        tensors = [*(x for x in grads if x is not None), *ctx.saved_tensors]
        found = self._backward_op(tensors, ctx.numbers, *ctx.options, [*given, ctx.keeps])
        return [*found, *[None] * (ctx.num_tensors - len(found))], None, None, None, None

    @without_autocast
    def _gradients_op(self, tensors, numbers, factors, words, given) -> list[Tensor]:
        *given, keeps = given
        saved = iter(tensors)
        grads = [next(saved) if there else None for there in given]
        return list(self.gradients([*saved], grads, (numbers, self._read(factors, words), keeps)))

    def _fake_gradients(self, tensors, numbers, factors, words, given) -> list[Tensor]:
        call, *_ = self._restored(iter(tensors[sum(given[:-1]) :]), numbers, given[-1])
        # Those of [B, H, L, D] lie as the inputs do, and those of parameters are contiguous.
        inputs = [x for x in call[: self.inputs] if x is not None]
        return [torch.empty_like(x) if x.dim() == 4 else x.new_empty(x.shape) for x in inputs]


class PlainCalls:
    """Plain eager calls of an operator that differ only in what their tensors hold and where these lie.

    Attributes:
        given: how many of a flat call's tensors are inputs.
        keeps: whether the backward reads the outputs.
    """

    def __init__(self, operator: KernelOperator, call: Any, numbers: tuple[int, ...], options: Any) -> None:
        self.operator, self.keeps = operator, operator.keeps(call)
        self.given = sum(x is not None for x in call[: operator.inputs])
        self._of_backward = numbers, options, self.keeps
        inference, training = (
            functools.partial(operator.run, given=(numbers, options, save)) for save in (False, True)
        )
        self._inference = Replays(inference)
        self._training, self._packing = Replays(training), Replays(training, operator.outputs)
        self._backwards: dict[Hashable, Replays] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensors:
        """The outputs of a flat call; differentiable."""
        if torch.is_grad_enabled():
            for x in tensors[: self.given]:
                if x.requires_grad:
                    return _Plain.apply(self, *tensors)
        return self._inference(tensors)[0]

    def training(self, tensors: Sequence[Tensor]) -> tuple[Tensors, Packing | None]:
        """The outputs, then what is saved, of a flat call, and how the latter is packed; None if it is not."""
        # Checkpointing counts what is saved, here and when it calls again.
        return (self._training if has_saved_tensor_hooks() else self._packing)(tensors)

    @without_autocast
    def gradients(self, saved: Sequence[Tensor], grads: Sequence[Tensor | None], packing: Packing | None) -> Tensors:
        """The gradients of the inputs, of what a forward saved, with its packing, and the outputs' gradients."""
        count = len(saved)

        def gradients(tensors: Sequence[Tensor | None]) -> Tensors:
            saved, grads = tensors[:count], tensors[count:]
            if packing is not None:
                saved = *saved[: -packing.length], *packing.unpacked(saved[-packing.length :])
            return self.operator.gradients(saved, grads, self._of_backward)

        tensors = *saved, *grads
        kind = kind_of(tensors)
        if kind is None:
            return gradients(tensors)
        replays = self._backwards.get(kind)
        if replays is None:
            # The same was called before, with what a forward saved that did not pack it yet.
            called = packing is not None and bool(self._backwards)
            replays = remember(self._backwards, kind, Replays(gradients, called=called))
        return replays(tensors)[0]


Known = tuple[PlainCalls, tuple[Tensor, ...], Any]


class KnownCalls:
    """Calls that a method's function has checked and worked out; others of their kind need neither again."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Known] = {}
        CACHES.append(self._known)

    def find(self, tensors: Sequence[Tensor | None], options: tuple) -> tuple[Hashable | None, Known | None]:
        """What a call is known by, and what was remembered of it: what runs its flat tensors, those after the inputs,
        and what `remember` got.

        The first is None for calls that modes, transforms, or traces must see, and that are not to be remembered.

        Args:
            tensors: the operator's inputs, the first of which is the query; not checked yet, nor are the options.
            options: all else that the call depends on, where there are no other tensors.
        """
        if tensors[0] is None or not is_plain(*tensors) or torch.autograd.forward_ad._current_level >= 0:
            return None, None
        kind = kind_of(tensors)
        if kind is None:
            return None, None
        key = options, kind
        try:
            return key, self._known.get(key)
        except TypeError:  # an option of a wrong type
            return None, None

    def remember(self, key: Hashable, ran: Any, call: tuple[PlainCalls, tuple[Tensor, ...]]) -> None:
        """Remembers a call that was `worked_out`, and what ran, for later ones with this key."""
        remember(self._known, key, (*call, ran))


def _gradients(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
    found = ctx.calls.gradients(saved, grads, ctx.packing)
    return None, *found, *[None] * (ctx.num_tensors - len(found))


_differentiable_once = once_differentiable(_gradients)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls: PlainCalls, *tensors: Tensor):
        results, ctx.packing = calls.training(tensors)
        outputs = results[: calls.operator.outputs]
        ctx.calls, ctx.num_tensors = calls, len(tensors)
        ctx.save_for_backward(*tensors, *(results if calls.keeps else results[len(outputs) :]))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        # Unless a graph of the backward is wanted, there is nothing to forbid.
        return (_differentiable_once if torch.is_grad_enabled() else _gradients)(ctx, *grads)
