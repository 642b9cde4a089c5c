"""`benchmarks/patched_hosts.py`, which needs a GPU: what it compares and what it writes, on the CPU."""

import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from host_modules import turbodiffusion_modules
from torch.nn import functional

from foveal.lab.bench.shapes import Shape
from foveal.lab.bench.timing import CpuTimer
from foveal.layout import VideoGrid

ROOT = Path(__file__).parents[1]
GRID = (7, 9, 10)
TINY = Shape("tiny", 1, 2, VideoGrid(*GRID), 64)
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    import patched_hosts

    yield patched_hosts
    for name in ("patched_hosts", "result_page"):
        sys.modules.pop(name, None)


def dense_attention(query, key, value, blocks, sizes):
    """Attention of blocks of 64 queries over the blocks of keys that bool [B, H, T, T] keeps."""
    valid = torch.arange(64).repeat(len(sizes)) < sizes.repeat_interleave(64)
    mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3) & valid
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.fixture
def fastvideo(monkeypatch):
    """fastvideo-kernel's functions in PyTorch, with its bfloat16 coarse stage, and without its extension."""
    package, extension = types.ModuleType("fastvideo_kernel"), types.ModuleType("fastvideo_kernel._C")

    def build_vsa_metadata(shape, tile, device):
        t, h, w = (
            torch.tensor([min(side, length - start) for start in range(0, length, side)])
            for length, side in zip(shape, tile, strict=True)
        )
        return {"variable_block_sizes": (t[:, None, None] * h[:, None] * w).flatten()}

    def block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
        kept = torch.zeros(*q2k_idx.shape[:3], len(variable_block_sizes), dtype=torch.bool)
        return dense_attention(q, k, v, kept.scatter(-1, q2k_idx.long(), True), variable_block_sizes), None

    def video_sparse_attn(
        q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size=64, compress_attn_weight=None
    ):
        sizes = variable_block_sizes[:, None]
        pooled = [(x.unflatten(2, (-1, 64)).float().sum(3) / sizes).to(x.dtype) for x in (q, k, v)]
        scores = pooled[0] @ pooled[1].mT / math.sqrt(q.shape[-1])
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk).indices, True)
        coarse = (scores.softmax(-1) @ pooled[2]).repeat_interleave(64, 2)
        return coarse * compress_attn_weight + dense_attention(q, k, v, kept, variable_block_sizes)

    functions = (build_vsa_metadata, block_sparse_attn_from_indices, video_sparse_attn)
    package.__dict__.update({function.__name__: function for function in functions})
    package.__path__ = extension.__path__ = []
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", package)
    monkeypatch.setitem(sys.modules, "fastvideo_kernel._C", extension)
    return package


