"""TurboDiffusion: foveal behind `SparseLinearAttention` of its package `SLA`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveal.hosts.patching import Patch, check_host_function, import_host
from foveal.methods.sla.attention import sla_attention
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.symbols import ceil_div

HOW_TO_INSTALL = "pip install turbodiffusion, or put the folder turbodiffusion/ of its repository on PYTHONPATH"
# What the host calls the functions that it makes for its feature maps.
FEATURE_MAPS = {"softmax_feature_map": "softmax", "elu_feature_map": "elu", "relu": "relu"}


def patch(impl: str) -> Patch:
    """The host's module computes with `impl`, from its own parameters; existing instances too."""
    package = import_host("SLA", "TurboDiffusion", HOW_TO_INSTALL)
    host_class = getattr(package, "SparseLinearAttention", None)
    if host_class is None:
        raise ImportError(f"the package SLA at {package.__path__[0]} is not TurboDiffusion's: {HOW_TO_INSTALL}")

    def forward(self, q, k, v, return_sparsity=False):
        """SLA of [B, L, H, D] tensors by foveal; see `foveal.hosts.turbodiffusion.attention_of`."""
        output, kept = attention_of(self, q, k, v, impl, topk=self.topk)
        return (output, kept) if return_sparsity else output

    check_host_function("turbodiffusion", "TurboDiffusion", host_class, "forward", forward)
    return Patch([(host_class, "forward", forward)])


def attention_of(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, impl: str, *, topk: float
) -> tuple[Tensor, float]:
    """What a host's module computes, and the share of key blocks that it keeps.

    Args:
        module: the host's, with `BLKQ`, `BLKK`, `dtype`, `proj_l`, and its feature maps.
        query, key, value: [B, L, H, D]. (The host's docstring says [B, H, L, D], but its code swaps L and H.)
        topk: the ratio of key blocks kept.

    Returns:
        [B, L, H, D] in the dtype of `query`. The kept share is at least one block; the host's is 0, and its output
        NaN, where topk times the number of blocks is below 1.
    """
    if not isinstance(module.proj_l, nn.Linear):
        raise TypeError(f"proj_l must be a Linear layer with foveal's patch, got {type(module.proj_l).__name__}")
    blocks = ceil_div(key.shape[1], module.BLKK)
    kept = max(1, min(blocks, int(topk * blocks)))
    config = SLAConfig(
        keep_ratio=kept / blocks,
        drop_ratio=0.0,
        block_q=module.BLKQ,
        block_k=module.BLKK,
        feature_map=_feature_map(module.feature_map_q),
        linear_scope="all",
    )
    tensors = (x.to(module.dtype).transpose(1, 2) for x in (query, key, value))
    weights = {"proj_weight": module.proj_l.weight, "proj_bias": module.proj_l.bias}
    output = sla_attention(*tensors, config=config, impl=impl, **weights)
    return output.to(query.dtype).transpose(1, 2), kept / blocks


def _feature_map(function: Callable) -> str:
    """Our name of the host's feature map, which it makes from a name and does not keep."""
    if isinstance(function, nn.ReLU):
        return "relu"
    name = getattr(function, "__name__", type(function).__name__)
    return FEATURE_MAPS[name] if name in FEATURE_MAPS else _found_by_values(function, name)


@functools.lru_cache(maxsize=64)
def _found_by_values(function: Callable, name: str) -> str:
    """The same of a function without a name, as SGLang makes them: by what it returns."""
    x = torch.tensor([[-1.0, 0.5, 2.0]])
    for ours in FEATURE_MAPS.values():
        if torch.allclose(function(x), apply_feature_map(x, ours)):
            return ours
    raise ValueError(f"feature_map_q must be the host's softmax, elu, or relu with foveal's patch, got {name}")
