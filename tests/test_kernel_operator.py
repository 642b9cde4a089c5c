"""Kernel operators and the calls that methods remember: what a replay skips, and what it must not."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from counted_replays import replays
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveal import SLAConfig, VideoGrid, VSAConfig, sla_attention, vsa_attention
from foveal.checks import without_autocast
from foveal.kernels import host
from foveal.kernels.api import Ran
from foveal.kernels.operator import KernelOperator
from foveal.kernels.values import packable


@pytest.fixture(autouse=True)
def fresh():
    host.clear()
    yield
    host.clear()


@packable
class Call(NamedTuple):
    x: Tensor
    weight: Tensor | None
    places: Tensor


class Options(NamedTuple):
    scale: float
    name: str


def _forward(call, options, save):
    x, weight, places = call
    scaled = torch.empty(x.shape, dtype=x.dtype)
    torch.mul(x, options.scale, out=scaled)
    if weight is not None:
        scaled *= weight
    taken = torch.empty(places.shape[0], x.shape[1], dtype=torch.float64)
    taken.copy_(scaled[places])
    total = torch.empty((), dtype=torch.float32)
    torch.sum(scaled, (0, 1), out=total)
    return (scaled, total), (taken, torch.tanh(x), places.to(torch.int32), scaled.new_empty(0))


def _backward(call, options, outputs, saved, grads):
    (x, weight, places), (taken, bent, same, nothing) = call, saved
    scaled, total = outputs
    assert nothing.numel() == 0
    pairs = (taken.float(), scaled[places]), (bent, torch.tanh(x)), (same, places.int()), (total, scaled.sum())
    wrong = sum((a - b).abs().sum() for a, b in pairs)  # 0: a look on the host would keep this from being recorded
    grad = sum(x for x in grads if x is not None).expand(x.shape) * options.scale + wrong
    return grad if weight is None else grad * weight, None if weight is None else (grad * x).sum(0)


def _fake(call, options):
    x, _, places = call
    return (torch.empty_like(x), x.new_empty(())), (
        x.new_empty((places.shape[0], x.shape[1]), dtype=torch.float64),
        torch.empty_like(x),
        places.new_empty(places.shape, dtype=torch.int32),
        x.new_empty(0),
    )


scaled = KernelOperator(
    "foveal_test::scaled", inputs=2, outputs=2, options=Options, forward=_forward, backward=_backward, fake=_fake
)


def run(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return scaled(Call(x, weight, torch.tensor([2, 0])), Options(3.0, "some"))


def leaves(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, generator=generator).requires_grad_(), torch.randn(5, generator=generator).requires_grad_()


def check_gradients(x: Tensor, weight: Tensor, run=run) -> None:
    output, total = run(x, weight)
    assert torch.equal(output, 3 * x * weight)
    found = torch.autograd.grad(output.square().sum() / 2 + total, (x, weight))
    expected = (3 * x * weight + 1) * 3
    torch.testing.assert_close(found, (expected * weight, (expected * x).sum(0)))


def test_forward_and_backward_are_replayed(monkeypatch):
    runs = replays(monkeypatch.setattr)
    for seed in range(6):
        check_gradients(*leaves(seed))
    assert len(runs) == 4 + 3  # the backward starts with the first packed forward
    packed = runs[0].packing
    assert packed.parts[1] is packed.parts[2] is None  # made by operators of PyTorch
    assert packed.length == 3
    assert [part.dtype for part in packed.parts if part] == [torch.float64, torch.float32]
    monkeypatch.setattr(host.DOORS["replay"], "on", False)
    check_gradients(*leaves(7))
    assert len(runs) == 7


def test_what_differs_is_seen(monkeypatch):
    """Gradients wanted of less or nothing, no weight, one output of two, another stride, and a tensor given twice."""
    runs = replays(monkeypatch.setattr)
    for seed in range(5):
        x, weight = leaves(seed)
        check_gradients(x, weight)
        with torch.no_grad():
            assert not run(x, weight)[0].requires_grad
        assert not run(x.detach(), weight.detach())[0].requires_grad
        (grad,) = torch.autograd.grad(run(x.detach(), weight)[0].sum(), weight)
        torch.testing.assert_close(grad, 3 * x.sum(0).detach())
        (grad,) = torch.autograd.grad(run(x, None)[1], x)  # of the second output only
        assert torch.equal(grad, torch.full_like(x, 3.0))
        turned = torch.randn(5, 4).T.requires_grad_()
        check_gradients(turned, weight)
    assert len(runs) > 20


def test_saved_tensors_may_come_back_otherwise(monkeypatch):
    """From hooks with other strides, from a checkpoint, twice from one graph; and a second derivative is refused."""
    runs = replays(monkeypatch.setattr)
    for seed in range(5):
        x, weight = leaves(seed)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.T.contiguous().T if t.dim() > 1 else t):
            check_gradients(x, weight)
        check_gradients(x, weight, lambda *tensors: checkpoint(run, *tensors, use_reentrant=False))
        output, _ = run(x, weight)
        first, second = (torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        (grad,) = torch.autograd.grad(run(x, weight)[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
    assert len(runs) > 20


class Stub:
    """In the place of a method's operator: counts the calls that were worked out, and those that were remembered."""

    def __init__(self) -> None:
        self.worked, self.known = 0, 0

    def __call__(self, call, options):
        self.worked += 1
        return (call.query,)

    def worked_out(self, call, options):
        def again(tensors):
            self.known += 1
            return (tensors[0],)

        return again, ()


