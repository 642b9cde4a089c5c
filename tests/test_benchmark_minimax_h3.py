"""`benchmarks/minimax_h3.py` at a tiny size: every arm runs, it writes what it measured, and goes on where it ended."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "minimax_h3.py"
TINY = ["--smoke", "--device", "cpu", "--clips", "5 s", "--layers", "1", "2", "--calls", "1", "--text-tokens", "8"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it shares code with another script
    spec = importlib.util.spec_from_file_location("minimax_h3_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Dynamo looks its functions up there
    spec.loader.exec_module(module)
    return module


def test_every_arm(script, tmp_path):
    path = tmp_path / "h3.json"
    script.main([*TINY, "--modes", "eager", "--rounds", "2", "--profile", "--output", str(path)])
    found = json.loads(path.read_text())
    group = found["figures"]["5 s, eager"]
    assert group["rounds"] == 2
    assert list(group["arms"]) == list(script.ARMS)
    for name, arm in group["arms"].items():
        assert arm["ran"] == ("torch" if script.ARMS[name].config else None)
        assert 0 < max(arm["profile"].values()) == next(iter(arm["profile"].values()))
        one, two = (arm["milliseconds"][layers] for layers in ("1", "2"))
        assert len(one) == len(two) == 2
        block = statistics.median(two) - statistics.median(one)
        assert arm["block_milliseconds"] == pytest.approx(block)
        assert arm["step_seconds"] == pytest.approx((statistics.median(one) + 49 * block) / 1e3)


def test_compiled_blocks(script, tmp_path):
    """Without a break in the graph; on a CPU by Dynamo only."""
    path, arms = tmp_path / "h3.json", ["VSA 10 %", "SLA 5 %", "no attention"]
    script.main([*TINY, "--modes", "compiled", "--arms", *arms, "--rounds", "1", "--output", str(path)])
    group = json.loads(path.read_text())["figures"]["5 s, compiled"]
    assert list(group["arms"]) == [script.DENSE, *arms]
    assert all(len(times) == 1 for arm in group["arms"].values() for times in arm["milliseconds"].values())


def test_goes_on_where_it_ended(script, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "more" / "second.json"
    few = [*TINY, "--modes", "eager", "--arms", "dense cuDNN", "VSA 10 %"]
    script.main([*few, "--rounds", "1", "--output", str(first)])
    former = json.loads(first.read_text())["figures"]["5 s, eager"]["arms"]["VSA 10 %"]["milliseconds"]
    script.main([*few, "--rounds", "3", "--output", str(second), "--resume", str(first)])
    found = json.loads(second.read_text())["figures"]["5 s, eager"]
    assert found["rounds"] == 3
    for layers, times in found["arms"]["VSA 10 %"]["milliseconds"].items():
        assert len(times) == 3
        assert times[:1] == former[layers]
    # What is there is not measured again.
    capsys.readouterr()
    script.main([*few, "--rounds", "3", "--output", str(second)])
    assert capsys.readouterr().out == ""
    script.main([*few, "--rounds", "4", "--output", str(second), "--budget-seconds", "0"])
    assert "out of time before the end of: 5 s, eager" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"second\.json has other settings"):
        script.main([*few, "--rounds", "4", "--text-tokens", "9", "--output", str(second)])


def test_what_is_known_before_the_first_round_is_kept(script, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "in_turns", stopped)
    file = tmp_path / "kept.json"
    with pytest.raises(KeyboardInterrupt):
        script.main(["--smoke", "--clips", "5 s", "--modes", "eager", "--device", "cpu", "--output", str(file)])
    group = json.loads(file.read_text())["figures"]["5 s, eager"]
    assert group["rounds"] == 0
    assert all("first_call_seconds" in arm for arm in group["arms"].values())


def test_a_wrong_arm_does_not_count(script, tmp_path, monkeypatch):
    """The attention of protected rows is exact in a sparse arm; a processor that only copies values is found out."""
    wrong = script.ARMS["no attention"]._replace(attention=True)

    def built(arm, *arguments):
        return original(script.ARMS["no attention"] if arm is wrong else arm, *arguments)

    original = script.arm_model
    monkeypatch.setattr(script, "arm_model", built)
    monkeypatch.setitem(script.ARMS, "VSA 10 %", wrong)
    path = tmp_path / "h3.json"
    with pytest.raises(SystemExit, match="1"):
        script.main([*TINY, "--modes", "eager", "--arms", "VSA 10 %", "--rounds", "1", "--output", str(path)])
    arm = json.loads(path.read_text())["figures"]["5 s, eager"]["arms"]["VSA 10 %"]
    assert "the attention of text and audio differs from" in arm["error"]
    assert "speedup" not in arm


@pytest.fixture
def training(script, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setitem(sys.modules, "minimax_h3", script)
    spec = importlib.util.spec_from_file_location("minimax_h3_training", SCRIPT.with_name("minimax_h3_training.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_training_step(training, tmp_path):
    path = tmp_path / "h3.json"
    training.main([*TINY, "--modes", "eager", "--rounds", "1", "--output", str(path)])
    found = json.loads(path.read_text())
    arms = found["figures"]["5 s, eager"]["arms"]
    assert list(arms) == list(training.TRAINING_ARMS)
    assert all(len(times) == 1 for arm in arms.values() for times in arm["milliseconds"].values())
    dense, teacher = arms[training.DENSE], arms[training.TEACHER]
    # Rank 32 on four projections of 48 and 64 wide, each to 64 or from it.
    assert dense["trained_parameters_of_a_block"] == 4 * 32 * (48 + 64)
    # The gates, with a bias.
    assert arms["VSA 10 %"]["trained_parameters_of_a_block"] - dense["trained_parameters_of_a_block"] == 49 * 64
    assert "speedup" not in teacher
    for name in ("VSA 10 %", "SLA 5 %"):
        assert arms[name]["ran"] == "torch"
        taught = arms[name]["step_seconds"] + teacher["step_seconds"]
        assert arms[name]["step_seconds_with_teacher"] == pytest.approx(taught)
        assert arms[name]["speedup_with_teacher"] == pytest.approx(dense["step_seconds"] / taught)


def test_an_arm_that_does_not_learn_does_not_count(training, tmp_path, monkeypatch):
    """One factor of its LoRA gets a gradient of zeros."""

    def chosen(model, trainable):
        choose_trained(model, trainable)
        for name, parameter in model.named_parameters():
            if "to_v.lora_A" in name:
                parameter.register_hook(torch.zeros_like)

    choose_trained = training.choose_trained
    monkeypatch.setattr(training, "choose_trained", chosen)
    path = tmp_path / "h3.json"
    with pytest.raises(SystemExit, match="1"):
        training.main([*TINY, "--modes", "eager", "--arms", "VSA 10 %", "--rounds", "1", "--output", str(path)])
    assert (
        "no gradient for transformer_blocks.0.attn.to_v.lora_A"
        in json.loads(path.read_text())["figures"]["5 s, eager"]["arms"]["VSA 10 %"]["error"]
    )


def test_on_two_processes(tmp_path):
    """`benchmarks/context_parallel.py` with MiniMax-H3: both ranks give what one gives, and it writes the times."""
    script, sizes = SCRIPT.with_name("context_parallel.py"), ["--size", "h3-tiny", "--layers", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    how = ["--resolution", "5 s", "--arms", "dense", "VSA 10 %", "--rounds", "1", "--no-compile"]
    subprocess.run([*command, *sizes, *how, "--output", str(tmp_path)], check=True, timeout=600)
    (path,) = tmp_path.glob("context-parallel-h3-tiny-*.json")
    found = json.loads(path.read_text())
    assert found["settings"]["layers"] == 2
    assert list(found["calls"]) == ["dense", "VSA 10 %"]
    for arm in found["calls"].values():
        assert len(arm["single"]["all_ms"]) == len(arm["parallel"]["all_ms"]) == 1
        assert arm["relative_difference"] < 1e-5


def test_packs_as_the_pipeline_does(script):
    """The clips' shapes at full size; the layout's own code makes them, so only the seconds and the canvas are ours."""
    with torch.device("meta"):
        model = script.MiniMaxH3Transformer3DModel(num_layers=0, **script.SMOKE)
    expected = {"5 s": (37, 414), "10 s": (72, 810), "15 s": (102, 1150)}
    for clip, (frames, audio) in expected.items():
        shape = script.pack(script.CLIPS[clip], 5, model.to_empty(device="cpu"), smoke=False).shape
        assert shape["pixels"] == [768, 1344]
        assert (shape["latent_frames"], shape["audio_tokens"]) == (frames, audio)
        assert shape["tokens"] == frames * 24 * 42 + audio + 5


def test_full_width(script):
    """What the docstring says of its memory, and the dtypes of the released weights."""
    with torch.device("meta"):
        model = script.MiniMaxH3Transformer3DModel(num_layers=1)
    block = sum(x.numel() for x in model.transformer_blocks[0].parameters())
    assert 2 * block / 2**30 == pytest.approx(1.2, abs=0.01)
    kept = set(model._keep_in_fp32_modules)
    float32 = {x.split(".")[0] for x in dict(model.named_parameters()) if kept & set(x.split("."))}
    assert float32 == {"proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out"}


def test_figures_of_the_page_are_those_of_the_run():
    root = SCRIPT.parent.parent
    page = (root / "docs" / "minimax-h3.md").read_text()
    names = re.findall(r"benchmarks/results/(minimax-h3-\S+\.json)", page)
    assert len(names) == 2
    runs = [json.loads((root / "benchmarks" / "results" / name).read_text())["figures"] for name in names]
    groups = [(name, found) for name, found in runs[0].items() if "eager" in name]
    groups += sorted(runs[1].items(), key=lambda group: int(group[0].split()[0]))
    rows = [
        f"| {group} | {arm} | {x['block_milliseconds']:.1f} | {x['step_seconds']:.2f} | {x['speedup']:.2f}x |"
        for group, found in groups
        for arm, x in found["arms"].items()
        if "error" not in x
    ]
    assert re.findall(r"^\| \d+ s, .*$", page, re.M) == rows
    arms = [found["arms"] for _, found in groups]
    bounds = [x["no attention"]["block_milliseconds"] / x["dense cuDNN"]["block_milliseconds"] for x in arms]
    more = [
        (x["VSA 10 %"]["peak_bytes"] - x["dense cuDNN"]["peak_bytes"]) / 2**30
        for x in (runs[1][f"{seconds} s, compiled"]["arms"] for seconds in (5, 10, 15))
    ]
    words = " ".join(page.split())
    said = "VSA took {:.1f} GiB more than dense attention at 5 s, {:.1f} GiB at 10 s, and {:.1f} GiB at 15 s"
    assert said.format(*more) in words
    log = (root / "benchmarks" / "results" / "minimax-h3-memory-nvidia-h200-2026-11-30.log").read_text()
    grouped = re.findall(r"^(\d+) s, compiled: (.+?): .*'peak_bytes': (\d+)}$", log, re.MULTILINE)
    peaks = {(seconds, arm): int(size) / 2**30 for seconds, arm, size in grouped}
    late, early = ([peaks[s, arm] for arm in ("dense cuDNN", "VSA 10 %", "SLA 5 %")] for s in ("15", "10"))
    assert max(late) == late[0]
    assert max(early) == early[0]
    assert "at 15 s dense attention takes {:.2f} GiB, VSA {:.2f}, and SLA {:.2f}".format(*late) in words
    assert "at 10 s they take {:.2f}, {:.2f}, and {:.2f}".format(*early) in words
    assert all(x["SLA 5 %"]["peak_bytes"] <= x["dense cuDNN"]["peak_bytes"] + 2**20 for x in arms)
    assert f"takes {100 * min(bounds):.0f} to {100 * max(bounds):.0f}% of a dense one's time" in page


def test_parts_of_a_compiled_block_are_those_of_its_profile():
    root = SCRIPT.parent.parent
    words = " ".join((root / "docs" / "minimax-h3.md").read_text().split())
    file = root / "benchmarks" / "results" / "minimax-h3-compiled-nvidia-h200-2026-11-30.json"
    assert f"`{file.name}`" in words
    figures = json.loads(file.read_text())["figures"]
    arms = figures["15 s, compiled"]["arms"]
    took = {name: arm["block_milliseconds"] for name, arm in arms.items()}

    def part(arm, *kernels):
        return sum(ms for name, ms in arms[arm]["profile"].items() if name.startswith(kernels))

    sla, vsa, dense = "SLA 5 %", "VSA 10 %", "dense cuDNN"
    choice = ("_pick_kernel", "_score_kernel", "_pool_kernel", "_key_state_kernel", "_pooled_fwd_kernel")
    protected, cubes = "cudnn_generated_fort_native_sdpa", part(vsa, "cubes_fwd_kernel")
    gates = part(vsa, "nvjet_sm90_tst_256x152_64x4_1x2_h_bz_coopA_bias")
    assert f"Where SLA's {took[sla] - took['no attention']:.0f} ms go" in words
    assert f"{part(sla, 'block_sparse_fwd_kernel'):.0f} ms in the block-sparse kernel" in words
    assert f"{part(sla, protected):.0f} ms in dense attention" in words
    assert f"{part(sla, 'nvjet_sm90_tst_320x128'):.0f} ms in the projection" in words
    assert f"{part(sla, *choice):.0f} ms in pooling" in words
    assert f"Where VSA's {took[vsa] - took['no attention']:.0f} ms go" in words
    assert f"{cubes:.0f} ms in the kernel of the cubes, {gates:.0f} ms in the projection of the gates" in words
    assert f"{part(vsa, protected):.0f} ms in dense attention for the protected rows, " in words
    assert f"{part(vsa, '_gather_cubes_kernel'):.0f} ms in copies to cubes, and {part(vsa, *choice):.0f} ms" in words

    def work(seconds):
        """TFLOP of the cubes' kernel, of which every query cube reads a tenth and all protected tiles."""
        shape = figures[f"{seconds} s, compiled"]["shape"]
        tiles = -(-shape["latent_frames"] // 4) * 6 * 11
        read = -(-tiles // 10) + -(-shape["text_tokens"] // 64) + -(-shape["audio_tokens"] // 64)
        return 4 * 56 * 128 * (64 * tiles) * (64 * read) / 1e12, 64 * tiles / shape["video_tokens"] - 1

    left = took[dense] / 3.4 - took["no attention"] - gates - part(vsa, protected)
    tokens = figures["15 s, compiled"]["shape"]["tokens"]
    flops, padded = work(15)
    assert f"3.4x would leave {left:.0f} ms to the kernel" in words
    assert f"{flops / left * 1e3:.0f} TFLOP/s for its {flops:.0f} TFLOP" in words
    dense_rate = 4 * 56 * 128 * tokens**2 / 1e9 / part(dense, protected)
    assert f"reaches {dense_rate:.0f} in the same run, and this one {flops / cubes * 1e3:.0f}," in words
    rows = 64 * (-(-102 // 4) * 6 * 11 + 256 // 64 + -(-1150 // 64))
    memory = {"3.0 GiB": 2 * rows * 7168 * 2, "0.07 GiB": 5376 * 7168 * 2}
    for said, size in memory.items():
        assert f"{size / 2**30:.{len(said.split()[0]) - 2}f} GiB" == said
        assert said in words
    flops, more_padded = work(5)
    arms = figures["5 s, compiled"]["arms"]
    cubes = arms[vsa]["profile"]["cubes_fwd_kernel"]
    assert f"it reaches {flops / cubes * 1e3:.0f}." in words
    gates, protected = (part(vsa, name) for name in ("nvjet_sm90_tst_128x288_64x4_2x1_v_bz_coopA_bias", protected))
    took = {name: arm["block_milliseconds"] for name, arm in arms.items()}
    left, beside = took[dense] / 2.0 - took["no attention"] - gates - protected, part(vsa, "_gather_cubes", *choice)
    assert (
        f"would leave {left:.1f} ms, of which copies, scores, the choice, and the coarse branch take {beside:.1f} ms"
        in words
    )
    rate = 4 * 56 * 128 * figures["5 s, compiled"]["shape"]["tokens"] ** 2 / 1e9 / part(dense, "cudnn_generated_fort")
    said = "{:.0f} TFLOP/s for the kernel's {:.1f} TFLOP, where cuDNN's dense kernel reaches {:.0f}."
    assert said.format(flops / (left - beside) * 1e3, flops, rate) in words
    assert f"which costs {100 * padded:.0f}% more rows at 15 s and {100 * more_padded:.0f}% at 5 s" in words
    again = [figures[f"{seconds} s, compiled"]["arms"][arm]["speedup"] for seconds in (5, 15) for arm in (vsa, sla)]
    said = "{:.2f}x with VSA and {:.2f}x with SLA at 5 s, and {:.2f}x and {:.2f}x at 15 s"
    assert said.format(*again) in words


def test_figures_with_a_router_are_those_of_their_runs():
    root = SCRIPT.parent.parent
    results = root / "benchmarks" / "results"
    page = (root / "docs" / "minimax-h3.md").read_text()
    section = page[page.index("### With a router") : page.index("### A training step")]
    names = re.findall(r"`(minimax-h3-compiled-\S+\.json)`", section)
    assert len(names) == 2
    rows, speedups = [], {}
    for name in names:
        ((group, found),) = json.loads((results / name).read_text())["figures"].items()
        clip, mode = group.split(", ")
        for arm, x in found["arms"].items():
            times = f"{x['block_milliseconds']:.1f} | {x['step_seconds']:.2f} | {x['speedup']:.2f}x"
            rows.append(f"| {mode}, {clip} | {arm} | {times} |")
            speedups[clip, arm] = x["speedup"]
    assert re.findall(r"^\| compiled, .*$", section, re.M) == rows
    said = "**With 5% of the cubes VSA reaches {:.2f}x at 5 s and {:.2f}x at 15 s.**"
    assert said.format(*(speedups[clip, "VSA 5 %, router"] for clip in ("5 s", "15 s"))) in section
    assert all(
        abs(speedups[clip, "VSA 10 %, router"] / speedups[clip, "VSA 10 %"] - 1) < 0.02 for clip in ("5 s", "15 s")
    )


def test_figures_of_training_on_two_gpus_are_those_of_their_runs():
    root = SCRIPT.parent.parent
    results = root / "benchmarks" / "results"
    words = " ".join((root / "docs" / "minimax-h3.md").read_text().split())
    log = (results / "minimax-h3-whole-training-nvidia-h200-2026-11-30.log").read_text()
    rate = int(re.findall(r"^step 4 of 4: loss \S+ ([\d,]+) tokens/s", log, re.M)[0].replace(",", ""))
    (grid,) = {tuple(map(int, x)) for x in re.findall(r"^\d+ +(\d+)x(\d+)x(\d+) ", log, re.M)}
    assert f"A step takes {2 * math.prod(grid) / rate:.1f} s, the teacher included" in words
    run = json.loads((results / "train-scaling-minimax-h3-nvidia-h200-2026-11-30.json").read_text())
    off = 100 * run["largest_relative_difference"]
    assert f"the losses of two GPUs differ from those of one by at most {off:.2f}%" in words


def test_figures_of_a_training_step_are_those_of_its_run():
    root = SCRIPT.parent.parent
    page = (root / "docs" / "minimax-h3.md").read_text()
    (name,) = re.findall(r"`(minimax-h3-training-\S+\.json)`", page)
    (found,) = json.loads((root / "benchmarks" / "results" / name).read_text())["figures"].values()
    for arm, x in found["arms"].items():
        row = f"| {arm} | {x['block_milliseconds']:.0f} | {x['step_seconds']:.1f} |"
        if "speedup" in x:
            row += f" {x['speedup']:.2f}x |"
        if "speedup_with_teacher" in x:
            row += f" {x['step_seconds_with_teacher']:.1f} | {x['speedup_with_teacher']:.2f}x |"
        assert row in page
    more, weights = found["arms"]["VSA 10 %"]["peak_bytes"] / 2**30, 61.7 + 50 * 5376 * 7168 * 2 / 2**30
    kept = found["shape"]["tokens"] * 5376 * 2 / 2**30
    words = " ".join(page.split())
    assert f"weights and gates take {weights:.0f} GiB, VSA's step with three blocks took {more:.0f} GiB more" in words
    assert f"47 keeps its input of {kept:.2f} GiB, which makes {weights + more + 47 * kept:.0f} GiB" in words
    assert f"halve the weights: {weights / 2 + more + 47 * kept:.0f} GiB on each" in words
    run = json.loads(max((root / "benchmarks" / "results").glob("context-parallel-h3-*.json")).read_text())["calls"]
    said = "is {:.2f} times faster with VSA, and {:.2f} times with dense".format(
        *(run[arm]["speedup"] for arm in ("VSA 10 %", "dense"))
    )
    assert said in " ".join(page.split())
