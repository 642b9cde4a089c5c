"""What a method of sparse attention answers, and the registry of methods.

A method is a value of `Method`, made of functions of its own folder, and `register` makes it known:

    from foveal.methods.base import Method, register
    register(Method("mine", MyConfig, MyModule, build=..., cost=..., cells=..., key_blocks=...))

Models, saved files, tables and the lab then ask it, whatever its name and wherever its folder is. This file imports no
method; `foveal/methods/__init__.py` imports those of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.checks import check_choice
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.config import MethodConfig
from foveal.rules import mean_ratio

if TYPE_CHECKING:
    from foveal.methods.bench import BenchCase
    from foveal.methods.cost import AttentionShape, CostPart

Config = MethodConfig


@dataclass(frozen=True)
class SummaryCells:
    """What a configuration says in the table of `summary`; empty where the method has no such thing.

    Args:
        keep: how much is attended to exactly, "0.05" or "top 32".
        drop: how much is skipped altogether.
        linear: what the linear branch sums over.
        blocks: the block sizes in tokens, "64x64" or "4x4x4", with the precision of their products, "64x64 int8".
    """

    keep: str = ""
    drop: str = ""
    linear: str = ""
    blocks: str = ""


def blocks_cell(blocks: str, precision: str) -> str:
    """The cell `blocks`, where products may be in another precision than that of the inputs."""
    return blocks if precision == "input" else f"{blocks} {precision}"


def _keep_ratio(config: Config, ratio: float) -> Config:
    return config.replace(keep_ratio=min(1.0, ratio))


@dataclass(frozen=True)
class Schedule:
    """What may change in a configuration from step to step. The same parameters fit before and after.

    Args:
        ratios: the fields that a `Policy` may set, some of "keep_ratio" and "drop_ratio".
        kept: configuration to the name of the field that says how much is kept, which annealing lowers to its final
            value; None for a method that cannot be annealed.
        keep: (configuration, amount) to the configuration that keeps so much, in that field's unit.
    """

    ratios: tuple[str, ...] = ("keep_ratio",)
    kept: Callable[[Config], str] | None = lambda config: "keep_ratio"
    keep: Callable[[Config, float], Config] = _keep_ratio

    def amount(self, config: Config) -> float:
        """How much a configuration keeps, in the unit of its field `kept`; on average over heads where they differ."""
        return mean_ratio(getattr(config, self.kept(config)))


class LayerCall(NamedTuple):
    """What a model's layer hands to its method.

    query, key, value: [B, H, L, D] and [B, H, L + text, D] twice. Every query reads the keys past the grid's tokens,
        such as text.
    hidden_states: [B, L, C]; None where there are gates.
    tokens: the grid, or a `TokenLayout` (MiniMax-H3); then all tensors are the whole sequence.
    kv_lengths: int [B], each sample's valid keys; None for all.
    config: stands in for the module's own, with other ratios; None for that.
    gates: stand in for the hidden states; the tensors may then hold only some of the heads.
    heads: which of the layer's heads the tensors hold; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor | None
    tokens: VideoGrid | TokenLayout
    kv_lengths: Tensor | None = None
    config: Config | None = None
    gates: tuple[Tensor | None, ...] | None = None
    heads: range | None = None

    def named(self) -> dict[str, Any]:
        """What every module takes by name."""
        where = "layout" if isinstance(self.tokens, TokenLayout) else "grid"
        return {where: self.tokens, "kv_lengths": self.kv_lengths, "config": self.config}

    def text(self) -> tuple[int, int] | None:
        """The keys past the grid's tokens, [start, stop); None where there are none, or a layout says what they are."""
        start, stop = self.query.shape[2], self.key.shape[2]
        return None if isinstance(self.tokens, TokenLayout) or stop == start else (start, stop)


