"""Sparse-linear attention: the reference, its gradients, the plain PyTorch implementation and the module."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from foveal import (
    BlockSelection,
    SLAConfig,
    SparseLinearAttention,
    VideoGrid,
    block_sparse_attention,
    select_blocks,
    sla_attention,
)
from foveal.methods.sla import linear
from foveal.methods.sla.config import FEATURE_MAPS, LINEAR_SCOPES
from foveal.methods.sla.feature_maps import apply_feature_map, feature_dim
from foveal.testing import (
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    poison_empty,
    random_selection,
    relative_error,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def make_weights(config, head_dim, dtype=torch.float64):
    """Random parameters by the name of their argument, those that the configuration takes."""
    generator = torch.Generator().manual_seed(7)
    shapes = {}
    if config.linear_scope != "none":
        if config.projection:
            shapes = {"proj_weight": (head_dim, head_dim), "proj_bias": (head_dim,)}
        if config.feature_map == "hedgehog":
            shapes["feature_weight"] = (head_dim, head_dim)
    return {name: torch.randn(shape, generator=generator).to(dtype) / 2 for name, shape in shapes.items()}


def attend(config, selection, impl, names=()):
    """A function of query, key, value and the parameters `names`."""

    def function(query, key, value, *weights):
        named = dict(zip(names, weights, strict=True))
        return sla_attention(query, key, value, config=config, selection=selection, impl=impl, **named)

    return function


def assert_same(ours, expected, **tolerance):
    assert len(ours) == len(expected)
    names = itertools.chain(("output", "grad of query", "of key", "of value"), (f"of parameter {n}" for n in range(3)))
    for name, x, y in zip(names, ours, expected, strict=False):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or TIGHT))


def both(config, inputs, selection):
    """Outputs and gradients of the torch implementation and of the reference, parameters included."""
    weights = make_weights(config, inputs[0].shape[-1])
    arguments = (*inputs, *weights.values())
    with poison_empty():
        ours = output_and_gradients(attend(config, selection, "torch", tuple(weights)), arguments)
    return ours, output_and_gradients(attend(config, selection, "reference", tuple(weights)), arguments)


every_branch = pytest.mark.parametrize("feature_map", FEATURE_MAPS)
every_scope = pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)


@every_scope
@every_branch
@pytest.mark.parametrize("projection", [True, False])
def test_torch_matches_reference(feature_map, linear_scope, projection):
    config = SLAConfig(block_q=8, block_k=16, feature_map=feature_map, linear_scope=linear_scope, projection=projection)
    shape = {"batch": 2, "heads": 2, "query_length": 67, "key_length": 83}
    assert_same(*both(config, make_inputs(**shape, head_dim=8), random_selection(**shape, block_q=8, block_k=16)))


@every_scope
@every_branch
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(feature_map, linear_scope, impl):
    config = SLAConfig(block_q=4, block_k=4, feature_map=feature_map, linear_scope=linear_scope)
    shape = {"heads": 1, "query_length": 13, "key_length": 15}
    weights = make_weights(config, 3)
    arguments = [x.requires_grad_() for x in (*make_inputs(**shape, head_dim=3, seed=3), *weights.values())]
    selection = random_selection(**shape, block_q=4, block_k=4)
    assert torch.autograd.gradcheck(attend(config, selection, impl, tuple(weights)), arguments)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_are_those_of_the_paper(impl):
    """design: dH, dZ, dphi(Q), G, z, dphi(K) and dV of the linear branch, written out block by block."""
    block, blocks, head_dim, epsilon = 4, 5, 6, 1e-5
    config = SLAConfig(keep_ratio=0.0, block_q=block, block_k=block)
    query, key, value = make_inputs(heads=1, query_length=20, head_dim=head_dim)
    weights = make_weights(config, head_dim)
    labels = torch.randint(-1, 1, (1, 1, blocks, blocks), generator=torch.Generator().manual_seed(0))
    labels[:, :, 1] = -1
    selection = BlockSelection.from_labels(labels, block_q=block, block_k=block, query_length=20, key_length=20)
    arguments = (query, key, value, *weights.values())
    grad_output = torch.randn(20, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in arguments]
    output = attend(config, selection, impl, tuple(weights))(*leaves)
    got = torch.autograd.grad(output, leaves, grad_output[None, None])

    phi_q, phi_k = query[0, 0].softmax(-1), key[0, 0].softmax(-1)
    cut = [slice(block * i, block * (i + 1)) for i in range(blocks)]
    marginal = [[j for j in range(blocks) if labels[0, 0, i, j] == 0] for i in range(blocks)]
    d_phi_q, d_phi_k, d_value, linear_output = (torch.zeros(20, head_dim).double() for _ in range(4))
    grad_states, grad_sums = {}, {}
    g = grad_output @ weights["proj_weight"]
    for i, rows in enumerate(cut):
        state, sums = torch.zeros(head_dim, head_dim).double(), torch.zeros(head_dim).double()
        for j in marginal[i]:
            state += phi_k[cut[j]].T @ value[0, 0, cut[j]]
            sums += phi_k[cut[j]].sum(0)
        n = (phi_q[rows] @ sums + epsilon)[:, None]
        linear_output[rows] = phi_q[rows] @ state / n
        row_dot = (g[rows] * linear_output[rows]).sum(-1, keepdim=True)
        grad_states[i] = (phi_q[rows] / n).T @ g[rows]
        grad_sums[i] = -(phi_q[rows] / n).T @ row_dot
        d_phi_q[rows] = (g[rows] @ state.T - row_dot * sums) / n
    for j, keys in enumerate(cut):
        for i in range(blocks):
            if j in marginal[i]:
                d_phi_k[keys] += value[0, 0, keys] @ grad_states[i].T + grad_sums[i].T
                d_value[keys] += phi_k[keys] @ grad_states[i]

    def through_softmax(phi, d_phi):
        return phi * (d_phi - (d_phi * phi).sum(-1, keepdim=True))

    expected = (
        through_softmax(phi_q, d_phi_q),
        through_softmax(phi_k, d_phi_k),
        d_value,
        grad_output.T @ linear_output,
        grad_output.sum(0),
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.view_as(y), y, **TIGHT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES[:2])
def test_keeping_everything_is_dense_attention(impl, linear_scope):
    config = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, block_q=16, block_k=8, linear_scope=linear_scope)
    inputs = make_inputs(query_length=37, key_length=45, head_dim=16)
    weight = make_weights(config, 16)["proj_weight"]
    ours = output_and_gradients(lambda *qkv: sla_attention(*qkv, config=config, proj_weight=weight, impl=impl), inputs)
    assert_same(ours, output_and_gradients(F.scaled_dot_product_attention, inputs))


@every_branch
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_linear_only_is_textbook_linear_attention(feature_map, impl):
    config = SLAConfig(
        keep_ratio=0.0, block_q=64, block_k=64, feature_map=feature_map, linear_scope="all", projection=False
    )
    query, key, value = inputs = make_inputs(query_length=31, key_length=45, head_dim=8)
    weights = make_weights(config, 8)
    output = attend(config, None, impl, tuple(weights))(*inputs, *weights.values())
    phi_query, phi_key = (apply_feature_map(x, feature_map, *weights.values()) for x in (query, key))
    state = torch.einsum("bhnf,bhnd->bhfd", phi_key, value)
    norm = torch.einsum("bhmf,bhf->bhm", phi_query, phi_key.sum(2)) + 1e-5
    expected = torch.einsum("bhmf,bhfd->bhmd", phi_query, state) / norm[..., None]
    torch.testing.assert_close(output, expected, **TIGHT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_branches_cover_the_keys_that_their_scope_names(impl):
    """With value = one key's indicator and no projection, an output of zero means that the key was not looked at."""
    labels = torch.tensor([[[[1, 0, -1], [1, 1, -1], [-1, 0, 0]]]])
    selection = BlockSelection.from_labels(labels, block_q=2, block_k=2, query_length=6, key_length=6)
    query, key, _ = make_inputs(heads=1, query_length=6, head_dim=8)
    value = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    value[0, 0, :, :6] = torch.eye(6)
    seen = {"none": labels == 1, "marginal": labels >= 0, "noncritical": labels < 2, "all": labels < 2}
    for scope, blocks in seen.items():
        config = SLAConfig(block_q=2, block_k=2, linear_scope=scope, projection=False)
        output = sla_attention(query, key, value, config=config, selection=selection, impl=impl)
        expected = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.equal(output[..., :6].abs() > 1e-12, expected), scope


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_rows_without_marginal_blocks_get_the_bias_alone(impl):
    config = SLAConfig(block_q=8, block_k=8)
    inputs = make_inputs(query_length=24, head_dim=8)
    weights = make_weights(config, 8)
    labels = torch.tensor([[1, -1, 1], [1, 0, -1], [-1, -1, -1]]).expand(1, 2, 3, 3)
    selection = BlockSelection.from_labels(labels, block_q=8, block_k=8, query_length=24, key_length=24)
    output = attend(config, selection, impl, tuple(weights))(*inputs, *weights.values())
    sparse = block_sparse_attention(*inputs, selection, impl="reference")
    bias = weights["proj_bias"]
    torch.testing.assert_close(output[:, :, :8], sparse[:, :, :8] + bias, **TIGHT)
    torch.testing.assert_close(output[:, :, 16:], bias.expand(1, 2, 8, 8), **TIGHT)
    assert not torch.allclose(output[:, :, 8:16], sparse[:, :, 8:16] + bias)


