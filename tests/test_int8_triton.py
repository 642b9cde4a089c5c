"""`precision="int8"` on Triton's kernels without a GPU: interpreted, see `interpreted`. The same cases run on GPUs."""

import sys

import pytest
from interpreted import all_strided, mend_interpreter, pretend_to_be_on, run_interpreted, with_strided_gradients

# name: (batch, heads, Lq, Lk, D, block_q, block_k, valid keys of each sample or None, dtype, what K and V are like)
CASES = {
    "one token": (1, 1, 1, 1, 64, 64, 128, None, "bfloat16", "plain"),
    "partial blocks": (1, 2, 200, 150, 64, 64, 64, None, "float16", "plain"),
    "an empty half of a block": (2, 1, 70, 129, 64, 128, 128, None, "bfloat16", "plain"),
    "padding": (2, 1, 130, 192, 128, 128, 64, (131, 10), "bfloat16", "plain"),
    "padding, two tiles": (2, 2, 70, 300, 64, 64, 128, (300, 70), "float16", "plain"),
    "strides": (2, 2, 70, 130, 64, 64, 64, None, "bfloat16", "plain"),
    "a channel of K": (1, 2, 130, 200, 64, 64, 64, None, "bfloat16", "channel"),
    "a mean of K": (1, 2, 130, 200, 64, 64, 64, None, "bfloat16", "key mean"),
    "a mean of V": (1, 2, 130, 200, 128, 64, 64, None, "bfloat16", "value mean"),
    "zeros": (1, 1, 70, 130, 64, 64, 64, None, "bfloat16", "zeros"),
}
NAMES = ("output", "lse", "grad_query", "grad_key", "grad_value")


def made_inputs(kind, **sizes):
    """Query, key, and value, whose outliers are of this kind."""
    import torch

    from foveal.testing import make_inputs

    query, key, value = make_inputs(**sizes)
    direction = torch.randn(query.shape[-1], generator=torch.Generator().manual_seed(3)).to(query)
    if kind == "channel":
        key[..., 7] *= 50
    elif kind == "key mean":
        key += 20 * direction
    elif kind == "value mean":
        value += 16
    elif kind == "zeros":
        query[:, :, :64], key[:, :, 64:] = 0, 0
    return query, key, value


def check(name, ours, attend, inputs, names=NAMES, outputs=1):
    """Results of the kernels against the same rounding in plain PyTorch: `attend`(precision) is the reference.

    The outputs may have twice its error. So may the gradients, where it is the error of the plain gradients without
    the rounding: plain PyTorch has the rounded tensors in float32, where kernels have them in the inputs' dtype. Values
    on the border of two integers may go either way: so single entries of a gradient may differ by a 127th of the
    largest, and the LSE, which is float32, by a little.
    """
    import torch

    from foveal.testing import assert_close_to_reference, output_and_gradients, relative_error

    doubled = [x.double() for x in inputs]
    exact, plain = (output_and_gradients(attend("int8"), x) for x in (doubled, inputs))
    unrounded, plain_gradients = (output_and_gradients(attend("input"), x) for x in (doubled, inputs))
    for index, (label, one, expected) in enumerate(zip(names, ours, exact, strict=False)):
        theirs = plain[index]
        if index >= outputs:
            rounding, ulps = plain_gradients[index].double() - unrounded[index], 2 * torch.finfo(one.dtype).eps
            limit = max(2 * relative_error(expected + rounding, expected), ulps)
            assert relative_error(one, expected) <= limit, f"{name}: {label}"
            limit = max(2 * rounding.abs().max(), max(ulps, 1 / 127) * expected.abs().max())
            assert (one.double() - expected).abs().max() <= limit, f"{name}: one entry of {label}"
            continue
        if label == "lse":
            finite = expected.isfinite()  # a row without keys has none
            assert bool((one[~finite] == expected[~finite]).all()), f"{name}: lse of rows without keys"
            assert relative_error(one[finite], expected[finite]) < 1e-4, f"{name}: lse"
            continue
        assert_close_to_reference(one, expected, theirs, name=f"{name}: {label}")


