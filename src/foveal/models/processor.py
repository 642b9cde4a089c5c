"""`sparsify`, `densify` and `dense`: sparse attention in the place of a model's self-attention, and back.

Each converted layer gets a `SparseAttentionProcessor`, a module that owns the method's parameters and keeps the
processor that it stands in for. All of a transformer's processors share one `ForwardState`, which hooks on the
transformer and its blocks keep up to date.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.methods.base import METHODS, Config, method_of
from foveal.models.context_parallel import Shards, check_parallel_config, receive_gates, send_gates, shards_of
from foveal.models.families.table import FAMILIES, Family, components_of, family_of
from foveal.models.layers import Layers, choose_configs
from foveal.models.pretrained import become_dense, become_sparse, register_components
from foveal.models.self_attention import Attend

Model = TypeVar("Model")

# A regular expression on module paths, as layerwise casting takes them. Our parameters are few, and the projection's
# small steps do not survive storage in eight bits.
SKIP_CASTING = r"\.processor(\.|$)"


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# What the processors of all families are called with.
_PROCESSOR_ARGUMENTS = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in _parameters(family.self_attention)[2:])
)


class Phase(NamedTuple):
    """What a policy asks of a transformer's sparse layers for one forward; the default asks nothing.

    Args:
        dense: run the original processors.
        keep_ratio, drop_ratio: instead of those of the layers' configurations; None leaves them.
    """

    dense: bool = False
    keep_ratio: float | None = None
    drop_ratio: float | None = None

    def apply(self, config: Config) -> Config:
        """A layer's configuration with these ratios."""
        changes = {}
        if self.keep_ratio is not None and hasattr(config, "keep_ratio"):
            changes["keep_ratio"] = self.keep_ratio
            if hasattr(config, "topk"):
                changes["topk"] = None
        if self.drop_ratio is not None and hasattr(config, "drop_ratio"):
            changes["drop_ratio"] = self.drop_ratio
        return config.replace(**changes) if changes else config