@every_branch
@pytest.mark.parametrize("linear_scope", ["marginal", "all"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_padding_keys_never_count(feature_map, linear_scope, impl):
    config = SLAConfig(block_q=8, block_k=8, feature_map=feature_map, linear_scope=linear_scope)
    lengths = torch.tensor([21, 30, 0])
    shape = {"batch": 3, "heads": 1, "query_length": 17, "key_length": 30}
    selection = random_selection(**shape, block_q=8, block_k=8, kv_lengths=lengths)
    inputs = make_inputs(**shape, head_dim=8)
    weights = make_weights(config, 8)
    function = attend(config, selection, impl, tuple(weights))
    expected = output_and_gradients(function, (*inputs, *weights.values()))
    for sample, length in enumerate(lengths):
        for x in inputs[1:]:
            x[sample, :, length:] = math.nan
    ours = output_and_gradients(function, (*inputs, *weights.values()))
    assert_same(ours, expected)
    assert (ours[2][2] == 0).all()
    torch.testing.assert_close(ours[0][2], weights["proj_bias"].expand(1, 17, 8), **TIGHT)

    shorter = BlockSelection.from_labels(
        selection.labels()[:1, ..., :3], block_q=8, block_k=8, query_length=17, key_length=21
    )
    alone = attend(config, shorter, impl, tuple(weights))(
        inputs[0][:1], *(x[:1, :, :21] for x in inputs[1:]), *weights.values()
    )
    torch.testing.assert_close(ours[0][:1], alone, **TIGHT)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_against_float64(dtype, head_dim):
    config = SLAConfig(block_q=32, block_k=32)
    inputs = make_inputs(query_length=150, key_length=190, head_dim=head_dim, dtype=dtype)
    selection = random_selection(query_length=150, key_length=190, block_q=32, block_k=32)
    weights = make_weights(config, head_dim, dtype)
    names, arguments = tuple(weights), (*inputs, *weights.values())
    reference = output_and_gradients(attend(config, selection, "reference", names), [x.double() for x in arguments])
    plain = output_and_gradients(attend(config, selection, "reference", names), arguments)
    ours = output_and_gradients(attend(config, selection, "torch", names), arguments)
    assert ours[0].dtype == dtype
    # In float32 the order in which a processor sums is all of the error, and chance decides about the largest entry's.
    factor = 4.0 if dtype == torch.float32 else 2.0
    for name, *results in zip(("output", "query", "key", "value", *names), ours, reference, plain, strict=True):
        assert_close_to_reference(*results, name=name, factor=factor)


@pytest.mark.parametrize("grid", [VideoGrid(3, 9, 6), VideoGrid(1, 11, 13)])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_tile_order_is_raster_order_on_reordered_tokens(grid, impl):
    raster = SLAConfig(keep_ratio=0.3, block_q=16, block_k=16, projection=False)
    inputs = make_inputs(query_length=grid.num_tokens, head_dim=8)
    tile = (1, 8, 8) if grid.frames == 1 else (4, 4, 4)
    ours = output_and_gradients(
        lambda *qkv: sla_attention(*qkv, config=raster.replace(token_order="tile"), grid=grid, impl=impl), inputs
    )

    def by_hand(*qkv):
        output = sla_attention(*(grid.to_tile_order(x, tile) for x in qkv), config=raster, impl="reference")
        return grid.to_raster_order(output, tile)

    assert_same(ours, output_and_gradients(by_hand, inputs))
    plain = sla_attention(*inputs, config=raster, impl=impl)
    assert not torch.allclose(plain, ours[0])


@given(
    query_length=st.integers(1, 40),
    key_length=st.integers(1, 40),
    block_q=st.integers(1, 16),
    block_k=st.integers(1, 16),
    ratios=st.tuples(st.floats(0.01, 0.5), st.floats(0, 0.5)),
    feature_map=st.sampled_from(FEATURE_MAPS),
    linear_scope=st.sampled_from(LINEAR_SCOPES),
    projection=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_configuration(query_length, key_length, ratios, seed, **fields):
    config = SLAConfig(keep_ratio=ratios[0], drop_ratio=ratios[1], **fields)
    inputs = make_inputs(query_length=query_length, key_length=key_length, head_dim=4, seed=seed)
    selection = select_blocks(
        *inputs[:2],
        block_q=config.block_q,
        block_k=config.block_k,
        keep_ratio=config.keep_ratio,
        drop_ratio=config.drop_ratio,
    )
    assert_same(*both(config, inputs, selection))


@every_branch
def test_compiles_without_graph_break(feature_map):
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.2, block_q=8, block_k=8, feature_map=feature_map)
    weights = make_weights(config, 8)
    arguments = (*make_inputs(query_length=37, head_dim=8), *weights.values())
    function = attend(config, None, "torch", tuple(weights))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(compiled, arguments), output_and_gradients(function, arguments))


def test_module_in_tile_order_compiles_without_graph_break():
    grid = VideoGrid(2, 5, 6)
    config = SLAConfig(keep_ratio=0.3, block_q=8, block_k=8, token_order="tile", feature_map="hedgehog")
    module = SparseLinearAttention(8, config)
    inputs = make_inputs(query_length=60, head_dim=8, dtype=torch.float32)
    compiled = torch.compile(lambda *qkv: module(*qkv, grid=grid), fullgraph=True, backend="aot_eager")
    eager = output_and_gradients(lambda *qkv: module(*qkv, grid=grid), inputs)
    assert_same(output_and_gradients(compiled, inputs), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", [linear.linear_branch, linear._composed])
@pytest.mark.parametrize("share", [0.8, 0.15])
@pytest.mark.parametrize("key_mean", [0.0, 2.0])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_a_mean_of_the_values_costs_the_gradients_no_accuracy(feature_map, key_mean, share, run):
    """O^l is a weighted mean of V: the gradients of Q and K do not change with V's mean, nor should their errors."""
    query, key, value = make_inputs(query_length=300, key_length=340, head_dim=32, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(*query.shape[:2], 10, 11, generator=generator) < share).to(torch.int8)

    def attend(query, key, value):
        phi = (apply_feature_map(x, feature_map, None) for x in (query, key))
        return run(*phi, value, mask, 32, 32)

    errors = {}
    for mean in (0.0, 4.0, 16.0):
        inputs = query, key + key_mean, value + mean
        found = output_and_gradients(attend, inputs)
        exact = output_and_gradients(attend, [x.double() for x in inputs])
        errors[mean] = [relative_error(x, y) for x, y in zip(found, exact, strict=True)]
    for mean in (4.0, 16.0):
        for name, error, usual in zip(("output", "query", "key", "value"), errors[mean], errors[0.0], strict=True):
            assert error <= 2 * usual, (mean, name)


@pytest.mark.parametrize("masked", [True, False])
def test_custom_ops_keep_their_promises(masked):
    phi_query, phi_key, value = (x.softmax(-1) for x in make_inputs(query_length=18, key_length=21, head_dim=4))
    mask = random_selection(query_length=18, key_length=21, block_q=8, block_k=8).marginal if masked else None
    leaves = [x.requires_grad_() for x in (phi_query, phi_key, value)]
    torch.library.opcheck(linear._forward_op, (*leaves, mask, 8, 8))
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(linear._backward_op, (torch.ones_like(phi_query), *plain, mask, 8, 8))


def test_activation_checkpointing_gives_the_same_gradients():
    config = SLAConfig(keep_ratio=0.3, drop_ratio=0.2, block_q=8, block_k=8)
    weights = make_weights(config, 8)
    arguments = (*make_inputs(query_length=37, head_dim=8), *weights.values())
    function = attend(config, None, "torch", tuple(weights))
    again = output_and_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), arguments)
    assert all(torch.equal(x, y) for x, y in zip(again, output_and_gradients(function, arguments), strict=True))


