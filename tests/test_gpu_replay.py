"""Replayed calls on a GPU: the same bits as calls that work everything out, from the same memory and from other."""

import gc

import pytest
import torch
from counted_replays import replays

from foveal import SLA2Config, SLAConfig, VideoGrid, VSAConfig, sla2_attention, sla_attention, vsa_attention
from foveal.kernels import host
from foveal.kernels.record import POOL_BYTES
from foveal.methods.sla import gpu_forward

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GRID = VideoGrid(5, 12, 20)


def attention(name: str):
    """The call, and how many tensors it takes beside query, key and value; SLA's are a weight and a bias."""
    method, *options = name.split(", ")
    if method == "vsa":
        config = VSAConfig(keep_ratio=0.25, tile="wide" if "wide" in options else (4, 4, 4))

        def vsa(query, key, value, coarse, fine=None):
            return vsa_attention(query, key, value, config=config, grid=GRID, gate_coarse=coarse, gate_fine=fine)

        return vsa, 2 if "both gates" in options else 1
    if method == "sla2":
        scope, router = (
            "none" if "none" in options else "noncritical",
            "per_head" if "per head" in options else "shared",
        )
        routed = SLA2Config(keep_ratio=0.2, block_q=64, linear_scope=scope, router=router)

        def sla2(query, key, value, proj_query, proj_key):
            return sla2_attention(query, key, value, config=routed, proj_query=proj_query, proj_key=proj_key)

        return sla2, 2
    config = SLAConfig(
        keep_ratio=0.2,
        block_q=128 if "128" in options else 64,
        linear_scope="all" if "all" in options else "none" if "none" in options else "marginal",
        token_order="tile" if "tile" in options else "raster",
    )

    def sla(query, key, value, *weights):
        weight, bias = weights or (None, None)
        return sla_attention(
            query, key, value, config=config, grid=GRID, proj_weight=weight, proj_bias=bias, impl="auto"
        )

    return sla, 0 if "none" in options else 2


NAMES = [
    "sla",
    "sla, 128",
    "sla, all",
    "sla, all, 128",
    "sla, none",
    "sla, tile",
    "sla2",
    "sla2, none, per head",
    "vsa",
    "vsa, both gates",
    "vsa, wide",
]


def tensors_of(name: str, seed: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    _, more = attention(name)

    def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    heads = [normal(2, GRID.num_tokens, 3, head_dim).transpose(1, 2) for _ in range(3 + more * name.startswith("vsa"))]
    if name.startswith("vsa") or not more:
        return heads
    if name.startswith("sla2"):
        shape = (3,) * ("per head" in name) + (head_dim, head_dim)
        return [*heads, *(normal(*shape, dtype=torch.float32) / 8 for _ in range(2))]
    return [*heads, normal(head_dim, head_dim, dtype=torch.float32) / 8, normal(head_dim, dtype=torch.float32)]


def with_gradients(function, tensors, seed: int) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype).contiguous())]


def plainly(function, *arguments):
    host.DOORS["replay"].on = False
    try:
        return function(*arguments)
    finally:
        host.DOORS["replay"].on = True


@pytest.fixture
def runs(monkeypatch):
    host.clear()
    yield replays(monkeypatch.setattr)
    host.clear()


def test_groups_beside_each_other_are_replayed(runs, monkeypatch):
    """Groups of heads of which one is prepared on a second stream while another attends."""
    monkeypatch.setattr(gpu_forward, "GROUP_BYTES", 0)
    function, _ = attention("sla")
    for seed in range(20):
        tensors = tensors_of("sla", seed, 128)
        found = with_gradients(function, tensors, seed)
        for x, y in zip(found, plainly(with_gradients, function, tensors, seed), strict=True):
            assert torch.equal(x, y)
    assert len(runs) == 18 + 17  # forward from the third call on, and backward from the fourth


@pytest.mark.parametrize(("name", "head_dim"), [*((name, 128) for name in NAMES), ("sla", 64), ("vsa", 64)])
def test_replays_give_the_same_bits(name, head_dim, runs):
    function, _ = attention(name)
    kept = []  # so that memory moves
    for seed in range(5):
        tensors = tensors_of(name, seed, head_dim)
        kept.append([tensors, with_gradients(function, tensors, seed), torch.empty(1 + 999 * seed, device="cuda")])
        with torch.no_grad():
            output = function(*tensors)
            assert torch.equal(output, plainly(function, *tensors)), f"inference, call {seed}"
        expected = plainly(with_gradients, function, tensors, seed)
        for index, (x, y) in enumerate(zip(kept[-1][1], expected, strict=True)):
            assert torch.equal(x, y), f"result {index}, call {seed}"
    assert len(runs) >= 8  # forward and inference three times, and backward twice
    assert all(x.isfinite().all() for _, results, _ in kept for x in results)


@pytest.mark.parametrize("name", ["sla", "vsa, wide"])
def test_memory_that_holds_anything(name, runs):
    """What a replay allocates is full of NaN."""
    function, _ = attention(name)
    tensors = tensors_of(name, 0, 128)
    results = plainly(with_gradients, function, tensors, 0)
    empty = torch.empty_strided

    def poisoned(*arguments, **named):
        x = empty(*arguments, **named)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

    torch.empty_strided = poisoned
    try:
        for _ in range(5):
            again = with_gradients(function, tensors, 0)
    finally:
        torch.empty_strided = empty
    assert len(runs) == 3 + 2  # forward from the third call on, and backward from the fourth
    for x, y in zip(again, results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["sla", "vsa"])
def test_streams_and_graphs(name, runs):
    function, _ = attention(name)
    tensors = tensors_of(name, 0, 128)
    expected = plainly(function, *tensors)
    for _ in range(3):
        function(*tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        output = function(*tensors)
    side.synchronize()
    assert torch.equal(output, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*tensors)
    others = tensors_of(name, 1, 128)
    for x, y in zip(tensors, others, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, plainly(function, *others))
    assert len(runs) == 3


def test_memory_of_a_replay_is_that_of_the_call():
    function, _ = attention("sla")
    tensors = tensors_of("sla", 0, 128)

    def peak() -> int:
        gc.collect()  # what an earlier test left, and freed in here, would count as less memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradients(function, tensors, 0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    for _ in range(4):
        replayed = peak()
    assert replayed <= plainly(peak) + POOL_BYTES
