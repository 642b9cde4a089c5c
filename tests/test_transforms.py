"""Transforms of torch.func, forward mode, autocast and the random state: right, or untouched."""

import pytest
import torch

from foveal import (
    SLAConfig,
    SparseLinearAttention,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
    block_sparse_attention,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.blocks import pool_blocks, pooled_scores

GRID = VideoGrid(2, 4, 5)
SLA = SLAConfig(keep_ratio=0.5, drop_ratio=0.25, block_q=16, block_k=16)
VSA = VSAConfig(topk=2, tile=(2, 2, 4))
SELECTED = select_blocks(*torch.randn(2, 1, 2, 40, 16, dtype=torch.float64), block_q=16, block_k=16, keep_ratio=0.5)


def block_sparse(impl):
    return lambda q, k, v: block_sparse_attention(q, k, v, SELECTED, impl=impl)


def sla(impl, **changes):
    return lambda q, k, v: sla_attention(q, k, v, config=SLA.replace(**changes), grid=GRID, impl=impl)


def vsa(impl):
    return lambda q, k, v: vsa_attention(q, k, v, config=VSA, grid=GRID, impl=impl)


FUNCTIONS = {
    "block sparse": block_sparse,
    "sla": sla,
    "sla, tile order": lambda impl: sla(impl, token_order="tile"),
    "sla, all": lambda impl: sla(impl, linear_scope="all", feature_map="elu"),
    "vsa": vsa,
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


def tensors(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, 40, 16, dtype=torch.float64, generator=generator) for _ in range(count))


@EACH
@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_forward_mode(name, impl):
    function, inputs, tangents = FUNCTIONS[name](impl), tensors(0), tensors(1)
    primal, tangent = torch.func.jvp(function, inputs, tangents)
    plus, minus = (function(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (1e-6, -1e-6))
    expected = (plus - minus) / 2e-6
    torch.testing.assert_close(primal, function(*inputs), rtol=0, atol=1e-10)
    assert (tangent - expected).norm() < 1e-5 * expected.norm()


@EACH
def test_forward_mode_by_dual_tensors(name):
    function, inputs, tangents = FUNCTIONS[name]("torch"), tensors(0), tensors(1)
    expected = torch.func.jvp(function, inputs, tangents)[1]
    with torch.autograd.forward_ad.dual_level():
        output = function(*map(torch.autograd.forward_ad.make_dual, inputs, tangents))
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(tangent, expected)


@EACH
def test_gradients_of_gradients(name):
    function, (query, key, value) = FUNCTIONS[name]("torch"), tensors(0)
    direction = tensors(1, 1)[0]

    def penalty(x, create_graph=True):
        loss = function(x, key, value).square().sum()
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0].square().sum()

    x = query.clone().requires_grad_()
    (found,) = torch.autograd.grad(penalty(x), x)
    near = [penalty((query + s * direction).requires_grad_(), False) for s in (1e-6, -1e-6)]
    torch.testing.assert_close((found * direction).sum(), (near[0] - near[1]).detach() / 2e-6, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["sla", "sla, tile order", "vsa"])
def test_vmap_and_per_sample_gradients(name):
    function = FUNCTIONS[name]("torch")
    samples = [torch.stack(each) for each in zip(tensors(0), tensors(2), strict=True)]
    expected = torch.stack([function(*(x[i] for x in samples)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(function)(*samples), expected)
    gradient = torch.func.grad(lambda q, k, v: function(q, k, v).square().sum())
    expected = torch.stack([gradient(*(x[i] for x in samples)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(gradient)(*samples), expected)


@EACH
def test_func_grad_of_one_argument(name):
    """The others are plain tensors, and no autograd function may run on them either."""
    function, inputs = FUNCTIONS[name]("torch"), tensors(0)
    for place in range(3):

        def loss(x, place=place):
            return function(*inputs[:place], x, *inputs[place + 1 :]).square().sum()

        x = inputs[place].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.func.grad(loss)(inputs[place]), expected)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    function = FUNCTIONS[name]("torch")
    results = []
    for enabled in (False, True):
        inputs = [x.float().requires_grad_() for x in tensors(0)]
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = function(*inputs)
            output.square().sum().backward()
        results.append([output, *(x.grad for x in inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


MODULES = {
    "sla": lambda: SparseLinearAttention(16, SLA),
    "sla, hedgehog": lambda: SparseLinearAttention(16, SLA.replace(feature_map="hedgehog", token_order="tile")),
    "vsa": lambda: VideoSparseAttention(32, 2, 16, VSA.replace(fine_gate=True)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_backward_inside_autocast_has_the_gradients_of_one_outside(name, own):
    torch.manual_seed(0)
    module, results = MODULES[name]().to(own), []
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(1, 40, 32, dtype=own)
    for enabled in (False, True):
        inputs = [x.to(own).requires_grad_() for x in tensors(0)]
        with torch.autocast("cpu", torch.bfloat16):
            gates = [hidden] if name == "vsa" else []
            loss = (module(*inputs, *gates, grid=GRID).float() ** 2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(loss, [*inputs, *module.parameters()]))
    for one, other in zip(*results, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_pooled_scores_have_their_gradients_inside_autocast():
    query, key = (x.float().requires_grad_() for x in tensors(0, 2))
    scores = pooled_scores(pool_blocks(query, 16), pool_blocks(key, 16), 0.25)
    expected = torch.autograd.grad(scores.square().sum(), (query, key), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(scores.square().sum(), (query, key))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("fine_gate", [False, True])
def test_modules_leave_the_random_state_alone(fine_gate):
    before = torch.random.get_rng_state()
    module = VideoSparseAttention(32, 2, 16, VSAConfig(fine_gate=fine_gate))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not module.to_gate_coarse.weight.any()
    assert not module.to_gate_coarse.bias.any()
    assert not fine_gate or (module.to_gate_fine.bias == 1).all()


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_gates_take_any_dtype(own):
    module = VideoSparseAttention(32, 2, 16, VSAConfig(tile=(2, 2, 4))).to(own)
    query, key, value = (x.bfloat16() for x in tensors(0))
    output = module(query, key, value, torch.randn(1, 40, 32, dtype=torch.bfloat16), grid=GRID)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.to_gate_coarse.weight.grad.dtype == own