@pytest.mark.parametrize(("feature_map", "features"), [("softmax", 8), ("elu", 8), ("relu", 8), ("hedgehog", 16)])
def test_feature_maps(feature_map, features):
    x = make_inputs(query_length=5, head_dim=8, dtype=torch.bfloat16)[0]
    weight = torch.eye(8) if feature_map == "hedgehog" else None
    phi = apply_feature_map(x, feature_map, weight)
    assert phi.dtype == torch.float32
    assert phi.shape[-1] == features == feature_dim(feature_map, 8)
    assert (phi >= 0).all()
    if feature_map in ("softmax", "hedgehog"):
        torch.testing.assert_close(phi.sum(-1), torch.ones(1, 2, 5))


class TestModule:
    config = SLAConfig(keep_ratio=0.4, drop_ratio=0.2, block_q=8, block_k=8)
    inputs = make_inputs(query_length=37, head_dim=8, dtype=torch.float32)

    def test_starts_as_block_sparse_attention(self):
        selection = select_blocks(*self.inputs[:2], block_q=8, block_k=8, keep_ratio=0.4, drop_ratio=0.2)
        output = SparseLinearAttention(8, self.config)(*self.inputs)
        torch.testing.assert_close(output, block_sparse_attention(*self.inputs, selection))

    def test_linear_branch_can_grow(self):
        module = SparseLinearAttention(8, self.config)
        before = module(*self.inputs)
        before.square().sum().backward()
        assert module.proj.weight.grad.abs().sum() > 0
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert not torch.allclose(module(*self.inputs), before)

    def test_projection_stays_in_float32(self):
        module = SparseLinearAttention(8, self.config.replace(feature_map="hedgehog")).to(torch.bfloat16)
        assert module.proj.weight.dtype == module.proj.bias.dtype == torch.float32
        assert module(*(x.bfloat16() for x in self.inputs)).dtype == torch.bfloat16
        assert module.double().proj.weight.dtype == torch.float64

    def test_what_the_projection_gives_outlives_its_memory(self):
        """Offloading by a stream takes the data back, and fills it, while kernels may still read it.

        Who offloads wraps the module's call, which is how the module knows; without that nothing is copied.
        """
        proj = SparseLinearAttention(4, SLAConfig()).proj
        inner = proj.forward
        proj.forward = lambda: inner()
        given = proj()
        for x, parameter in zip(given, proj.parameters(), strict=True):
            parameter.data.fill_(torch.nan)
            assert torch.equal(x, torch.zeros_like(x))
        given[0].sum().backward()
        assert torch.equal(proj.weight.grad, torch.ones(4, 4))

    def test_holds_only_what_its_configuration_uses(self):
        def names(**changes):
            return set(SparseLinearAttention(8, self.config.replace(**changes)).state_dict())

        assert names() == {"proj.weight", "proj.bias"}
        assert names(projection=False) == set()
        assert names(linear_scope="none", feature_map="hedgehog") == set()
        assert names(feature_map="hedgehog") == {"proj.weight", "proj.bias", "feature_weight"}

    def test_wrong_arguments(self):
        with pytest.raises(TypeError, match=r"head_dim must be an int, got 8\.0"):
            SparseLinearAttention(8.0, self.config)
        with pytest.raises(TypeError, match=r"config must be an SLAConfig, got dict"):
            SparseLinearAttention(8, {})
        with pytest.raises(ValueError, match=r"unknown impl 'fast'"):
            SparseLinearAttention(8, self.config, impl="fast")
        with pytest.raises(ValueError, match=r"query must have head_dim 16, got 8"):
            SparseLinearAttention(16, self.config)(*self.inputs)


