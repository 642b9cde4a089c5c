"""`summary`: what each self-attention layer of a model runs, and what that saves; `report`: what its forwards ran."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields
from typing import Any

from torch import nn

from foveal.checks import check_choice
from foveal.layout import VideoGrid
from foveal.methods.base import Config, SummaryCells, method_of
from foveal.methods.cost import AttentionCost, attention_cost
from foveal.models.families.table import components_of, family_of
from foveal.models.policy import Policy, get_policy
from foveal.models.processor import note_configs, sparse_processors, state_of
from foveal.models.record import ON_FALLBACK, Forward, LayersRan, layers_that_ran

TEXTS = ("layer", "method", *(cell.name for cell in fields(SummaryCells)))
NUMBERS = ("added", "fewer FLOPs")


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer.

    Args:
        layer: qualified name, after the component's name in a pipeline.
        config: the layer's configuration; None where it is dense.
        parameters: how many `sparsify` added.
        grid: what the costs are for; None if none was given or seen.
        heads, head_dim: the layer's number of heads and their dimension.
        held_dense: the policy keeps the layer dense, and its configuration waits.
        ran: the implementation that the layer's latest sparse call ran, such as "triton"; None before the first one,
            and where the method's module does not say.
        why: what was slower in that call than what was asked for; None if nothing was.
    """

    layer: str
    config: Config | None
    parameters: int
    grid: VideoGrid | None
    heads: int
    head_dim: int
    held_dense: bool = False
    ran: str | None = None
    why: str | None = None

    @property
    def method(self) -> str:
        """The name of the method, or "dense"."""
        return "dense" if self.config is None else method_of(self.config).name

    @property
    def cost(self) -> AttentionCost | None:
        """The layer's arithmetic in a forward where it may be sparse; None without a grid."""
        if self.grid is None:
            return None
        config = None if self.held_dense else self.config
        return attention_cost(config, grid=self.grid, heads=self.heads, head_dim=self.head_dim)

    @property
    def reduction(self) -> float | None:
        """Dense FLOPs of the attention over ours (see `attention_cost`); None without a grid."""
        return None if self.cost is None else self.cost.reduction

    def cells(self, *, ran: bool = False) -> tuple[str, ...]:
        """The texts of the table's columns, the one of `ran` only on request."""
        reduction = "" if self.reduction is None else f"{self.reduction:.1f}x"
        method = f"({self.method})" if self.held_dense else self.method
        settings = SummaryCells() if self.config is None else method_of(self.config).cells(self.config, self.grid)
        implementation = (self.ran or "",) if ran else ()
        return (self.layer, method, *astuple(settings), *implementation, f"{self.parameters:,}", reduction)