def check_case(name, device, attend):
    """`attend`(query, key, value, selection) gives the output and, perhaps, the LSE."""
    import torch

    from foveal import block_sparse_attention
    from foveal.testing import output_and_gradients, poison_empty, random_selection

    batch, heads, query_length, key_length, head_dim, block_q, block_k, lengths, dtype, kind = CASES[name]
    sizes = {"batch": batch, "heads": heads, "query_length": query_length, "key_length": key_length, "device": device}
    lengths = None if lengths is None else torch.tensor(lengths)
    selection = random_selection(**sizes, block_q=block_q, block_k=block_k, critical=0.7, kv_lengths=lengths)
    dtype = getattr(torch, dtype)
    inputs = made_inputs(kind, **sizes, head_dim=head_dim, dtype=dtype, layout="BLHD")
    if name == "strides":
        inputs = all_strided(*inputs)
    poisoned = inputs
    if lengths is not None:
        valid = selection.key_valid()[:, None, :, None]
        poisoned = (inputs[0], *(torch.where(valid, x, float("nan")) for x in inputs[1:]))
    with poison_empty():
        ours = output_and_gradients(with_strided_gradients(lambda *qkv: attend(*qkv, selection)), poisoned)

    def reference(precision):
        options = {"impl": "reference", "return_lse": True, "precision": precision}
        return lambda *qkv: block_sparse_attention(*qkv, selection, **options)

    assert len(ours) == len(NAMES)
    check(name, ours, reference, inputs, outputs=2)


def run_case(name: str) -> None:
    from on_kernels import block_sparse_attention_gpu

    from foveal.kernels import int8

    def attend(query, key, value, selection):
        scale = query.shape[-1] ** -0.5
        output, lse = block_sparse_attention_gpu(query, key, value, selection, scale, "triton_int8")
        return output, lse + int8.lse_shift(query, key, selection, scale)

    for chip in ("sm_90", "sm_80") if name in ("partial blocks", "padding") else ("sm_80",):
        pretend_to_be_on(chip)
        check_case(name, "cpu", attend)


# name: (feature_map, linear_scope, projected, block_q, block_k, D, heads, Lq, Lk, kv_lengths)
SLA_CASES = {
    "sla softmax": ("softmax", "marginal", True, 64, 64, 64, 2, 200, 127, None),
    "sla elu, no projection": ("elu", "noncritical", False, 128, 64, 64, 2, 130, 150, None),
    "sla relu, all": ("relu", "all", True, 64, 128, 64, 2, 130, 191, None),
    "sla padding keys": ("softmax", "marginal", True, 64, 64, 64, 2, 130, 150, (127, 63)),
    "sla D 128": ("elu", "marginal", True, 64, 128, 128, 1, 70, 150, None),
}


def check_sla(name, device, attend):
    """`attend`(query, key, value, weight, bias, config, selection, kv_lengths)."""
    import torch

    from foveal import SLAConfig, sla_attention
    from foveal.testing import output_and_gradients, random_selection

    feature_map, scope, projected, block_q, block_k, head_dim, heads, *lengths, kv_lengths = SLA_CASES[name]
    kv_lengths = None if kv_lengths is None else torch.tensor(kv_lengths)
    sizes = {"batch": 1 if kv_lengths is None else 2, "heads": heads, "device": device}
    sizes |= {"query_length": lengths[0], "key_length": lengths[1]}
    blocks = {"block_q": block_q, "block_k": block_k}
    selection = random_selection(**sizes, **blocks, critical=0.5, negligible=0.1, kv_lengths=kv_lengths)
    config = SLAConfig(
        keep_ratio=0.3, drop_ratio=0.3, feature_map=feature_map, linear_scope=scope, projection=projected, **blocks
    )
    query, key, value = made_inputs("key mean", **sizes, head_dim=head_dim, dtype=torch.bfloat16)
    inputs = (*all_strided(query, key / 8, value), *weights_for(config, head_dim, device))

    def reference(precision):
        def run(query, key, value, weight=None, bias=None):
            options = {"config": config.replace(precision=precision), "selection": selection, "impl": "reference"}
            return sla_attention(query, key, value, proj_weight=weight, proj_bias=bias, **options)

        return run

    int8 = config.replace(precision="int8")
    ours = output_and_gradients(
        with_strided_gradients(lambda q, k, v, w=None, b=None: attend(q, k, v, w, b, int8, selection)), inputs
    )
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")
    check(name, ours, reference, inputs, names)


