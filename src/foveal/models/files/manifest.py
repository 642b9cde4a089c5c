"""A transformer's sparse layers as JSON: each layer's method and configuration, and the policy.

The file that `save` writes has such an entry per component, and the `config.json` of `save_pretrained` has one too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from foveal.methods.base import Config, config_from_dict, method_of
from foveal.models.families.table import family_of
from foveal.models.files.tensor_files import enumerated
from foveal.models.installation import build_processors, install
from foveal.models.policy import Policy, attach_policy, check_policy, get_policy
from foveal.models.processor import sparse_processors

FORMAT = 1


def describe(transformer: nn.Module) -> dict[str, Any] | None:
    """Describe a transformer's sparse layers for its `config.json`, as JSON-ready values; None for a dense one."""
    return {"format": FORMAT, **entry_of(transformer)} if sparse_processors(transformer) else None


def build_described(transformer: nn.Module, description: Any) -> None:
    """Convert a dense transformer as `describe` recorded, with initial parameters.

    Raises:
        ValueError: the description is malformed, or is of another version or model.
    """
    source = "config.json"
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        version = description.get("format") if isinstance(description, dict) else description
        raise ValueError(f"{source} describes sparse layers in format {version!r}; this version reads {FORMAT}")
    family, configs, policy = parse_component(source, description)
    check_component(source, transformer, family, configs, policy)
    install(transformer, build_processors(transformer, configs))
    if policy is not None:
        attach_policy(transformer, policy)


def entry_of(transformer: nn.Module) -> dict[str, Any]:
    """One component of the manifest."""
    configs = {name: processor.config for name, processor in sparse_processors(transformer).items()}
    layers = {name: {"method": method_of(c).name, "config": c.to_dict()} for name, c in configs.items()}
    policy = get_policy(transformer)
    return {
        "family": family_of(transformer).name,
        **({} if policy is None else {"policy": policy.to_dict()}),
        "layers": layers,
    }


def model_entry(transformer: nn.Module) -> dict[str, Any]:
    """What identifies a model: its class, and the name and sizes of every self-attention layer, sparse or dense."""
    family = family_of(transformer)
    sizes = {name: family.dimensions(layer) for name, layer in family.self_attention_layers(transformer).items()}
    layers = {name: dict(zip(("width", "heads", "head_dim"), size, strict=True)) for name, size in sizes.items()}
    return {"class": family.transformer, "self_attention": layers}


def check_model(source: str, transformer: nn.Module, saved: Any) -> None:
    """Raise a ValueError unless a transformer is the model that a `model_entry` identifies."""
    current = model_entry(transformer)
    if saved == current:
        return
    try:
        was, names = _summary(saved), list(saved["self_attention"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the model entry of {source} is malformed: {error!r}") from None
    odd = sorted(set(names) ^ set(current["self_attention"]))
    where = f"; only one of them has {enumerated(odd)}" if was == _summary(current) else ""
    raise ValueError(f"{source} was saved from a {was}, but the model is a {_summary(current)}{where}")


def _summary(entry: dict[str, Any]) -> str:
    layers = entry["self_attention"]
    names, sizes = list(layers), dict.fromkeys((s["width"], s["heads"], s["head_dim"]) for s in layers.values())
    shapes = " and ".join(f"width {width}, {heads} heads of {head_dim}" for width, heads, head_dim in sizes)
    return f"{entry['class']} with {len(names)} self-attention layers ({names[0]} to {names[-1]}) of {shapes}"


def parse_component(component: str, entry: Any) -> tuple[str, dict[str, Config], Policy | None]:
    """(family name, configuration by layer, policy) of one component of the manifest."""
    try:
        layers = {name: config_from_dict(layer["method"], layer["config"]) for name, layer in entry["layers"].items()}
        policy = None if entry.get("policy") is None else Policy.from_dict(entry["policy"])
        return entry["family"], layers, policy
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"component {component!r} of the saved configurations is malformed: {error!r}") from None


def check_component(
    component: str, transformer: nn.Module, family: str, configs: dict[str, Config], policy: Policy | None
) -> None:
    """Raise a ValueError unless a transformer can take these configurations and policy, or already has them."""
    known = family_of(transformer)
    if family != known.name:
        raise ValueError(f"{component} was saved from family {family!r}, but the model's is {known.name!r}")
    layers = known.self_attention_layers(transformer)
    unknown = [name for name in configs if name not in layers]
    if unknown:
        raise ValueError(
            f"{component} has no layers {enumerated(unknown)}; it has {len(layers)}, up to {list(layers)[-1]}"
        )
    if policy is not None:
        check_policy(transformer, policy, configs)
    current = {name: processor.config for name, processor in sparse_processors(transformer).items()}
    if not current:
        return
    for name in layers:
        if current.get(name) != configs.get(name):
            raise ValueError(
                f"{component} layer {name} is {_described(current.get(name))} in the model, "
                f"but {_described(configs.get(name))} was saved; densify the model to take the saved one"
            )


def _described(config: Config | None) -> str:
    return "dense" if config is None else str(config)
