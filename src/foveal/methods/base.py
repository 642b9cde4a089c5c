"""The only table of method names: what a method is called, configured with, built from and fed.

A new method is a folder with its reference and its module, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from foveal.checks import check_choice
from foveal.layout import VideoGrid
from foveal.methods.sla.attention import SparseLinearAttention
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.attention import VideoSparseAttention
from foveal.methods.vsa.config import VSAConfig

Config = SLAConfig | VSAConfig


@dataclass(frozen=True)
class Method:
    """How to put one method into a model.

    Args:
        name: as in saved files and tables.
        config_type: its configuration.
        module_type: the module that owns its parameters; has `select` and `token_places`.
        build: (config, hidden_dim, num_heads, head_dim, impl) to that module.
        gates: (module, hidden_states [B, L, C]) to what the module makes of these token by token, a tuple of
            [B, H, L, D] or None; None for a method that makes nothing.
        run: (module, query, key, value, hidden_states, grid, kv_lengths=None, config=None, gates=None) to the
            output, [B, H, L, D] like query. Keys past the grid's tokens are text, say: kept for every query.
            kv_lengths, int [B], counts each sample's valid keys. A config stands in for the module's own, with other
            ratios. Gates stand in for the hidden states, which are then None; some of the heads may then go alone.
    """

    name: str
    config_type: type
    module_type: type
    build: Callable[[Config, int, int, int, str], nn.Module]
    gates: Callable[[nn.Module, Tensor], tuple[Tensor | None, ...] | None]
    run: Callable[..., Tensor]


def _run_sla(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    grid: VideoGrid,
    kv_lengths: Tensor | None = None,
    config: Config | None = None,
    gates: tuple[Tensor | None, ...] | None = None,
) -> Tensor:
    text = (query.shape[2], key.shape[2]) if key.shape[2] > query.shape[2] else None
    return module(query, key, value, grid=grid, protected_keys=text, kv_lengths=kv_lengths, config=config)


def _run_vsa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    grid: VideoGrid,
    kv_lengths: Tensor | None = None,
    config: Config | None = None,
    gates: tuple[Tensor | None, ...] | None = None,
) -> Tensor:
    return module(query, key, value, hidden_states, gates, grid=grid, kv_lengths=kv_lengths, config=config)


METHODS = {
    "sla": Method(
        "sla",
        SLAConfig,
        SparseLinearAttention,
        lambda config, hidden_dim, num_heads, head_dim, impl: SparseLinearAttention(head_dim, config, impl=impl),
        lambda module, hidden_states: None,
        _run_sla,
    ),
    "vsa": Method(
        "vsa",
        VSAConfig,
        VideoSparseAttention,
        lambda config, hidden_dim, num_heads, head_dim, impl: VideoSparseAttention(
            hidden_dim, num_heads, head_dim, config, impl=impl
        ),
        lambda module, hidden_states: module.gates(hidden_states),
        _run_vsa,
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
