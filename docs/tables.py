"""Writes the tables of docs/performance.md and the README from the JSON in benchmarks/results/.

    python docs/tables.py

Everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
import re
import runpy
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "notes" / "tables.md",
    ROOT / "docs" / "choosing-sparsity.md",
    ROOT / "docs" / "multi-gpu.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "vsa.md",
    ROOT / "docs" / "evidence.md",
    ROOT / "docs" / "precision.md",
    ROOT / "README.md",
)


def latest(pattern: str, wanted=lambda run: True) -> dict:
    """The newest result whose file name matches and that is wanted."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    return [run for run in runs if wanted(run)][-1]


def bench_run(shape: str, kind: str, pattern: str = "nvidia-*.json") -> tuple[dict, list[dict]]:
    """The newest run of `foveal bench` with this shape and kind of candidates, and those of its entries that ran.

    Not one of only some candidates by name.
    """

    def entries(run: dict) -> list[dict]:
        return [
            entry
            for entry in run["results"]
            if entry["shape"] == shape and entry["status"] == "ok" and entry["kind"] in (kind, "dense")
        ]

    run = latest(
        pattern, lambda run: not run["settings"].get("names") and any(entry["kind"] == kind for entry in entries(run))
    )
    return run, entries(run)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def kernels(pattern: str = "nvidia-*.json", shape: str = "480p") -> str:
    """Block-sparse kernels: milliseconds, and the share of dense cuDNN's rate that they keep."""
    run, entries = bench_run(shape, "kernel", pattern)
    lines = [
        _row("candidate", "forward, ms", "share of cuDNN's TFLOP/s", "backward, ms", "share of cuDNN's TFLOP/s"),
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = []
        for name in ("forward", "backward"):
            figures = entry["passes"][name]
            share = figures["ratios"]["SDPA cuDNN"]["share_of_rate"]
            cells += [f"{figures['rested_ms']:.3f}", f"{100 * share:.0f} %"]
        lines.append(_row(entry["name"], *cells))
    return "\n".join([*lines, "", _caption(run, shape)])


GIVEN = ", selection given"


def methods(shape: str = "480p", given: bool = True) -> str:
    """Whole methods: milliseconds, and how many times faster than dense attention; `given` adds given selections."""
    run, entries = bench_run(shape, "method")
    one = ("ms", "x cuDNN", "sustained x cuDNN", "x flash")
    heads = [f"{name}, {cell}" if cell == "ms" else cell for name in ("forward", "backward") for cell in one]
    lines = [_row("candidate", *heads, "extra MiB"), "|---" * (len(heads) + 2) + "|"]
    for entry in entries:
        if GIVEN in entry["name"] and not given:
            continue
        cells = []
        for name in ("forward", "backward"):
            figures = entry["passes"][name]
            cudnn, flash = (figures["ratios"][base] for base in ("SDPA cuDNN", "SDPA flash"))
            cells += [f"{figures['rested_ms']:.3f}", f"{cudnn['speedup']:.1f}", f"{cudnn['sustained_speedup']:.1f}"]
            cells.append(f"{flash['speedup']:.1f}")
        cells.append(f"{entry['memory']['forward'] / 2**20:.0f}, {entry['memory']['forward_backward'] / 2**20:.0f}")
        lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", _caption(run, shape)])


def sla2_learning() -> str:
    """SLA2's rows, while its router learns and when it does not, of the newest run of only some candidates."""
    run = latest("nvidia-*.json", lambda run: "SLA2" in (run["settings"].get("names") or ()))
    heads = ("candidate", "forward, ms", "sustained", "host", "backward, ms", "sustained", "host", "extra MiB")
    lines = [_row(*heads), "|---" * len(heads) + "|"]
    for entry in run["results"]:
        if entry["status"] != "ok" or GIVEN in entry["name"]:
            continue
        cells = []
        for name in ("forward", "backward"):
            figures = entry["passes"][name]
            cells += [f"{figures[key]:.2f}" for key in ("rested_ms", "sustained_ms", "host_ms")]
        cells.append(f"{entry['memory']['forward'] / 2**20:.0f}, {entry['memory']['forward_backward'] / 2**20:.0f}")
        lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", _caption(run)])


def shapes() -> str:
    """How many times faster than dense cuDNN each method is at each shape."""
    names = ("480p", "720p", "paper", "d64")
    runs = [bench_run(name, "method") for name in names]
    heads = [f"{name}, {shape}" for name in ("forward", "backward") for shape in names]
    lines = [_row("x cuDNN", *heads), "|---" * (len(heads) + 1) + "|"]
    found = [{entry["name"]: entry["passes"] for entry in entries} for _, entries in runs]
    for entry in runs[0][1]:
        if entry["kind"] == "dense" or GIVEN in entry["name"] or any(entry["name"] not in run for run in found):
            continue
        cells = [
            f"{passes[entry['name']][name]['ratios']['SDPA cuDNN']['speedup']:.1f}"
            for name in ("forward", "backward")
            for passes in found
        ]
        lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", f"{_machines([run for run, _ in runs])}; bfloat16; rested medians."])


def short() -> str:
    """Forwards of short sequences: milliseconds rested and back to back, and how many times faster than dense cuDNN."""
    runs = [bench_run(name, "method") for name in ("4k", "8k")]
    heads = [
        f"{name}, {tokens} tokens" for tokens in ("4,096", "8,192") for name in ("ms", "x cuDNN", "sustained x cuDNN")
    ]
    lines = [_row("forward", *heads), "|---" * (len(heads) + 1) + "|"]
    found = [{entry["name"]: entry["passes"]["forward"] for entry in entries} for _, entries in runs]
    for entry in runs[0][1]:
        if GIVEN in entry["name"]:
            continue
        cells = []
        for figures in (passes[entry["name"]] for passes in found):
            cudnn = figures["ratios"]["SDPA cuDNN"]
            cells += [f"{figures['rested_ms']:.3f}", f"{cudnn['speedup']:.1f}", f"{cudnn['sustained_speedup']:.1f}"]
        lines.append(_row(entry["name"].removesuffix(", auto"), *cells))
    return "\n".join([*lines, "", f"{_machines([run for run, _ in runs])}; B1 H12 D128, bfloat16."])


def counters() -> str:
    """What bounds the kernels: shares of what the hardware can do."""
    run = latest("counters-*.json")
    heads = ("candidate", "kernel", "L2 to SMs", "tensor cores", "L1 and shared memory", "DRAM", "L2 hits")
    lines = [_row(*heads), "|---" * len(heads) + "|"]
    for name, kernels in run["kernels"].items():
        for found in {one["kernel"]: one for one in kernels}.values():
            cells = [found[label] for label in ("l2_out", "tensor_cores", "l1_and_shared", "dram", "l2_hits")]
            kernel = found["kernel"].removesuffix("_kernel")
            lines.append(_row(name.removesuffix(", auto"), f"`{kernel}`", *(f"{cell:.0f} %" for cell in cells)))
    return "\n".join([*lines, "", f"{_machine(run)}; Nsight Compute, one launch each, {run['shape']}."])


def call_of(arm: str) -> dict:
    """The newest transformer call at 480p with this attention."""
    return latest("wan-1.3b-*.json", lambda run: arm in run["calls"]["480p"])["calls"]["480p"][arm]


def speed() -> str:
    """The README's short table: whole methods against dense attention, and a whole model."""
    run, entries = bench_run("480p", "method")
    model = latest("wan-1.3b-*.json")
    head = ("Wan2.1-1.3B, 480p, 81 frames (32,760 tokens)", "attention forward", "backward", "whole transformer call")
    lines = [_row(*head), "|---|---|---|---|"]
    wanted = {
        "SDPA cuDNN": "dense",
        "SLA 64x64 marginal, auto": "SLA 64x64 marginal",
        "SLA 128x64 all, auto": "SLA 128x64 all",
        "VSA 12.5 %, auto tile, auto": "VSA 12.5 %",
        "VSA 12.5 %, wide tile, auto": "VSA 12.5 %, wide tile",
    }
    for entry in entries:
        if entry["name"] in wanted:
            cells = [
                f"{entry['passes'][name]['rested_ms']:.2f} ms ({ratios['speedup']:.1f}x, "
                f"sustained {ratios['sustained_speedup']:.1f}x)"
                for name in ("forward", "backward")
                for ratios in (entry["passes"][name]["ratios"]["SDPA cuDNN"],)
            ]
            call = call_of(wanted[entry["name"]])
            lines.append(_row(wanted[entry["name"]], *cells, f"{call['ms']:.0f} ms ({call['speedup']:.2f}x)"))
    return "\n".join([*lines, "", _caption(run), f"Transformer calls: {_machine(model)}, blocks compiled."])


def wan(every_run: bool = False) -> str:
    """Transformer calls and the newest whole generation, with the share of self-attention in each.

    The share of a call is its time minus the time of the call without self-attention in the same run. A step of a
    generation has two calls.
    """
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("wan-1.3b-*.json"))]
    heads = ("", "attention", "ms", "", "self-attention's share", "peak GiB above the weights")
    lines = [_row(*heads), "|---" * len(heads) + "|"]
    newest = {resolution: run for run in runs for resolution in run["calls"]}
    for run in runs:
        for resolution, calls in run["calls"].items():
            if not every_run and run is not newest[resolution]:
                continue
            for arm, call in calls.items():
                share = 1 - calls["no self-attention"]["ms"] / call["ms"]
                cells = (f"{call['ms']:.0f}", f"{call['speedup']:.2f}x", f"{100 * share:.0f} %")
                lines.append(_row(resolution, arm, *cells, f"{call['peak_bytes'] / 2**30:.2f}"))
    run = latest("wan-1.3b-*.json", lambda run: run["generation"])
    heads = ("a generation", "attention", "s", "", "denoising, s", "VAE decode, s", "self-attention's share")
    lines += ["", _row(*heads), "|---" * len(heads) + "|"]
    for resolution, arms in run["generation"].items():
        for arm, found in arms.items():
            cells = [f"{found[name]:.1f}" for name in ("seconds", "denoising_s", "decode_s")]
            steps, calls = run["settings"]["generate"], run["calls"][resolution]
            spent = 2 * steps * (calls[arm]["ms"] - calls["no self-attention"]["ms"]) / 1e3
            share = f"{100 * spent / found['seconds']:.0f} %"
            lines.append(
                _row(f"{resolution}, {steps} steps", arm, cells[0], f"{found['speedup']:.2f}x", *cells[1:], share)
            )
    rounds = " and ".join(dict.fromkeys(str(run["settings"]["rounds"]) for run in runs))
    return "\n".join(
        [*lines, "", f"{_machines(runs)}; medians of {rounds} calls; each run has a dense row of its own."]
    )


