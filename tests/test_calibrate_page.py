"""The page on training-free sparsity shows what its script wrote."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import calibrate

    yield calibrate
    sys.modules.pop("calibrate", None)


def test_the_page_has_the_tables_of_the_results(script):
    results = json.loads((ROOT / "benchmarks" / "results" / "calibrate-tiny.json").read_text(encoding="utf-8"))
    between = script.PAGE.read_text(encoding="utf-8").split(script.BEGIN)[1].split(script.END)[0]
    assert between.strip() == script.tables(results)
    assert len({row["error"] for row in results["rows"]}) >= 3


def test_the_page_is_renewed_in_place(script, monkeypatch, tmp_path):
    results = json.loads((ROOT / "benchmarks" / "results" / "calibrate-tiny.json").read_text(encoding="utf-8"))
    before = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.PAGE.write_text(before, encoding="utf-8")
    script.renew_page(results)
    assert script.PAGE.read_text(encoding="utf-8") == before
    script.renew_page(results | {"steps": 99})
    assert "of 99 |" in script.PAGE.read_text(encoding="utf-8")
