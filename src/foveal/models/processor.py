"""The attention processor that runs a sparse method in place of a layer's dense self-attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foveal.checks import check_choice
from foveal.kernels.api import block_sparse_attention, may_note
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Config, LayerCall, method_of
from foveal.models.context_parallel import Shards, check_parallel_config, receive_gates, send_gates, shards_of
from foveal.models.families.table import FAMILIES, family_of
from foveal.models.record import DENSE, HELD_DENSE, ON_FALLBACK, UNTOLD, LayerRecord
from foveal.models.self_attention import LayerAttention
from foveal.models.state import ForwardState, Phase


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters, in order."""
    return tuple(inspect.signature(function).parameters)


# What the processors of all families are called with.
_PROCESSOR_ARGUMENTS = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in parameters_of(family.self_attention)[2:])
)


class _Layer:
    """The attention module that a processor runs in, as an argument that is no module.

    accelerate's hooks move the arguments of a module to a device, modules among them, and this one may be offloaded.
    """

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn


class _ZeroGradients(torch.autograd.Function):
    """Its first argument, with gradients of zero for the others."""

    @staticmethod
    def forward(ctx, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class SparseAttentionProcessor(nn.Module):
    """An attention processor that runs SLA or VSA in place of dense self-attention.

    Args:
        attention: the method's module, with its parameters and configuration.
        state: shared by the layers of one transformer.
        original: the processor that this one stands in for.
        on_fallback: as in `sparsify`.

    Attributes:
        held_dense: the policy keeps this layer dense.
        record: what the layer ran.

    Raises:
        ValueError: an unknown `on_fallback`.
    """

    def __init__(self, attention: nn.Module, state: ForwardState, original: Any, *, on_fallback: str = "allow") -> None:
        super().__init__()
        check_choice("on_fallback", on_fallback, ON_FALLBACK)
        self.attention = attention
        self.state = state
        self.original = original
        self.held_dense = False
        self.record = LayerRecord(attention.config, on_fallback)

    @property
    def config(self) -> Config:
        return self.attention.config

    @property
    def _attention_backend(self) -> Any:
        # diffusers sets the backend of every processor that has this attribute. It is the dense attention's, so it
        # belongs to the original, which runs under `dense` and comes back with `densify`.
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        # `enable_parallelism` sets it, on the processors that have it. The original needs it too, when it runs.
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        check_parallel_config(self.state.family, config)
        self.original._parallel_config = config

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(_Layer(attn), *args, **kwargs)

    # Some attention classes pass on only those keyword arguments that they find in this signature.
    __call__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _PROCESSOR_ARGUMENTS]
    )

    def forward(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, from the arguments that the original processor takes."""
        attn = layer.attn
        call = self.state.current()
        if call is None and not self.held_dense:
            raise ValueError(
                "no grid is known for this call of a block: run the whole transformer, not only one of its blocks; and "
                "checkpoint gradients by transformer.enable_gradient_checkpointing(), or without use_reentrant=True. A "
                "compiled block that checkpoints itself has to be one graph: fullgraph=True says where it breaks"
            )
        phase = Phase(dense=True)
        if call is not None:
            phase = Phase.from_text(call.phase_text) if torch.compiler.is_compiling() else call.phase
        if phase.dense or self.held_dense:
            output = self.original(attn, *args, **kwargs)
            if may_note():
                self.record.ran = HELD_DENSE if self.held_dense else DENSE
            # The switch takes the method out of a forward; a policy makes it a part that does nothing this time.
            by_policy = call is not None and call.grid is not None
            hidden_states = args[0] if args else kwargs["hidden_states"]
            return self._with_zero_gradients(output, hidden_states) if by_policy else output
        grid = call.grid
        family = FAMILIES[self.state.family]
        shards = shards_of(self._parallel_config)
        tokens = grid if call.layout is None else call.layout
        method, mass = (functools.partial(x, tokens, phase) for x in (self._run_method, self._kept_mass))
        sparse_attention = LayerAttention(functools.partial(method, shards), tokens, shards, mass)
        return family.self_attention(attn, sparse_attention, *args, **kwargs)

    def _with_zero_gradients(self, output: Any, hidden_states: Tensor) -> Any:
        """The output, with gradients of zero for the parameters that had no part in it.

        DistributedDataParallel waits for every parameter's gradient, FSDP for the calls of all of its units, and ranks
        may differ in what their policy skips.
        """
        # FSDP gathers a part's parameters when it is called, and waits for the other ranks, also without gradients.
        if not (torch.is_grad_enabled() or (dist.is_available() and dist.is_initialized())):
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        idle = method_of(self.config).idle(self.attention, hidden_states)
        idle = [x for x in idle if x is not None and x.requires_grad]
        if not idle:
            return output
        first = _ZeroGradients.apply(first, *idle)
        return (first, *rest) if isinstance(output, tuple) else first

    def _run_method(
        self,
        tokens: VideoGrid | TokenLayout,
        phase: Phase,
        shards: Shards | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        kv_lengths: Tensor | None,
        receive: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        method, config = method_of(self.config), phase.apply(self.config)
        gates, heads = None, None
        if shards is not None:
            gates, hidden_states = send_gates(self.attention, hidden_states, tokens, shards), None
        query, key, value = map(receive, (query, key, value))
        if shards is not None:
            gates, heads = receive_gates(gates, tokens, shards), shards.heads(query.shape[1])
            config = config.of_heads(heads.start, heads.stop)
        call = LayerCall(query, key, value, hidden_states, tokens, kv_lengths, config, gates, heads)
        output = method.run(self.attention, call)
        if may_note():
            self.record.ran = getattr(self.attention, "ran", UNTOLD)
        return output

    def _kept_mass(self, tokens: VideoGrid, phase: Phase, query: Tensor, key: Tensor) -> Tensor:
        """See `LayerAttention`."""
        config = phase.apply(self.config)
        selection = self.attention.select(query, key, grid=tokens, config=config)
        places = self.attention.token_places(tokens)
        query, key = (
            x.new_zeros(*x.shape[:2], length, x.shape[3]).index_copy(2, places.to(x.device), x)
            for x, length in ((query, selection.query_length), (key, selection.key_length))
        )
        impl = getattr(self.attention, "impl", "auto")
        _, mass = block_sparse_attention(query, key, key, selection, impl=impl, return_lse=True)
        return mass.index_select(2, places.to(mass.device))

    def extra_repr(self) -> str:
        return f"method={method_of(self.config).name!r}"


def sparse_processors(transformer: nn.Module) -> dict[str, SparseAttentionProcessor]:
    """The processors that `sparsify` put into a transformer, by layer name; empty for a dense one."""
    layers = family_of(transformer).self_attention_layers(transformer)
    found = {name: attn.processor for name, attn in layers.items()}
    return {name: processor for name, processor in found.items() if isinstance(processor, SparseAttentionProcessor)}


def state_of(transformer: nn.Module) -> ForwardState | None:
    """The state that a transformer's sparse layers share; None for a dense one."""
    return next((processor.state for processor in sparse_processors(transformer).values()), None)


def note_configs(transformer: nn.Module) -> None:
    """Tells the state of a transformer which sparse layers it has now, and their configurations."""
    state = state_of(transformer)
    if state is not None:
        processors = sparse_processors(transformer)
        for processor in processors.values():
            processor.record.config = processor.config
        state.configs = tuple(dict.fromkeys(x.config for x in processors.values()))
        state.layers = {name: processor.record for name, processor in processors.items()}
        state.minds_fallbacks = any(layer.on_fallback != "allow" for layer in state.layers.values())
        state.record.clear()