def steps(every_run: bool = False) -> str:
    """Seconds of a fine-tuning step: of the run with the most arms at each length, or of every run."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("training-step-*.json"))]
    runs.sort(key=lambda run: -run["tokens"])
    if not every_run:
        widest = {run["tokens"]: run for run in sorted(runs, key=lambda run: len(run["arms"]))}
        runs = [run for run in runs if run is widest[run["tokens"]]]
    lines = [_row("tokens", "attention", "s per step", "", "peak GiB", "parameters, M"), "|---|---|---|---|---|---|"]
    for run in runs:
        tokens, dense = run["tokens"], run["arms"]["dense"]["median_seconds"]
        for arm, found in run["arms"].items():
            seconds = found["median_seconds"]
            cells = (f"{seconds:.3f}", f"{dense / seconds:.2f}x", f"{found['peak_memory_gib']:.1f}")
            lines.append(_row(f"{tokens:,}", arm, *cells, f"{found['parameters'] / 1e6:.0f}"))
    steps = " and ".join(dict.fromkeys(str(run["settings"]["steps"]) for run in runs))
    return "\n".join([*lines, "", f"{_machines(runs)}; medians of {steps} steps; each run has a dense row of its own."])


def parallel() -> str:
    """One GPU against two: a transformer call under Ulysses, and steps of `foveal train`."""
    lines = [_row("", "attention", "one GPU", "two GPUs", ""), "|---|---|---|---|---|"]
    runs = []
    for size, backward, label in (
        ("1.3b", False, "1.3B under Ulysses, forward, compiled"),
        ("14b", False, "14B under Ulysses, forward, compiled"),
        ("h3", False, "MiniMax-H3, 8 blocks, 15 s under Ulysses, forward, compiled"),
        ("1.3b", True, "1.3B under Ulysses, forward and backward"),
    ):
        wanted = {"size": size, "backward": backward}
        run = latest("context-parallel-*.json", lambda run, wanted=wanted: wanted.items() <= run["settings"].items())
        runs.append(run)
        for arm, found in run["calls"].items():
            times = [f"{found[name]['ms']:.0f} ms" for name in ("single", "parallel")]
            lines.append(_row(label, arm, *times, f"{found['speedup']:.2f}x"))
    # Older runs did not record these settings.
    without = {"parallel": "fsdp", "context_parallel": 1, "compile": False, "heads": 12}
    for parallel, degree, compiled, heads, label in (
        ("fsdp", 1, False, 12, "`foveal train`, FSDP2"),
        ("fsdp", 2, False, 12, "`foveal train`, FSDP2 and Ulysses"),
        ("fsdp", 2, True, 12, "`foveal train`, FSDP2 and Ulysses, compiled"),
        ("ddp", 2, True, 12, "`foveal train`, DDP and Ulysses, compiled"),
        ("ddp", 2, True, 40, "the same with 14B's width, 3 layers"),
    ):
        wanted = {"parallel": parallel, "context_parallel": degree, "compile": compiled, "heads": heads}
        run = latest(
            "train-scaling-*.json", lambda run, wanted=wanted: wanted.items() <= (without | run["settings"]).items()
        )
        runs.append(run)
        rates = [f"{one['tokens_per_second']:,.0f} tokens/s" for one in (run["one_process"], run)]
        lines.append(_row(label, "SLA 64x64 marginal", *rates, f"{run['scaling']:.2f}x"))
    return "\n".join([*lines, "", f"{_machines(runs)}; two of them."])


def fine_tune(file: str = "fine_tune.json") -> str:
    """Held-out losses of a fine-tune; the one at 16K tokens by default."""
    run = latest(file)
    marks = [step for step, _ in run["arms"]["dense"]["held_out_loss"]]
    shown = [marks[index] for index in (0, len(marks) // 4, len(marks) // 2, -1)]
    lines = [_row("attention", *(f"after {step} steps" for step in shown), "s per step"), "|---" * 6 + "|"]
    for arm, found in run["arms"].items():
        losses = dict(map(tuple, found["held_out_loss"]))
        cells = (*(f"{losses[step]:.4f}" for step in shown), f"{found['median_step_seconds']:.3f}")
        lines.append(_row(arm, *cells))
    settings, before = run["settings"], run["pretraining"]
    caption = (
        f"{run['tokens']:,} tokens, {run['parameters'] / 1e6:.0f} M parameters, {settings['pretrain_steps']} dense "
        f"steps first ({before['seconds']:.0f} s), batch {settings['batch']}, seed {settings['seed']}; "
        f"{_machine(run)}."
    )
    return "\n".join([*lines, "", caption])


def cpu() -> str:
    """The gathering implementation on a CPU."""
    run = json.loads((RESULTS / "cpu_block_sparse.json").read_text())
    lines = [_row("", "dense, ms", "sparse, ms", "speed-up"), "|---|---|---|---|"]
    for name, label in (("forward", "forward"), ("forward_backward", "forward and backward")):
        dense, sparse, ratio = (run[name][key] for key in ("dense_seconds", "sparse_seconds", "ratio"))
        lines.append(_row(label, f"{1e3 * dense:.0f}", f"{1e3 * sparse:.0f}", f"{ratio:.1f}x"))
    machine, options = run["machine"], run["shape"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; B{options['batch']} "
            f"H{options['heads']} L{options['length']} D{options['head_dim']}, {options['dtype']}, "
            f"{100 * options['keep_ratio']:g} % of the blocks, selection not timed; commit {machine['commit'][:7]}.",
        ]
    )


def order() -> str:
    """Raster order against tile order on the demo's trained model: means over the runs of each clip."""
    run = json.loads((RESULTS / "token_order.json").read_text())
    ratios = run["keep_ratios"]
    heads = [f"{name}, {100 * ratio:g} %" for name in ("recall", "error") for ratio in ratios]
    lines = [_row("clip", "order", *heads), "|---" * (len(heads) + 2) + "|"]
    for clip in dict.fromkeys(each["clip"] for each in run["runs"]):
        runs = [each for each in run["runs"] if each["clip"] == clip]
        for name in ("raster", "tile"):
            cells = [
                f"{sum(each[name][figure]['pooled'][index] for each in runs) / len(runs):.3f}"
                for figure in ("recall", "error")
                for index in range(len(ratios))
            ]
            lines.append(_row(clip, name, *cells))
    settings = run["settings"]
    caption = (
        f"A small model in pixel space after {settings['pretrain_steps']} steps of dense pretraining, "
        f"{len(run['runs'])} runs (seeds 0 to {max(each['seed'] for each in run['runs'])} on each clip), "
        "all layers, heads and query blocks, held-out windows; blocks of 64x64, pooled choice; "
        f"torch {run['machine']['torch']}."
    )
    return "\n".join([*lines, "", caption])


