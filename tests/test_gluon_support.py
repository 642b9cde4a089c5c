"""Whether the Hopper kernels can run is decided in plain Python, also inside `torch.compile`: held without a GPU."""

import importlib.metadata
import warnings

import pytest
import torch

from foveal import block_sparse_attention
from foveal.checks import clear_constants
from foveal.kernels import api, chips, tma
from foveal.kernels.hopper import support
from foveal.testing import make_inputs, random_selection


def test_named_gluon_says_why_it_cannot_run():
    selection = random_selection(batch=1, heads=1, query_length=64, key_length=64, block_q=64, block_k=64)
    inputs = make_inputs(query_length=64, heads=1, head_dim=64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='impl="gluon" cannot run here: it needs an NVIDIA GPU, got tensors on cpu'):
        block_sparse_attention(*inputs, selection, impl="gluon")
    assert "NVIDIA" in support.why_not(*inputs, 64, 64)


@pytest.mark.parametrize("length", [64, 100])
def test_the_decision_compiles_whole(monkeypatch, length):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def decide(x):
        hopper = chips.capability(x.device) == "9.0"
        fits = tma.copyable(x) and support.missing_gluon() != "nonsense"
        return x + 1 if hopper and fits else x - 1

    # A device that no other test asks about: the answer is cached.
    x = torch.randn(1, length, 2, 64).transpose(1, 2)
    compiled = torch.compile(decide, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x), x + 1)
    view = torch.randn(1, 2, length, 65)[..., :64]
    assert torch.equal(compiled(view), view - 1)


def test_what_tma_can_walk():
    base = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    assert tma.copyable(base)
    assert tma.copyable(base.transpose(1, 2))
    assert not tma.copyable(base[..., 1:])
    assert not tma.copyable(torch.zeros(2, 3, 40, 60, dtype=torch.bfloat16))
    assert not tma.copyable(base.transpose(2, 3))
    assert not tma.copyable(base[:, :1].expand(2, 3, 40, 64))


@pytest.fixture
def installed(monkeypatch):
    """A function that makes this release of Triton the installed one; every question about it is asked anew."""

    def install(release):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
        clear_constants()
        support._warn_once.cache_clear()

    yield install
    clear_constants()
    support._warn_once.cache_clear()


def test_other_releases_are_named(installed):
    installed("3.10.1")
    assert "3.6, 3.7, 3.8, 3.9, got 3.10.1" in support.missing_gluon()
    assert set(support.VERIFIED_RELEASES) <= set(support.TRITON_RELEASES)


def on_hopper(monkeypatch):
    """Tensors without memory, as if of a Hopper GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(chips, "capability", lambda device: "9.0")
    monkeypatch.setattr(support, "missing_gluon", lambda: None)
    with FakeTensorMode():
        return (torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="cuda"),) * 3


@pytest.mark.skipif(not api._HAS_TRITON, reason="needs triton")
def test_auto_says_once_that_it_passes_over_unverified_kernels(monkeypatch, installed):
    inputs = on_hopper(monkeypatch)
    monkeypatch.setattr(support, "VERIFIED_RELEASES", ("3.6",))
    installed("3.9.0")
    with pytest.warns(RuntimeWarning, match=r'slower kernels .* Triton 3\.6, got 3\.9\.0\. Install .* impl="gluon"'):
        ran = api.choose_impl("auto", *inputs, 64, 64)
    assert ran == api.Ran("triton", "not gluon: its kernels were verified on a GPU with Triton 3.6, got 3.9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api.choose_impl("auto", *inputs, 64, 64) == ran
        assert api.choose_impl("gluon", *inputs, 64, 64).impl == "gluon"  # who names it takes the risk
        monkeypatch.setattr(support, "VERIFIED_RELEASES", ("3.6", "3.9"))
        installed("3.9.0")
        assert api.choose_impl("auto", *inputs, 64, 64) == api.Ran("gluon")


def test_other_gpus_are_not_warned(monkeypatch, installed):
    inputs = on_hopper(monkeypatch)
    monkeypatch.setattr(chips, "capability", lambda device: "8.9")
    monkeypatch.setattr(support, "VERIFIED_RELEASES", ("3.6",))
    installed("3.9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api.choose_impl("auto", *inputs, 64, 64) == api.Ran("triton")