@pytest.fixture
def sla(monkeypatch):
    """TurboDiffusion's module in PyTorch."""
    modules = turbodiffusion_modules()
    monkeypatch.setitem(sys.modules, "SLA", modules["SLA"])

    def forward(self, q, k, v, return_sparsity=False):
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        rows, columns = (torch.arange(q.shape[1]) // block for block in (self.BLKQ, self.BLKK))

        def pooled(x, block):
            return torch.stack([part.mean(2) for part in x.split(block, 2)], 2)

        scores = pooled(query, self.BLKQ) @ pooled(key - key.mean(2, keepdim=True), self.BLKK).mT
        kept = scores.topk(int(self.topk * scores.shape[-1])).indices
        blocks = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
        sparse = functional.scaled_dot_product_attention(query, key, value, attn_mask=blocks[:, :, rows][..., columns])
        phi_query, phi_key = self.feature_map_q(query), self.feature_map_k(key)
        weights = (phi_query * phi_key.sum(2, keepdim=True)).sum(-1, keepdim=True)
        linear = phi_query @ (phi_key.mT @ value) / (1e-5 + weights)
        return (sparse + self.proj_l(linear.float()).to(sparse)).transpose(1, 2)

    modules["SLA"].SparseLinearAttention.forward = forward
    return modules["SLA"]


def cases(script, host):
    return list(getattr(script, f"{host}_cases")(TINY, CPU, {}))


@pytest.mark.parametrize("host", ["fastvideo", "turbodiffusion"])
def test_the_compared_agree_and_are_timed(script, fastvideo, sla, monkeypatch, host):
    monkeypatch.setattr(script, "SLA_KEEP", 0.31)
    made = cases(script, host)
    assert len(made) == 2
    for case in made:
        result = script.time_case(case, CpuTimer(), 1, 1)
        own = next(iter(case.functions))
        assert result["differences"].keys() == {"foveal"}
        assert 0 < max(result["differences"]["foveal"]) < script.SAME
        assert all(times.keys() == {own, "foveal"} for times in result["milliseconds"].values())


def test_the_groups_leave_no_doubt_about_the_selection(script):
    """Every query block prefers exactly as many key blocks as it keeps, by far."""
    heads, length, dim, kept = 2, 1240, 64, 6  # 20 blocks of keys, three groups of 6, 2 left over
    query, key, *others = script.grouped_attention(heads, length, dim, 128, 64, kept, CPU)
    assert len(others) == 3
    pooled = [torch.stack([part.float().mean(2) for part in x.split(n, 2)], 2) for x, n in ((query, 128), (key, 64))]
    scores = (pooled[0] @ pooled[1].mT).sort(-1, descending=True).values
    steps = scores.diff(dim=-1).neg()
    assert torch.equal(steps.argmax(-1), torch.full(steps.shape[:-1], kept - 1))


@pytest.mark.parametrize("change", ["one block more", "no gradient of the gate", "NaN"])
def test_who_computes_something_else_is_not_timed(script, fastvideo, monkeypatch, change):
    case = cases(script, "fastvideo")[0]
    own = case.functions["foveal"]
    monkeypatch.setattr(script, "VSA_KEEP", script.VSA_KEEP + 1 / 18)
    with_one_block_more = cases(script, "fastvideo")[0].functions["foveal"]
    case.functions["foveal"] = {
        "one block more": with_one_block_more,
        "no gradient of the gate": lambda query, key, value, gate: own(query, key, value, gate.detach() + 0 * gate),
        "NaN": lambda *tensors: own(*tensors) * math.nan,
    }[change]
    result = script.time_case(case, CpuTimer(), 1, 1)
    assert result["milliseconds"]["forward"].keys() == {"fastvideo-kernel Triton"}
    assert not all(error is not None and error < script.SAME for error in result["differences"]["foveal"])
    json.dumps(result, allow_nan=False)


def test_results_are_written_and_shown(script, fastvideo, monkeypatch, tmp_path):
    monkeypatch.setitem(script.SHAPES, "tiny", TINY)
    monkeypatch.setattr(script, "CudaTimer", lambda device: CpuTimer())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setitem(sys.modules, "SLA", None)
    file = tmp_path / "patched.json"
    script.main(["--shape", "tiny", "--rounds", "1", "--calls", "1", "--output", str(file), "--commit", "abc"])
    results = json.loads(file.read_text())
    assert results["machine"]["commit"] == "abc"
    assert results["left_out"].keys() == {"fastvideo-kernel TK", "turbodiffusion"}
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", type(script.PAGE)("patched_hosts", page))
    script.main(["--page", str(file)])
    rows = re.findall(r"^\| (`\w+`), .* \| (.+) \| ([\d.]+) \| ([\d.]+) \|$", script.PAGE.tables(), re.MULTILINE)
    assert [row[0] for row in rows] == ["`video_sparse_attn`"] * 2 + ["`block_sparse_attn_from_indices`"] * 2
    assert float(rows[1][2]) == pytest.approx(results["cases"][0]["milliseconds"]["forward"]["foveal"], abs=0.005)
    assert "`patched.json`" in script.PAGE.tables()


def test_the_page_shows_the_file_of_results(script):
    files = sorted((ROOT / "benchmarks" / "results").glob("patched-hosts*.json"))
    if files:
        results = json.loads(files[-1].read_text(encoding="utf-8"))
        assert script.PAGE.tables() == script.tables(results, files[-1].name)
        ratios = [
            {
                way: next(ms for name, ms in found.items() if name != "foveal") / found["foveal"]
                for way, found in case["milliseconds"].items()
            }
            for case in results["cases"]
        ]
        vsa, slas = ratios[0], ratios[2:]
        low, high = ({way: pick(ratio[way] for ratio in slas) for way in vsa} for pick in (min, max))
        said = " ".join(script.PAGE.file.read_text(encoding="utf-8").split())
        assert f"{vsa['forward']:.2f} times faster forward and {vsa['backward']:.2f} times backward" in said
        assert f"{low['forward']:.1f} to {high['forward']:.1f} times" in said
        assert f"{low['backward']:.1f} to {high['backward']:.1f} times" in said
    else:
        assert script.PAGE.tables() == "Nobody has timed them yet."


def test_without_a_gpu_it_says_so(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main([])