class ForwardState:
    """What the sparse layers of one transformer share: the grid of the forward in progress, and what is dense in it.

    The hooks are bound methods, not closures, so that `copy.deepcopy` of a model gives the copy a state of its own.

    Args:
        family: name in the table of families.
        parameters: names of the parameters of the transformer's forward, in order.

    Attributes:
        grid: the grid of the latest forward; None before the first.
        dense: run the original processors for now.
        phase: what the policy asks of the latest forward.
        held: names of the layers that the policy keeps dense.
        clock: the policy and where it reads the denoising step, a `PolicyClock`; None without a policy.
        recomputed: (grid, phase) of the forward that gradient checkpointing runs again; None outside of that.
        handles: of the hooks, by the name of the module that has them.
    """

    def __init__(self, family: str, parameters: tuple[str, ...]) -> None:
        self.family = family
        self.parameters = parameters
        self.grid: VideoGrid | None = None
        self.dense = False
        self.phase = Phase()
        self.held: frozenset[str] = frozenset()
        self.clock: Any = None
        self.recomputed: tuple[VideoGrid | None, Phase] | None = None
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def begin_forward(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the transformer."""
        if not torch.compiler.is_compiling():
            self._go_first()
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.grid = FAMILIES[self.family].read_grid(transformer, arguments)
        if self.clock is not None and not self.dense:
            self.phase = self.clock.phase(transformer, arguments.get("timestep"))

    def begin_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on a block of layers.

        Gradient checkpointing runs a block again during the backward, maybe after a forward on another grid or past
        the end of `with dense(model)`. The block's first argument, which it keeps for that, carries both.
        """
        if torch.compiler.is_compiling():
            return
        carrier = args[0] if args else kwargs["hidden_states"]
        if _in_backward():
            self.recomputed = getattr(carrier, "_foveal_forward", None)
        else:
            carrier._foveal_forward = (self.grid, self._phase())

    def _go_first(self) -> None:
        """Puts the hooks of the blocks before any that came later and replaces their arguments, as FSDP2's does."""
        for handle in self.handles.values():
            hooks = handle.hooks_dict_ref()
            if next(iter(hooks)) != handle.id:
                hooks.move_to_end(handle.id, last=False)

    def current(self) -> tuple[VideoGrid | None, Phase]:
        """(grid, phase) for the block that runs."""
        if not torch.compiler.is_compiling() and self.recomputed is not None and _in_backward():
            return self.recomputed
        return self.grid, self._phase()

    def _phase(self) -> Phase:
        return Phase(dense=True) if self.dense else self.phase


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class SparseAttentionProcessor(nn.Module):
    """An attention processor that runs SLA or VSA in place of dense self-attention.

    Args:
        attention: the method's module, with its parameters and configuration.
        state: shared by the layers of one transformer.
        original: the processor that this one stands in for.

    Attributes:
        held_dense: the policy keeps this layer dense.
    """

    def __init__(self, attention: nn.Module, state: ForwardState, original: Any) -> None:
        super().__init__()
        self.attention = attention
        self.state = state
        self.original = original
        self.held_dense = False

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    # Some attention classes pass on those keyword arguments alone that they find in this signature.
    __call__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _PROCESSOR_ARGUMENTS]
    )

    def forward(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, from the arguments that the original processor takes."""
        grid, phase = self.state.current()
        if phase.dense or self.held_dense:
            return self.original(attn, *args, **kwargs)
        if grid is None:
            raise ValueError("no grid is known yet: run the whole transformer, not one of its blocks alone")
        family = FAMILIES[self.state.family]
        shards = shards_of(self._parallel_config)
        attend = Attend(functools.partial(self._attend, grid, phase, shards), grid, shards)
        return family.self_attention(attn, attend, *args, **kwargs)

    def _attend(
        self,
        grid: VideoGrid,
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
        gates = None
        if shards is not None:
            gates, hidden_states = send_gates(self.attention, hidden_states, grid, shards), None
        query, key, value = map(receive, (query, key, value))
        if shards is not None:
            gates = receive_gates(gates, grid, shards)
        return method.attend(self.attention, query, key, value, hidden_states, grid, kv_lengths, config, gates)

    def extra_repr(self) -> str:
        return f"method={method_of(self.config).name!r}"


def sparsify(model: Model, config: Config | None = None, *, layers: Layers = None, impl: str = "auto") -> Model:
    """Puts sparse attention in the place of a model's dense self-attention. Cross-attention stays as it is.

    The new parameters go where the layer's are, in the model's dtype, but for SLA's projection, which stays float32.
    They start at values that leave the sparse branch alone (see `SparseLinearAttention`, `VideoSparseAttention`).

    Args:
        model: a transformer of a family in the table, or a pipeline, whose `transformer` and `transformer_2` are
            converted alike.
        config: an `SLAConfig` or `VSAConfig`.
        layers: which layers, by index or by name ("blocks.0.attn1"). None converts all of them. A collection, [0, 5]
            or range(2, 28), converts these. A table, {0: None, range(1, 4): one, "blocks.7.attn1": another}, gives
            these layers configurations of their own, None for dense, and the others `config`; without a `config` the
            others stay as they are. A function (index, name) gives every layer its configuration or None; `config`
            must then be None. Calls add up, and none converts a layer again; `reconfigure` changes one.
        impl: see `block_sparse_attention`.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        TypeError: an unsupported model, or a `config` or `layers` of the wrong type.
        ValueError: a layer that does not exist, is named twice in a table, is sparse already, or has a processor of
            someone else's; `layers` that leave nothing to convert; a model under context parallelism that sparse
            layers cannot follow, or sharded; an unknown `impl`.
    """
    plans = []
    for transformer in components_of(model).values():
        configs = choose_configs(family_of(transformer).self_attention_layers(transformer), config, layers)
        plans.append((transformer, build_processors(transformer, configs, impl=impl)))
    for transformer, processors in plans:
        install(transformer, processors)
    register_components(model)
    return model


def densify(model: Model) -> Model:
    """Undoes `sparsify`: the original processors come back, the hook and the new parameters go.

    Args:
        model: what `sparsify` takes. One that is dense already stays as it is.

    Returns:
        The same model, changed in place.
    """
    for transformer in components_of(model).values():
        processors = sparse_processors(transformer)
        layers = family_of(transformer).self_attention_layers(transformer)
        for name, processor in processors.items():
            layers[name].set_processor(processor.original)
            for handle in processor.state.handles.values():
                handle.remove()
            processor.state.handles.clear()
        _skip_casting(transformer, skip=False)
        become_dense(transformer)
    register_components(model)
    return model


@contextlib.contextmanager
def dense(model: Model) -> Iterator[Model]:
    """`with dense(model): ...` runs dense attention inside; the sparse parameters stay where they are.

    May be nested, and ends with the block however that ends. With gradient checkpointing, a forward made inside is
    recomputed dense even if its backward runs outside.

    Args:
        model: what `sparsify` takes. One that is dense already stays so.
    """
    states = [state_of(transformer) for transformer in components_of(model).values()]
    states = [(state, state.dense) for state in states if state is not None]
    for state, _ in states:
        state.dense = True
    try:
        yield model
    finally:
        for state, former in states:
            state.dense = former


def sparse_processors(transformer: nn.Module) -> dict[str, SparseAttentionProcessor]:
    """The processors that `sparsify` put into a transformer, by layer name; empty for a dense one."""
    layers = family_of(transformer).self_attention_layers(transformer)
    found = {name: attn.processor for name, attn in layers.items()}
    return {name: processor for name, processor in found.items() if isinstance(processor, SparseAttentionProcessor)}


def state_of(transformer: nn.Module) -> ForwardState | None:
    """The state that a transformer's sparse layers share; None for a dense one."""
    return next((processor.state for processor in sparse_processors(transformer).values()), None)


def build_processors(
    transformer: nn.Module, configs: dict[str, Config], *, impl: str = "auto"
) -> dict[str, SparseAttentionProcessor]:
    """Processors for the layers named in `configs`, ready for `install`; changes nothing yet.

    Raises:
        ValueError: as `sparsify` does.
    """
    family = family_of(transformer)
    layers = family.self_attention_layers(transformer)
    check_parallel_config(family.name, getattr(transformer, "_parallel_config", None))
    state = state_of(transformer) or ForwardState(family.name, _parameters(type(transformer).forward)[1:])
    processors = {}
    for name, config in configs.items():
        attn = layers[name]
        _check_replaceable(name, attn, family)
        attention = build_attention(family, attn, config, next(attn.parameters()).device, impl=impl)
        attention.to(dtype=transformer.dtype)
        processors[name] = SparseAttentionProcessor(attention, state, attn.processor).train(attn.training)
    return processors


def build_attention(
    family: Family, attn: nn.Module, config: Config, device: torch.device | str, *, impl: str = "auto"
) -> nn.Module:
    """The method's module for one attention layer, in its initial dtypes."""
    with torch.device(device):
        return METHODS[method_of(config).name].build(config, *family.dimensions(attn), impl)


def install(transformer: nn.Module, processors: dict[str, SparseAttentionProcessor]) -> None:
    """Puts processors from `build_processors` in place, and the hook that they depend on."""
    family = family_of(transformer)
    layers = family.self_attention_layers(transformer)
    for name, processor in processors.items():
        layers[name].set_processor(processor)
        processor.held_dense = name in processor.state.held
        state, block = processor.state, name.rpartition(".")[0]
        for owner, hook in (("", state.begin_forward), (block, state.begin_block)):
            if owner not in state.handles:
                module = transformer.get_submodule(owner)
                state.handles[owner] = module.register_forward_pre_hook(hook, with_kwargs=True)
    _skip_casting(transformer, skip=True)
    become_sparse(transformer)


def _check_replaceable(name: str, attn: nn.Module, family: Family) -> None:
    processor = attn.processor
    if isinstance(processor, SparseAttentionProcessor):
        raise ValueError(
            f"layer {name} is sparse already ({processor.config}); reconfigure changes that, densify takes it out"
        )
    if type(processor).__name__ not in family.processors:
        raise ValueError(
            f"layer {name} has a {type(processor).__name__}, which sparse attention cannot stand in for; "
            f"expected {' or '.join(family.processors)}"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in attn.parameters()):
        raise ValueError(
            f"layer {name} is sharded (DTensor), and parameters added now would not be; sparsify the model before "
            "fully_shard"
        )
    offloaded = any(hasattr(module, "_hf_hook") for module in attn.modules())
    if offloaded and next(attn.parameters()).device.type == "meta":
        raise ValueError(f"layer {name} is offloaded, its parameters are elsewhere; sparsify the model before that")


def _skip_casting(transformer: nn.Module, *, skip: bool) -> None:
    """Adds our pattern to the instance's layerwise casting exceptions, or takes it away again."""
    inherited = type(transformer)._skip_layerwise_casting_patterns
    current = transformer._skip_layerwise_casting_patterns
    patterns = [pattern for pattern in current or () if pattern != SKIP_CASTING]
    if skip:
        transformer._skip_layerwise_casting_patterns = [*patterns, SKIP_CASTING]
    elif patterns == list(inherited or ()):
        vars(transformer).pop("_skip_layerwise_casting_patterns", None)
    else:
        transformer._skip_layerwise_casting_patterns = patterns
