"""Turn observations into a recommendation: ratios, block sizes, token order, and the layers to leave dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveal.lab.inspect.probe import InspectSettings, LayerObservation
from foveal.methods.cost import attention_cost
from foveal.methods.sla2.config import SLA2Config

# Larger query blocks run faster, so they win unless their error is larger by more than this factor.
WORTH = 1.10
# Tile order has to reorder the tokens, so it must be better by this factor.
WORTH_REORDERING = 0.98


@dataclass(frozen=True)
class Advice:
    """What to try first.

    Attributes:
        config: for the layers that are converted. A router in each head learns to choose the blocks, and chooses by
            their means at first. Of all ways to choose blocks this lost least in docs/evidence.md.
        layers: (component, layer) of all layers that were looked at.
        dense_layers: the ones among them whose output changes by more than twice the tolerance.
        tolerance: the error that was allowed.
        error: mean output error of the sparse branch in the converted layers (in all layers if none is left to
            convert), before any fine-tuning.
        recall: mean attention mass in the kept blocks of these layers.
        flops_ratio: FLOPs of their attention over those of dense attention, with all parts counted. It is not a time.
        reached: whether the error is within the tolerance.
    """

    config: SLA2Config
    layers: tuple[tuple[str, str], ...]
    dense_layers: tuple[tuple[str, str], ...]
    tolerance: float
    error: float
    recall: float
    flops_ratio: float
    reached: bool

    def code(self) -> str:
        """The Python that converts a pipeline `pipe` as recommended; a comment if no layer is to be converted."""
        if set(self.dense_layers) == set(self.layers):
            return "# Leave attention dense, or allow a larger tolerance."
        fields = ("keep_ratio", "block_q", "block_k", "linear_scope", "router", "token_order")
        config = ", ".join(f"{name}={getattr(self.config, name)!r}" for name in fields)
        dense: dict[str, list[str]] = {component: [] for component, _ in self.layers}
        for component, layer in self.dense_layers:
            dense[component].append(layer)
        lists = list(dense.values())
        targets = {"pipe": lists[0]} if all(names == lists[0] for names in lists) else None
        targets = targets or {f"pipe.{component}": names for component, names in dense.items()}
        lines = []
        for target, names in targets.items():
            table = "{" + ", ".join(f'"{name}": None' for name in names) + "}"
            lines.append(
                f"foveal.sparsify({target}, foveal.SLA2Config({config}){f', layers={table}' if names else ''})"
            )
        return "\n".join(lines)

    def verdict(self) -> str:
        """In words: whether the tolerance was kept, what the conversion costs and keeps, and what stays dense."""
        missed = f"No ratio that was tried keeps the median layer's error within the tolerance of {self.tolerance:g}. "
        total, dense = len(self.layers), [layer for _, layer in self.dense_layers]
        figures = (
            f"output error {100 * self.error:.1f} % before fine-tuning, {100 * self.recall:.1f} % of the attention "
            f"mass kept, {100 * self.flops_ratio:.1f} % of dense attention's arithmetic"
        )
        if len(dense) == total:
            left = f"All {total} layers change by more than twice the tolerance, so none is converted: {figures}."
        elif dense:
            left = f"In the converted layers: {figures}. {len(dense)} of {total} layers stay dense: {', '.join(dense)}."
        else:
            left = f"In all {total} layers: {figures}."
        return ("" if self.reached else missed) + left


def advise(
    observations: Sequence[LayerObservation],
    settings: InspectSettings,
    *,
    heads: int,
    head_dim: int,
    tolerance: float = 0.1,
) -> Advice:
    """Recommend the fewest blocks whose output error is within `tolerance` in the median layer, in the better order.

    Args:
        observations: what `observe` returned.
        settings: the settings of that call.
        heads, head_dim: the layers' sizes, for the cost.
        tolerance: the relative output error of the sparse branch before fine-tuning. Fine-tuning repairs much of it,
            and SLA's paper starts from far larger errors.

    Raises:
        ValueError: there are no observations.
    """
    if not observations:
        raise ValueError("observations must not be empty: nothing was observed")
    errors = {
        variant: torch.stack([o.quality[variant].error["pooled"].mean(0) for o in observations])
        for variant in observations[0].quality
    }
    medians = {variant: error.median(0).values for variant, error in errors.items()}

    def needed(variant: tuple[str, int, int]) -> int:
        within = (medians[variant] <= tolerance).nonzero()
        return int(within[0]) if len(within) else len(settings.keep_ratios) - 1

    def rank(variant: tuple[str, int, int]) -> tuple[int, float]:
        order, block_q, _ = variant
        index = needed(variant)
        handicap = (1 / WORTH if block_q > 64 else 1.0) / (WORTH_REORDERING if order == "tile" else 1.0)
        return index, float(medians[variant][index]) * handicap

    best = min(medians, key=rank)
    index = needed(best)
    ratio = settings.keep_ratios[index]
    by_layer: dict[tuple[str, str], list[float]] = {}
    for observation, error in zip(observations, errors[best][:, index].tolist(), strict=True):
        by_layer.setdefault((observation.component, observation.layer), []).append(error)
    dense = tuple(layer for layer, values in by_layer.items() if sum(values) / len(values) > 2 * tolerance)
    converted = [o for o in observations if (o.component, o.layer) not in dense]
    order, block_q, block_k = best
    config = SLA2Config(
        keep_ratio=ratio,
        block_q=block_q,
        block_k=block_k,
        linear_scope="none",
        router="per_head",
        token_order=order,
    )
    cost = attention_cost(config, grid=observations[0].grid, heads=heads, head_dim=head_dim)
    counted = [o.quality[best] for o in converted or observations]
    return Advice(
        config=config,
        layers=tuple(by_layer),
        dense_layers=dense,
        tolerance=tolerance,
        error=float(torch.stack([quality.error["pooled"][:, index] for quality in counted]).mean()),
        recall=float(torch.stack([quality.recall["pooled"][:, index] for quality in counted]).mean()),
        flops_ratio=cost.flops_ratio,
        reached=bool(converted) and float(medians[best][index]) <= tolerance,
    )


def to_json(observations: Sequence[LayerObservation]) -> list[dict[str, Any]]:
    """The observations as JSON-ready dictionaries; lists run over heads, inner ones over `keep_ratios`."""
    return [
        {
            "component": o.component,
            "layer": o.layer,
            "call": o.call,
            "step": o.step,
            "timestep": o.timestep,
            "grid": list(o.grid.shape),
            "int8_error": _rounded(o.int8_error),
            "distribution": {name: _rounded(value) for name, value in vars(o.distribution).items()},
            "quality": [
                {
                    "order": order,
                    "block_q": block_q,
                    "block_k": block_k,
                    "recall": {name: _rounded(value) for name, value in quality.recall.items()},
                    "error": {name: _rounded(value) for name, value in quality.error.items()},
                    "overlap": _rounded(quality.overlap),
                }
                for (order, block_q, block_k), quality in o.quality.items()
            ],
        }
        for o in observations
    ]


def _rounded(value: torch.Tensor) -> list:
    return [
        [float(f"{x:.6g}") for x in row] if isinstance(row, list) else float(f"{row:.6g}") for row in value.tolist()
    ]