@dataclass(frozen=True)
class Summary:
    """The layers of a model; `print` it for a table, in color with rich.

    Args:
        rows: one per self-attention layer, sparse or dense, in order of depth. A method in parentheses waits: the
            policy keeps the layer dense. The column "ran" appears once a layer has run.
        policies: the policies, by component. Costs are those of a forward where they ask nothing but their
            `dense_layers`.
    """

    rows: tuple[LayerSummary, ...]
    policies: dict[str, Policy] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many parameters `sparsify` added in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def reduction(self) -> float | None:
        """Dense FLOPs of all these layers' attention over ours; None unless every layer has a grid."""
        costs = [row.cost for row in self.rows]
        if None in costs:
            return None
        return sum(cost.dense.flops for cost in costs) / sum(cost.flops for cost in costs)

    def title(self) -> str:
        """A line on the whole model, one on its policy if it has one, and one on each reason to fall back."""
        sparse = sum(row.config is not None for row in self.rows)
        parts = [f"{sparse} of {len(self.rows)} self-attention layers sparse", f"{self.parameters:,} parameters added"]
        if self.reduction is not None:
            grids = dict.fromkeys("x".join(map(str, row.grid.shape)) for row in self.rows)
            parts.append(f"{self.reduction:.1f}x fewer attention FLOPs than dense at {', '.join(grids)} tokens")
        lines = ["; ".join(parts)]
        shown = dict.fromkeys(map(str, self.policies.values()))
        if len(shown) == 1:
            lines.append(f"policy: {next(iter(shown))}")
        else:
            lines.extend(f"policy of {component}: {policy}" for component, policy in self.policies.items())
        reasons = [row.why for row in self.rows if row.why is not None]
        lines.extend(f"fell back in {_layers(reasons.count(why))}: {why}" for why in dict.fromkeys(reasons))
        return "\n".join(lines)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], int]:
        """(titles of the columns, cells of each row, how many columns at the left are text and not numbers)."""
        ran = any(row.ran is not None for row in self.rows)
        texts = (*TEXTS, "ran") if ran else TEXTS
        return (*texts, *NUMBERS), [row.cells(ran=ran) for row in self.rows], len(texts)

    def __str__(self) -> str:
        return "\n".join([self.title(), "", *_aligned(*self.table())])

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        titles, rows, texts = self.table()
        table = Table(title=self.title(), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, title in enumerate(titles):
            table.add_column(title, justify="left" if index < texts else "right", no_wrap=index == 0)
        for row, cells in zip(self.rows, rows, strict=True):
            table.add_row(*cells, style="dim" if row.config is None else None)
        return table


def _aligned(titles: tuple[str, ...], rows: list[tuple[str, ...]], texts: int) -> list[str]:
    """The lines of a table whose first `texts` columns are text, and the others numbers."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    justify = [str.ljust] * texts + [str.rjust] * (len(titles) - texts)
    lines = [
        "  ".join(place(cell, width) for place, cell, width in zip(justify, row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def summary(model: Any, grid: VideoGrid | None = None) -> Summary:
    """What each self-attention layer of a model or pipeline runs, what it added, and how much arithmetic it saves.

    After a forward, it also says which implementation ran in each layer.

    Args:
        model: what `sparsify` takes, sparse or dense.
        grid: the video's shape in tokens that the costs are for; None takes that of each transformer's latest
            forward, and leaves the column blank before the first.

    Raises:
        TypeError: an unsupported model, or a `grid` of another type.
    """
    if grid is not None and not isinstance(grid, VideoGrid):
        raise TypeError(f"grid must be a VideoGrid, got {grid!r}")
    rows, policies = [], {}
    for component, transformer in components_of(model).items():
        family = family_of(transformer)
        processors, state = sparse_processors(transformer), state_of(transformer)
        seen = None if state is None else state.grid
        policy = get_policy(transformer)
        if policy is not None:
            policies[component] = policy
        for name, attn in family.self_attention_layers(transformer).items():
            processor = processors.get(name)
            ran = None if processor is None else getattr(processor.attention, "ran", None)
            _, heads, head_dim = family.dimensions(attn)
            rows.append(
                LayerSummary(
                    layer=name if isinstance(model, nn.Module) else f"{component}.{name}",
                    config=None if processor is None else processor.config,
                    parameters=0 if processor is None else sum(p.numel() for p in processor.parameters()),
                    grid=grid or seen,
                    heads=heads,
                    head_dim=head_dim,
                    held_dense=processor is not None and processor.held_dense,
                    ran=None if ran is None else ran.impl,
                    why=None if ran is None else ran.why,
                )
            )
    return Summary(tuple(rows), policies)


@dataclass(frozen=True)
class ReportRow:
    """Layers that ran in the same way in forwards of one kind.

    Args:
        component: the pipeline's component; empty for a bare transformer.
        forwards: how many; None where a whole model was compiled, for then they are not counted.
        grid: the video's shape in tokens; None where dense attention needed none, or too many kinds were seen.
        ran: the layers, and what they ran.
    """

    component: str
    forwards: int | None
    grid: tuple[int, int, int] | None
    ran: LayersRan

    def cells(self) -> tuple[str, ...]:
        """The texts of the table's columns."""
        forwards = "compiled" if self.forwards is None else str(self.forwards)
        grid = "" if self.grid is None else "x".join(map(str, self.grid))
        kept = "" if self.ran.kept is None else "{} of {}".format(*self.ran.kept)
        method = f"{self.component}: {self.ran.method}" if self.component else self.ran.method
        return forwards, grid, method, kept, _layers(len(self.ran.layers)), self.ran.impl, self.ran.why or ""


@dataclass(frozen=True)
class Report:
    """What the forwards of a model ran; `print` it for a table.

    Args:
        rows: for each kind of forward, by grid, ratios and what its layers ran, its groups of layers, in the order
            in which they were first seen.
    """

    rows: tuple[ReportRow, ...]

    @property
    def fallbacks(self) -> tuple[ReportRow, ...]:
        """The rows that `on_fallback` minds."""
        return tuple(row for row in self.rows if row.ran.fallback)

    def __str__(self) -> str:
        if not self.rows:
            return "no forward of a sparse layer yet"
        titles = "forwards", "grid", "method", "kept", "layers", "ran", "why"
        return "\n".join(_aligned(titles, [row.cells() for row in self.rows], len(titles)))


def report(model: Any) -> Report:
    """What the sparse layers of a model ran, forward by forward: implementations, kept blocks, and each fallback.

    It counts since the layers were made, also where blocks are compiled; `reconfigure` and `set_on_fallback` begin
    anew. Nothing waits for the GPU. Where a whole model is compiled (`torch.compile(transformer)`) only the latest
    forward is told, unless its layers have an `on_fallback` other than "allow".

    Args:
        model: what `sparsify` takes, sparse or dense.

    Raises:
        TypeError: an unsupported model.
    """
    rows = []
    for component, transformer in components_of(model).items():
        state = state_of(transformer)
        if state is None:
            continue
        name = "" if isinstance(model, nn.Module) else component
        for forward, kind in state.record.kinds.items():
            groups = layers_that_ran(forward, state.layers)
            rows.extend(ReportRow(name, kind.count, forward.grid, group) for group in groups)
        if state.compiled:
            phase, ran = state.phase, tuple(layer.ran for layer in state.layers.values())
            grid = None if state.grid is None else state.grid.shape
            latest = Forward(grid, state.packed, phase, ran)
            rows.extend(ReportRow(name, None, latest.grid, x) for x in layers_that_ran(latest, state.layers))
    return Report(tuple(rows))


def set_on_fallback(model: Any, on_fallback: str) -> None:
    """Sets what happens when a sparse layer of a model falls back, from the next forward on; see `sparsify`.

    Args:
        model: a sparse transformer or pipeline.
        on_fallback: "allow", "warn", or "raise".

    Raises:
        TypeError: an unsupported model.
        ValueError: an unknown `on_fallback`, or a model without a sparse layer.
    """
    check_choice("on_fallback", on_fallback, ON_FALLBACK)
    transformers = [part for part in components_of(model).values() if sparse_processors(part)]
    if not transformers:
        raise ValueError("model has no sparse layer that could fall back; call sparsify first")
    for transformer in transformers:
        for processor in sparse_processors(transformer).values():
            processor.record.on_fallback = on_fallback
        note_configs(transformer)