@dataclass(frozen=True, eq=False)  # compared by identity
class Method:
    """What one method answers.

    Args:
        name: the method's name in saved files, in tables, and on the command line.
        config_type: its configuration: a frozen dataclass that derives from `MethodConfig`, with a default for every
            field.
        module_type: the `nn.Module` that owns its parameters, with its configuration as the attribute `config`. Beside
            `forward` it has `select`, which takes the query, the key and the keyword arguments of `forward` and returns
            the `BlockSelection` that `forward` makes; and `token_places`, which takes a grid and returns, as int64 [L],
            where each token in raster order stands in the order that blocks are cut from. It may have `ran`, the
            `foveal.kernels.api.Ran` of its latest call, which `summary` and `report` then show.
        build: (config, hidden_dim, num_heads, head_dim, impl) to that module.
        cost: (config, `AttentionShape`) to the forward pass's `CostPart`s, in the order in which they run.
        cells: (config, grid or None) to its `SummaryCells`.
        key_blocks: (config, grid) to the number of key blocks of a video and the size of one in tokens, as text.
        kept_blocks: (config, grid, packed) to how many of a video's key blocks each query block reads exactly, and how
            many there are; packed says whether protected segments stand around the video. The default returns None,
            for a method that does not say.
        precision: configuration to the precision that it asks of kernels (see `block_sparse_attention`).
        run: (module, `LayerCall`) to the output, [B, H, L, D] like query. The default calls the module with query,
            key, and value, and with grid, kv_lengths, and config by name.
        gates: (module, hidden_states [B, L, C]) to what the module makes of these token by token, a tuple of
            [B, H, L, D] or None; None for a method that makes nothing.
        idle: (module, hidden_states [B, L, C]) to tensors in which each parameter has a part, made by calling the
            module's parts in the order of `forward`. A layer that a policy keeps dense gives them zero gradients, for
            DDP and FSDP. The default returns the parameters.
        plan: (config, grid, device) asks a grid for the tile orders that layers of this configuration will ask for. It
            runs at the start of a model's forward, so that blocks compiled on their own take any grid. The default asks
            for nothing.
        needs_grid: whether it costs what it costs because of the video's shape, not only because of its length.
        schedule: what policies and annealing may change.
        presets: configurations to try, by the name that `foveal ui` shows.
        training_free: the configuration that `foveal calibrate` starts from: of the best quality without training. None
            for the default configuration.
        bench_cases: the calls that `foveal bench` checks and times.
    """

    name: str
    config_type: type[MethodConfig]
    module_type: type[nn.Module]
    build: Callable[[Config, int, int, int, str], nn.Module]
    cost: Callable[[Config, AttentionShape], tuple[CostPart, ...]]
    cells: Callable[[Config, VideoGrid | None], SummaryCells]
    key_blocks: Callable[[Config, VideoGrid], tuple[int, str]]
    kept_blocks: Callable[[Config, VideoGrid, bool], tuple[int, int] | None] = lambda config, grid, packed: None
    precision: Callable[[Config], str] = lambda config: "input"
    run: Callable[[nn.Module, LayerCall], Tensor] = lambda module, call: module(*call[:3], **call.named())
    gates: Callable[[nn.Module, Tensor], tuple[Tensor | None, ...] | None] = lambda module, hidden_states: None
    idle: Callable[[nn.Module, Tensor], Iterable[Tensor | None]] = lambda module, hidden_states: module.parameters()
    plan: Callable[[Config, VideoGrid, torch.device], Any] = lambda config, grid, device: None
    needs_grid: bool = False
    schedule: Schedule = Schedule()
    presets: dict[str, Config] = field(default_factory=dict)
    training_free: Config | None = None
    bench_cases: tuple[BenchCase, ...] = ()

    def configure(self, base: Config | None = None, **options: Any) -> Config:
        """A configuration, the default one for None, with these fields changed, as a command line asks for them.

        Raises:
            TypeError, ValueError: for a field that the method does not have, or a value out of its range.
        """
        known = {field.name for field in dataclasses.fields(self.config_type)}
        for name in options:
            if name not in known:
                raise ValueError(f"method {self.name} has no {name}")
        return self.config_type(**options) if base is None else base.replace(**options)

    def follow(self, config: Config, **ratios: float | None) -> Config:
        """A configuration with the ratios that a policy asks for, as far as the method has them; None leaves one."""
        changes = {name: value for name, value in ratios.items() if value is not None and name in self.schedule.ratios}
        return config.replace(**changes) if changes else config


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Makes a method known, by its name and by its type of configuration.

    Raises:
        TypeError: for anything but a `Method`, or a configuration that does not derive from `MethodConfig`.
        ValueError: for a name or a type of configuration that another method has.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, got {type(method).__name__}")
    if not (isinstance(method.config_type, type) and issubclass(method.config_type, MethodConfig)):
        raise TypeError(f"method.config_type must derive from MethodConfig, got {method.config_type!r}")
    for other in METHODS.values():
        if other.name == method.name:
            raise ValueError(f"a method named {method.name!r} is registered already")
        if issubclass(method.config_type, other.config_type) or issubclass(other.config_type, method.config_type):
            raise ValueError(
                f"method {method.name!r} must have a type of configuration of its own: "
                f"{method.config_type.__name__} and {other.config_type.__name__}, of {other.name!r}, are of one kind"
            )
    METHODS[method.name] = method


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
    """The configuration that `config.to_dict()` came from in a saved file of any version, by the method's name."""
    check_choice("method", method, tuple(METHODS))
    return METHODS[method].config_type.from_saved(fields)
