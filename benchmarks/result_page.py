"""A file of results, and the tables of a page of the docs that show it, as the scripts beside this one write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
END = "<!-- and ends -->"


@dataclass(frozen=True)
class ResultPage:
    """A page with tables between two marks.

    Args:
        kind: of results, "calibrate" say: the names of the script, of the page, and of its files begin so.
        file: the page.
    """

    kind: str
    file: Path

    @classmethod
    def of(cls, kind: str) -> ResultPage:
        return cls(kind, ROOT / "docs" / f"{kind}.md")

    @property
    def _begin(self) -> str:
        return f"<!-- benchmarks/{self.kind}.py begins -->"

    def tables(self) -> str:
        """What the page shows now."""
        return self.file.read_text(encoding="utf-8").split(self._begin)[1].split(END)[0].strip()

    def renew(self, tables: str) -> None:
        """Puts tables into the page."""
        before, rest = self.file.read_text(encoding="utf-8").split(self._begin)
        _, after = rest.split(END, 1)
        self.file.write_text(f"{before}{self._begin}\n\n{tables}\n\n{END}{after}", encoding="utf-8")

    def show(self, file: Path, tables: Callable[[dict[str, Any], str], str]) -> None:
        """Puts `tables(results, name)` of a file of results into the page."""
        self.renew(tables(json.loads(file.read_text(encoding="utf-8")), file.name))

    def results_of(self, model: str) -> Path:
        """The file in benchmarks/results of what was measured on a model."""
        name = model.replace("/", "-").removeprefix("foveal-")
        return ROOT / "benchmarks" / "results" / f"{self.kind}-{name}.json"

    def write_results(self, model: str, results: dict[str, Any]) -> None:
        """Writes what was measured on a model."""
        self.results_of(model).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
