"""Whether the Hopper kernels can run is decided in plain Python, also inside `torch.compile`: held without a GPU."""

import pytest
import torch

from foveal import block_sparse_attention
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
        hopper = support._capability(x.device) == "9.0"
        fits = support.copyable(x) and support.missing_gluon() != "nonsense"
        return x + 1 if hopper and fits else x - 1

    # A device that no other test asks about: the answer is cached.
    x = torch.randn(1, length, 2, 64).transpose(1, 2)
    compiled = torch.compile(decide, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x), x + 1)
    view = torch.randn(1, 2, length, 65)[..., :64]
    assert torch.equal(compiled(view), view - 1)


def test_what_the_copy_engine_can_walk():
    base = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    assert support.copyable(base)
    assert support.copyable(base.transpose(1, 2))
    assert not support.copyable(base[..., 1:])
    assert not support.copyable(torch.zeros(2, 3, 40, 60, dtype=torch.bfloat16))
    assert not support.copyable(base.transpose(2, 3))
    assert not support.copyable(base[:, :1].expand(2, 3, 40, 64))
