"""`benchmarks/in_hosts.py`, which needs a GPU: what it compares and what it writes, on the CPU, in diffusers.

With ComfyUI and vLLM-Omni it runs on a CPU too: `--size smoke`.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from foveal.lab.bench.timing import CpuTimer
from foveal.layout import VideoGrid

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import in_hosts

    yield in_hosts
    for name in ("in_hosts", "result_page"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(script, monkeypatch):
    """A name among the sizes: a model so small that a step takes milliseconds."""
    size = script.Size("tiny", 1, 1, 64, VideoGrid(2, 8, 16), 4)
    monkeypatch.setitem(script.SIZES, "tiny", size)
    return size


def test_foveal_in_diffusers_is_compared_and_timed(script, tiny):
    with script.diffusers_host(tiny, torch.device("cpu"), None) as host:
        result = script.time_host(host, CpuTimer(), 2, 1)
        names = ["dense", *map(script.blocks_name, script.TRAINING_FREE)]
        assert list(result["milliseconds"]) == names
        assert all(len(times) == 2 for times in result["spans"].values())
        assert 0 < result["difference of everything"] < script.SAME < min(result["differences"].values())
        # A host in which foveal does not run: dense attention is what everyone computes.
        dense = host.candidates["dense"]
        unplugged = script.Host("1", dict.fromkeys(names, dense), dense)
        assert list(script.time_host(unplugged, CpuTimer(), 1, 1)["milliseconds"]) == ["dense"]


def test_topk_is_a_share_of_the_cubes(script, tiny):
    assert script.SIZES[script.FULL].topk(21) == 21
    assert script.SIZES[script.FULL].grid.num_cubes(script.VSA_TILE) == 168
    assert tiny.topk(21) == 1


def test_results_are_written_and_shown(script, tiny, monkeypatch, tmp_path):
    for module in ("comfy", "vllm_omni"):
        monkeypatch.setitem(sys.modules, module, None)
    file, page = tmp_path / "in-hosts.json", tmp_path / "page.md"
    script.main(["--size", "tiny", "--rounds", "1", "--output", str(file), "--commit", "abc"])
    results = json.loads(file.read_text())
    assert results["machine"]["commit"] == "abc"
    assert results["size"]["tokens"] == 256
    assert results["left_out"].keys() == {"ComfyUI", "vLLM-Omni"}
    page.write_text(script.PAGE.file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", type(script.PAGE)("in_hosts", page))
    script.main(["--page", str(file)])
    rows = re.findall(r"^\| diffusers [\d.]+ \| (.+) \| (\d+) \| ([\d.]+)x \|$", script.PAGE.tables(), re.MULTILINE)
    times = results["hosts"]["diffusers"]["milliseconds"]
    assert [row[0] for row in rows] == list(times)
    assert rows[0][2] == "1.00"
    assert "`in-hosts.json`" in script.PAGE.tables()
    # The page's other table stays.
    assert page.read_text().count("<!-- and ends -->") == 2
    shown_before = script.page_of([file])
    later, other = tmp_path / "later.json", tmp_path / "other.json"
    assert "vLLM-Omni was left out" in shown_before
    times["dense"] *= 2
    results["hosts"]["vLLM-Omni"] = results["hosts"]["diffusers"]
    later.write_text(json.dumps(results))
    shown = script.page_of([file, later])
    assert f"| dense | {times['dense']:.0f} |" in shown
    assert "`in-hosts.json`, `later.json`" in shown
    assert "ComfyUI was left out" in shown
    assert "vLLM-Omni was left out" not in shown
    other.write_text(json.dumps({**results, "machine": {**results["machine"], "torch": "1.0"}}))
    with pytest.raises(ValueError, match=r"--page takes files of one model and machine, .*other\.json"):
        script.page_of([file, other])


def test_the_page_shows_the_file_of_results(script):
    files = sorted((ROOT / "benchmarks" / "results").glob("in-hosts*.json"))
    if files:
        assert script.PAGE.tables() == script.page_of(files)
        gains, hosts = {}, {}
        for file in files:
            hosts |= json.loads(file.read_text(encoding="utf-8"))["hosts"]
        for host, found in hosts.items():
            dense, *others = found["milliseconds"].values()
            gains[host] = [dense / ms for ms in others]
        comfyui, vllm = (
            " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split())
            for page in ("comfyui", "vllm-omni")
        )
        said = "{:.2f} times faster than dense attention with 30% of the blocks, and {:.2f} times with 10%"
        assert said.format(*gains["ComfyUI"]) in comfyui
        assert "with 21 of 168 cubes it is {1:.2f} times faster".format(*gains["vLLM-Omni"]) in vllm
        assert "with the default of 64 it is {:.2f} times faster".format(*gains["vLLM-Omni"]) in vllm
    else:
        assert script.PAGE.tables() == "Nobody has timed them yet."


def test_without_a_gpu_it_says_so(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device, but for --size smoke"):
        script.main([])
