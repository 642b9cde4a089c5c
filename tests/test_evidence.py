"""What docs/evidence.md and the pages that quote it say is what the runs' files have."""

from __future__ import annotations

import json
import statistics

import pytest
from docs_tables import ROOT, load_tables

from foveal import SLA2Config, VideoGrid, VSAConfig, attention_cost


@pytest.fixture
def tables():
    return load_tables()


def test_sentences_about_the_tiny_models_arms_are_those_of_the_table(tables):
    page = " ".join((ROOT / "docs" / "evidence.md").read_text().split())
    rows = [row.strip("| ").split(" | ") for row in tables.quality_tiny("tiny").splitlines() if row[:2] == "| "]
    found = {row[0]: row for row in rows[1:]}

    def gain(arm):
        return -float(found[arm][5].split(" ")[0])

    assert all(gain(arm) > 0 for arm in found if "," in arm)
    both, coarse, linear = (gain(f"cubes, {kind}") for kind in ("coarse, linear", "coarse", "linear"))
    assert f"together they gain {both:.2f}%, by themselves {coarse:.2f}% and {linear:.2f}%" in page
    seeds = [[float(x) for x in row[6].split(" / ")] for row in found.values() if " / " in row[-1]]
    assert f"differs by {max(abs(x - y) for x, y in seeds):.2f}%" in page
    slow, fast = gain("blocks, linear"), gain("blocks, linear (rate x 10)")
    assert f"more than doubles SLA's gain**, from {slow:.2f}% to {fast:.2f}%" in page
    assert fast > 2 * slow
    prices = [float(found[arm][4].split(" ")[0]) for arm in ("cubes", "blocks")]
    assert "costs {:.1f}% in cubes after 300 steps and {:.1f}% in blocks".format(*prices) in page
    assert gain("cubes, coarse, linear (rate x 10)") / prices[0] < 1 / 20
    assert fast / prices[1] < 1 / 20


