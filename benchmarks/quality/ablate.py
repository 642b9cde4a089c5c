"""What the dense model's loss owes to its attention: held-out losses with other attention in all layers, or in one.

Nothing is trained. `diagnose` asks how far an approximation is from a layer's dense output; this asks what the model
makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from arms import merged
from attention import replace_attention, sparse_only
from task import HeldOut, Scale
from torch import Tensor, nn

from foveal import SLAConfig, VSAConfig, sparsify
from foveal.methods.base import Config


class MeanValue(nn.Module):
    """Uniform attention: every query gets the mean value of all tokens, times a factor (0 leaves attention out)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused: object) -> Tensor:
        return (self.factor * value.mean(2, keepdim=True)).expand_as(query).to(query.dtype)


@dataclass(frozen=True)
class Variant:
    """Attention to put in: a configuration, and a module instead of the library's if `build` is given."""

    config: Config
    build: Callable[[nn.Module], nn.Module] | None = None


def variants(block: int) -> dict[str, Variant]:
    sparse, few = sparse_only(0.05, block), sparse_only(0.016, block)
    return {
        "no attention": Variant(sparse, lambda layer: MeanValue(0.0)),
        "uniform attention": Variant(sparse, lambda layer: MeanValue(1.0)),
        "sparse 5 %": Variant(sparse),
        "sparse 5 %, tile order": Variant(sparse.replace(token_order="tile")),
        "sparse 5 %, tail of mean keys": Variant(sparse, merged),
        "sparse 5 %, tail of mean keys and variances": Variant(sparse, partial(merged, variance=True)),
        "sparse 1.6 %": Variant(few),
        "sparse 1.6 %, tail of mean keys": Variant(few, merged),
        "VSA 5 %": Variant(VSAConfig(keep_ratio=0.05)),
        "VSA 12.5 %": Variant(VSAConfig(keep_ratio=0.125)),
        "linear attention": Variant(SLAConfig(keep_ratio=0.0, drop_ratio=0.0, linear_scope="all", projection=False)),
    }


def with_attention(model: nn.Module, variant: Variant, layer: int | None) -> nn.Module:
    """A copy of a dense model with this attention in one layer, or in all."""
    model, layers = copy.deepcopy(model), None if layer is None else [layer]
    if variant.build is None:
        return sparsify(model, variant.config, layers=layers)
    replace_attention(model, variant.config, variant.build, layers)
    return model


def ablate(model: nn.Module, held_out: HeldOut, scale: Scale, *, one_layer: bool = True) -> dict:
    """Mean held-out losses by noise level: dense, and for each variant in all layers and in each layer by itself."""

    def losses(tried: nn.Module) -> list[float]:
        return held_out.losses(tried).mean(0).tolist()

    layers = range(scale.demo.num_layers) if one_layer else ()
    found = {"dense": losses(model)}
    for name, variant in variants(scale.block).items():
        found[name] = {
            "all layers": losses(with_attention(model, variant, None)),
            "one layer": [losses(with_attention(model, variant, layer)) for layer in layers],
        }
        print(f"ablate: {line(name, found)}", flush=True)
    return {"windows": len(held_out.video), "losses": found}


def line(name: str, found: dict) -> str:
    """The increase of the loss over dense in %, all layers and each by itself."""
    dense = torch.tensor(found["dense"]).mean()

    def percent(losses: list[float]) -> str:
        return f"{100 * (torch.tensor(losses).mean() / dense - 1).item():+.1f}"

    each = " ".join(percent(losses) for losses in found[name]["one layer"])
    return f"{name}: all layers {percent(found[name]['all layers'])} %; one layer {each}"
