"""LoRA adapters on a sparse model: fused, unfused, several at once, and trained, each against merged weights."""

import copy

import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, randomize, run, tiny_transformer

from foveal import dense, sparse_parameters, sparsify, unfreeze

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, ALPHA = 4, 6

pytestmark = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])


def sparse_model(config):
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    return model


def add_adapter(model, name, seed):
    """An adapter whose updates are not zero, and what it adds to the weight of each layer."""
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS), name)
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    with torch.no_grad():
        for layer_name, layer in model.named_modules():
            if name in getattr(layer, "lora_A", {}):
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                for factor in (down, up):
                    factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
                updates[layer_name] = up @ down * (ALPHA / RANK)
    assert len(updates) == 2 * 2 * len(TARGETS)  # two layers, with self- and cross-attention each
    return updates


@torch.no_grad()
def merged(model, *weighted):
    """A copy of a model without adapters whose weights have (updates, weight) added."""
    model = copy.deepcopy(model)
    for updates, weight in weighted:
        for name, update in updates.items():
            model.get_submodule(name).weight += weight * update
    return model


def agree(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-5)


def differ(model, other):
    with torch.no_grad():
        assert (run(model) - run(other)).abs().max() > 1e-3


def weights_agree(model, expected):
    """The weights of the adapted layers themselves, whatever the adapters add to them in a forward."""
    names = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    assert names
    for name in names:
        weight = model.get_submodule(name).base_layer.weight
        torch.testing.assert_close(weight, expected.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_fused_and_unfused(config):
    model = sparse_model(config)
    plain = copy.deepcopy(model)
    expected = merged(plain, (add_adapter(model, "one", 3), 1.0))
    differ(expected, plain)
    agree(model, expected)
    weights_agree(model, plain)
    model.fuse_lora()
    weights_agree(model, expected)
    agree(model, expected)
    with dense(model), dense(expected):
        agree(model, expected)
    model.unfuse_lora()
    weights_agree(model, plain)
    agree(model, expected)
    model.disable_adapters()
    agree(model, plain)


def test_several_adapters_with_weights(config):
    model = sparse_model(config)
    plain = copy.deepcopy(model)
    one, two = add_adapter(model, "one", 3), add_adapter(model, "two", 4)
    model.set_adapters(["one", "two"], [0.5, 0.8])
    both = merged(plain, (one, 0.5), (two, 0.8))
    agree(model, both)
    model.fuse_lora(adapter_names=["one", "two"])
    weights_agree(model, both)
    agree(model, both)
    model.unfuse_lora()
    weights_agree(model, plain)
    model.set_adapters("two", 1.0)
    only_two = merged(plain, (two, 1.0))
    differ(only_two, both)
    agree(model, only_two)
    model.delete_adapters("one")
    agree(model, only_two)


def test_an_adapter_trains_beside_the_sparse_parameters(config):
    model = sparse_model(config)
    plain = copy.deepcopy(model)
    expected = merged(plain, (add_adapter(model, "one", 3), 1.0))
    unfreeze(model)  # add_adapter freezes them
    sparse = sparse_parameters(model)
    assert sparse
    assert all(parameter.requires_grad for parameter in sparse.values())
    run(model).square().sum().backward()
    run(expected).square().sum().backward()
    wanted = sparse_parameters(expected)
    for name, parameter in sparse.items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-4)
    for name, layer in model.named_modules():
        if "one" in getattr(layer, "lora_A", {}):
            full = expected.get_submodule(name).weight.grad  # of W + (alpha / r) B A
            down, up = layer.lora_A["one"].weight, layer.lora_B["one"].weight
            scale = ALPHA / RANK
            torch.testing.assert_close(up.grad, scale * full @ down.T, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(down.grad, scale * up.T @ full, rtol=1e-3, atol=1e-3)
