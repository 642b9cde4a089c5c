"""`explain` names the implementation that runs, and modules remember the one that ran."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from foveal import SLAConfig, SparseLinearAttention, VideoGrid, VideoSparseAttention, VSAConfig, explain
from foveal.kernels import api, chips
from foveal.testing import make_inputs


def inputs(length: int = 128):
    return make_inputs(batch=1, query_length=length, heads=2, head_dim=64, dtype=torch.bfloat16)


def test_on_a_cpu_both_backends_say_why_not():
    found = explain(*inputs(), SLAConfig(block_q=128))
    assert (found.impl, found.blocks) == ("torch", (128, 64))
    assert [name for name, _ in found.refused] == ["gluon", "triton"]
    assert str(found).splitlines()[0] == "torch runs, in blocks of 128x64 tokens"
    assert "not gluon: it needs an NVIDIA GPU, got tensors on cpu" in str(found)


def test_only_faster_ones_are_named(monkeypatch):
    reasons = {"gluon": "no Hopper", "triton": None}
    monkeypatch.setattr(api, "why_not", lambda name, *_: reasons[name])
    monkeypatch.setattr("foveal.methods.explain.why_not", lambda name, *_: reasons[name])
    found = explain(*inputs(), VSAConfig(), VideoGrid(2, 8, 8))
    assert (found.impl, found.refused) == ("triton", (("gluon", "no Hopper"),))


def test_the_gpu_is_named(monkeypatch):
    """What is known of the kernels there, with the implementation that takes them."""
    monkeypatch.setattr(chips, "capability", lambda device: "12.0")
    monkeypatch.setattr(chips, "chip_of", lambda device: chips.Chip("sm_120", 99 * 1024))
    monkeypatch.setattr(api, "_HAS_TRITON", True)
    monkeypatch.setattr(api, "_why_no_kernels", lambda device: None)
    with FakeTensorMode():
        on_gpu = (torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="cuda"),) * 3
    found = explain(*on_gpu, SLAConfig())
    assert found.impl == "triton"
    assert str(found).splitlines()[-1] == "the kernels compile for this GPU (sm_120), and were never tested on one"
    assert chips.Chip("sm_90", 0).standing == "the kernels were tested on a GPU like this (sm_90)"
    assert "neither" in chips.Chip("sm_70", 0).standing
    assert explain(*inputs(), SLAConfig()).chip is None


def test_mistakes():
    with pytest.raises(ValueError, match="layout is required"):
        explain(*inputs(), VSAConfig())
    with pytest.raises(TypeError, match="layout must be a VideoGrid"):
        explain(*inputs(), SLAConfig(), (2, 8, 8))
    with pytest.raises(TypeError, match="config must be"):
        explain(*inputs(), {"keep_ratio": 0.1})


def test_modules_remember_what_ran():
    query, key, value = inputs()
    module = SparseLinearAttention(64, SLAConfig())
    assert module.ran is None
    module(query, key, value)
    assert module.ran.impl == "torch"
    reference = SparseLinearAttention(64, SLAConfig(), impl="reference")
    reference(query, key, value)
    assert reference.ran.impl == "reference"
    gated = VideoSparseAttention(32, 2, 64, VSAConfig(topk=1)).bfloat16()
    gated(query, key, value, torch.zeros(1, 128, 32, dtype=torch.bfloat16), grid=VideoGrid(2, 8, 8))
    assert gated.ran.impl == "torch"


def test_the_projection_is_copied_only_for_those_who_take_it_away():
    module = SparseLinearAttention(64, SLAConfig()).proj
    assert module()[0] is module.weight
    assert module()[1] is module.bias
    handle = module.register_forward_hook(lambda *_: None)
    assert module()[0] is not module.weight
    handle.remove()
    forward = module.forward
    module.forward = lambda: forward()  # what hooks of diffusers and accelerate do
    assert module()[0] is not module.weight
    del module.forward
    # Sharded parameters are views of a flat one, whose memory comes and goes.
    flat = torch.zeros(64 * 65)
    module.weight.data, module.bias.data = flat[: 64 * 64].view(64, 64), flat[64 * 64 :]
    assert module()[0] is not module.weight
