"""`benchmarks/sglang_h3.py`, which needs a GPU: what it loads and what it calls, on the CPU."""

import importlib.util
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


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    spec = importlib.util.spec_from_file_location("sglang_h3_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main([])


def test_the_files_of_the_backend_suffice(pytestconfig):
    require(pytestconfig, "sglang", "sglang")
    folder = pytestconfig.getoption("--sglang") or Path(importlib.util.find_spec("sglang").origin).parent.parent
    command = [sys.executable, "-c", FILES_ONLY, str(SCRIPT), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["439", "2", "64", "True"]