def quality(pattern: str = "quality-arms-*.json", base: str = "sparse5", seed: int = 0) -> str:
    """Held-out losses of the arms of benchmarks/quality, of one seed, against dense attention and against `base`."""
    run = {}
    for path in sorted(RESULTS.glob(pattern)):
        run |= {name: arm for name, arm in json.loads(path.read_text()).items() if arm["seed"] == seed}
    losses = {arm["name"]: _window_means(arm) for arm in run.values()}
    heads = ("arm", "loss before", "after", "against dense", f"against {base}", f"windows worse than {base}")
    lines = [_row(*heads), _row(*["---"] * len(heads))]
    for arm in sorted(run.values(), key=lambda arm: statistics.mean(losses[arm["name"]])):
        mine = losses[arm["name"]]
        cells = [arm["name"], f"{arm['held_out'][0]['mean']:.4f}", f"{statistics.mean(mine):.5f}"]
        for other in ("dense", base):
            same = other == arm["name"]
            cells.append("" if same else "{:+.2f} ± {:.2f} %".format(*_relative(mine, losses[other])))
        worse = sum(x > y for x, y in zip(mine, losses[base], strict=True))
        lines.append(_row(*cells, "" if arm["name"] == base else f"{worse} of {len(mine)}"))
    days = " and ".join(dict.fromkeys(arm["started"][:10] for arm in run.values()))
    steps = next(iter(run.values()))["steps"]
    caption = f"{_machines(list(run.values()))}; {steps} steps, seed {seed}, {days}."
    return "\n".join([*lines, "", caption])


