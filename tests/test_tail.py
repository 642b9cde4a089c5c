"""The pooled tail: unread blocks count by their means, in one softmax with the keys that are read."""

import sys

import pytest
import torch
from interpreted import all_strided, mend_interpreter, run_interpreted, with_strided_gradients
from tiny_wan import run, tiny_transformer

import foveal
from foveal import SLAConfig, SparseLinearAttention, TokenLayout, VideoGrid, attention_cost, sla_attention
from foveal.kernels import tail as module
from foveal.testing import (
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    random_selection,
    relative_error,
)

BLOCKS = {"block_q": 16, "block_k": 8}
TAIL = SLAConfig(keep_ratio=0.25, drop_ratio=0.25, linear_scope="none", tail="pooled", **BLOCKS)
NAMES = ("output", "grad_query", "grad_key", "grad_value")

CONFIGS = {
    "only the tail": TAIL,
    "nothing read": TAIL.replace(keep_ratio=0.0),
    "with a linear branch": TAIL.replace(linear_scope="marginal", projection=False),
    "linear over all": TAIL.replace(linear_scope="all", feature_map="elu", projection=False),
    "tiles": TAIL.replace(token_order="tile", block_q=64, block_k=64),
    "mass of quarters": TAIL.replace(score="log_sum_exp", keep_mass=0.5),
}


