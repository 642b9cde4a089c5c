"""Sparse processors into a transformer and out of it: their modules, the hooks that they depend on, and the checks."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from foveal.methods.base import Config, method_of
from foveal.models.context_parallel import check_parallel_config
from foveal.models.families.table import Family, family_of
from foveal.models.processor import SparseAttentionProcessor, note_configs, parameters_of, sparse_processors, state_of
from foveal.models.sharding import Overrides, in_flat_parameters, is_dtensor
from foveal.models.state import ForwardState

# A regular expression on module paths, as layerwise casting takes them. Our parameters are few, and the projection's
# small steps do not survive storage in eight bits.
SKIP_CASTING = r"\.processor(\.|$)"


def build_processors(
    transformer: nn.Module, configs: dict[str, Config], *, impl: str = "auto", on_fallback: str = "allow"
) -> dict[str, SparseAttentionProcessor]:
    """Processors for the layers named in `configs`, ready for `install`; changes nothing yet.

    Raises:
        ValueError: as `sparsify` does.
    """
    family = family_of(transformer)
    layers = family.self_attention_layers(transformer)
    check_parallel_config(family.name, getattr(transformer, "_parallel_config", None))
    state = state_of(transformer) or ForwardState(family.name, parameters_of(type(transformer).forward)[1:])
    processors = {}
    for name, config in configs.items():
        attn = layers[name]
        _check_replaceable(name, attn, family)
        attention = build_attention(family, attn, config, next(attn.parameters()).device, impl=impl)
        attention.to(dtype=transformer.dtype)
        processor = SparseAttentionProcessor(attention, state, attn.processor, on_fallback=on_fallback)
        processors[name] = processor.train(attn.training)
    return processors


def build_attention(
    family: Family, attn: nn.Module, config: Config, device: torch.device | str, *, impl: str = "auto"
) -> nn.Module:
    """The method's module for one attention layer, in its initial dtypes."""
    with torch.device(device):
        return method_of(config).build(config, *family.dimensions(attn), impl)


def install(transformer: nn.Module, processors: dict[str, SparseAttentionProcessor]) -> None:
    """Puts processors from `build_processors` in place, and the hook that they depend on."""
    family = family_of(transformer)
    layers = family.self_attention_layers(transformer)
    for name, processor in processors.items():
        layers[name].set_processor(processor)
        processor.held_dense = name in processor.state.held
        state, block = processor.state, name.rpartition(".")[0]
        transformer.get_submodule(block)._wrap_overrides = Overrides(layers[name])
        for owner, begin, end in (("", state.begin_forward, state.end_forward), (block, state.begin_block, None)):
            if owner not in state.handles:
                module = transformer.get_submodule(owner)
                handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
                if end is not None:
                    handles.append(module.register_forward_hook(end, always_call=True))
                state.handles[owner] = tuple(handles)
    note_configs(transformer)
    _skip_casting(transformer, skip=True)


def uninstall(transformer: nn.Module) -> None:
    """Puts the original processors back and takes the hooks away."""
    layers = family_of(transformer).self_attention_layers(transformer)
    for name, processor in sparse_processors(transformer).items():
        layers[name].set_processor(processor.original)
        vars(transformer.get_submodule(name.rpartition(".")[0])).pop("_wrap_overrides", None)
        for handle in itertools.chain(*processor.state.handles.values()):
            handle.remove()
        processor.state.handles.clear()
    _skip_casting(transformer, skip=False)


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
    for sharded, how, wrap in (
        (any(is_dtensor(parameter) for parameter in attn.parameters()), "DTensor", "fully_shard"),
        (in_flat_parameters(attn), "FSDP", "FullyShardedDataParallel"),
    ):
        if sharded:
            raise ValueError(
                f"layer {name} is sharded ({how}), and parameters added now would not be; sparsify the model before "
                f"{wrap}"
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
