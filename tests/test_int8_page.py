"""The figures of docs/precision.md are in a file (`test_readme`), and the file is what the tool counts and predicts."""

import importlib.util
import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "results" / "int8-instructions.json"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load(ROOT / "benchmarks" / "int8_instructions.py")


def test_predictions_follow_from_counts(tool):
    for chip, facts in json.loads(FILE.read_text())["chips"].items():
        assert facts["predicted"] == pytest.approx(tool.predicted(chip, facts["counts"]))
        counts, predicted = facts["counts"], facts["predicted"]
        # What the page says: products bound the loop. A scheduler issues one instruction a cycle.
        assert all(counts[kind]["all"] < predicted[f"product_cycles_{kind}"] for kind in counts)


def test_counts_are_those_of_the_kernels(tool):
    run = json.loads(FILE.read_text())
    if run["triton"] != triton.__version__:
        pytest.skip(f"counted with Triton {run['triton']}, got {triton.__version__}")
    for kind, backend in tool.BACKENDS.items():
        found = tool.counts("sm_89", backend)
        assert found == run["chips"]["sm_89"]["counts"][kind]
        # 64 x 64 x 128 products of QK and of PV, in 4 warps: 16 x 8 x 16 of bfloat16 each, 16 x 8 x 32 of int8.
        assert found["bf16 products"] == (128 if kind == "bf16" else 64)
        assert found["int8 products"] == (0 if kind == "bf16" else 32)
        assert found["loop_spills"] == 0