def by_definition(query, key, value, selection, scale):
    """Loops over float64 rows: the softmax over read keys and n copies of each unread block's mean."""
    labels, output = selection.labels(), torch.empty_like(query)
    sizes = selection.key_block_sizes
    for b, h, m in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        keys, values = [], []
        for j in range(selection.num_key_blocks):
            start = j * selection.block_k
            stop = min(start + selection.block_k, key.shape[2])
            if sizes is not None:
                stop = start + int(sizes[b % len(sizes), j])
            k, v = key[b, h, start:stop], value[b, h, start:stop]
            if labels[b, h, m // selection.block_q, j] != 1 and len(k):
                k, v = (x.mean(0, keepdim=True).expand(len(x), -1) for x in (k, v))
            keys.append(k)
            values.append(v)
        weights = (torch.cat(keys) @ query[b, h, m] * scale).softmax(0)
        output[b, h, m] = weights @ torch.cat(values)
    return output


@pytest.mark.parametrize("lengths", [None, (61, 20)])
def test_reference_is_the_definition(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    sizes = {"batch": 2, "query_length": 50, "key_length": 61}
    qkv = make_inputs(**sizes, head_dim=8)
    selection = random_selection(**sizes, **BLOCKS, kv_lengths=lengths)
    expected = by_definition(*qkv, selection, 8**-0.5)
    for impl in ("reference", "torch"):
        output = sla_attention(*qkv, config=TAIL, selection=selection, impl=impl)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [False, True])
def test_torch_equals_the_reference_with_all_gradients(name, padding):
    config = CONFIGS[name]
    grid = VideoGrid(3, 6, 7)
    length = grid.num_tokens
    qkv = make_inputs(batch=2, query_length=length, key_length=length + 20, head_dim=8)
    lengths = torch.tensor([length + 20, length + 3]) if padding else None
    where = {"grid": grid, "protected_keys": (length, length + 20), "kv_lengths": lengths}
    if padding:
        mask = torch.arange(length + 20) < lengths[:, None]
        poisoned = (qkv[0], *(torch.where(mask[:, None, :, None], x, float("nan")) for x in qkv[1:]))
    else:
        poisoned = qkv
    ours = output_and_gradients(lambda *x: sla_attention(*x, config=config, impl="torch", **where), poisoned)
    exact = output_and_gradients(lambda *x: sla_attention(*x, config=config, impl="reference", **where), qkv)
    for label, x, y in zip(NAMES, ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=f"{name}: {label}")


def test_gradients_are_those_of_finite_differences_and_of_every_transform():
    sizes = {"query_length": 21, "key_length": 30}
    qkv = make_inputs(**sizes, head_dim=4, heads=1, requires_grad=True)
    selection = random_selection(**sizes, heads=1, block_q=8, block_k=4)

    def attend(*x):
        return sla_attention(*x, config=TAIL.replace(block_q=8, block_k=4), selection=selection, impl="torch")

    assert torch.autograd.gradcheck(attend, qkv)
    assert torch.autograd.gradgradcheck(attend, qkv)
    qkv = [x.detach() for x in qkv]
    tangents = [torch.randn_like(x) for x in qkv]
    _, ours = torch.func.jvp(attend, tuple(qkv), tuple(tangents))
    step = 1e-6
    ahead, behind = (attend(*(x + s * t for x, t in zip(qkv, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(ours, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_equal_keys_in_each_block_make_it_exact():
    query, key, value = make_inputs(query_length=64, head_dim=8)
    key = key[:, :, ::8].repeat_interleave(8, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for ratio in (0.0, 0.2, 1.0):
        config = TAIL.replace(keep_ratio=ratio, drop_ratio=0.0)
        torch.testing.assert_close(sla_attention(query, key, value, config=config), dense)
    without = sla_attention(query, key, value, config=TAIL.replace(tail="none"))
    assert relative_error(without, dense) > 0.1


def test_packed_sequence_counts_only_the_video_in_its_tail():
    layout = TokenLayout(VideoGrid(2, 5, 7), before=(9,), after=(4,))
    qkv = make_inputs(query_length=layout.num_tokens, head_dim=8)
    for order in ("raster", "tile"):
        config = TAIL.replace(token_order=order, block_q=16, block_k=16)
        ours, exact = (
            output_and_gradients(lambda *x, i=impl, c=config: sla_attention(*x, config=c, layout=layout, impl=i), qkv)
            for impl in ("torch", "reference")
        )
        for label, x, y in zip(NAMES, ours, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=label)
        everything = sla_attention(*qkv, config=config.replace(keep_ratio=1.0, drop_ratio=0.0), layout=layout)
        torch.testing.assert_close(everything, torch.nn.functional.scaled_dot_product_attention(*qkv))


def test_bfloat16_is_within_the_rule():
    qkv = make_inputs(query_length=200, head_dim=32, dtype=torch.bfloat16)
    selection = random_selection(query_length=200, **BLOCKS)

    def attend(impl, tensors):
        return output_and_gradients(lambda *x: sla_attention(*x, config=TAIL, selection=selection, impl=impl), tensors)

    exact = attend("reference", [x.double() for x in qkv])
    for label, *x in zip(NAMES, attend("torch", qkv), exact, attend("reference", qkv), strict=True):
        assert_close_to_reference(*x, name=label)


def test_compiled_and_under_autocast():
    attention = SparseLinearAttention(16, TAIL, impl="torch")
    qkv = make_inputs(query_length=64, head_dim=16, dtype=torch.float32)
    expected = output_and_gradients(attention, qkv)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for x, y in zip(output_and_gradients(compiled, qkv), expected, strict=True):
        torch.testing.assert_close(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in zip(output_and_gradients(attention, qkv), expected, strict=True):
            assert torch.equal(x, y)


def test_cost_has_a_part_of_its_own_and_settings_are_checked():
    grid = VideoGrid(8, 30, 52)
    cost = attention_cost(SLAConfig(linear_scope="none", tail="pooled"), grid=grid, heads=12, head_dim=128)
    (part,) = (part for part in cost.parts if part.name == "tail")
    blocks = -(-grid.num_tokens // 64)
    assert part.flops == 12 * 128 * (2 * grid.num_tokens + 4 * 64 * blocks * blocks)
    with pytest.raises(ValueError, match=r"unknown tail 'mean'; expected one of \('none', 'pooled'\)"):
        SLAConfig(tail="mean")
    SLAConfig(keep_ratio=0.0, linear_scope="none", tail="pooled")
    with pytest.raises(ValueError, match="leaves neither branch"):
        SLAConfig(keep_ratio=0.0, linear_scope="none")


def test_model_with_a_tail_is_closer_to_the_dense_one_and_comes_back_from_a_file(tmp_path):
    model = tiny_transformer()
    dense = run(model)
    errors = {}
    for tail in ("none", "pooled"):
        config = SLAConfig(keep_ratio=0.2, drop_ratio=0.0, linear_scope="none", tail=tail, **BLOCKS)
        foveal.sparsify(model, config)
        errors[tail] = relative_error(run(model), dense)
        if tail == "pooled":
            expected = run(model)
            foveal.save(model, tmp_path)
        foveal.densify(model)
    assert errors["pooled"] < 0.8 * errors["none"]
    assert torch.equal(run(foveal.load(model, tmp_path)), expected)


def random_biases(batch, heads, rows, columns, seed=0):
    """Biases of random unread blocks of 1 to 64 keys; a row that reads everything, and one that reads nothing."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.rand(batch, heads, rows, columns, generator=generator) < 0.4
    read[:, :, 0], read[:, :, -1] = True, False
    sizes = torch.randint(1, 65, (batch, 1, 1, columns), generator=generator)
    return torch.where(read, -torch.inf, sizes.double().log())


# name: (batch, heads, Lq, Tk, D, block_q, each tensor with strides of its own)
INTERPRETED = {
    "partial": (1, 2, 150, 37, 64, 64, False),
    "wide blocks": (2, 1, 200, 5, 64, 128, False),
    "wide heads": (1, 1, 70, 33, 128, 64, False),
    "strides": (2, 2, 70, 40, 64, 64, True),
}


def run_case(name):
    """The kernels for the tail against float64; plain is PyTorch's own at the same precision."""
    batch, heads, length, columns, head_dim, block_q, with_strides = INTERPRETED[name]
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
    bias = random_biases(batch, heads, -(-length // block_q), columns)
    for dtype in (torch.float16, torch.bfloat16):
        query, *_ = make_inputs(**sizes, query_length=length, dtype=dtype)
        means = [x.to(dtype).float() for x in make_inputs(**sizes, query_length=columns, seed=1)[:2]]
        if with_strides:
            query, *_ = all_strided(query, query, query)

        def attend(query, mean_key, mean_value, impl="triton", dtype=torch.float32, block_q=block_q):
            return module.pooled_tail(
                query, mean_key, mean_value, bias.to(dtype), block_q, query.shape[-1] ** -0.5, impl
            )

        def plain(query, mean_key, mean_value, block_q=block_q):
            rows = bias.float().repeat_interleave(block_q, 2)[:, :, : query.shape[2]]
            scores = (query @ mean_key.to(query.dtype).mT).float() * query.shape[-1] ** -0.5 + rows
            some = (rows > -torch.inf).any(-1, keepdim=True)
            scores = torch.where(some, scores, 0)
            weights = torch.where(some, scores.softmax(-1), 0).to(query.dtype)
            lse = torch.where(some[..., 0], scores.logsumexp(-1), -torch.inf)
            return weights @ mean_value.to(query.dtype), lse

        ours = output_and_gradients(with_strided_gradients(attend) if with_strides else attend, (query, *means))
        double = [x.double() for x in (query, *means)]
        exact = output_and_gradients(lambda *x: attend(*x, impl="torch", dtype=torch.float64), double)
        names = ("output", "lse", "grad_query", "grad_mean_key", "grad_mean_value")
        for label, *x in zip(names, ours, exact, output_and_gradients(plain, (query, *means)), strict=True):
            assert_close_to_reference(*x, name=f"{name}, {dtype}: {label}")


def run_linear():
    """The linear branch by itself, as the kernels give it where there is a tail."""
    from on_kernels import linear_branch_gpu

    qkv = make_inputs(query_length=130, key_length=150, head_dim=64, dtype=torch.float16)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    selection = random_selection(query_length=130, key_length=150)
    for scope in ("marginal", "noncritical", "all"):
        config = SLAConfig(linear_scope=scope, tail="pooled")

        def reference(query, key, value, weight, config=config):
            both, sparse = (
                sla_attention(query, key, value, config=c, selection=selection, impl="reference", **given)
                for c, given in (
                    (config.replace(tail="none"), {"proj_weight": weight}),
                    (config.replace(tail="none", linear_scope="none"), {}),
                )
            )
            return both - sparse

        def ours(query, key, value, weight, config=config):
            return linear_branch_gpu(query, key, value, config, selection, 0.125, weight, None, "triton")

        exact = output_and_gradients(reference, [x.double() for x in (*qkv, weight)])
        found = output_and_gradients(ours, (*qkv, weight))
        for label, x, y in zip((*NAMES, "grad_weight"), found, exact, strict=True):
            if y.abs().max() > 1e-9:
                assert relative_error(x, y) < 0.01, (scope, label)


# The interpreter takes seconds for a case. The others are left out unless asked for.
QUICK = ("partial", "linear")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.exhaustive) for x in (*INTERPRETED, "linear")]
)
def test_kernels(name):
    run_interpreted(__file__, [name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu(name):
    config = CONFIGS[name].replace(block_q=64, block_k=64)
    grid = VideoGrid(5, 9, 11)
    length = grid.num_tokens
    qkv = make_inputs(query_length=length, key_length=length + 70, head_dim=128, dtype=torch.bfloat16, device="cuda")
    where = {"grid": grid, "protected_keys": (length, length + 70)}
    selection = SparseLinearAttention(128, config).select(*qkv[:2], **where)

    def attend(impl, inputs):
        given = {"config": config, "selection": selection, "grid": grid}
        return output_and_gradients(lambda *x: sla_attention(*x, **given, impl=impl), inputs)

    exact, plain = attend("reference", [x.double() for x in qkv]), attend("reference", qkv)
    for impl in ("triton", "auto"):
        for label, *x in zip(NAMES, attend(impl, qkv), exact, plain, strict=True):
            assert_close_to_reference(*x, name=f"{name}, {impl}: {label}")


if __name__ == "__main__":
    mend_interpreter()
    for case in sys.argv[1:]:
        run_linear() if case == "linear" else run_case(case)
