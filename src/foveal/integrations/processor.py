"""`sparsify`, `densify` and `dense`: sparse attention in the place of a model's self-attention, and back.

Each converted layer gets a `SparseAttentionProcessor`, a module that owns the method's parameters and keeps the
processor that it stands in for. All of a transformer's processors share one `ForwardState`, which a hook on the
transformer's position embedding keeps up to date.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foveal.integrations.families import FAMILIES, Family, components_of, family_of
from foveal.methods import METHODS, Config, method_of
from foveal.video_grid import VideoGrid

Model = TypeVar("Model")

# A regular expression on module paths, as layerwise casting takes them. Our parameters are few, and the projection's
# small steps do not survive storage in eight bits.
SKIP_CASTING = r"\.processor(\.|$)"

CONTEXT_PARALLEL = (
    "context parallelism is not supported by sparse attention: each rank would attend to its own shard of the tokens; "
    "densify the model, or run it without context parallelism"
)


class ForwardState:
    """What the sparse layers of one transformer share: the grid of the forward in progress, and the dense switch.

    The hook is a bound method, not a closure, so that `copy.deepcopy` of a model gives the copy a state of its own.

    Args:
        family: name in the table of families.

    Attributes:
        grid: the grid of the latest forward; None before the first.
        dense: run the original processors for now.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.grid: VideoGrid | None = None
        self.dense = False
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def observe(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook on the family's grid source."""
        self.grid = FAMILIES[self.family].read_grid(module, args)
        # Gradient checkpointing runs a layer again during the backward, maybe after a forward on another grid or past
        # the end of `with dense(model)`. The position embedding is an argument that it keeps, so it carries both.
        if not torch.compiler.is_compiling():
            _first(output)._foveal_forward = (self.grid, self.dense)

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[VideoGrid | None, bool]:
        """(grid, dense) for one call of a layer with these arguments."""
        if not torch.compiler.is_compiling():
            for value in (*args, *kwargs.values()):
                carried = getattr(_first(value), "_foveal_forward", None)
                if carried is not None:
                    return carried
        return self.grid, self.dense


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


class SparseAttentionProcessor(nn.Module):
    """An attention processor that runs SLA or VSA in place of dense self-attention.

    Args:
        attention: the method's module, with its parameters and configuration.
        state: shared by the layers of one transformer.
        original: the processor that this one stands in for.
    """

    def __init__(self, attention: nn.Module, state: ForwardState, original: Any) -> None:
        super().__init__()
        self.attention = attention
        self.state = state
        self.original = original

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
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        # `enable_parallelism` skips processors without the attribute: they would attend within their shard, unnoticed.
        if config is not None:
            raise ValueError(CONTEXT_PARALLEL)

    def forward(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, from the arguments that the original processor takes."""
        grid, dense = self.state.of_call(args, kwargs)
        if dense:
            return self.original(attn, *args, **kwargs)
        if grid is None:
            raise ValueError("no grid is known yet: run the whole transformer, not one of its blocks alone")
        family = FAMILIES[self.state.family]
        return family.self_attention(attn, functools.partial(self._attend, grid), *args, **kwargs)

    def _attend(self, grid: VideoGrid, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor) -> Tensor:
        # Autocast leaves norms in float32 and would cast all three at scaled_dot_product_attention.
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        method = method_of(self.config)
        return method.attend(self.attention, query, key, value, hidden_states, grid)

    def extra_repr(self) -> str:
        return f"method={method_of(self.config).name!r}"


def sparsify(model: Model, config: Config, *, layers: Iterable[int | str] | None = None, impl: str = "auto") -> Model:
    """Puts sparse attention in the place of a model's dense self-attention. Cross-attention stays as it is.

    The new parameters go where the layer's are, in the model's dtype, but for SLA's projection, which stays float32.
    They start at values that leave the sparse branch alone (see `SparseLinearAttention`, `VideoSparseAttention`).

    Args:
        model: a `WanTransformer3DModel`, or a pipeline, whose `transformer` and `transformer_2` are converted alike.
        config: an `SLAConfig` or `VSAConfig`.
        layers: the layers to convert, by index or by name ("blocks.0.attn1"); the others stay as they are. None
            converts all. Call again with other layers to mix configurations.
        impl: see `block_sparse_attention`.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        TypeError: an unsupported model, or a `config` or `layers` of the wrong type.
        ValueError: a layer that does not exist, is sparse already, or has a processor of someone else's; a model
            under context parallelism; an unknown `impl`.
    """
    method_of(config)
    plans = []
    for transformer in components_of(model).values():
        names = _choose_layers(family_of(transformer).self_attention_layers(transformer), layers)
        plans.append((transformer, build_processors(transformer, dict.fromkeys(names, config), impl=impl)))
    for transformer, processors in plans:
        install(transformer, processors)
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
            if processor.state.handle is not None:
                processor.state.handle.remove()
        _skip_casting(transformer, skip=False)
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
    _check_parallelism(transformer)
    state = state_of(transformer) or ForwardState(family.name)
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
        state = processor.state
        if state.handle is None:
            state.handle = family.grid_source(transformer).register_forward_hook(state.observe)
    _skip_casting(transformer, skip=True)


def _choose_layers(layers: dict[str, nn.Module], chosen: Iterable[int | str] | None) -> list[str]:
    names = list(layers)
    if chosen is None:
        return names
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"layers must be an iterable of indices or names, got {chosen!r}")
    picked = set()
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise TypeError(f"layers must hold indices or names, got {layer!r} ({type(layer).__name__})")
        if isinstance(layer, int):
            if not 0 <= layer < len(names):
                raise ValueError(f"layers must be in 0..{len(names) - 1}, got {layer}")
            layer = names[layer]
        if layer not in layers:
            raise ValueError(f"unknown layer {layer!r}; expected some of {names[0]!r} to {names[-1]!r}")
        picked.add(layer)
    if not picked:
        raise ValueError("layers is empty; None converts all layers")
    return [name for name in names if name in picked]


def _check_parallelism(transformer: nn.Module) -> None:
    parallel = getattr(transformer, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError(CONTEXT_PARALLEL)


def _check_replaceable(name: str, attn: nn.Module, family: Family) -> None:
    processor = attn.processor
    if isinstance(processor, SparseAttentionProcessor):
        raise ValueError(
            f"layer {name} is sparse already ({processor.config}); densify the model before another configuration"
        )
    if type(processor).__name__ not in family.processors:
        raise ValueError(
            f"layer {name} has a {type(processor).__name__}, which sparse attention cannot stand in for; "
            f"expected {' or '.join(family.processors)}"
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
