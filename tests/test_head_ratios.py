"""A keep_ratio for each head: SLA and VSA against a call for each head, and whatever else reads the field."""

import json

import pytest
import torch
from tiny_wan import check_compiled_over_grids, run, tiny_transformer

import foveal
from foveal import (
    SLAConfig,
    SparseLinearAttention,
    TokenLayout,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
    attention_cost,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.methods.base import METHODS
from foveal.models.policy import Policy
from foveal.models.state import Phase
from foveal.testing import make_inputs

GRID = VideoGrid(5, 5, 7)
RATIOS = (0.1, 0.45)


def tensors_of(length, text=0):
    sizes = {"batch": 2, "heads": 2, "query_length": length, "key_length": length + text, "head_dim": 16}
    query, key, value = make_inputs(**sizes, dtype=torch.float64)
    return query * torch.linspace(0.2, 6, length, dtype=torch.float64)[:, None], key, value


@pytest.mark.parametrize("lengths", [None, (175, 61)])
@pytest.mark.parametrize("mass", [{}, {"keep_mass": 0.6, "max_keep_ratio": 0.5}], ids=["ratio", "mass"])
def test_each_head_counts_by_its_own_ratio(lengths, mass):
    query, key, _ = tensors_of(175)
    rule = {"block_q": 16, "block_k": 8, "drop_ratio": 0.3, **mass}
    rule["kv_lengths"] = None if lengths is None else torch.tensor(lengths)
    labels = select_blocks(query, key, keep_ratio=RATIOS, **rule).labels()
    for head, ratio in enumerate(RATIOS):
        one = slice(head, head + 1)
        expected = select_blocks(query[:, one], key[:, one], keep_ratio=ratio, **rule).labels()
        assert torch.equal(labels[:, one], expected)
    assert not torch.equal(labels[:, 0].sum((1, 2)), labels[:, 1].sum((1, 2)))


SLA = SLAConfig(keep_ratio=RATIOS, drop_ratio=0.2, block_q=16, block_k=8, projection=False, token_order="tile")
VSA = VSAConfig(keep_ratio=RATIOS, tile=(2, 2, 4))


def output_and_gradients(call, config, tensors, cotangent):
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = call(*leaves, config=config)
    return output, *torch.autograd.grad(output, leaves, cotangent)


def by_head(call, config, tensors, cotangent):
    """The call's output and gradients, each head by itself with a configuration of one ratio."""
    heads = []
    for head, ratio in enumerate(config.keep_ratio):
        one = slice(head, head + 1)
        parts = [x[:, one] for x in tensors]
        heads.append(output_and_gradients(call, config.replace(keep_ratio=ratio), parts, cotangent[:, one]))
    return [torch.cat(parts, 1) for parts in zip(*heads, strict=True)]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("where", ["grid", "text", "packed"])
@pytest.mark.parametrize(
    "config",
    [SLA, SLA.replace(sink_frames=1), VSA, VSA.replace(window=(1, 2, 1))],
    ids=["sla", "sla sinks", "vsa", "vsa window"],
)
def test_heads_are_those_of_calls_of_their_own(config, where, impl):
    layout = TokenLayout(GRID, (6,), (9,)) if where == "packed" else GRID
    options = {"layout": layout, "impl": impl}
    text = 21 if where == "text" else 0
    if text:
        options["kv_lengths"] = torch.tensor([196, 178])
        if isinstance(config, SLAConfig):
            options["protected_keys"] = (175, 196)
    tensors = tensors_of(layout.num_tokens, text)
    function = sla_attention if isinstance(config, SLAConfig) else vsa_attention

    def call(*x, config):
        return function(*x, config=config, **options)

    cotangent = torch.randn_like(tensors[0])
    ours = output_and_gradients(call, config, tensors, cotangent)
    for x, y in zip(ours, by_head(call, config, tensors, cotangent), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    module = (
        SparseLinearAttention(16, config) if isinstance(config, SLAConfig) else VideoSparseAttention(32, 2, 16, config)
    )
    del options["impl"]
    counts = module.select(*tensors[:2], **options).critical_count
    assert (counts[:, 0] < counts[:, 1]).any()


@pytest.mark.parametrize("config", [SLA.replace(projection=True), VSA], ids=["sla", "vsa"])
def test_compiled_models_follow_their_ratios(config):
    check_compiled_over_grids(config)


@pytest.mark.parametrize(
    "config", [SLAConfig(keep_ratio=(0.25, 0.5)), VSAConfig(keep_ratio=(0.25, 0.5))], ids=["sla", "vsa"]
)
def test_models_keep_their_ratios(config, tmp_path):
    model = foveal.sparsify(tiny_transformer(num_layers=1), config)
    foveal.save(model, tmp_path)
    loaded = foveal.load(tiny_transformer(num_layers=1), tmp_path)
    assert foveal.summary(loaded).rows[0].config == config
    assert "0.25 to 0.5 by head" in str(foveal.summary(loaded))
    with torch.no_grad():
        assert torch.equal(run(model), run(loaded))
    kept, total = foveal.report(loaded).rows[0].ran.kept
    assert 0 < kept < total
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.sparsity == 0.625
    assert config.of_heads(1, 2).keep_ratio == (0.5,)
    assert config.replace(keep_ratio=0.1).of_heads(1, 2).keep_ratio == 0.1


def test_costs_are_those_of_the_mean():
    shape = {"grid": VideoGrid(8, 16, 16), "heads": 2, "head_dim": 64}
    for make in (SLAConfig, VSAConfig):
        ours = attention_cost(make(keep_ratio=(0.25, 0.5)), **shape).flops
        parts = [attention_cost(make(keep_ratio=ratio), **shape).flops for ratio in (0.25, 0.5)]
        assert ours == sum(parts) / 2


def test_annealing_scales_them():
    schedule = METHODS["sla"].schedule
    config = SLAConfig(keep_ratio=(0.1, 0.3), drop_ratio=0.2)
    assert schedule.amount(config) == pytest.approx(0.2)
    assert schedule.keep(config, schedule.amount(config)) == config
    halfway = schedule.keep(config, 0.4)
    assert halfway.keep_ratio == pytest.approx((0.2, 0.6))
    assert schedule.keep(config, 1.0).keep_ratio == (0.5, 1.0)
    assert schedule.keep(config, 1.0).drop_ratio == 0.0


def test_policies_may_have_them():
    policy = Policy(keep_ratio={0: (0.1, 0.2), 500: 0.4})
    assert policy.phase(None, None, 100.0).keep_ratio == (0.1, 0.2)
    assert policy.phase(None, None, 600.0).keep_ratio == 0.4
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert "0.1 to 0.2 by head from 0, 0.4 from 500" in str(policy)
    for phase in (policy.phase(None, None, 100.0), Phase(False, 0.25, 0.5), Phase(), Phase(True)):
        assert Phase.from_text(phase.as_text())[:3] == phase[:3]
    with pytest.raises(TypeError, match="drop_ratio at timestep 0"):
        Policy(drop_ratio={0: (0.1, 0.2)})


MISTAKES = {
    "empty": ((), "keep_ratio must be a number in"),
    "out of range": ((0.1, 1.5), r"keep_ratio\[1\] must be in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("make", [SLAConfig, VSAConfig])
def test_mistakes(make, name):
    ratios, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make(keep_ratio=ratios)


def test_mistakes_of_single_heads():
    with pytest.raises(TypeError, match=r"keep_ratio\[0\] must be a number"):
        SLAConfig(keep_ratio=("a", 0.1))
    with pytest.raises(ValueError, match=r"keep_ratio \+ drop_ratio must be at most 1"):
        SLAConfig(keep_ratio=(0.1, 0.95), drop_ratio=0.1)
    with pytest.raises(ValueError, match="keep_ratio must be above 0 for VSA"):
        VSAConfig(keep_ratio=(0.1, 0.0))
    with pytest.raises(ValueError, match="at most max_keep_ratio"):
        VSAConfig(keep_ratio=(0.1, 0.5), keep_mass=0.5, max_keep_ratio=0.3)
    with pytest.raises(TypeError, match="keep_ratio must be a number"):
        foveal.SLAVSAConfig(keep_ratio=(0.1, 0.2))


def test_heads_are_counted():
    message = "keep_ratio must be a number, or a tuple of one for each of the 2 heads, got 3"
    tensors = make_inputs(heads=2, query_length=GRID.num_tokens, head_dim=16)
    ratios = (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=message):
        sla_attention(*tensors, config=SLAConfig(keep_ratio=ratios, projection=False))
    with pytest.raises(ValueError, match=message):
        vsa_attention(*tensors, config=VSAConfig(keep_ratio=ratios), grid=GRID)
    for config in (SLAConfig(keep_ratio=ratios), VSAConfig(keep_ratio=ratios)):
        with pytest.raises(ValueError, match=message):
            foveal.sparsify(tiny_transformer(num_layers=1), config)