class TestErrors:
    config = SLAConfig(keep_ratio=0.4, block_q=8, block_k=8)
    inputs = make_inputs(query_length=24, head_dim=8, dtype=torch.float32)

    def attend(self, *, config=config, inputs=inputs, **options):
        return sla_attention(*inputs, config=config, **options)

    def test_config_of_another_type(self):
        with pytest.raises(TypeError, match=r"config must be an SLAConfig, got float"):
            self.attend(config=0.05)

    def test_mixed_dtypes(self):
        query, key, value = self.inputs
        with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float16 \(value\)"):
            self.attend(inputs=(query, key, value.half()))

    def test_unknown_impl(self):
        with pytest.raises(ValueError, match=r"unknown impl 'cute'; expected one of \('auto', 'reference', 'torch'"):
            self.attend(impl="cute")

    def test_selection_with_other_blocks(self):
        selection = random_selection(query_length=24, block_q=8, block_k=4)
        with pytest.raises(ValueError, match=r"selection has blocks of 8x4, but config asks for 8x8"):
            self.attend(selection=selection)

    def test_selection_for_other_lengths(self):
        selection = random_selection(query_length=24, key_length=32, block_q=8, block_k=8)
        with pytest.raises(ValueError, match=r"selection was made for"):
            self.attend(selection=selection)

    def test_tile_order_without_grid(self):
        with pytest.raises(ValueError, match=r"grid is required for token_order=\"tile\""):
            self.attend(config=self.config.replace(token_order="tile"))

    @pytest.mark.parametrize("token_order", ["tile", "raster"])
    def test_grid_of_another_length(self, token_order):
        with pytest.raises(ValueError, match=r"grid 1x5x5 has 25 tokens, but the tensors have 24"):
            self.attend(config=self.config.replace(token_order=token_order), grid=VideoGrid(1, 5, 5))

    @pytest.mark.parametrize("token_order", ["tile", "raster"])
    def test_grid_of_another_type(self, token_order):
        with pytest.raises(TypeError, match=r"grid must be a VideoGrid, got \(2, 3, 4\)"):
            self.attend(config=self.config.replace(token_order=token_order), grid=(2, 3, 4))

    def test_projection_of_another_shape(self):
        with pytest.raises(ValueError, match=r"proj_weight must have shape \(8, 8\) for head_dim 8, got \(8, 4\)"):
            self.attend(proj_weight=torch.zeros(8, 4))

    def test_projection_on_another_device(self):
        with pytest.raises(ValueError, match=r"proj_weight is on meta, but query is on cpu"):
            self.attend(proj_weight=torch.zeros(8, 8, device="meta"))

    @pytest.mark.parametrize("changes", [{"projection": False}, {"linear_scope": "none"}])
    def test_projection_that_the_config_does_not_have(self, changes):
        with pytest.raises(ValueError, match=r"proj_weight was given, but config has"):
            self.attend(config=self.config.replace(**changes), proj_weight=torch.zeros(8, 8))

    def test_bias_without_weight(self):
        with pytest.raises(ValueError, match=r"proj_bias was given without proj_weight"):
            self.attend(proj_bias=torch.zeros(8))

    def test_hedgehog_without_its_weight(self):
        with pytest.raises(ValueError, match=r"feature_weight is required for feature_map=\"hedgehog\""):
            self.attend(config=self.config.replace(feature_map="hedgehog"))

    def test_feature_weight_without_hedgehog(self):
        with pytest.raises(ValueError, match=r"feature_weight is only for feature_map=\"hedgehog\""):
            self.attend(feature_weight=torch.zeros(8, 8))