def test_sentences_about_distilled_arms_are_those_of_their_runs(tables):
    page = " ".join((ROOT / "docs" / "evidence.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    plain, taught = (
        json.loads((results / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in ("rates", "distillation")
    )
    assert {run["distillation"] for run in plain.values()} == {0}
    assert {run["distillation"] for run in taught.values()} == {1}

    def lower(mine, other):
        clips = [[statistics.mean(levels) for levels in run["after"]] for run in (mine, other)]
        return 100 * statistics.mean(1 - x / y for x, y in zip(*clips, strict=True))

    def closer(mine, other):
        return mine["videos"]["psnr_db"] - other["videos"]["psnr_db"]

    pairs = (
        (plain["blocks, linear (rate x 30) #0"], plain["blocks #0"]),
        (taught["blocks, linear (rate x 10) #0"], taught["blocks #0"]),
    )
    assert f"Thirty times the rate gains {lower(*pairs[0]):.2f}%**" in page
    assert f"on top of it: {lower(*pairs[1]):.2f}% at ten times the rate" in page
    assert "branch end {:.2f}% lower, clip by clip".format(lower(taught["blocks #0"], plain["blocks #0"])) in page
    said = "they are {:.1f} dB closer to the dense checkpoint's, and {:.1f} dB if distilled"
    assert said.format(*(closer(*pair) for pair in pairs)) in page
    assert all(mine["videos"]["flicker"] < other["videos"]["flicker"] for mine, other in pairs)


def test_sentences_about_longer_training_and_longer_clips_are_those_of_their_runs():
    page = " ".join((ROOT / "docs" / "evidence.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    short, taught, long, long_taught = (
        json.loads((results / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in ("1000", "1000-distillation", "14400", "14400-distillation")
    )
    sla, sla2 = "blocks, linear (rate x 10)", "blocks, SLA2 (rate x 10)"

    def lower(runs, arm, other="blocks", seed=0, others=None, level=None):
        """By how many percent the loss of an arm is lower, the mean over clips, at all noise levels or at one."""
        found = (runs[f"{arm} #{seed}"]["after"], (others or runs)[f"{other} #{seed}"]["after"])
        clips = [[x[level] if level is not None else statistics.mean(x) for x in run] for run in found]
        return 100 * statistics.mean(1 - x / y for x, y in zip(*clips, strict=True))

    def brought_back(runs, arm):
        """The share of what sparsity costs that an arm's branch brings back, with seed 0."""
        return 1 - lower(runs, arm, "dense") / lower(runs, "blocks", "dense")

    def both(runs, *arms):
        return [lower(runs, *arms, seed=seed) for seed in (0, 1)]

    assert f"SLA2 gains {statistics.mean(both(short, sla2)):.1f}%, four times what SLA gains" in page
    assert 4 < statistics.mean(both(short, sla2)) / statistics.mean(both(short, sla)) < 5
    assert "ahead of SLA by {:.1f}% and {:.1f}% in the two seeds".format(*both(short, sla2, sla)) in page
    levels = [lower(short, sla2, seed=seed, level=level) for seed in (0, 1) for level in range(4)]
    assert min(levels) > 1
    assert all(max(levels[i], levels[i + 3]) < min(levels[i + 1 : i + 3]) for i in (0, 4))
    assert "{:.2f}% and {:.2f}% after 1,000 steps".format(*both(short, sla)) in page
    high, low = (lower(short, sla, level=level) for level in (3, 0))
    assert f"largest at high noise, {high:.1f}%, and {low:.1f}% at low noise" in page
    closer = [
        taught[f"{arm} #0"]["videos"]["psnr_db"] - short[f"{arm} #0"]["videos"]["psnr_db"]
        for arm in ("blocks", sla, sla2)
    ]
    assert f"their videos are {min(closer):.1f} to {max(closer):.1f} dB closer" in page
    assert all(round(-lower(taught, arm, arm, others=short), 1) == 0.2 for arm in ("blocks", sla, sla2))

    slower, faster = (short[f"{arm} #0"]["seconds"] / 1000 for arm in (sla2, "blocks"))
    assert f"four times as long here**, {slower:.2f} s instead of {faster:.2f} s" in page
    assert "14,400 tokens" in page
    assert {run["tokens"] for run in (*long.values(), *long_taught.values())} == {14400}
    assert [round(x, 1) for x in both(long, sla)] == [0.3, 0.3]
    assert (
        "SLA 0.3% in both seeds, SLA2 {:.1f}%, both branches in cubes {:.1f}%".format(
            lower(long, sla2), lower(long, "cubes, coarse, linear (rate x 10)", "cubes")
        )
        in page
    )
    assert [round(lower(long, sla2, level=level), 1) for level in range(4)] == [-0.0, 0.5, 0.8, 0.8]
    price = statistics.mean(-lower(long, "blocks", "dense", seed=seed) for seed in (0, 1))
    assert f"less at this length**, {price:.1f}% with 5% of the blocks, and SLA2 brings back a ninth of that" in page
    assert round(1 / brought_back(long, sla2)) == 9
    costs = [-lower(long_taught, arm, arm, others=long) for arm in ("blocks", sla)]
    assert "costs {:.1f}% to {:.1f}% of loss on data".format(*costs) in page
    dense = long["dense #0"]
    assert f"dense attention itself gains {100 * (1 - _mean(dense['after']) / _mean(dense['before'])):.1f}%" in page


LARGE_PRETRAINING = "quality-tiny-large-pretraining-nvidia-h200-2026-11-30.jsonl"


def test_sentences_about_the_router_and_the_larger_model_are_those_of_their_runs():
    page = " ".join((ROOT / "docs" / "evidence.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    router, large = (
        json.loads((results / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in ("router", "large")
    )

    def gains(runs, arm, other="blocks", seeds=(0, 1)):
        found = []
        for seed in seeds:
            clips = zip(runs[f"{arm} #{seed}"]["after"], runs[f"{other} #{seed}"]["after"], strict=True)
            found.append(100 * statistics.mean(1 - statistics.mean(x) / statistics.mean(y) for x, y in clips))
        return found

    sla, sla2 = "blocks, linear (rate x 10)", "blocks, SLA2 (rate x 10)"
    fixed = "blocks, SLA2 (fixed router, rate x 10)"
    learned, kept = (statistics.mean(gains(router, arm)) for arm in (sla2, fixed))
    assert f"SLA2 gains {learned:.1f}% with a learned router and {kept:.1f}% with a fixed one, which is half" in page
    sla2_page = " ".join((ROOT / "docs" / "sla2.md").read_text().split())
    assert f"with a fixed one the loss is {kept:.1f}% lower" in sla2_page
    (of_sla,), (of_both,) = (
        gains(router, *arms, seeds=(1,)) for arms in ((sla,), ("cubes, coarse, linear (rate x 10)", "cubes"))
    )
    assert round(of_sla / kept) == 2
    said = "first run**: {:.1f}% and {:.1f}% for SLA2, with other kernels, {:.1f}% for SLA, and {:.1f}% for both"
    assert said.format(*gains(router, sla2), of_sla, of_both) in page

    def closer(arm):
        return statistics.mean(
            router[f"{arm} #{seed}"]["videos"]["psnr_db"] - router[f"blocks #{seed}"]["videos"]["psnr_db"]
            for seed in (0, 1)
        )

    assert f"With the learned router they are {closer(sla2):.1f} dB closer" in page
    assert closer(fixed) < 0.05

    ends = {}
    for name in ("sla", "sla2"):
        lines = map(json.loads, (results / "tiny" / f"{name}-adapter.jsonl").read_text().splitlines())
        ends[name] = [line for line in lines if "held_out/sparse" in line]
        assert ends[name][-1]["recall/mean"] < ends[name][0]["recall/mean"]
    of_sla, of_sla2 = (ends[name][-1] for name in ("sla", "sla2"))
    assert {f"{100 * end['recall/mean']:.0f}%" for end in (of_sla, of_sla2)} == {"57%"}
    lower = 100 * (1 - of_sla2["held_out/sparse"] / of_sla["held_out/sparse"])
    errors = [f"{100 * ends[name][at]['error/mean']:.0f}%" for at in (-1, 0) for name in ("sla2", "sla")]
    said = "end with 57% of dense attention's weight, as SLA's do, and with less than at the start. Yet its loss is"
    assert f"{said} {lower:.1f}% lower" in page
    assert "off by {}, where SLA's are off by {}. At the start it was {} and {}.".format(*errors) in page

    assert f"has {large['blocks #0']['parameters'] / 1e6:.1f} million parameters" in page
    assert f"**SLA2 gains {gains(large, sla2, seeds=(0,))[0]:.1f}% here too**" in page
    begin, end = (json.loads(line) for line in (results / LARGE_PRETRAINING).read_text().splitlines())
    assert f"trained for {end['step']} dense steps of {begin['batch']} clips from random weights" in page


def test_sentences_about_a_router_for_each_head_are_those_of_their_runs():
    page, sla2_page = (" ".join((ROOT / "docs" / f"{name}.md").read_text().split()) for name in ("evidence", "sla2"))
    short, before, long, large = (
        json.loads((ROOT / "benchmarks" / "results" / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in ("per-head", "router", "14400-routers", "large-14400")
    )
    short["dense #1"] = before["dense #1"]

    def lower(runs, arm, other="blocks"):
        """By how many percent the loss of an arm is lower, over the seeds that both have."""
        found = []
        for seed in (0, 1):
            if {f"{arm} #{seed}", f"{other} #{seed}"} <= runs.keys():
                clips = zip(runs[f"{arm} #{seed}"]["after"], runs[f"{other} #{seed}"]["after"], strict=True)
                found.append(100 * statistics.mean(1 - statistics.mean(x) / statistics.mean(y) for x, y in clips))
        return statistics.mean(found)

    per_head, shared = "blocks, router per head (rate x 10)", "blocks, router (rate x 10)"
    sla, sla2 = "blocks, linear (rate x 10)", "blocks, SLA2 (rate x 10)"
    prices = [-lower(runs, arm, "dense") for runs in (short, long) for arm in (per_head, "blocks")]
    assert "It halves what sparsity costs, for blocks and for cubes, at both lengths that we ran" in page
    assert all(0.45 < prices[i] / prices[i + 1] < 0.55 for i in (0, 2))
    assert "from {1:.1f}% to {0:.1f}%, at every noise level".format(*prices) in page
    gains = [lower(before, sla), lower(long, sla), lower(short, sla2), lower(long, sla2)]
    said = "SLA gains {:.1f}% and {:.1f}% over block-sparse attention at these lengths, and SLA2 {:.1f}% and {:.1f}%"
    assert said.format(*gains) in page
    back = [1 - lower(runs, sla, "dense") / lower(runs, "blocks", "dense") for runs in (before, long)]
    assert all(0.04 < share < 0.07 for share in back)
    choosing = " ".join((ROOT / "docs" / "choosing-sparsity.md").read_text().split())
    assert "where SLA's linear branch brings back a twentieth" in choosing
    both = [lower(short, arm) for arm in (shared, sla2)]
    assert "gains more**, {:.1f}% instead of {:.1f}%".format(*both) in page
    with_branch, without = (lower(short, arm) for arm in ("blocks, SLA2 (router per head, rate x 10)", per_head))
    assert f"with the linear branch, {with_branch:.1f}%, and without, {without:.1f}%" in page
    assert "{:.1f}% instead of {:.1f}%, and {:.1f}% with a router".format(*both, without) in sla2_page
    more = [lower(short, "blocks, SLA2 (router per head, rate x 10)", sla2), lower(short, per_head, shared)]
    assert "it gains {:.1f} to {:.1f}% over a shared router".format(*more) in sla2_page
    for seed in (0, 1):  # at every noise level
        by_level = [zip(*short[f"{arm} #{seed}"]["after"], strict=True) for arm in (per_head, "blocks")]
        assert all(sum(mine) < sum(theirs) for mine, theirs in zip(*by_level, strict=True))

    grown = []
    for at in (0, 1, 2, None):
        shares = []
        for seed in (0, 1):
            mine, theirs = (
                _mean(run["after"]) if at is None else run["curve"][at][1]
                for run in (short[f"{arm} #{seed}"] for arm in (per_head, "blocks"))
            )
            shares.append(100 * (1 - mine / theirs))
        grown.append(statistics.mean(shares))
    said = "{:.1f}% after 250 steps, {:.1f}% after 500, {:.1f}% after 750, and {:.1f}% after 1,000"
    assert said.format(*grown) in page

    def mean(arm, *keys):
        found = [short[f"{arm} #{seed}"] for seed in (0, 1)]
        for key in keys:
            found = [x[key] for x in found]
        return statistics.mean(found)

    off = [
        100 * statistics.mean(mean(arm, "velocity_error", "after", i) for i in range(4)) for arm in (per_head, "blocks")
    ]
    closer = mean(per_head, "videos", "psnr_db") - mean("blocks", "videos", "psnr_db")
    said = "is off from the dense checkpoint's by {:.1f}% instead of {:.1f}%, and the videos are {:.1f} dB closer"
    assert said.format(*off, closer) in page
    to_dense, to_real = (
        sorted((mean(arm, "frechet", key), arm) for arm in {x.rpartition(" #")[0] for x in short} - {"dense"})
        for key in ("dense", "real")
    )
    assert [to_dense[i][1] for i in (0, -1)] == [per_head, "blocks"]
    assert to_real[-1][1] == per_head
    ends = [to_dense[-1][0], to_dense[0][0], to_real[0][0], to_real[-1][0], mean("blocks", "frechet", "dense_to_real")]
    said = (
        "falls with the loss, from {:.1f} to {:.1f}. The distance to the real clips does not: it is {:.1f} to {:.1f} "
    )
    assert (said + "for every arm and {:.1f} for the checkpoint").format(*ends) in page
    assert f"**The router gains {lower(large, shared):.2f}% in this run.**" in page


def test_sentences_about_every_arm_at_14400_tokens_are_those_of_their_run():
    pages = {name: " ".join((ROOT / "docs" / f"{name}.md").read_text().split()) for name in ("evidence", "vsa")}
    page = pages["evidence"][pages["evidence"].index("### Every arm at 14,400 tokens") :]
    name = "quality-tiny-14400-routers-nvidia-h200-2026-11-30.json"
    runs = json.loads((ROOT / "benchmarks" / "results" / name).read_text())

    def above(arm, other, *seeds):
        """By how many percent the loss of an arm is above another's, over seeds."""
        shares = []
        for seed in seeds or (0, 1):
            clips = zip(runs[f"{arm} #{seed}"]["after"], runs[f"{other} #{seed}"]["after"], strict=True)
            shares.append(100 * statistics.mean(_mean([x]) / _mean([y]) - 1 for x, y in clips))
        return statistics.mean(shares)

    vsa, router, blocks = "VSA 4x4x4", "VSA 4x4x4, router per head (rate x 10)", "blocks, router per head (rate x 10)"
    closed, half = (f"VSA 4x4x4, router per head ({x}, rate x 10)" for x in ("closed gate", "x 1/2"))
    prices = [above(arm, "dense") for arm in (blocks, "blocks", router, vsa)]
    said = "{:.1f}% above dense attention instead of {:.1f}%, and {:.1f}% instead of {:.1f}%"
    assert said.format(*prices) in page
    assert all(0.45 < prices[i] / prices[i + 1] < 0.55 for i in (0, 2))
    said = "VSA's router ends {:.1f}% above dense attention, {:.2f}% lower in one seed and {:.2f}% in the other"
    assert said.format(above(closed, "dense"), *(-above(closed, router, seed) for seed in (0, 1))) in page
    said = "it ends [{:.1f}% above dense attention](evidence.md#every-arm-at-14400-tokens), and with the coarse branch "
    assert (said + "{:.1f}%").format(above(closed, "dense"), above(router, "dense")) in pages["vsa"]
    choosing = " ".join((ROOT / "docs" / "choosing-sparsity.md").read_text().split())
    said = "it ends [{:.1f}% above](evidence.md#every-arm-at-14400-tokens), and {:.1f}% with `coarse=False`"
    assert said.format(above(router, "dense"), above(closed, "dense")) in choosing
    assert f"Without a router the coarse branch gains {-above(vsa, 'cubes'):.1f}%" in page
    assert 0.1 < abs(above(half, vsa)) < 0.2
    said = f"a third more of them ends {above('blocks (x 4/3)', 'dense'):.1f}% above dense attention. SLA gains "
    assert f"{said}{-above('blocks, linear (rate x 10)', 'blocks'):.1f}% with its projection at ten times" in page
    assert {runs[f"blocks, linear ({x}) #0"]["added_rate"] for x in ("relu", "all")} == {runs["dense #0"]["rate"]}
    assert all(0 < -above(f"blocks, linear ({x})", "blocks") < 0.1 for x in ("relu", "all"))
    assert f"the linear branch over cubes {-above('cubes, linear', 'cubes'):.2f}%" in page
    assert above("blocks (x 4/3)", "blocks, SLA2 (rate x 10)") < 0


def test_sentences_about_vsas_router_are_those_of_their_runs():
    pages = {name: " ".join((ROOT / "docs" / f"{name}.md").read_text().split()) for name in ("evidence", "vsa", "tiny")}
    page = pages["evidence"]
    results = ROOT / "benchmarks" / "results"
    cubes, settings, blocks, before = (
        json.loads((results / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in ("vsa-router", "router-settings", "per-head", "router")
    )
    runs = {**cubes, **settings, **blocks, "dense #1": before["dense #1"]}

    def lower(arm, other, *seeds):
        """By how many percent the loss of an arm is lower, for each seed that both have."""
        found = []
        for seed in seeds or (0, 1):
            if {f"{arm} #{seed}", f"{other} #{seed}"} <= runs.keys():
                clips = zip(runs[f"{arm} #{seed}"]["after"], runs[f"{other} #{seed}"]["after"], strict=True)
                found.append(100 * statistics.mean(1 - statistics.mean(x) / statistics.mean(y) for x, y in clips))
        return found

    def price(arm):
        (found,) = lower(arm, "dense")
        return -found

    vsa, router = "VSA 4x4x4", "VSA 4x4x4, router per head (rate x 10)"
    half, more = "VSA 4x4x4, router per head (x 1/2, rate x 10)", "blocks, router per head (x 4/3, rate x 10)"
    assert "From VSA at the shorter length it takes away two thirds" in page
    for name in ("evidence", "vsa"):
        assert f"{price(router):.1f}% above dense attention instead of {price(vsa):.1f}%" in pages[name]
    assert round(3 * (1 - price(router) / price(vsa))) == 2
    gains = lower(router, vsa)
    said = "It gains {:.1f}% and {:.1f}% in the two seeds, at every noise level, and most at low noise"
    assert said.format(*gains) in page
    for seed in (0, 1):
        levels = [
            100 * statistics.mean(1 - x / y for x, y in zip(*pair, strict=True))
            for pair in zip(*(zip(*runs[f"{arm} #{seed}"]["after"], strict=True) for arm in (router, vsa)), strict=True)
        ]
        assert min(levels) > 0
        assert max(levels) == levels[0]
    assert f"beats VSA with all of them**, by {statistics.mean(lower(half, vsa)):.1f}%" in page
    assert f"VSA ends {statistics.mean(lower(vsa, 'cubes')):.1f}% below the same cubes without it" in page
    said = (
        f"12.5% of the cubes end {price(router):.1f}% above dense attention, and 13.3% of the blocks {price(more):.1f}%"
    )
    assert said in page

    grid = VideoGrid(13, 9, 16)
    vsa_router = VSAConfig(keep_ratio=0.125, router="per_head")
    own = {"block_q": 64, "linear_scope": "none", "router": "per_head", "token_order": "tile"}
    configs = (vsa_router, vsa_router.replace(keep_ratio=0.0625), SLA2Config(keep_ratio=4 / 30, **own))
    work = [100 * attention_cost(config, grid=grid, heads=4, head_dim=64).flops_ratio for config in configs]
    said = "VSA takes {:.0f}% of dense attention's FLOPs, with half of the cubes {:.0f}%, and the blocks {:.0f}%"
    assert said.format(*work) in page
    wan = attention_cost(vsa_router.replace(tile="auto"), grid=VideoGrid(21, 30, 52), heads=12, head_dim=128)
    assert f'480p grid, with `tile="auto"`, VSA takes {100 * wan.flops_ratio:.0f}%' in page

    def mean(arm, at):
        return statistics.mean(at(runs[f"{arm} #{seed}"]) for seed in (0, 1))

    off = [100 * mean(arm, lambda run: statistics.mean(run["velocity_error"]["after"])) for arm in (router, vsa)]
    closer = mean(router, lambda run: run["videos"]["psnr_db"]) - mean(vsa, lambda run: run["videos"]["psnr_db"])
    said = "is off from the dense checkpoint's by {:.1f}% instead of {:.1f}%, and the videos are {:.1f} dB closer"
    assert said.format(*off, closer) in page

    again = [
        (f"{name} (x 1.25{rest})", other)
        for name, rest, other in (
            ("blocks", "", "blocks"),
            ("blocks, router per head", ", rate x 10", "blocks, router per head (rate x 10)"),
        )
    ]
    plain, routed = (max(abs(x) for x in lower(*pair)) for pair in again)
    assert plain < 0.015
    assert 0.05 < routed < 0.15
    assert "blocks by means end where they did, within 0.01%, and the router within 0.1%" in page
    ten = "blocks, router per head (rate x 10)"
    (faster,) = lower("blocks, router per head (rate x 30)", ten)
    colder, warmer = (lower(f"blocks, router per head (temperature {t}, rate x 10)", ten)[0] for t in (0.03, 0.3))
    assert f"Thirty times the model's rate gains {faster:.1f}% more than ten times" in page
    assert f"0.03 and 0.3 end {-colder:.2f}% and {-warmer:.1f}% above that of 0.1" in page
    assert (
        f"with 4 blocks the router ends {price(more):.1f}% above dense attention instead of {price(ten):.1f}%" in page
    )

    for name, row in (("router", "router adapter | 10%"), ("vsa-router", "VSA router adapter | 12.5%")):
        lines = map(json.loads, (results / "tiny" / f"{name}-adapter.jsonl").read_text().splitlines())
        measured = [line for line in lines if "held_out/sparse" in line]
        loss, dense = measured[-1]["held_out/sparse"], measured[0]["held_out/dense"]
        assert f"| {row} | {loss:.4f} | {100 * (loss / dense - 1):+.1f}% |" in pages["tiny"]
    assert f"with the router](tiny.md#what-it-can-and-cannot-do) {100 * (loss / dense - 1):.1f}%" in page


def _mean(losses):
    return statistics.mean(statistics.mean(x) if isinstance(x, list) else x for x in losses)
