"""The table of methods: names, configurations, how a model builds and calls each."""

import dataclasses

import pytest
import torch

from foveal import (
    RoutedSparseLinearAttention,
    SLA2Config,
    SLAConfig,
    SLAVSAConfig,
    SparseLinearAttention,
    SparseLinearVideoAttention,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
)
from foveal.methods.base import METHODS, LayerCall, config_from_dict, method_of
from foveal.testing import make_inputs

CONFIGS = {
    "sla": SLAConfig(keep_ratio=0.2, block_q=16, block_k=16),
    "sla2": SLA2Config(keep_ratio=0.3, block_q=16, block_k=16),
    "vsa": VSAConfig(topk=2, tile=(2, 4, 4)),
    "sla_vsa": SLAVSAConfig(topk=2, tile=(2, 4, 4)),
}
MODULES = {
    "sla": SparseLinearAttention,
    "sla2": RoutedSparseLinearAttention,
    "vsa": VideoSparseAttention,
    "sla_vsa": SparseLinearVideoAttention,
}
WITHOUT_HIDDEN_STATES = ("sla", "sla2")


def test_every_method_is_in_these_tests():
    assert set(METHODS) == set(CONFIGS) == set(MODULES)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_method_of_its_configuration(name):
    assert method_of(CONFIGS[name]) is METHODS[name]
    assert config_from_dict(name, CONFIGS[name].to_dict()) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_and_attends(name):
    grid = VideoGrid(2, 5, 6)
    hidden = torch.randn(2, grid.num_tokens, 24, generator=torch.Generator().manual_seed(0))
    qkv = make_inputs(batch=2, heads=3, query_length=grid.num_tokens, head_dim=8, dtype=torch.float32)
    module = METHODS[name].build(CONFIGS[name], 24, 3, 8, "torch")
    assert isinstance(module, MODULES[name])
    assert module.config == CONFIGS[name]
    assert module.impl == "torch"
    output = METHODS[name].run(module, LayerCall(*qkv, hidden, grid))
    assert output.shape == qkv[0].shape
    direct = module(*qkv, grid=grid) if name in WITHOUT_HIDDEN_STATES else module(*qkv, hidden, grid=grid)
    assert torch.equal(output, direct)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_its_reference_is_one_of_its_implementations(name):
    grid = VideoGrid(2, 5, 6)
    hidden = torch.randn(2, grid.num_tokens, 24, generator=torch.Generator().manual_seed(0))
    qkv = make_inputs(batch=2, heads=3, query_length=grid.num_tokens, head_dim=8, dtype=torch.float64)
    exact, ours = (METHODS[name].build(CONFIGS[name], 24, 3, 8, impl).double() for impl in ("reference", "torch"))
    outputs = [METHODS[name].run(module, LayerCall(*qkv, hidden.double(), grid)) for module in (exact, ours)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_schedule_keeps_the_parameters(name):
    """Annealing ends where it starts from, and no ratio is above 1."""
    method, config = METHODS[name], CONFIGS[name]
    assert method.schedule.keep(config, method.schedule.amount(config)) == config
    more = method.schedule.keep(config, 5.2)
    assert method.schedule.amount(more) == (1.0 if method.schedule.kept(config) == "keep_ratio" else 5)
    assert method.follow(config, keep_ratio=None, drop_ratio=None) is config
    assert method.follow(config, keep_ratio=0.5).keep_ratio == 0.5
    assert method.follow(config, keep_ratio=0.5, drop_ratio=0.25).to_dict().get("drop_ratio") == {"sla": 0.25}.get(name)


def test_unknown_configuration():
    with pytest.raises(
        TypeError, match=r"config must be one of SLAConfig, SLA2Config, VSAConfig, SLAVSAConfig, got dict"
    ):
        method_of({"keep_ratio": 0.05})
    with pytest.raises(TypeError, match=r"got NoneType"):
        method_of(None)
    with pytest.raises(TypeError, match=r"got type"):
        method_of(SLAConfig)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown method 'moba'; expected one of \('sla', 'sla2', 'vsa', 'sla_vsa'\)"):
        config_from_dict("moba", {})
    with pytest.raises(ValueError, match=r"unknown VSAConfig fields \['block_q'\]"):
        config_from_dict("vsa", {"block_q": 64})
    with pytest.raises(ValueError, match=r"keep_ratio must be in \[0, 1\], got 7"):
        config_from_dict("sla", {"keep_ratio": 7})


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["sla"].name = "other"
