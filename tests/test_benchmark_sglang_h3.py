"""`benchmarks/sglang_h3.py`, which needs a GPU: what it loads and what it calls, on the CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_hosts import require

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sglang_h3.py"

# In a process of its own, since its stand-ins for the rest of SGLang would stay.
FILES_ONLY = """
import importlib.util, sys, pathlib, torch, foveal
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.CLIPS = {"tiny": ((5, 8, 9), (70, 9))}
script.HEAD_DIM = 64
backend = script.load_backend(pathlib.Path(sys.argv[2]), True)
step, call = script.make_call(backend, "tiny", 2, 0.8, torch.device("cpu"))
layer = backend.VideoSparseAttentionH3Impl(
    num_heads=2, head_size=64, causal=False, softmax_scale=0.125, prefix="blocks.0.attn"
)
with foveal.patch("sglang", impl="torch"):
    metadata = backend.VideoSparseAttentionH3MetadataBuilder().build(**step)
    output = layer.forward_varlen(**call, attn_metadata=metadata)
assert metadata.num_video_tiles == 12 and metadata.num_prefix_tiles == 3
print(*output.shape, bool(output.isfinite().all()))
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import sglang_h3

    yield sglang_h3
    for name in ("sglang_h3", "result_page"):
        sys.modules.pop(name, None)


def test_without_a_gpu_it_says_so(script):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main([])


def test_the_files_of_the_backend_suffice(pytestconfig):
    require(pytestconfig, "sglang", "sglang")
    folder = pytestconfig.getoption("--sglang") or Path(importlib.util.find_spec("sglang").origin).parent.parent
    command = [sys.executable, "-c", FILES_ONLY, str(SCRIPT), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["439", "2", "64", "True"]


def test_the_page_shows_the_file_of_results(script):
    files = sorted((SCRIPT.parent / "results").glob("sglang-h3*.json"))
    if files:
        results = json.loads(files[-1].read_text(encoding="utf-8"))
        assert script.PAGE.tables() == script.tables(results, files[-1].name)
    else:
        assert script.PAGE.tables() == "Nobody has run it on a GPU yet."


def test_a_file_of_results_goes_into_the_page(script, monkeypatch, tmp_path):
    case = {"clip": "5 s", "tokens": 37760, "heads": 56, "sparsity": 0.9, "ratio": 1.5}
    case["milliseconds"] = {"sglang": 15.0, "foveal": 10.0}
    file, page = tmp_path / "sglang-h3.json", tmp_path / "page.md"
    machine = {"device": "a GPU", "torch": "2.13", "triton": "3.9"}
    file.write_text(json.dumps({"machine": machine, "cases": [case]}), encoding="utf-8")
    page.write_text(script.PAGE.file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", type(script.PAGE)("sglang_h3", page))
    script.main(["--page", str(file)])
    assert "| 5 s | 37,760 | 56 | 10% | 15.00 | 10.00 | 1.50x as fast |" in page.read_text(encoding="utf-8")
