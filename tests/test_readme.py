"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import json
import re

import pytest
import torch
from docs_tables import ROOT, load_tables

README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))


def test_the_first_block_is_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert README[: first.start()].strip() == "# foveal"
    run, check = first.group(1).strip().split("\n")
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command, extra in ((run, "demo"), (check, "test")):
        assert command.startswith("python3 -m venv .venv && ")
        assert f".[{extra}]" in command
        assert extra in extras
    assert run.endswith("foveal demo")
    assert check.endswith("pytest")


def test_it_is_short():
    assert len(README.splitlines()) < 100


def test_local_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_wan_example_runs(monkeypatch, tmp_path):
    """With a tiny pipeline in place of the download, and no text encoder."""
    diffusers = pytest.importorskip("diffusers")
    from tiny_wan import tiny_transformer

    calls = []

    class Pipeline:
        transformer = tiny_transformer()

        def to(self, device):
            assert device == "cuda"
            return self

        def __call__(self, prompt):
            latents = torch.randn(1, self.transformer.config.in_channels, 3, 8, 12)
            text = torch.randn(1, 4, self.transformer.config.text_dim)
            with torch.no_grad():
                calls.append(self.transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0])
            return type("Output", (), {"frames": [calls[-1]]})

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kwargs: Pipeline())
    monkeypatch.chdir(tmp_path)
    example = next(code for code in BLOCKS.values() if "WanPipeline" in code)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert calls[0].isfinite().all()
    assert (tmp_path / "wan-sparse" / "foveal.safetensors").exists()
    assert len([line for line in example.split("\n") if line.strip() and not line.startswith(("import", "from"))]) <= 10


@pytest.fixture
def tables():
    return load_tables()


def test_tables_are_those_of_the_results(tables):
    """Figures come from the JSON that the tools wrote, not from hands."""
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- table:" in text
        assert tables.rendered(text) == text, f"{page.name}: run python docs/tables.py"


def test_sentences_about_speed_are_those_of_the_results(tables):
    def words(page):
        return " ".join((ROOT / "docs" / page).read_text().split())

    def entries(shape, kind):
        return {entry["name"]: entry["passes"] for entry in tables.bench_run(shape, kind)[1]}

    found = [passes for name, passes in entries("480p", "kernel").items() if name.endswith("gluon")]
    shares = {
        name: [100 * passes[name]["ratios"]["SDPA cuDNN"]["share_of_rate"] for passes in found]
        for name in ("forward", "backward")
    }
    low, high = ({name: f"{pick(x):.0f}" for name, x in shares.items()} for pick in (min, max))
    said = f"at {low['forward']} to {high['forward']}% of dense cuDNN's TFLOP/s forward and at {low['backward']} to "
    assert f"{said}{high['backward']}% backward" in words("performance.md")

    ratios = []
    for shape in ("h3-5s", "h3-15s"):
        ours, theirs = (
            entries(shape, "kernel")[f"block-sparse 64x64 10 %, {impl}"]
            for impl in ("gluon", "fastvideo-kernel Triton")
        )
        ratios += [theirs[name]["rested_ms"] / ours[name]["rested_ms"] for name in ("forward", "backward")]
    said = words("performance.md")
    links = "[{:.2f} times faster](notes/tables.md#minimax-h3-5-s) forward and {:.2f} times backward than "
    links += "fastvideo-kernel's Triton kernels, and at its 15 s shape [{:.2f} times](notes/tables.md#minimax-h3-15-s) "
    assert (links + "and {:.2f} times").format(*ratios) in said

    (log,) = (ROOT / "benchmarks" / "results").glob("demo-nvidia-h200-*.log")
    took = re.findall(r"([\d.]+) s, the (?:first|second) run", log.read_text())
    first, second = map(float, took)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{second:.0f} to {first:.0f} seconds on an H200 whose CPU was busy" in readme
    timed = f"On an H200 it took {first:.0f} seconds the first time, when kernels compile, and {second:.0f} the second"
    assert timed in words("demo.md")

    host = tables.latest("host-cost-*.json")["calls"]
    queued = {
        name: {way: found["replayed"]["queued_ms"] for way, found in host[name].items()}
        for name in host
        if name != "cuDNN"
    }
    assert "Forwards of SLA, of VSA, and of SLA2 without its linear branch meet their goal of 0.25 ms" in said

    def forwards(*names):
        return [queued[name][way] for name in names for way in ("forward, inference", "forward, training")]

    methods = ("SLA marginal", "SLA all", "VSA")
    assert max(forwards(*methods, "SLA2, router only")) <= 0.25 < min(forwards("SLA2"))
    chain = {name: queued[name]["both, in 8 layers"] for name in queued}
    assert max(chain[name] for name in methods) <= 0.6
    sla, cudnn = queued["SLA marginal"], {way: found["as it is"]["queued_ms"] for way, found in host["cuDNN"].items()}
    one, own = "both, in one thread", "forward and backward"
    notes = words("notes/kernels.md")
    assert "forwards of SLA and VSA take {:.2f} to {:.2f} ms".format(*_ends(forwards(*methods))) in notes
    assert f"take {sla[one]:.2f} ms if the backward runs in the calling thread, and {sla[own]:.2f} ms if" in notes
    assert f"cuDNN's {cudnn[one]:.2f} ms become {cudnn[own]:.2f} in the same way" in notes
    former = json.loads((tables.RESULTS / "host-cost-nvidia-h200-2026-11-30-020200.json").read_text())
    quicker = former["calls"]["cuDNN"][own]["as it is"]["queued_ms"]
    assert f"took {quicker:.2f} ms instead of {cudnn[own]:.2f}" in said
    assert f"SLA takes {chain['SLA marginal']:.2f} ms a layer and VSA {chain['VSA']:.2f}" in notes

    def speedups(tile):
        passes = entries("480p", "method")[f"VSA 12.5 %, {tile} tile, auto"]
        return [f"{passes[name]['ratios']['SDPA cuDNN']['speedup']:.1f} times" for name in ("forward", "backward")]

    said = "It is {} faster than dense in the forward and {} in the backward".format(*speedups("auto"))
    forward, backward = speedups("wide")
    assert f'{said} with `tile="auto"`, and {forward} and {backward} with `tile="wide"`' in words("limits.md")


