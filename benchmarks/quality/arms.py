"""The arms of `run.py`: how each makes the dense model sparse, and what it trains at which rate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from attention import CenteredAttention, MergedAttention, MixedAttention, replace_attention, sparse_only
from pixel_wan import HELD_OUT_SIGMAS
from task import Clips
from torch import Tensor, nn

from foveal import SLAConfig, VSAConfig, sparsify
from foveal.lab.train.objective import add_noise
from foveal.methods.base import Config
from foveal.models.processor import sparse_processors

SLOW, FAST = 5e-4, 6e-3  # the model's own rate, and the demo's for new parameters
WARM_SEED = 3


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Args:
        config: None for dense attention.
        new_rate: peak learning rate of the parameters that conversion adds.
        warm: start SLA's projections at their least-squares fit.
        frozen: leave the new parameters where they start.
        build: (attention layer) to a module that takes the place of the library's, with `config` for its selection.
    """

    config: Config | None
    new_rate: float = SLOW
    warm: bool = False
    frozen: bool = False
    build: Callable[[nn.Module], nn.Module] | None = None


def merged(layer: nn.Module, **options: bool) -> nn.Module:
    return MergedAttention(layer.heads, **options)


def mixed(layer: nn.Module) -> nn.Module:
    return MixedAttention(layer.heads)


def mixed_with_relu(layer: nn.Module) -> nn.Module:
    return MixedAttention(layer.heads, feature_map="relu", head_dim=layer.inner_dim // layer.heads)


def centered(layer: nn.Module) -> nn.Module:
    return CenteredAttention(layer.inner_dim // layer.heads)


def arms(block: int) -> dict[str, Arm]:
    """By name, the most telling ones first."""
    sla = SLAConfig(keep_ratio=0.05, drop_ratio=0.1, block_q=block, block_k=block)
    sla_few = sla.replace(keep_ratio=0.016)
    sparse, few = sparse_only(0.05, block), sparse_only(0.016, block)
    return {
        "dense": Arm(None),
        "sparse5": Arm(sparse),
        "sla5-lr5e-4": Arm(sla),
        "sla5-warm": Arm(sla, warm=True),
        "merge5": Arm(sparse, build=merged),
        "sla5-lr6e-3": Arm(sla, FAST),
        "sla2-5": Arm(sparse, build=mixed),
        "sla5-warm-frozen": Arm(sla, warm=True, frozen=True),
        "merge5-bias": Arm(sparse, build=partial(merged, bias=True)),
        "sla5-lr1e-4": Arm(sla, 1e-4),
        "sla5-lr2e-3": Arm(sla, 2e-3),
        "sparse1.6": Arm(few),
        "sla1.6": Arm(sla_few),
        "sla1.6-warm": Arm(sla_few, warm=True),
        "merge1.6": Arm(few, build=merged),
        "sla5-all": Arm(sla.replace(linear_scope="all")),
        "sla5-noncritical": Arm(sla.replace(linear_scope="noncritical")),
        "sla5-elu": Arm(sla.replace(feature_map="elu")),
        "sla5-noproj": Arm(sla.replace(projection=False)),
        "vsa12.5-lr5e-4": Arm(VSAConfig(keep_ratio=0.125)),
        "vsa12.5-lr6e-3": Arm(VSAConfig(keep_ratio=0.125), FAST),
        "vsa5": Arm(VSAConfig(keep_ratio=0.05)),
        "sparse5-tile": Arm(sparse.replace(token_order="tile")),
        "sla5-tile": Arm(sla.replace(token_order="tile")),
        "sla5-relu": Arm(sla.replace(feature_map="relu")),
        "sla5-relu-tile": Arm(sla.replace(feature_map="relu", token_order="tile")),
        "merge5-tile": Arm(sparse.replace(token_order="tile"), build=merged),
        "sla2-5-relu-tile": Arm(sparse.replace(token_order="tile"), build=mixed_with_relu),
        "merge5-variance": Arm(sparse, build=partial(merged, variance=True, bias=True)),
        "sla2-5-lr6e-3": Arm(sparse, FAST, build=mixed),
        "sla5-centered": Arm(sla, build=centered),
        "sla5-centered-lr6e-3": Arm(sla, FAST, build=centered),
    }


def converted(model: nn.Module, arm: Arm) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the dense model as an arm starts, but for a warm start, and the parameters that are new in it."""
    model = copy.deepcopy(model)
    if arm.build is not None:
        replace_attention(model, arm.config, arm.build)
    elif arm.config is not None:
        sparsify(model, arm.config)
    new = [p for processor in sparse_processors(model).values() for p in processor.parameters()]
    for parameter in new:
        parameter.requires_grad_(not arm.frozen)
    return model, new


def warm_batches(clips: Clips) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(noisy, sigmas, first frame) of a few training windows, one at each held-out noise level."""
    found, batches = [], clips.batches(WARM_SEED)
    for sigma in HELD_OUT_SIGMAS:
        video, noise, sigmas = (x[:1] for x in next(batches))
        sigmas = torch.full_like(sigmas, sigma)
        found.append((add_noise(video, noise, sigmas)[0], sigmas, video[:, :, :1]))
    return found
