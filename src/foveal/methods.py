"""The only table of method names: what a method is called, configured with, built from and fed.

A new method is a folder with its reference and its module, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from foveal.sla.attention import SparseLinearAttention
from foveal.types import SLAConfig, VSAConfig, check_choice
from foveal.video_grid import VideoGrid
from foveal.vsa.attention import VideoSparseAttention

Config = SLAConfig | VSAConfig


@dataclass(frozen=True)
class Method:
    """How to put one method into a model.

    Args:
        name: as in saved files and tables.
        config_type: its configuration.
        module_type: the module that owns its parameters; has `select` and `token_places`.
        build: (config, hidden_dim, num_heads, head_dim, impl) to that module.
        attend: (module, query, key, value, hidden_states, grid) to the output, [B, H, L, D] like query.
    """

    name: str
    config_type: type
    module_type: type
    build: Callable[[Config, int, int, int, str], nn.Module]
    attend: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, VideoGrid], Tensor]


METHODS = {
    "sla": Method(
        "sla",
        SLAConfig,
        SparseLinearAttention,
        lambda config, hidden_dim, num_heads, head_dim, impl: SparseLinearAttention(head_dim, config, impl=impl),
        lambda module, query, key, value, hidden_states, grid: module(query, key, value, grid=grid),
    ),
    "vsa": Method(
        "vsa",
        VSAConfig,
        VideoSparseAttention,
        lambda config, hidden_dim, num_heads, head_dim, impl: VideoSparseAttention(
            hidden_dim, num_heads, head_dim, config, impl=impl
        ),
        lambda module, query, key, value, hidden_states, grid: module(query, key, value, hidden_states, grid=grid),
    ),
}


def method_of(config: Config) -> Method:
    """The method that a configuration belongs to.

    Raises:
        TypeError: for anything but a method's configuration.
    """
    for method in METHODS.values():
        if isinstance(config, method.config_type):
            return method
    valid = ", ".join(method.config_type.__name__ for method in METHODS.values())
    raise TypeError(f"config must be one of {valid}, got {type(config).__name__}")


def config_from_dict(method: str, fields: dict) -> Config:
    """The configuration that `config.to_dict()` came from, by the method's name."""
    check_choice("method", method, tuple(METHODS))
    return METHODS[method].config_type.from_dict(fields)
