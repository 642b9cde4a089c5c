"""`foveal bench`: the whole path on the CPU at a tiny size, the gate, the arithmetic of the figures, files, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal import SLAConfig, VSAConfig, attention_cost, select_blocks
from foveal.lab import cli
from foveal.lab.bench import __main__ as module_main
from foveal.lab.bench import ahead, report, timing
from foveal.lab.bench import machine as bench_machine
from foveal.lab.bench.break_even import break_evens
from foveal.lab.bench.candidates import (
    Candidate,
    Problem,
    candidates_for,
    dense_flops,
    flex_block_mask,
)
from foveal.lab.bench.gate import Gate
from foveal.lab.bench.run import BenchSettings, add_ratios, figures, run_bench
from foveal.lab.bench.shapes import SHAPES, Inputs, Shape, shape_of_length
from foveal.lab.bench.timing import CpuTimer, measure
from foveal.layout import VideoGrid
from foveal.output_folder import LIST_FILE

SMALL_GRID = VideoGrid(5, 8, 9)
CPU = torch.device("cpu")
CHOSEN = [
    "SDPA",
    "block-sparse 128x64 12.5 %, torch",
    "SLA 64x64 marginal, auto",
    "SLA 128x64 all, auto",
    "VSA 12.5 %, both gates, auto",
    "SLA 64x64 marginal, selection given, auto",
]
SETTINGS = BenchSettings(device="cpu", length=600, quick=True, gate_grid=SMALL_GRID)


class FakeTimer:
    """Hands out times by the order in which functions first appear; every function runs once."""

    def __init__(self) -> None:
        self.seen = []

    def _time(self, function) -> float:
        if function not in self.seen:
            function()
            self.seen.append(function)
        return 1.0 + self.seen.index(function)

    def burst(self, function, calls):
        return [self._time(function)] * calls

    def sustained(self, function, calls):
        return 2 * self._time(function)

    def host(self, function, calls):
        return 3 * self._time(function)


def by_name(*starts):
    return [c for c in candidates_for("cpu") if c.name.startswith(starts)]


def spoiled(candidate, spoil):
    """The candidate with its output passed through `spoil`."""

    def build(inputs):
        problem = candidate.build(inputs)
        return dataclasses.replace(problem, run=lambda *tensors: spoil(problem.run(*tensors)))

    return dataclasses.replace(candidate, build=build)


def test_end_to_end(tmp_path, capsys, monkeypatch):
    """Through the module's own command line, in float32 and with real clocks."""
    chosen = [c for c in candidates_for("cpu") if c.name in CHOSEN]
    monkeypatch.setattr(report, "run_bench", lambda settings, **rest: run_bench(SETTINGS, candidates=chosen, **rest))
    assert module_main.main(["--device", "cpu", "--length", "600", "--quick", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert results["schema"] == 2
    assert set(results) == {"schema", "started", "settings", "machine", "shapes", "results", "break_even"}
    assert results["break_even"] == []  # of one length
    assert results["shapes"]["length 600"] == {
        "batch": 1, "heads": 2, "length": 600, "head_dim": 64, "grid": [4, 10, 15], "before": []
    }  # fmt: skip
    assert results["machine"]["torch"] == torch.__version__
    assert {"commit", "uncommitted_changes", "driver", "cuda", "triton", "foveal"} <= set(results["machine"])

    entries = results["results"]
    assert [entry["name"] for entry in entries] == CHOSEN
    assert {entry["kind"] for entry in entries} == {"dense", "kernel", "method"}
    for entry in entries:
        assert (entry["status"], entry["reason"]) == ("ok", None)
        assert set(entry["passes"]) == {"forward", "backward"}
        for own in entry["passes"].values():
            assert 0 < own["rested_ms"] < 1e4
            assert len(own["rested_all_ms"]) == 9
            assert own["executed_tflops"] > 0
            assert set(own["ratios"]) == {"SDPA"}
        if entry["ours"]:
            for where in ("small", "heads"):
                errors = entry["errors"][where]
                assert {"output", "grad_query", "grad_key", "grad_value"} <= set(errors)
                assert 0 < max(errors.values()) < 1e-4
    printed = capsys.readouterr().out
    assert "SLA 64x64 marginal, selection given" in printed
    assert str(path) in printed
    assert path.stem.endswith(results["started"][11:19].replace(":", ""))


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from foveal.lab.bench.plot import write_plot

    chosen = [*by_name("SDPA"), *by_name("block-sparse 64x64"), *by_name("SLA 64x64")]
    results = run_bench(SETTINGS, candidates=chosen, timer=FakeTimer())
    write_plot(tmp_path / "figure.png", results)
    pictures = [(tmp_path / "figure.png").read_bytes()]
    # A run of the methods only has no empty half.
    write_plot(tmp_path / "half.png", results | {"results": [x for x in results["results"] if x["kind"] != "kernel"]})
    pictures.append((tmp_path / "half.png").read_bytes())
    sizes = [(int.from_bytes(p[16:20]), int.from_bytes(p[20:24])) for p in pictures if p.startswith(b"\x89PNG")]
    (width, height), (half_width, half_height) = sizes
    assert width == half_width == 1504
    assert half_height < 0.7 * height


@pytest.mark.parametrize("name", ["block-sparse 64x64 12.5 %", "SLA 64x64 marginal", "VSA 12.5 %"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda output: output * 1.001,
        lambda output: output + 0.01 * (output - output.detach()),
        lambda output: torch.where(torch.arange(output.shape[2])[:, None] == 5, float("nan"), output),
    ],
    ids=["output", "gradients alone", "NaN"],
)
def test_gate_catches_wrong_results(name, spoil):
    right = by_name(name)[0]
    timer = FakeTimer()
    results = run_bench(SETTINGS, candidates=[*by_name("SDPA"), spoiled(right, spoil)], timer=timer)
    dense, wrong = results["results"]
    assert dense["status"] == "ok"
    assert wrong["status"] == "failed"
    assert "exceeds" in wrong["reason"] or "not finite" in wrong["reason"]
    assert wrong["passes"] == {}
    assert len(timer.seen) == 2, "only the dense passes were timed"


def test_gate_at_the_timed_length_catches_one_wrong_block():
    """Right at the small size, wrong in one block of the last head at the timed one."""
    right = by_name("block-sparse 128x64 5 %")[0]
    timed = shape_of_length(600).length

    def spoil(output):
        scale = torch.ones_like(output)
        if output.shape[2] == timed:
            scale[:, -1, -24:] = 1.01
        return output * scale

    (entry,) = run_bench(SETTINGS, candidates=[spoiled(right, spoil)], timer=FakeTimer())["results"]
    assert entry["status"] == "failed"
    assert "small" in entry["errors"]
    assert "heads" not in entry["errors"]


def test_gate_catches_a_wrong_selection():
    right = by_name("SLA 64x64 marginal")[0]

    def build(inputs):
        problem = right.build(inputs)

        def select(query, key):
            return select_blocks(query.roll(64, 2), key, block_q=64, block_k=64, keep_ratio=0.05, drop_ratio=0.1)

        return dataclasses.replace(problem, select=select)

    wrong = dataclasses.replace(right, build=build)
    (entry,) = run_bench(SETTINGS, candidates=[wrong], timer=FakeTimer())["results"]
    assert entry["status"] == "failed"
    assert "labels differ from float64" in entry["reason"]


def test_others_that_do_not_run_and_impls_that_refuse_are_skipped():
    def build(inputs):
        raise ImportError("no such package")

    missing = Candidate("peer", "peer", "kernel", False, build, dense_flops)
    refused = candidates_for("cpu", only="kernels", impls=("triton",))[1]
    results = run_bench(SETTINGS, candidates=[missing, refused], timer=FakeTimer())
    assert [entry["status"] for entry in results["results"]] == ["skipped", "skipped"]
    first, second = (entry["reason"] for entry in results["results"])
    assert first == "ImportError: no such package"
    assert 'impl="triton" cannot run here' in second


def test_a_failure_of_ours_is_no_skip(tmp_path, monkeypatch):
    def build(inputs):
        raise RuntimeError("kernel launch failed\nat some line")

    broken = Candidate("broken", "ours", "kernel", True, build, dense_flops)
    monkeypatch.setattr(report, "run_bench", lambda settings, **rest: run_bench(SETTINGS, candidates=[broken], **rest))
    assert report.bench(SETTINGS, tmp_path) == 1
    (path,) = tmp_path.glob("*.json")
    (entry,) = json.loads(path.read_text())["results"]
    assert (entry["status"], entry["reason"]) == ("failed", "RuntimeError: kernel launch failed")


def test_ratios_from_known_times():
    def entry(task, kind, milliseconds, flops):
        own = figures([9.0, milliseconds, 0.5], 2 * milliseconds, 1.0, flops, 8e12)
        return {"task": task, "kind": kind, "passes": {"forward": own}}

    dense, flash, ours = entries = [
        entry("SDPA cuDNN", "dense", 4.0, 8e12),
        entry("SDPA flash", "dense", 8.0, 8e12),
        entry("block-sparse", "kernel", 1.0, 1e12),
    ]
    add_ratios(entries)
    own = ours["passes"]["forward"]
    assert own["rested_ms"] == 1.0
    assert own["executed_tflops"] == pytest.approx(1e3)
    assert own["dense_equivalent_tflops"] == pytest.approx(8e3)
    assert own["ratios"]["SDPA cuDNN"] == pytest.approx(
        {"speedup": 4.0, "sustained_speedup": 4.0, "share_of_rate": 0.5}
    )
    assert own["ratios"]["SDPA flash"]["speedup"] == pytest.approx(8.0)
    assert dense["passes"]["forward"]["ratios"]["SDPA cuDNN"]["speedup"] == 1.0
    assert flash["passes"]["forward"]["ratios"]["SDPA cuDNN"]["speedup"] == pytest.approx(0.5)


def test_figures_of_a_run_follow_from_its_times():
    chosen = [*by_name("SDPA"), *by_name("block-sparse 64x64 12.5 %, torch")]
    settings = dataclasses.replace(SETTINGS, quick=False)
    dense, sparse = run_bench(settings, candidates=chosen, timer=FakeTimer())["results"]
    # In turns: dense forward 1 ms, sparse forward 2, dense backward 3, sparse backward 4, both 5 and 6.
    assert [dense["passes"][name]["rested_ms"] for name in ("forward", "backward", "both")] == [1, 3, 5]
    assert [sparse["passes"][name]["rested_ms"] for name in ("forward", "backward", "both")] == [2, 4, 6]
    # 600 tokens are 10 blocks, of which each row keeps one.
    forward = 4 * 2 * 640 * 64 * 64
    assert sparse["passes"]["forward"]["executed_tflops"] == pytest.approx(forward / 2e-3 * 1e-12)
    assert sparse["passes"]["backward"]["executed_tflops"] == pytest.approx(2.5 * forward / 4e-3 * 1e-12)
    assert sparse["passes"]["both"]["executed_tflops"] == pytest.approx(3.5 * forward / 6e-3 * 1e-12)
    assert dense["passes"]["forward"]["executed_tflops"] == pytest.approx(4 * 2 * 600**2 * 64 / 1e-3 * 1e-12)
    assert sparse["passes"]["both"]["ratios"]["SDPA"]["speedup"] == pytest.approx(5 / 6)
    assert sparse["passes"]["both"]["sustained_ms"] == 12
    assert sparse["passes"]["both"]["host_ms"] == 18


def test_candidates_take_turns():
    calls = []
    timer = CpuTimer()
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure(timer, functions, rounds=2, calls=1, seconds=0.0)
    assert "".join(calls) == "aabbaabb" + "abab"
    assert [len(rested) for rested, _, _ in times.values()] == [2, 2]


class FakeEvent:
    """Reads a clock that `tick` moves."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_cuda_timer_with_a_device_played_by_the_host(monkeypatch):
    synchronised, calls = [], []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(FakeEvent, "now", 0.0)

    def work():
        calls.append(len(calls))
        FakeEvent.now += 10.0 if len(calls) == 1 else 2.5

    timer = timing.CudaTimer(CPU, pause=0.0)
    assert timer.burst(work, 3) == [2.5, 2.5, 2.5], "the first call does not count"
    assert len(calls) == 4
    assert timer.sustained(work, 5) == 2.5
    assert len(calls) == 9
    assert synchronised == [CPU] * 4
    assert timer.host(work) < 1000, "the host's own clock, not the device's"
    assert len(calls) == 9 + timing.HOST_CALLS
    batches = timing.HOST_CALLS // timing.HOST_BATCH
    assert synchronised == [CPU] * (4 + batches + 1), "a few calls at a time wait for the device"


def test_peak_memory_leaves_out_what_is_returned(monkeypatch):
    allocated = iter((1000, 1000 + 4096 + 400 + 24))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(allocated))
    both = torch.zeros(100)
    assert timing.peak_memory(CPU, lambda: (both[:50], both[50:], torch.zeros(6))) == 4096


def test_flops_of_a_method_leave_out_what_the_call_does_not_run():
    shape = dataclasses.replace(shape_of_length(600), grid=SMALL_GRID)
    (inside, given) = [c for c in candidates_for("cpu") if c.task == "VSA 12.5 %"]
    cost = attention_cost(VSAConfig(keep_ratio=0.125), grid=SMALL_GRID, heads=2, head_dim=64)
    run = [part for part in cost.parts if part.name != "gates"]
    assert inside.flops(shape) == (
        sum(part.flops for part in run),
        sum(part.flops * {"fine": 2.5, "reorder": 0}.get(part.name, 2) for part in run),
    )
    assert given.flops(shape) == inside.flops(shape), "ranking takes none"
    (inside, given) = [c for c in candidates_for("cpu") if c.task == "SLA 64x64 marginal"]
    cost = attention_cost(SLAConfig(), grid=SMALL_GRID, heads=2, head_dim=64)
    assert inside.flops(shape) == (cost.flops, cost.backward_flops)
    assert given.flops(shape) == (cost.flops - cost.part("selection").flops, cost.backward_flops)


def test_shapes_of_packed_sequences_time_kernels_only(monkeypatch):
    """Those of MiniMax-H3: whole blocks of 64, one ratio, and fastvideo-kernel's two operators beside ours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shapes = BenchSettings(shapes=("h3",)).chosen_shapes()
    assert [shape.length for shape in shapes] == [37_760, 109_632]
    assert not any(shape.length % 64 for shape in shapes)
    with pytest.raises(ValueError, match=r"only must be 'kernels' for the shapes \['h3-15s'\]"):
        BenchSettings(shapes=("h3-15s",), only="methods")
    names = [x.name for x in candidates_for("cuda", only="kernels", quick=True, keep_ratios=shapes[0].keep_ratios)]
    sparse = [name for name in names if name.startswith("block-sparse 64x64")]
    others = [f"fastvideo-kernel {kind}" for kind in ("Triton", "TK")]
    assert sparse == [f"block-sparse 64x64 10 %, {impl}" for impl in ("triton", "gluon", "int8, triton", *others)]


def test_a_packed_shape_counts_its_protected_tokens():
    shape = Shape("packed", 1, 2, VideoGrid(3, 8, 9), 64, before=(70, 9), keep_ratios=(0.3,))
    (candidate,) = candidates_for("cpu", only="kernels", keep_ratios=shape.keep_ratios)[1:2]
    problem = candidate.build(Inputs(shape, device=CPU, dtype=torch.float32, seed=0))
    assert problem.grad.shape[2] == shape.length == 295
    assert problem.run(*problem.tensors).shape == problem.grad.shape
    # Five blocks of queries read one block each.
    assert candidate.flops(shape)[0] == 4 * 2 * (5 * 64) * 64 * 64
    assert ahead.run_job(ahead.job([candidate], (shape,), "cpu", torch.float32)) == [candidate.name]


def test_the_host_is_timed_in_fewer_calls_where_each_is_long(monkeypatch):
    asked = []
    timer = FakeTimer()
    timer.burst = lambda function, calls: [500.0]
    timer.host = lambda function, calls: asked.append(calls)
    timing.measure(timer, {"long": lambda: None}, rounds=1, calls=1, seconds=0.1)
    timer.burst = lambda function, calls: [0.5]
    timing.measure(timer, {"short": lambda: None}, rounds=1, calls=1, seconds=0.1)
    assert asked == [timing.HOST_MILLISECONDS // 500, timing.HOST_CALLS]


def test_candidates_of_a_gpu():
    names = [candidate.name for candidate in candidates_for("cuda")]
    assert names[:3] == ["SDPA cuDNN", "SDPA flash", "flash-attn-4"]
    assert {"block-sparse 64x64 5 %, triton", "block-sparse 64x64 5 %, int8, triton"} <= set(names)
    assert {"SLA 64x64 marginal, int8, auto", "VSA 12.5 %, int8, auto"} <= set(names)
    assert "block-sparse 128x128 12.5 %, FlexAttention" in names
    assert not any("FlexAttention" in candidate.name for candidate in candidates_for("cuda", quick=True))
    assert len(set(names)) == len(names)
    kinds = {candidate.kind for candidate in candidates_for("cuda", only="methods")}
    assert kinds == {"dense", "method"}


def test_candidates_by_parts_of_their_names():
    settings = BenchSettings(device="cpu", length=600, names=("SLA2 64x64", "torch"))
    (shape,) = settings.chosen_shapes()
    names = [candidate.name for candidate in settings.candidates(shape)]
    assert names[0] == "SDPA"
    assert {"SLA2 64x64, auto", "SLA2 64x64, selection given, auto", "block-sparse 64x64 5 %, torch"} <= set(names)
    assert all(name == "SDPA" or "SLA2 64x64" in name or "torch" in name for name in names)
    assert set(names) < {candidate.name for candidate in settings.candidates(shape, named=False)}
    with pytest.raises(ValueError, match=r"names must be parts of \[.*'VSA 12.5 %, auto'.*\], got 'SLA3'"):
        BenchSettings(device="cpu", length=600, names=("SLA2", "SLA3"))


def test_flex_attention_gets_the_same_blocks():
    """The last block is partial; without compiling, FlexAttention would not look at the lists."""
    selection = Inputs(shape_of_length(600), device=CPU, dtype=torch.float32, seed=0).random_selection(128, 128, 0.4)
    mask = flex_block_mask(selection)
    assert torch.equal(mask.to_dense().bool(), selection.critical_mask())
    assert mask.seq_lengths == (600, 600)
    assert not mask.kv_num_blocks.any(), "no block needs a mask inside"
    assert torch.equal(mask.full_q_num_blocks, selection.critical_mask().sum(2, dtype=torch.int32))


def test_bfloat16_goes_through_the_gate():
    """The dtype of the GPU, on the CPU's implementation, at both sizes."""
    shape = shape_of_length(600)
    for candidate in (*by_name("block-sparse 128x128 12.5 %"), by_name("SLA 128x64 all")[0], by_name("VSA 12.5 %")[0]):
        problem = candidate.build(Inputs(shape, device=CPU, dtype=torch.bfloat16, seed=0))
        for errors in (
            Gate().check_whole(candidate, problem),
            Gate().check_heads(candidate, problem, ((0, 0), (0, 1))),
        ):
            assert 1e-4 < errors["output"] < 1e-2


def test_inputs_are_views_that_depend_on_the_seed_alone():
    shape = SHAPES["480p"]
    assert (shape.length, SHAPES["720p"].length) == (32760, 75600)
    small = shape_of_length(97)
    assert (small.grid.shape, small.length) == ((1, 1, 97), 97)
    first, second, other = (Inputs(small, device=CPU, dtype=torch.float32, seed=seed) for seed in (3, 3, 4))
    key = first.tensors("key")[0]
    assert key.shape == (1, 2, 97, 64)
    assert key.transpose(1, 2).is_contiguous()
    (contiguous,) = first.tensors("key", contiguous=True)
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, key)
    assert torch.equal(second.tensors("query", "key")[1], key)
    assert not torch.equal(other.tensors("key")[0], key)
    assert not torch.equal(first.tensors("value")[0], key)


def test_json_is_written_aside_and_renamed(tmp_path):
    path = tmp_path / "results" / "file.json"
    report.write_json(path, {"value": 1})
    assert json.loads(path.read_text()) == {"value": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write_json(path, {"value": float("nan")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            report.write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert {file.name for file in path.parent.iterdir()} == {"file.json", LIST_FILE}


def test_file_name():
    results = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "started": "2026-01-31T23:59:58+00:00"}
    assert report.file_name(results) == "nvidia-h100-80gb-hbm3-2026-01-31-235958.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "device 'cpu' needs a length"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--shapes", "5k"], "unknown shape '5k'"),
        (["--only", "everything", "--device", "cpu"], "unknown only 'everything'"),
        (["--impl", "cuda"], "unknown impl 'cuda'"),
        (["--device", "cpu", "--length", "64", "--names", "SLA3"], "names must be parts of"),
        (["--device", "cpu", "--length", "64", "--shapes", "480p"], "give shapes or length"),
    ],
)
@pytest.mark.parametrize("main", ["cli", "module"])
def test_mistakes_end_with_one_line_and_status_2(main, arguments, message, capsys):
    if main == "cli":
        pytest.importorskip("tyro")
        status = cli.main(["bench", *arguments])
    else:
        status = module_main.main(arguments)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("main", ["cli", "module"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(main, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(report, "run_bench", lambda *args, **kwargs: pytest.fail("worked first"))
    arguments = ["--device", "cpu", "--length", "64", "--output", str(tmp_path / "file")]
    if main == "cli":
        pytest.importorskip("tyro")
        status = cli.main(["bench", *arguments])
    else:
        status = module_main.main(arguments)
    assert status == 2
    assert f"output {tmp_path}/file is a file; expected a folder" in capsys.readouterr().err


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytest.importorskip("tyro")
    assert cli.main(["bench", "--quick"]) == 2
    assert "the benchmark needs a CUDA device" in capsys.readouterr().err


def test_runs_without_rich_matplotlib_and_tyro(tmp_path):
    """As a module on a machine that has only torch: a plain table, a word about the plot, and the figures."""
    script = f"""
import sys
from pathlib import Path
for name in ("rich", "matplotlib", "tyro"):
    sys.modules[name] = None
from foveal.lab.bench import report
from foveal.lab.bench.candidates import candidates_for
from foveal.lab.bench.run import BenchSettings, run_bench
from foveal.layout import VideoGrid
from foveal.output_folder import LIST_FILE
chosen = [c for c in candidates_for("cpu") if c.name.startswith(("SDPA", "block-sparse 64x64 5 %"))]
run = lambda settings, **rest: run_bench(settings, candidates=chosen, **rest)
report.run_bench = run
settings = BenchSettings(device="cpu", length=128, quick=True, gate_grid=VideoGrid(1, 8, 9))
raise SystemExit(report.bench(settings, __import__("pathlib").Path({str(tmp_path)!r})))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "no plot: matplotlib is missing" in run.stdout
    assert "block-sparse 64x64 5 %, torch  " in run.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".jsonl"]


def test_problem_of_every_candidate_is_laid_out_like_its_gradient():
    inputs = Inputs(shape_of_length(120), device=CPU, dtype=torch.float32, seed=0)
    for candidate in candidates_for("cpu"):
        problem: Problem = candidate.build(inputs)
        assert len(problem.names) == len(problem.tensors)
        dims = [x.dim() for x in problem.tensors]
        assert dims == sorted(dims, reverse=True), "tensors with heads come first"
        with torch.no_grad():
            assert problem.run(*problem.tensors).shape == problem.grad.shape


def entry_of(shape: str, name: str, kind: str, **milliseconds: float) -> dict:
    passes = {
        which: {"rested_ms": 1.0, "sustained_ms": each, "host_ms": each / 2, "executed_tflops": 1.0}
        for which, each in milliseconds.items()
    }
    named = {"shape": shape, "name": name, "task": name, "impl": "auto", "kind": kind, "status": "ok"}
    return {**named, "passes": passes, "memory": {}}


def test_break_even_between_the_timed_lengths(capsys):
    """Dense time grows with the square of the length and sparse time not at all: they meet at 5,793 tokens."""
    shapes = {name: SHAPES[name].to_dict() for name in ("4k", "8k", "d64", "h3-5s")}
    entries = []
    for shape, dense in (("4k", 1.0), ("8k", 4.0), ("d64", 9.0)):
        entries += [
            entry_of(shape, "SDPA cuDNN", "dense", forward=dense, both=dense),
            entry_of(shape, "SLA", "method", forward=2.0, both=8.0),
            entry_of(shape, "sparse", "kernel", forward=2.0),
        ]
    for shape in shapes:
        add_ratios([entry for entry in entries if entry["shape"] == shape])
    results = {"shapes": shapes, "results": entries, "machine": {"device": "a GPU"}}
    results["break_even"] = break_evens(results, ("SDPA cuDNN", "SDPA flash"))
    forward, both = results["break_even"]
    assert (forward["name"], forward["pass"], forward["baseline"]) == ("SLA", "forward", "SDPA cuDNN")
    assert forward["tokens"] == round(4096 * 2**0.5)
    assert forward["host_ms"] == {"4096": 1.0, "8192": 1.0}
    assert both["tokens"] is None
    report.print_break_even(results)
    printed = capsys.readouterr().out
    assert "vs SDPA cuDNN: faster from about 5,793 tokens on" in printed
    assert "no faster at the longest measured length, 8,192 tokens" in printed
    assert "1.00 at 4,096, 1.00 at 8,192" in printed


def test_table_names_both_baselines_and_says_who_is_missing():
    def entry(name, kind, times, **rest):
        passes = {"forward": figures([times], times, times, 1e12, 1e12)} if times else {}
        base = {"shape": "480p", "name": name, "task": name, "kind": kind, "memory": {}, "status": "ok", "reason": None}
        return base | {"passes": passes} | rest

    entries = [
        entry("SDPA cuDNN", "dense", 4.0),
        entry("SDPA flash", "dense", 8.0),
        entry("SLA", "method", 0.5, memory={"forward": 2**20 * 7, "forward_backward": 0}),
        entry("peer", "kernel", None, status="skipped", reason="not installed"),
    ]
    add_ratios(entries)
    headings, rows, notes = report.table({"results": entries}, "480p")
    assert [len(row) for row in rows] == [len(headings)] * 3
    sla = dict(zip(headings, rows[2], strict=True))
    assert (sla["vs SDPA cuDNN"], sla["vs SDPA flash"], sla["extra MiB"]) == ("8.00x", "16.00x", "7")
    assert notes == ["SKIPPED peer: not installed"]
    alone = report.table({"results": [entries[0]]}, "480p")
    assert [heading for heading in alone[0] if heading.startswith("vs ")] == ["vs SDPA cuDNN"]
    assert len(alone[0]) == len(alone[1][0])


def test_processes_that_compile_ahead():
    """Each candidate once a shape; whatever fails is left out."""
    shapes = shape_of_length(600), shape_of_length(256)
    names = ["block-sparse 64x64 5 %, triton", "SLA 64x64 marginal, torch", "VSA 12.5 %, wide tile, auto"]
    some = [x for x in candidates_for("cpu", impls=("torch", "triton", "auto")) if x.name in names]
    assert [x.name for x in some] == names
    # The first refuses a CPU.
    assert sorted(ahead.run_job(ahead.job(some, shapes, "cpu", torch.float32))) == sorted(2 * names[1:])


def test_processes_agree_on_cache_keys():
    """What one process compiled another one finds."""
    code = "import json; from foveal.lab.bench.ahead import fix_cache_keys; print(json.dumps(fix_cache_keys()))"
    command, keys = [sys.executable, "-c", code], []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        keys.append(json.loads(made))
    assert keys[0] == keys[1]
    assert "foveal.kernels.triton.forward._block_sparse_fwd_kernel" in keys[0]


def test_compiling_ahead_is_shared_out(monkeypatch):
    jobs = []

    class Process:
        def __init__(self, command, **options):
            assert command[1:3] == ["-m", "foveal.lab.bench.ahead"]
            jobs.append(json.loads(command[3]))

        def wait(self, timeout=None):
            return 0

        def kill(self):
            pass

    monkeypatch.setattr(ahead.subprocess, "Popen", Process)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 32)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**34, 2**36))
    candidates, shapes = candidates_for("cuda", quick=True), (SHAPES["480p"], SHAPES["720p"])
    ahead.compile_ahead(candidates, shapes, torch.bfloat16, lambda line: None)
    assert len(jobs) == 3  # 16 GiB, some 5 a process
    names = [name for job in jobs for name in job["names"]]
    assert sorted(names) == sorted(x.name for x in candidates if x.ours and x.options.get("selection") != "given")
    assert {job["device"] for job in jobs} == {"cuda:1"}
    assert all([x["name"] for x in job["shapes"]] == ["480p", "720p"] for job in jobs)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**32, 2**36))
    ahead.compile_ahead(candidates, shapes, torch.bfloat16, lambda line: None)
    assert len(jobs) == 3


def test_the_commit_that_is_said_counts(monkeypatch):
    """A copy of a tree may carry an older commit's history and changes on it."""
    answers = {"status": " M file", "rev-parse": "0ldc0mm1t"}
    monkeypatch.setattr(
        bench_machine, "_run", lambda *command: next((answers[x] for x in command if x in answers), None)
    )
    found = [bench_machine.machine(CPU, commit) for commit in (None, "0ldc0mm1t", "newer")]
    assert [(x["commit"], x["uncommitted_changes"]) for x in found] == [
        ("0ldc0mm1t", True),
        ("0ldc0mm1t", True),
        ("newer", None),
    ]


def test_counters_of_each_candidate(tmp_path, capsys):
    """What Nsight Compute prints: lines of the program it ran, names, units, one line a kernel."""
    spec = importlib.util.spec_from_file_location("counters", Path(__file__).parent.parent / "benchmarks/counters.py")
    counters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counters)
    names = ["ID", "Kernel Name", *counters.COUNTERS.values()]
    units = ["", "", "ms", *["%"] * 6]
    kernels = ["cubes_fwd_kernel", "block_sparse_dq_kernel", "block_sparse_dkdv_kernel"] * 2
    rows = [[str(i), name, f"1,{i}00.5", *["81.239"] * 6] for i, name in enumerate(kernels)]
    (tmp_path / "ncu.csv").write_text(
        "a line\n" + "\n".join(",".join(f'"{x}"' for x in row) for row in [names, units, *rows])
    )
    (tmp_path / "like.json").write_text('{"machine": {"device": "A card"}}')
    command = ["--csv", str(tmp_path / "ncu.csv"), "--like", str(tmp_path / "like.json"), "--output", str(tmp_path)]
    path = counters.main([*command, "--candidates", "one", "two"])
    assert path.name.startswith("counters-a-card-")
    found = json.loads(path.read_text())["kernels"]
    assert [len(found[name]) for name in ("one", "two")] == [3, 3]
    assert (
        found["two"][0] | {"kernel": "cubes_fwd_kernel", "microseconds": 1300500.0, "l2_out": 81.24} == found["two"][0]
    )
    with pytest.raises(ValueError, match="expected the kernels of 3 candidates, found 2"):
        counters.main([*command, "--candidates", "one", "two", "three"])
    with pytest.raises(SystemExit):
        counters.main(command[:2])
    assert "--csv needs --like RESULT" in capsys.readouterr().err