@pytest.fixture
def stub(monkeypatch):
    pytest.importorskip("triton")
    from foveal.kernels import order
    from foveal.methods.sla import attention as sla
    from foveal.methods.sla import gpu as sla_gpu
    from foveal.methods.vsa import attention as vsa
    from foveal.methods.vsa import gpu as vsa_gpu

    one = Stub()
    monkeypatch.setattr(sla_gpu, "sla_attention_gpu", one)
    monkeypatch.setattr(vsa_gpu, "vsa_attention_gpu", one)
    for module in (sla, vsa):
        monkeypatch.setattr(module, "choose_impl", lambda *_: Ran("triton"))
    monkeypatch.setattr(sla, "fits_kernel", lambda *_: True)
    monkeypatch.setattr(order, "is_plain", lambda *_: False)  # its kernel is no stub
    return one


QUERY = torch.randn(1, 2, 128, 64).bfloat16()


def sla(query=QUERY, **changes):
    given = {"config": SLAConfig(), "proj_weight": torch.zeros(64, 64), "proj_bias": torch.zeros(64)} | changes
    return sla_attention(query, given.pop("key", QUERY), QUERY, **given)


def vsa(query=QUERY, **changes):
    given = {"config": VSAConfig(), "grid": VideoGrid(2, 8, 8), "gate_coarse": QUERY} | changes
    return vsa_attention(query, QUERY, QUERY, **given)


@pytest.mark.parametrize("attention", [sla, vsa])
def test_a_call_of_a_known_kind_is_not_worked_out_again(stub, attention):
    for _ in range(3):
        attention(torch.randn_like(QUERY))
    assert (stub.worked, stub.known) == (1, 2)
    host.clear()
    attention(torch.randn_like(QUERY))
    assert (stub.worked, stub.known) == (2, 2)


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        (sla, {"config": SLAConfig(keep_ratio=0.5)}),
        (sla, {"query": QUERY.transpose(1, 2).contiguous().transpose(1, 2)}),
        (sla, {"query": torch.cat([QUERY.flatten()[:1], QUERY.flatten()])[1:].view_as(QUERY)}),
        (sla, {"key": QUERY.clone()}),
        (sla, {"proj_weight": torch.zeros(64, 64).double()}),
        (sla, {"proj_bias": None}),
        (sla, {"scale": 0.5}),
        (sla, {"impl": "triton"}),
        (sla, {"grid": VideoGrid(2, 8, 8)}),
        (sla, {"kv_lengths": torch.tensor([100])}),
        (sla, {"protected_keys": (0, 64)}),
        (sla, {"config": SLAConfig(token_order="tile"), "grid": VideoGrid(2, 8, 8)}),
        (vsa, {"grid": VideoGrid(8, 4, 4)}),
        (vsa, {"gate_fine": QUERY}),
        (vsa, {"gate_coarse": None}),
        (vsa, {"kv_lengths": torch.tensor([128])}),
    ],
)
def test_a_call_of_another_kind_is_worked_out(stub, attention, changes):
    for _ in range(2):
        attention()
    attention(**changes)
    assert (stub.worked, stub.known) == (2, 1)


@pytest.mark.parametrize(
    ("attention", "changes", "error", "words"),
    [
        (sla, {"query": None}, TypeError, "query must be a tensor"),
        (sla, {"query": QUERY.float()}, TypeError, "one dtype"),
        (sla, {"key": QUERY[..., :1]}, ValueError, "one shape"),
        (sla, {"query": QUERY.to("meta")}, ValueError, "one device"),
        (sla, {"proj_weight": torch.zeros(64, 64, device="meta")}, ValueError, "proj_weight is on meta"),
        (sla, {"proj_weight": torch.zeros(3, 64)}, ValueError, "proj_weight must have shape"),
        (sla, {"config": "SLA"}, TypeError, "config must be an SLAConfig"),
        (sla, {"config": []}, TypeError, "config must be an SLAConfig"),
        (sla, {"scale": [1]}, TypeError, "scale must be a number"),
        (sla, {"grid": VideoGrid(2, 2, 2)}, ValueError, "8 tokens"),
        (vsa, {"grid": None}, ValueError, "grid is required"),
        (vsa, {"gate_coarse": QUERY[:, :1]}, ValueError, "gate_coarse"),
        (vsa, {"scale": True}, TypeError, "scale must be a number"),
    ],
)
def test_what_is_wrong_is_said_after_calls_that_were_right(stub, attention, changes, error, words):
    for _ in range(2):
        attention(scale=1.0)
    with pytest.raises(error, match=words):
        attention(**changes)


def test_modes_and_transforms_see_every_call(stub):
    """Inference mode, forward-mode derivatives, and torch.func; autocast changes nothing."""
    for _ in range(2):
        sla()
    with torch.inference_mode():
        sla()
    with torch.autograd.forward_ad.dual_level():
        sla()
    torch.func.vmap(lambda x: x + sla().sum())(torch.zeros(2))
    assert (stub.worked, stub.known) == (4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        without_autocast(sla)()
    assert (stub.worked, stub.known) == (4, 2)