def quality_tiny(name: str, date: str = "2026-11-30") -> str:
    """Held-out losses of the tiny model's arms, as benchmarks/tiny/arms.py prints them."""
    return _arms(list(json.loads((RESULTS / f"quality-{name}-nvidia-h200-{date}.json").read_text()).values()))


def quality_tiny_taught(plain: str, distilled: str) -> str:
    """The tiny model's arms with the loss of flow matching, and distilled from the dense checkpoint."""
    runs = []
    for name, prefix in ((plain, ""), (distilled, "distilled ")):
        found = json.loads((RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
        runs += [{**run, "arm": prefix + run["arm"]} for run in found.values()]
    return _arms(runs)


def quality_tiny_with(name: str, **others: tuple[str, ...]) -> str:
    """The arms of a run, and those of earlier runs that they are compared with, by the name of that run."""
    mine = _tiny_runs(name)
    for other, arms in others.items():
        mine += [run for run in _tiny_runs(other.replace("_", "-")) if run["arm"] in arms]
    return _arms(mine)


def quality_summary() -> str:
    """The README's short table: how far above dense attention arms end at two lengths."""
    sla, sla2, router = "blocks, linear (rate x 10)", "blocks, SLA2 (rate x 10)", "blocks, router per head (rate x 10)"
    vsa, vsa_router = "VSA 4x4x4", "VSA 4x4x4, router per head (rate x 10)"
    blocks, cubes = "blocks, 10 % and 5 %", "cubes, 12.5 % and 5 %"
    rows = (  # the label, what is kept, the arm, and the table of its runs at the shorter length
        ("block-sparse", blocks, "blocks", "quality_tiny_1000"),
        ("SLA", blocks, sla, "quality_tiny_1000"),
        ("SLA2", blocks, sla2, "quality_tiny_1000"),
        ("block-sparse, a router in each head", blocks, router, "quality_tiny_per_head"),
        ("VSA", cubes, vsa, "quality_tiny_vsa_router"),
        ("**VSA, a router in each head**", cubes, vsa_router, "quality_tiny_vsa_router"),
    )
    lines = [_row("attention", "kept", "1,872 tokens", "14,400 tokens"), "|---|---|---|---|"]
    for label, kept, arm, short in rows:
        prices = (price_of(table, arm) for table in (short, "quality_tiny_14400_routers"))
        lines.append(_row(label, kept, *(f"+{price:.1f} %" for price in prices)))
    return "\n".join(lines)


def price_of(table: str, arm: str) -> float:
    """How many percent above dense attention an arm ends, by the first table of losses under that name."""
    rows = [row.strip("| ").split(" | ") for row in TABLES[table]().splitlines() if row[:2] == "| "]
    return float(next(row[4] for row in rows if row[0] == arm).split(" ")[0])


def _tiny_runs(name: str) -> list[dict]:
    return list(json.loads((RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text()).values())


def quality_tiny_levels(name: str) -> str:
    """The same arms at each noise level."""
    found = json.loads((RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text())
    return _arms_table()["levels"](list(found.values()))


def _arms_table() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "tiny" / "arms_table.py"))


def _arms(runs: list[dict]) -> str:
    first = runs[0]
    clips = f"{first['steps']} steps of {first['batch']} clips, {len(first['after'])} held-out clips"
    commits = sorted({run["commit"] for run in runs})
    made = f"{first['device']}, torch {first['torch']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    script = _arms_table()
    shown = [script["table"](runs), script["quality"](runs), f"{made}; {clips}."]
    return "\n\n".join(filter(None, shown))


def host() -> str:
    """The host's milliseconds of a layer's call at 4,096 tokens, queued behind other work."""
    run = latest("host-cost-*.json")
    passes = tuple(run["calls"]["cuDNN"])
    lines = [_row("ms", *passes), "|---" * (len(passes) + 1) + "|"]
    for name, found in run["calls"].items():
        for way in found[passes[0]]:
            lines.append(_row(f"{name}, {way}", *(f"{found[label][way]['queued_ms']:.2f}" for label in passes)))
    settings = run["settings"]
    size = f"{settings['tokens']:,} tokens, {settings['heads']} heads of {settings['head_dim']}"
    return "\n".join([*lines, "", f"{_machine(run)}; {size}; medians of {settings['calls']} calls."])


def _window_means(arm: dict) -> list[float]:
    """The loss of each held-out window after the last step, over the noise levels."""
    return [statistics.mean(levels) for levels in arm["held_out"][-1]["windows"]]


def _relative(losses: list[float], base: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of paired relative differences, in %."""
    relative = [100 * (x / y - 1) for x, y in zip(losses, base, strict=True)]
    return statistics.mean(relative), 2.0 * statistics.stdev(relative) / len(relative) ** 0.5


def attention_mass() -> str:
    """How diffuse the dense model's attention is, layer by layer."""
    run = json.loads((RESULTS / "quality-diagnose-nvidia-h200-2026-11-28.json").read_text())
    heads = (
        "layer",
        "effective keys of 16,128",
        "mass in the chosen 5 %",
        "in the best 5 %",
        "error of the sparse output",
    )
    lines = [_row(*heads), _row(*["---"] * len(heads))]
    for number, layer in enumerate(run["layers"]):
        facts = layer["facts"]
        shares = (facts[f"keep 0.05, {kind}: mass inside"] for kind in ("pooled", "oracle"))
        error = facts["keep 0.05, pooled: relative error of O_s"]
        cells = f"{facts['effective keys']:,.0f}", *(f"{share:.3f}" for share in shares), f"{error:.2f}"
        lines.append(_row(number, *cells))
    return "\n".join([*lines, "", _machine(run) + "."])


BRANCHES = {
    "a learned constant per layer": "bias alone",
    "SLA, softmax, marginal, W fitted": "softmax, marginal: fitted (SLA)",
    "SLA, elu, marginal, W fitted": "elu, marginal: fitted (SLA)",
    "SLA, relu, marginal, W fitted": "relu, marginal: fitted (SLA)",
    "a O^s + (1 - a) O^l W, softmax, all keys": "softmax, all: a O_s + fit on (1-a) O_l (SLA2)",
    "a O^s + (1 - a) O^l W, relu, all keys": "relu, all: a O_s + fit on (1-a) O_l (SLA2)",
    "unread blocks by their mean key and value": "tail of mean keys: merged",
    "unread blocks by their true mass and mean value": "tail of true block masses: merged",
    "VSA's coarse output, W fitted": "coarse output of VSA: fitted",
}


def branches() -> str:
    """What a global branch gives back of what block-sparse attention leaves out of a dense layer's output."""
    run = json.loads((RESULTS / "quality-diagnose-nvidia-h200-2026-11-28.json").read_text())
    lines = [_row("global branch", "removed at 5 %", "removed at 1.6 %"), _row("---", "---", "---")]
    for title, name in BRANCHES.items():
        removed = (run["all layers"][f"keep {ratio}"][name]["removed"] for ratio in ("0.05", "0.016"))
        lines.append(_row(title, *(f"{share:.2f}" for share in removed)))
    return "\n".join([*lines, "", _machine(run) + "."])


def int8_instructions() -> str:
    """What a tile takes in bfloat16 and in int8 on chips that kernels are only compiled for, and the predicted gain."""
    run = json.loads((RESULTS / "int8-instructions.json").read_text())
    chips = run["chips"].items()
    heads = [f"{facts['card']} ({chip}), {kind}" for chip, facts in chips for kind in ("bf16", "int8")]
    lines = [_row("instructions of a warp", *heads), _row("---", *["---"] * len(heads))]
    columns = [facts["counts"][kind] for _, facts in chips for kind in ("bf16", "int8")]
    names = {name: name for name in columns[0]} | {
        "registers": "registers a thread",
        "shared_memory": "shared memory, bytes",
        "loop_spills": "spills in the loop, bytes",
    }
    lines += [_row(title, *(f"{column[name]:,}" for column in columns)) for name, title in names.items()]
    cycles = [facts["predicted"][f"product_cycles_{kind}"] for _, facts in chips for kind in ("bf16", "int8")]
    lines.append(_row("cycles of the products, predicted", *(f"{x:,.0f}" for x in cycles)))
    for name, title in (("loop", "gain of the loop, predicted"), ("call", "gain of the call, predicted")):
        lines.append(_row(title, *(x for _, facts in chips for x in ("", f"{facts['predicted'][name]:.2f}x"))))
    return "\n".join([*lines, "", f"Triton {run['triton']}."])


def selection_cost(pattern: str = "selection-cost-*.json") -> str:
    """What choosing blocks costs of a forward, by shape, method, and rule."""
    run = latest(pattern)
    lines = [
        _row("shape", "method", "rule", "blocks kept", "forward, ms", "choosing, ms", "share", "by itself, ms"),
        "|---" * 8 + "|",
    ]
    for entry in run["entries"]:
        if "inside_ms" in entry:
            share = f"{100 * entry['share']:.1f} %"
            figures = f"{entry['inside_ms']:.3f}", f"{entry['cost_ms']:.3f}", share, f"{entry['select_ms']:.3f}"
            names = entry["shape"], entry["method"], entry["rule"]
            lines.append(_row(*names, f"{100 * entry['kept']:.1f} %", *figures))
    return "\n".join([*lines, "", f"{_machine(run)}; {run['started'][:10]}."])


def beside_sla() -> str:
    """The methods built on SLA, by their time over SLA's at about as many kept blocks."""
    run = latest("selection-cost-*.json")
    lines = [_row("shape", "method", "blocks kept", "forward, ms", "x SLA", "x SLA in tile order"), "|---" * 6 + "|"]
    known = {(x["shape"], x["method"], x["rule"]): x["inside_ms"] for x in run["entries"] if "inside_ms" in x}
    for entry in run["entries"]:
        if entry["method"] in ("SLA2", "SLA + VSA") and "inside_ms" in entry:
            slas = [known[entry["shape"], name, "mean"] for name in ("SLA", "SLA, tile order")]
            ratios = [f"{entry['inside_ms'] / x:.2f}" for x in slas]
            kept = f"{100 * entry['kept']:.1f} %"
            lines.append(_row(entry["shape"], entry["method"], kept, f"{entry['inside_ms']:.3f}", *ratios))
    return "\n".join([*lines, "", f"{_machine(run)}; {run['started'][:10]}."])


def _machine(run: dict) -> str:
    machine = run["machine"]
    commit = f", commit {machine['commit'][:7]}" if machine["commit"] else ""
    commit += " with uncommitted changes" if machine.get("uncommitted_changes") else ""
    return f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}{commit}"


def _machines(runs: list[dict]) -> str:
    return "; ".join(dict.fromkeys(map(_machine, runs)))


def _caption(run: dict, shape: str = "480p") -> str:
    sizes = run["shapes"][shape]
    sizes = f"B{sizes['batch']} H{sizes['heads']} L{sizes['length']} D{sizes['head_dim']}"
    return f"{_machine(run)}; {sizes}, {run['settings']['dtype']}; rested medians, {run['started'][:10]}."


TABLES = {
    "kernels_480p": kernels,
    "flex": lambda: kernels("flex-*.json"),
    "kernels_h3": lambda: kernels(shape="h3-5s"),
    "kernels_h3_15s": lambda: kernels(shape="h3-15s"),
    "methods": lambda: methods(given=False),
    "methods_480p": methods,
    "sla2_learning": sla2_learning,
    "shapes": shapes,
    "short": short,
    "methods_720p": lambda: methods("720p"),
    "methods_paper": lambda: methods("paper"),
    "methods_d64": lambda: methods("d64"),
    "counters": counters,
    "speed": speed,
    "wan": wan,
    "wan_runs": lambda: wan(every_run=True),
    "steps": steps,
    "steps_runs": lambda: steps(every_run=True),
    "parallel": parallel,
    "fine_tune": fine_tune,
    "fine_tune_2k": lambda: fine_tune("fine_tune_2k.json"),
    "cpu": cpu,
    "order": order,
    "host": host,
    "quality": quality,
    "quality_long": lambda: quality("quality-long-*.json", "sparse5-tile"),
    "quality_scratch": lambda: quality("quality-scratch-*.json", "sparse5-tile"),
    "quality_scratch_1": lambda: quality("quality-scratch-*.json", "sparse5-tile", seed=1),
    "quality_tiny": lambda: quality_tiny("tiny"),
    "quality_tiny_taught": lambda: quality_tiny_taught("rates", "distillation"),
    "quality_tiny_1000": lambda: quality_tiny_taught("1000", "1000-distillation"),
    "quality_tiny_1000_levels": lambda: quality_tiny_levels("1000"),
    "quality_tiny_router": lambda: quality_tiny("tiny-router"),
    "quality_tiny_per_head": lambda: quality_tiny_with("per-head", router=("dense",)),
    "quality_tiny_vsa_router": lambda: quality_tiny_with("vsa-router", router=("dense",)),
    "quality_tiny_vsa_router_levels": lambda: quality_tiny_levels("vsa-router"),
    "quality_tiny_router_settings": lambda: quality_tiny_with(
        "router-settings", per_head=("blocks", "blocks, router per head (rate x 10)"), router=("dense",)
    ),
    "quality_tiny_per_head_levels": lambda: quality_tiny_levels("per-head"),
    "quality_tiny_large": lambda: quality_tiny("tiny-large"),
    "quality_tiny_large_14400": lambda: quality_tiny("tiny-large-14400"),
    "quality_tiny_14400_per_head": lambda: quality_tiny("tiny-14400-per-head"),
    "quality_tiny_14400_routers": lambda: quality_tiny("tiny-14400-routers"),
    "quality_summary": quality_summary,
    "quality_tiny_14400_levels": lambda: quality_tiny_levels("14400"),
    "quality_tiny_14400": lambda: quality_tiny_taught("14400", "14400-distillation"),
    "quality_tiny_before": lambda: quality_tiny("tiny", "2026-11-29"),
    "attention_mass": attention_mass,
    "branches": branches,
    "int8_instructions": int8_instructions,
    "selection_cost": selection_cost,
    "tile_order_cost": lambda: selection_cost("tile-order-cost-*.json"),
    "beside_sla": beside_sla,
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """The page with its tables regenerated, percentages without a space."""
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]().replace(' %', '%')}\n\n{match[4]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