def weights_for(config, head_dim, device):
    import torch

    if not config.projection:
        return ()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(head_dim, head_dim, generator=generator).div(head_dim**0.5)
    return tuple(x.bfloat16().to(device) for x in (weight, torch.randn(head_dim, generator=generator)))


def run_sla(name: str) -> None:
    """In groups of one head both ways."""
    import torch
    from on_kernels import selection_rule, sla_attention_gpu

    from foveal.methods.sla import gpu_backward, gpu_forward

    pretend_to_be_on("sm_90" if "elu" in name else "sm_80")
    gpu_forward.GROUP_BYTES = gpu_backward.GROUP_BYTES = 1

    def attend(query, key, value, weight, bias, config, selection):
        return sla_attention_gpu(
            query, key, value, config, selection, query.shape[-1] ** -0.5, weight, bias, "triton_int8"
        )

    check_sla(name, "cpu", attend)
    if name != "sla softmax":
        return
    # A choice made on the way, from the same means, is the one made beforehand.
    from foveal import SLAConfig, select_blocks
    from foveal.kernels import api

    query, key, value = made_inputs("plain", heads=3, query_length=130, head_dim=64, dtype=torch.bfloat16)
    ratios = {"block_q": 64, "block_k": 64, "keep_ratio": 0.4, "drop_ratio": 0.3}
    api.fits_kernel = lambda *_: True
    choices = selection_rule(query, key, **ratios), select_blocks(query, key, **ratios)
    config = SLAConfig(**ratios, projection=False, precision="int8")
    with torch.no_grad():
        ours, given = (attend(query, key, value, None, None, config, choice) for choice in choices)
    assert torch.equal(ours, given)


# name: (grid, tile, topk, heads, D, text keys of each sample or None)
VSA_CASES = {
    "vsa partial cubes": ((3, 5, 9), (4, 4, 4), 3, 2, 64, None),
    "vsa full slots": ((4, 4, 8), (4, 4, 4), 1, 2, 64, None),
    "vsa wide slots": ((4, 5, 9), (4, 4, 8), 2, 1, 128, None),
    "vsa text": ((2, 5, 7), (4, 4, 4), 2, 1, 64, (68, 3)),
}


def check_vsa(name, device, attend):
    """`attend`(query, key, value, gates, grid, config, selection, kv_lengths)."""
    import torch

    from foveal import VideoGrid, VSAConfig, vsa_attention
    from foveal.methods.vsa.attention import select_cubes
    from foveal.testing import output_and_gradients, poison_empty

    sides, tile, topk, heads, head_dim, text = VSA_CASES[name]
    grid, config = VideoGrid(*sides), VSAConfig(topk=topk, tile=tile)
    sizes = {"batch": 1 if text is None else len(text), "heads": heads, "head_dim": head_dim, "dtype": torch.bfloat16}
    sizes |= {"device": device, "query_length": grid.num_tokens, "layout": "BLHD"}
    qkv = made_inputs("key mean", **sizes, key_length=grid.num_tokens + (70 if text else 0))
    gates = made_inputs("plain", **sizes)[:2]
    lengths = None if text is None else torch.tensor([grid.num_tokens + n for n in text], device=device)
    selection = select_cubes(*qkv[:2], config=config, grid=grid, kv_lengths=lengths)

    def reference(precision):
        def run(query, key, value, coarse, fine):
            options = {"config": config.replace(precision=precision), "selection": selection, "impl": "reference"}
            options |= {"gate_coarse": coarse, "gate_fine": fine, "grid": grid, "kv_lengths": lengths}
            return vsa_attention(query, key, value, **options)

        return run

    int8 = config.replace(precision="int8")
    with poison_empty():
        ours = output_and_gradients(
            with_strided_gradients(lambda q, k, v, *gates: attend(q, k, v, gates, grid, int8, selection, lengths)),
            (*qkv, *gates),
        )
    check(name, ours, reference, (*qkv, *gates), ("output", *NAMES[2:], "grad_coarse", "grad_fine"))


def run_vsa(name: str) -> None:
    from on_kernels import vsa_attention_gpu

    from foveal.methods.vsa.layout import CubeLayout

    def attend(query, key, value, gates, grid, config, selection, lengths):
        layout = CubeLayout(config, grid, key, lengths)
        selection = layout.checked(selection, query)
        return vsa_attention_gpu(query, key, value, layout, selection, query.shape[-1] ** -0.5, *gates, "triton_int8")

    check_vsa(name, "cpu", attend)