def test_sentences_about_learning_routers_times_are_those_of_the_table(tables):
    performance = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    rows = [row.strip("| ").split(" | ") for row in tables.sla2_learning().splitlines() if row.startswith("| SLA2")]
    forward, backward = ({row[0]: float(row[at]) for row in rows} for at in (1, 4))
    fixed, learning = "SLA2 64x64", "SLA2 64x64, learning"
    assert "the forward takes as long as with a fixed one" in performance
    assert abs(forward[learning] / forward[fixed] - 1) < 0.02
    said = f"the backward takes {backward[learning] / backward[fixed]:.1f} times as long with the linear branch"
    assert f"{said}. Without the branch, the backward of a learning router takes a quarter less" in performance
    assert 0.22 < 1 - backward["SLA2 64x64, no linear branch, learning"] / backward[learning] < 0.28
    limits = " ".join((ROOT / "docs" / "limits.md").read_text().split())
    (tiled,), (plain,) = (
        [x["inside_ms"] for x in tables.latest("tile-order-cost-*.json")["entries"] if x["method"] == name]
        for name in ("SLA, tile order", "SLA")
    )
    assert f"SLA's forward takes {tiled:.2f} ms instead of {plain:.2f} ms at 480p" in limits
    entries = tables.latest("selection-cost-*.json")["entries"]
    (both,) = (x["inside_ms"] for x in entries if x["method"] == "SLA + VSA" and x["shape"] == "480p")
    (sla,) = (x["inside_ms"] for x in entries if (x["method"], x["shape"], x["rule"]) == ("SLA", "480p", "mean"))
    said = "takes {:.2f} times as long as SLA at 480p**, which has no copies to tile order, and {:.2f} times as long"
    assert said.format(both / sla, both / tiled) in limits
    (sorted_by_torch,) = (
        x["inside_ms"] for x in entries if (x["method"], x["shape"], x["rule"]) == ("SLA, tile order", "480p", "mean")
    )
    notes = " ".join((ROOT / "docs" / "notes" / "kernels.md").read_text().split())
    assert f"took {sorted_by_torch - sla:.2f} ms of SLA's {sorted_by_torch:.2f} ms at 480p" in notes
    moved = 2 * 12 * 32760 * 128 * 2  # bytes of a tensor, read and written
    rate = 4 * moved / (tiled - plain) / 1e9
    assert f"makes it {tiled - plain:.2f} ms: 4 x {moved / 1e6:.0f} MB, read and written, at {rate:.1f} TB/s" in notes
    vsa = {
        x["rule"]: x["inside_ms"] for x in tables.latest("tile-order-cost-*.json")["entries"] if x["method"] == "VSA"
    }
    page = " ".join((ROOT / "docs" / "vsa.md").read_text().split())
    assert "the forward takes {router:.2f} ms instead of {mean:.2f} ms".format(**vsa) in page
    learning = json.loads((tables.RESULTS / "nvidia-h200-2026-11-30-210516.json").read_text())
    backward = {x["name"]: x["passes"]["backward"]["rested_ms"] for x in learning["results"] if x["status"] == "ok"}
    took = [backward[f"VSA 12.5 %, auto tile{router}, auto"] for router in (", router", "")]
    assert "router that learns takes {:.2f} ms instead of {:.2f} ms (`nvidia-h200".format(*took) in page


def test_the_summary_of_losses_says_how_they_were_made(tables):
    """Its figures are those of docs/tables.py; here what is said of the steps, the tokens, and what is kept."""
    readme, evidence = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/evidence.md"))
    names = ("1000", "per-head", "vsa-router", "14400-routers")
    files = {
        name: json.loads((tables.RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        for name in names
    }
    for name, runs in files.items():
        steps, batch, tokens, blocks, cubes = (
            (400, 8, 14400, 0.05, 0.05) if name == "14400-routers" else (1000, 32, 1872, 0.1, 0.125)
        )
        for run in runs.values():
            assert (run["steps"], run["batch"], run["tokens"]) == (steps, batch, tokens)
            if run["arm"].endswith(("x 10)", "blocks", "4x4x4")) and "(x " not in run["arm"]:
                assert run["config"]["keep_ratio"] == (blocks if run["arm"].startswith("blocks") else cubes)
    assert "after 1,000 steps at 1,872 tokens and after 400 at 14,400" in readme
    assert "after 1,000 steps of 32 clips at 1,872 tokens, and after 400 steps of 8 clips at 14,400" in evidence
    rows = tables.quality_summary().splitlines()[2:]
    assert all("blocks, 10 % and 5 %" in row or "cubes, 12.5 % and 5 %" in row for row in rows)
    assert min(rows, key=lambda row: float(row.split("+")[-1].split()[0])).startswith("| **VSA, a router")


def _ends(values):
    return min(values), max(values)
