"""The page that compares rules of the choice shows what its script wrote, and says no more than that."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
import foveal

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import selection

    yield selection
    for name in ("selection", "result_page"):
        sys.modules.pop(name, None)


@pytest.fixture
def results():
    return json.loads((ROOT / "benchmarks" / "results" / "selection-tiny.json").read_text(encoding="utf-8"))


def test_the_page_has_the_tables_of_the_results(script, results):
    assert script.PAGE.tables() == script.tables(results)


def test_the_page_concludes_what_the_results_say(script, results):
    shares = results["shares"]
    assert {x["method"] for x in results["rows"]} == set(script.METHODS)
    plain = [{"kept": 0.0, "error": 0.5}, {"kept": 1.0, "error": 0.5}]
    rows = [{"method": method, "rule": "mean", "points": plain} for method in script.METHODS]
    for rule, error in (("mean_spread", 0.4), ("log_sum_exp", 0.6), ("mean, mass", 0.25)):
        points = [point | {"error": error} for point in plain]
        rows += [{"method": method, "rule": rule, "points": points} for method in script.METHODS]
    rows[-1]["points"] = [{"kept": 0.0, "error": 0.9}, {"kept": 1.0, "error": 0.9}]
    said = script.conclusions(results | {"rows": rows})
    cells = len(shares) * len(script.METHODS)
    assert f"| mean_spread | {cells} of {cells} cells | 0.80x |" in said
    assert f"| log_sum_exp | 0 of {cells} cells | 1.20x |" in said
    assert f"| mean, mass | {cells - len(shares)} of {cells} cells | 0.50x |" in said
    assert "`mean_spread` had a lower error than the means in every cell." in said
    rows[3]["points"] = rows[-1]["points"]
    assert any(line.startswith("No score") for line in script.conclusions(results | {"rows": rows}))


def test_time_buys_the_means_more_blocks(script, results):
    """Choosing by another score takes 2 ms longer, in which the means read 20 % more of the blocks."""
    entry = {"shape": "480p", "method": "SLA"}
    entries = [
        entry | {"rule": "mean", "kept": 0.1, "given_ms": 3.0, "cost_ms": 1.0},
        entry | {"rule": "log_sum_exp", "kept": 0.2, "given_ms": 4.0, "cost_ms": 3.0},
    ]
    more = script.more_blocks({"entries": entries}, "480p", "SLA")
    assert more == {"mean": (0.0, 0.0), "log_sum_exp": pytest.approx((2.0, 0.2))}
    points = [{"kept": x, "error": 1 - x, "recall": x} for x in (0.0, 1.0)]
    rows = [{"method": "SLA, raster", "rule": rule, "points": points} for rule in ("mean", "log_sum_exp")]
    found = script.at_equal_time({"rows": rows, "shares": [0.3, 0.9]}, {"entries": entries}, "480p")
    assert found == {("SLA, raster", "log_sum_exp"): [pytest.approx((0.7, 0.3, 0.5, 0.5)), None]}


def test_no_figure_of_the_page_is_written_by_hand(script):
    before, rest = script.PAGE.file.read_text(encoding="utf-8").split("<!-- benchmarks/selection.py begins -->")
    after = rest.split("<!-- and ends -->")[1]
    assert not re.findall(r"\d+ ?%|\d\.\d|\d+x", before + after)


def test_blocks_of_a_call_add_up_to_dense_attention(script):
    query, key, value = torch.randn(3, 1, 2, 48, 8, generator=torch.Generator().manual_seed(0))
    blocks = script.Blocks(query, key, value, torch.arange(48).flip(0), 8)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    looked_at = torch.arange(48).flip(0) % script.QUERY_STEP == 0
    torch.testing.assert_close(blocks.exact, dense[0][:, looked_at])
    share, recall, missed, _ = blocks.of(torch.ones(1, 2, 6, 6, dtype=torch.bool))[0]
    assert (share == 1).all()
    torch.testing.assert_close(recall, torch.ones(2, dtype=torch.float64))
    assert (missed < 1e-8).all()
    best, none = blocks.of(torch.stack((blocks.oracle(2), torch.eye(6, dtype=torch.bool).expand(2, 6, 6))))
    assert (best[0] == 2 / 6).all()
    assert (best[1] > none[1]).all()


def test_choices_are_those_of_the_modules(script):
    grid = foveal.VideoGrid(5, 9, 16)
    query, key = torch.randn(2, 1, 2, grid.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    chooser = script.Chooser(query, key, grid)
    for method in script.METHODS.values():
        kind = foveal.SparseLinearAttention if isinstance(method, foveal.SLAConfig) else foveal.VideoSparseAttention
        sizes = (16,) if kind is foveal.SparseLinearAttention else (32, 2, 16)
        module = kind(*sizes, method, impl="torch")
        for rule in script.RULES:
            configs = script.budgets_of(method, rule)
            if configs:
                expected = [module.select(query, key, grid=grid, config=x).critical_mask()[0] for x in configs]
                assert torch.equal(chooser.masks(configs), torch.stack(expected)), (method, rule)


def test_heads_get_budgets_by_what_they_gain(script):
    shares = torch.tensor([0.1, 0.2, 0.4])[:, None].expand(3, 2)
    missed = torch.tensor([[1.0, 8.0], [0.9, 3.0], [0.8, 1.0]])
    call = torch.stack((shares, 1 - missed / 10, missed, torch.ones(3, 2)), 1).double()
    (found,) = script.by_head([call], [call])
    assert found[0, 2].tolist() == [1.0, 8.0]
    assert found[1, 2].tolist() == pytest.approx([0.9, 3.0])
    assert found[2, 2].tolist() == pytest.approx([0.8, 1.0])
    # Between the first and the second budget's mean share only one head can go up: the one that gains.
    between = call.clone()
    between[1, 0] = torch.tensor([0.2, 0.15])
    assert script.by_head([between], [between])[0][1, 2, 1] < 8


def test_shares_lie_between_budgets(script):
    points = [{"kept": 0.1, "error": 0.5}, {"kept": 0.3, "error": 0.3}]
    assert script.at_share(points, 0.2, "error") == pytest.approx(0.4)
    assert script.at_share(points, 0.05, "error") is None
    assert script.at_share(points, 0.5, "error") is None
