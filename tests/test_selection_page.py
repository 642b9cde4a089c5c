"""The page that compares rules of the choice shows what its script wrote, and says no more than that."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
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
    errors = {
        (row["method"], row["rule"]): [script.at_share(row["points"], share, "error") for share in results["shares"]]
        for row in results["rows"]
    }
    scores = ("mean_spread", "log_sum_exp")
    for score in scores:
        assert any(errors[method, score][i] > errors[method, "mean"][i] for method in script.METHODS for i in range(4))
    for method in script.METHODS:
        by_head = errors[method, script.BY_HEAD]
        for place, share in enumerate(results["shares"]):
            rules = [r for r in script.RULES if (method, r) in errors and errors[method, r][place] is not None]
            if share >= 0.2:
                rivals = [r for r in rules if share < 0.5 or "window" not in r]
                assert all(by_head[place] < errors[method, rule][place] for rule in rivals)
            plain = errors[method, "mean"][place]
            for rule in rules:
                if rule == "mean, window 1x3x3":
                    assert errors[method, rule][place] < plain
                if rule in ("mean, mass", "mean, first frame"):
                    assert errors[method, rule][place] > plain


def test_blocks_of_a_call_add_up_to_dense_attention(script):
    query, key, value = torch.randn(3, 1, 2, 48, 8, generator=torch.Generator().manual_seed(0))
    blocks = script.Blocks(query, key, value, torch.arange(48).flip(0), 8)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    looked_at = torch.arange(48).flip(0) % script.QUERY_STEP == 0
    torch.testing.assert_close(blocks.exact, dense[0][:, looked_at])
    share, recall, missed, _ = blocks.of(torch.ones(2, 6, 6, dtype=torch.bool))
    assert (share == 1).all()
    torch.testing.assert_close(recall, torch.ones(2, dtype=torch.float64))
    assert (missed < 1e-8).all()
    best, none = blocks.of(blocks.oracle(2)), blocks.of(torch.eye(6, dtype=torch.bool).expand(2, 6, 6))
    assert (best[0] == 2 / 6).all()
    assert (best[1] > none[1]).all()


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
