"""Which layers of a model get which configuration: the `layers` argument of `sparsify` and similar functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from foveal.methods.base import Config, method_of

Layers = Iterable[int | str] | Mapping[int | str | range, Config | None] | Callable[[int, str], Config | None] | None


def choose_configs(layers: dict[str, nn.Module], config: Config | None, chosen: Layers) -> dict[str, Config]:
    """Turn the arguments of `sparsify` into configurations by layer name, in order of depth.

    Raises:
        TypeError, ValueError: as `sparsify` does.
    """
    if callable(chosen):
        if config is not None:
            raise TypeError(f"config must be None when layers is a function, which gives each layer's, got {config}")
        configs = {name: chosen(index, name) for index, name in enumerate(layers)}
    elif isinstance(chosen, Mapping):
        configs = dict.fromkeys(layers, config)
        given = [(name, value) for key, value in chosen.items() for name in _layers_of_key(layers, key)]
        twice = [name for name, times in Counter(name for name, _ in given).items() if times > 1]
        if twice:
            raise ValueError(f"layers has {twice[0]} twice; expected each layer under one key")
        configs.update(given)
    else:
        method_of(config)
        configs = dict.fromkeys(layers if chosen is None else choose_layers(layers, chosen), config)
    configs = {name: value for name, value in configs.items() if value is not None}
    if not configs:
        raise ValueError("layers leaves every layer dense; expected a configuration for at least one layer")
    for value in configs.values():
        method_of(value)
    return configs


def choose_layers(layers: dict[str, nn.Module], chosen: Iterable[int | str], argument: str = "layers") -> list[str]:
    """The names of the chosen layers, in order of depth.

    Args:
        argument: the name of `chosen` in errors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    names = list(layers)
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"{argument} must be an iterable of indices or names, got {chosen!r}")
    picked = set()
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise TypeError(f"{argument} must hold indices or names, got {layer!r} ({type(layer).__name__})")
        if isinstance(layer, int):
            if not 0 <= layer < len(names):
                raise ValueError(f"{argument} must be in 0..{len(names) - 1}, got {layer}")
            layer = names[layer]
        if layer not in layers:
            raise ValueError(f"unknown layer {layer!r}; expected some of {names[0]!r} to {names[-1]!r}")
        picked.add(layer)
    if not picked:
        raise ValueError(f"{argument} is empty; None takes all layers")
    return [name for name in names if name in picked]


def _layers_of_key(layers: dict[str, nn.Module], key: Any) -> list[str]:
    return choose_layers(layers, key if isinstance(key, range) else [key])
