"""`layers`: which layers get which configuration, when a model is converted and after it."""

import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, randomize, run, tiny_pipeline, tiny_transformer

from foveal import Policy, SLAConfig, VSAConfig, get_policy, reconfigure, set_policy, sparsify
from foveal.models.processor import sparse_processors

OTHER_SLA = SPARSE_SLA.replace(keep_ratio=0.5, linear_scope="all")


def configs_of(model) -> list:
    """One per layer, None where dense."""
    found = {name: processor.config for name, processor in sparse_processors(model).items()}
    return [found.get(f"blocks.{index}.attn1") for index in range(len(model.blocks))]


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (SPARSE_SLA, {1: SPARSE_VSA}, [SPARSE_SLA, SPARSE_VSA, SPARSE_SLA, SPARSE_SLA]),
        (SPARSE_SLA, {0: None, "blocks.3.attn1": None}, [None, SPARSE_SLA, SPARSE_SLA, None]),
        (SPARSE_SLA, {range(2): OTHER_SLA, 3: SPARSE_VSA}, [OTHER_SLA, OTHER_SLA, SPARSE_SLA, SPARSE_VSA]),
        (SPARSE_SLA, {}, [SPARSE_SLA] * 4),
        (None, {range(1, 3): SPARSE_VSA}, [None, SPARSE_VSA, SPARSE_VSA, None]),
        (None, lambda index, name: SPARSE_SLA if index % 2 else None, [None, SPARSE_SLA, None, SPARSE_SLA]),
        (None, lambda index, name: {"blocks.2.attn1": SPARSE_VSA}.get(name), [None, None, SPARSE_VSA, None]),
        (SPARSE_SLA, range(1, 3), [None, SPARSE_SLA, SPARSE_SLA, None]),
    ],
)
def test_configurations_by_layer(config, layers, expected):
    assert configs_of(sparsify(tiny_transformer(num_layers=4), config, layers=layers)) == expected


def test_the_configuration_of_who_names_none():
    """All layers, or those of a collection, with what came out best in the evidence."""
    best = VSAConfig(keep_ratio=0.125, router="per_head")
    assert configs_of(sparsify(tiny_transformer(num_layers=3))) == [best] * 3
    assert configs_of(sparsify(tiny_transformer(num_layers=3), layers=[1])) == [None, best, None]
    assert configs_of(sparsify(tiny_transformer(num_layers=2), policy=Policy(dense_layers=(0,)))) == [best] * 2


@pytest.mark.parametrize(
    ("config", "layers", "error", "match"),
    [
        (None, {}, ValueError, "layers leaves every layer dense"),
        (None, {0: None}, ValueError, "layers leaves every layer dense"),
        (None, lambda index, name: None, ValueError, "layers leaves every layer dense"),
        (SPARSE_SLA, lambda index, name: SPARSE_SLA, TypeError, "config must be None when layers is a function"),
        (SPARSE_SLA, {2: SPARSE_VSA}, ValueError, r"layers must be in 0\.\.1, got 2"),
        (SPARSE_SLA, {-1: None}, ValueError, r"layers must be in 0\.\.1, got -1"),
        (SPARSE_SLA, {range(3): None}, ValueError, r"layers must be in 0\.\.1, got 2"),
        (SPARSE_SLA, {"attn1": None}, ValueError, "unknown layer 'attn1'"),
        (SPARSE_SLA, {(0, 1): None}, TypeError, r"layers must hold indices or names, got \(0, 1\)"),
        (SPARSE_SLA, {True: None}, TypeError, "layers must hold indices or names, got True"),
        (SPARSE_SLA, {0: 0.5}, TypeError, "config must be one of SLAConfig, .*, SLAVSAConfig, got float"),
        (None, lambda index, name: "sla", TypeError, "config must be one of SLAConfig, .*, SLAVSAConfig, got str"),
        (SPARSE_SLA, {0: None, range(2): SPARSE_VSA}, ValueError, r"layers has blocks\.0\.attn1 twice"),
        (SPARSE_SLA, {1: None, "blocks.1.attn1": None}, ValueError, r"layers has blocks\.1\.attn1 twice"),
    ],
)
def test_wrong_layers(config, layers, error, match):
    model = tiny_transformer()
    with pytest.raises(error, match=match):
        sparsify(model, config, layers=layers)
    assert not sparse_processors(model)


def test_a_table_applies_to_both_transformers():
    pipeline = sparsify(tiny_pipeline(), SPARSE_SLA, layers={1: SPARSE_VSA})
    assert configs_of(pipeline.transformer) == configs_of(pipeline.transformer_2) == [SPARSE_SLA, SPARSE_VSA]


@torch.no_grad()
def test_reconfigure_keeps_the_parameters():
    model = sparsify(tiny_transformer(num_layers=3), SPARSE_SLA, layers=[0, 1])
    randomize(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert reconfigure(model, OTHER_SLA, layers=[1]) is model
    assert configs_of(model) == [SPARSE_SLA, OTHER_SLA, None]
    reconfigure(model, OTHER_SLA.replace(block_q=32))
    assert configs_of(model) == [OTHER_SLA.replace(block_q=32)] * 2 + [None]
    reconfigure(model, layers={0: SPARSE_SLA})
    assert configs_of(model)[:2] == [SPARSE_SLA, OTHER_SLA.replace(block_q=32)]
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())

    fresh = sparsify(tiny_transformer(num_layers=3), None, layers={0: SPARSE_SLA, 1: OTHER_SLA.replace(block_q=32)})
    randomize(fresh)
    assert torch.equal(run(model), run(fresh))
    annealed = sparsify(tiny_pipeline(), VSAConfig(topk=8, tile=(2, 2, 4)))
    reconfigure(annealed, VSAConfig(topk=4, tile=(2, 2, 4)))
    assert configs_of(annealed.transformer_2) == [VSAConfig(topk=4, tile=(2, 2, 4))] * 2


def test_reconfigure_refuses():
    model = sparsify(tiny_transformer(num_layers=3), SPARSE_SLA, layers=[0, 1])
    set_policy(model, Policy(keep_ratio={0: 0.8}))
    for arguments, error, match in (
        ({"config": SPARSE_SLA, "layers": [2]}, ValueError, r"layer blocks\.2\.attn1 is dense; sparsify converts it"),
        ({"config": SPARSE_VSA}, ValueError, "has parameters .*proj.* and would need .*to_gate_coarse.*densify"),
        ({"config": SPARSE_SLA.replace(linear_scope="none")}, ValueError, "would need none"),
        ({"config": SPARSE_SLA.replace(drop_ratio=0.3)}, ValueError, r"does not go with layer blocks\.0\.attn1"),
        ({"config": "sla"}, TypeError, "config must be one of SLAConfig, .*, SLAVSAConfig, got str"),
        ({"layers": {0: None}}, ValueError, "layers leaves every layer dense"),
    ):
        with pytest.raises(error, match=match):
            reconfigure(model, **arguments)
        assert configs_of(model) == [SPARSE_SLA, SPARSE_SLA, None]
    with pytest.raises(ValueError, match="no sparse layer to reconfigure; call sparsify first"):
        reconfigure(tiny_transformer(), SLAConfig())
    with pytest.raises(TypeError, match="got Linear"):
        reconfigure(torch.nn.Linear(2, 2), SLAConfig())
    assert get_policy(model) == Policy(keep_ratio={0: 0.8})
