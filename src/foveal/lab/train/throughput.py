"""The speed of a run: tokens per second, and model FLOPs utilization where the device's peak is known."""

from __future__ import annotations

import torch
from torch import nn

from foveal.layout import VideoGrid
from foveal.methods.cost import attention_cost
from foveal.models.families.table import family_of
from foveal.models.processor import sparse_processors

# Dense bfloat16 tensor-core FLOP/s from the vendors' data sheets, without sparsity. The first matching name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def sample_flops(model: nn.Module, grid: VideoGrid, *, dense: bool = False) -> float:
    """FLOPs of one sample's forward and backward, as model FLOPs utilization counts them, without recomputation.

    They are 6 per block weight and token of the video, plus 3 times the forward of each attention as configured now,
    from `attention_cost`. Cross-attention, the tokens of text and sound, and everything that happens once per sample
    are not counted.

    Args:
        model: the transformer.
        grid: the sample's grid in tokens.
        dense: count dense attention, whatever the model has.
    """
    family = family_of(model)
    processors = {} if dense else sparse_processors(model)
    flops = 0.0
    for name, attention in family.self_attention_layers(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        # `attention_cost` counts the sparse parameters.
        elsewhere = (".processor.", *family.training.not_per_token)
        weights = sum(
            p.numel() for n, p in block.named_parameters() if p.dim() == 2 and not any(part in n for part in elsewhere)
        )
        _, heads, head_dim = family.dimensions(attention)
        config = processors[name].config if name in processors else None
        cost = attention_cost(config, grid=grid, heads=heads, head_dim=head_dim)
        flops += 6 * weights * grid.num_tokens + 3 * cost.flops
    return flops
