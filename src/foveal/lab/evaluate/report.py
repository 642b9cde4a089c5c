"""The results of an evaluation as a table for the terminal, Markdown, and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveal.lab.evaluate.statistics import CONFIDENCE, Estimate

HEADINGS = ("", "dense", "sparse", "pair by pair")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: the metric, with its unit.
        dense, sparse: estimates over each arm's own videos.
        paired: an estimate over the pairs of one prompt and seed: a similarity, the difference sparse - dense, or the
            ratio dense / sparse.
        digits: digits after the point.
        unit: the unit of `paired`; "x" for a ratio.
    """

    name: str
    dense: Estimate | None
    sparse: Estimate | None
    paired: Estimate | None
    digits: int
    unit: str = ""

    def cells(self) -> tuple[str, ...]:
        own = ("" if figure is None else figure.text(self.digits) for figure in (self.dense, self.sparse))
        return (self.name, *own, "" if self.paired is None else self.paired.text(self.digits, self.unit))


@dataclass(frozen=True)
class EvaluationReport:
    """The table of an evaluation, with its context.

    Args:
        rows: the rows of the table.
        videos: how many pairs were compared.
        notes: what was skipped, and why.
        settings: the settings that the outputs share.
        pairs: the metrics of each pair.
        environment: the machine and the versions.
    """

    rows: tuple[Row, ...]
    videos: int
    notes: tuple[str, ...]
    settings: dict[str, Any]
    pairs: list[dict[str, Any]]
    environment: dict[str, str]

    def caption(self) -> str:
        interval = f", mean and {CONFIDENCE:.0%} confidence interval (Student's t)" if self.videos > 1 else ""
        size = "x".join(str(self.settings[name]) for name in ("num_frames", "height", "width"))
        return (
            f"{self.videos} pair{'s' * (self.videos != 1)} of {size}, {self.settings['num_inference_steps']} steps, "
            f"{self.settings['dtype']}, on {self.environment['device']}{interval}"
        )

    def markdown(self) -> str:
        lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in self.rows]
        return "\n".join([*lines, "", f"{self.caption()}.", *(f"{note}." for note in self.notes)]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        rows = {}
        for row in self.rows:
            figures = {"dense": row.dense, "sparse": row.sparse, "paired": row.paired}
            rows[row.name] = {name: vars(figure) for name, figure in figures.items() if figure is not None}
        return {
            "settings": self.settings,
            "environment": self.environment,
            "confidence": CONFIDENCE,
            "table": rows,
            "notes": list(self.notes),
            "pairs": self.pairs,
        }

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # As Text, because rich would read the brackets of ".[eval]" as a style.
        caption = Text("\n".join([self.caption(), *self.notes]))
        table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row.cells())
        return table
