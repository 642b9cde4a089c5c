"""The page on training-free sparsity shows what its script wrote."""

import dataclasses
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
    for name in ("calibrate", "result_page"):
        sys.modules.pop(name, None)


def test_the_page_has_the_tables_of_the_results(script):
    results = json.loads((ROOT / "benchmarks" / "results" / "calibrate-tiny.json").read_text(encoding="utf-8"))
    assert script.PAGE.tables() == script.tables(results)
    assert len({row["error"] for row in results["rows"]}) >= 3


def test_the_page_is_renewed_in_place(script, tmp_path):
    results = json.loads((ROOT / "benchmarks" / "results" / "calibrate-tiny.json").read_text(encoding="utf-8"))
    before = script.PAGE.file.read_text(encoding="utf-8")
    page = dataclasses.replace(script.PAGE, file=tmp_path / "page.md")
    page.file.write_text(before, encoding="utf-8")
    page.renew("other tables")
    assert page.tables() == "other tables"
    page.renew(script.tables(results))
    assert page.file.read_text(encoding="utf-8") == before
    page.renew(script.tables(results | {"steps": 99}))
    assert "of 99 |" in page.tables()