def run_kernels() -> None:
    """Each kernel against plain PyTorch, to the last integer."""
    import torch

    from foveal.kernels import int8
    from foveal.kernels.triton.int8 import Int8, key_means, round_trip, write_int8
    from foveal.kernels.triton.select import pool
    from foveal.testing import random_selection

    sizes = {"batch": 2, "heads": 2, "query_length": 70, "key_length": 200}
    for lengths, block in ((None, 64), ((199, 64), 64), ((130, 1), 128)):
        lengths = None if lengths is None else torch.tensor(lengths)
        selection = random_selection(**sizes, block_k=block, kv_lengths=lengths)
        _, key, _ = made_inputs("key mean", **sizes, head_dim=64, dtype=torch.bfloat16)
        (key,) = all_strided(key, key, key)[1:2]
        listed, valid, pairs = selection.key_block_sizes, selection.key_valid(), range(4)
        mean = key_means(pool(key, block, listed).flatten(0, 1), key, block, listed, pairs)
        expected = int8.key_mean(key, valid)
        torch.testing.assert_close(mean.unflatten(0, (2, 2)), expected[:, :, 0], rtol=1e-5, atol=1e-5)
        tokens, blocks = torch.arange(200) // block, selection.num_key_blocks
        centered = torch.where(valid[:, None, :, None], key.float() - mean.view(2, 2, 1, 64), 0)
        rounded = int8.through_int8(centered, tokens, blocks)
        output = Int8.empty(key, block)
        for part in (range(1), range(1, 4)):
            write_int8(key, block, listed, mean[part.start : part.stop], part, output)
        back = output.values * output.steps.view(2, 2, blocks, 1)[:, :, tokens]
        torch.testing.assert_close(back, rounded, rtol=1e-5, atol=1e-6)
        assert torch.equal(round_trip(key, block, listed, mean)[0], rounded.bfloat16())


def run_ways() -> None:
    """Plain eager calls, custom ops, compiled and checkpointed ones give the same bits."""
    from functools import partial

    import torch
    from on_kernels import selection_rule, sla_attention_gpu
    from torch.utils.checkpoint import checkpoint

    from foveal import SLAConfig
    from foveal.kernels import operator
    from foveal.kernels.triton import select
    from foveal.testing import output_and_gradients

    query, key, value = made_inputs("plain", heads=1, query_length=100, head_dim=64, dtype=torch.bfloat16)
    config = SLAConfig(keep_ratio=0.5, drop_ratio=0.0, projection=False, precision="int8")
    rule = selection_rule(query, key, block_q=64, block_k=64, keep_ratio=0.5, drop_ratio=0.0)

    def attention(query, key, value):
        return sla_attention_gpu(query, key, value, config, rule, 0.125, None, None, "triton_int8")

    expected = output_and_gradients(attention, (query, key, value))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    ways = {"compiled": compiled, "checkpointed": partial(checkpoint, attention, use_reentrant=False)}
    results = {way: output_and_gradients(function, (query, key, value)) for way, function in ways.items()}
    for module in (operator, select):
        module.is_plain = lambda *_: False
    results["custom ops"] = output_and_gradients(attention, (query, key, value))
    for way, got in results.items():
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), way


def main(names) -> None:
    mend_interpreter()
    runs = {"kernels": run_kernels, "ways": run_ways}
    for name in names:
        if name in runs:
            runs[name]()
        else:
            (run_sla if name in SLA_CASES else run_vsa if name in VSA_CASES else run_case)(name)


QUICK = ("sla relu, all", "vsa text")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["kernels"], id="kernels"),
        pytest.param(["ways"], id="ways", marks=pytest.mark.exhaustive),
        pytest.param(list(CASES), id="attention"),
        *(
            pytest.param([name], id=name, marks=() if name in QUICK else pytest.mark.exhaustive)
            for name in (*SLA_CASES, *VSA_CASES)
        ),
    ],
)
def test_interpreted(names):
    pytest.importorskip("triton")
    run_interpreted(__file__, names)


if __name__ == "__main__":
    main(sys.argv[1:])
