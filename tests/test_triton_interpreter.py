"""The numerics of the Triton kernels on small odd shapes, without a GPU.

Triton decides when it is imported whether kernels are interpreted, so the cases run in a process of their own: this
file, started as a script.
"""

import sys

import pytest
from interpreted import (
    all_strided,
    mend_interpreter,
    pretend_to_be_on,
    run_interpreted,
    strided,
    with_strided_gradients,
    with_strided_lists,
)

# name: (batch, heads, Lq, Lk, D, block_q, block_k, descriptors, layout, kv_lengths); layout "each" gives every tensor
# strides of its own. 63 keys of 64 are next to a full tile, and must not pass for one.
CASES = {
    "one token": (1, 1, 1, 1, 64, 64, 128, False, "BHLD", None),
    "partial blocks": (1, 2, 200, 150, 64, 64, 64, True, "BHLD", None),
    "partial blocks, pointers": (1, 2, 200, 150, 64, 64, 64, False, "BHLD", None),
    "an empty half of a block": (2, 1, 70, 129, 64, 128, 128, True, "BLHD", None),
    "an empty half of a block, pointers": (2, 1, 70, 193, 64, 64, 128, False, "BLHD", None),
    "padding keys": (2, 1, 130, 192, 128, 128, 64, True, "BHLD", (131, 10)),
    "padding keys, two tiles": (2, 1, 130, 300, 64, 64, 128, False, "BLHD", (300, 70)),
    "63 keys": (1, 2, 63, 127, 64, 64, 64, True, "BLHD", None),
    "63 keys, two tiles": (1, 2, 65, 191, 64, 64, 128, False, "BLHD", None),
    "63 padding keys": (2, 2, 70, 128, 64, 64, 64, False, "BLHD", (127, 63)),
    "strides": (2, 2, 70, 130, 64, 64, 64, True, "each", None),
    "strides, pointers": (2, 2, 70, 130, 64, 64, 64, False, "each", None),
}


def run_case(name: str) -> None:
    import torch
    from on_kernels import block_sparse_attention_gpu

    from foveal.kernels.reference import block_sparse_attention_reference
    from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients, random_selection

    batch, heads, query_length, key_length, head_dim, block_q, block_k, descriptors, layout, kv_lengths = CASES[name]
    pretend_to_be_on("sm_90" if descriptors else "sm_80")
    sizes = {"batch": batch, "heads": heads, "query_length": query_length, "key_length": key_length}
    kv_lengths = None if kv_lengths is None else torch.tensor(kv_lengths)
    selection = random_selection(**sizes, block_q=block_q, block_k=block_k, critical=0.7, kv_lengths=kv_lengths)
    made = make_inputs(**sizes, head_dim=head_dim, dtype=torch.float16, layout="BHLD" if layout == "each" else layout)
    query, key, value = made
    if layout == "each":
        query, key, value, selection = *all_strided(*made), with_strided_lists(selection)
    valid = selection.key_valid()[:, None, :, None]
    poisoned = (query, key, value)
    if kv_lengths is not None:
        poisoned = (query, *(torch.where(valid, x, float("nan")) for x in (key, value)))

    def run(attention, inputs):
        return output_and_gradients(lambda *qkv: attention(*qkv, selection, head_dim**-0.5), inputs)

    ours = run(with_strided_gradients(lambda *inputs: block_sparse_attention_gpu(*inputs, "triton")), poisoned)
    exact = run(block_sparse_attention_reference, [x.double() for x in (query, key, value)])
    plain = run(block_sparse_attention_reference, (query, key, value))
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    for label, x, y, z in zip(names, ours, exact, plain, strict=True):
        assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def run_lists() -> None:
    import dataclasses

    import torch

    from foveal.kernels.triton.lists import column_lists, full_blocks_first
    from foveal.testing import random_selection

    selection = random_selection(batch=2, query_length=1100, key_length=200, block_q=64, block_k=16, critical=0.4)
    columns = column_lists(selection)
    mask = selection.critical_mask().transpose(2, 3).flatten(0, 2)
    for expected, offset, count in zip(mask, columns.offsets, columns.counts, strict=True):
        assert columns.rows[offset : offset + count].tolist() == expected.nonzero().flatten().tolist()

    sizes = torch.randint(13, 17, (2, selection.num_key_blocks), dtype=torch.int32)
    ordered = full_blocks_first(dataclasses.replace(selection, key_block_sizes=sizes))
    for b in range(2):
        for i in range(selection.num_query_blocks):
            count = int(selection.critical_count[b, 1, i])
            row = selection.critical[b, 1, i, :count].tolist()
            full = [j for j in row if sizes[b, j] == 16]
            assert int(ordered.full_counts[b, 1, i]) == len(full)
            assert ordered.critical[b, 1, i, :count].tolist() == full + [j for j in row if sizes[b, j] != 16]


def run_selection() -> None:
    import torch

    from foveal import select_blocks
    from foveal.kernels import api as module
    from foveal.kernels.triton import picking as kernel
    from foveal.rules import FixedBlocks

    generator = torch.Generator().manual_seed(0)
    # Small integers and blocks of powers of two: scores are exact, in whatever order a processor sums them.
    query = torch.randint(-8, 9, (2, 1, 200, 64), generator=generator).float()
    key = torch.randint(-8, 9, (2, 1, 450, 64), generator=generator).float()
    # Ties: equal key blocks score the same against every query block.
    key[:, :, 64:320] = key[:, :, :64].repeat(1, 1, 4, 1)
    query[1, 0, :128] = 0
    ranges = [[[0, 2], [5 * i, 5 * i + 3], [20 + i, 60]] for i in range(4)]
    fixed = FixedBlocks(torch.tensor(ranges, dtype=torch.int32), torch.zeros(30, dtype=torch.int8))
    options = [
        {"keep_ratio": 0.3},
        {"keep_ratio": 0.3, "drop_ratio": 0.4},
        {"keep_ratio": 0.0, "drop_ratio": 1.0},
        {"keep_ratio": 0.5, "drop_ratio": 0.5, "kv_lengths": torch.tensor([450, 88])},
        {"keep_ratio": 0.2, "drop_ratio": 0.2, "protected_keys": (400, 450), "protected_queries": (150, 200)},
        {"keep_ratio": 0.1, "keep_mass": 0.6},
        {"keep_ratio": 0.1, "keep_mass": 1.0, "max_keep_ratio": 0.5},
        {"keep_ratio": 0.1, "drop_ratio": 0.5, "keep_mass": 0.8, "kv_lengths": torch.tensor([450, 88])},
        {"keep_ratio": 0.3, "score": "log_sum_exp"},
        {"keep_ratio": 0.3, "score": "mean_spread"},
        {"keep_ratio": 0.2, "drop_ratio": 0.3, "score": "mean_spread", "kv_lengths": torch.tensor([450, 84])},
        {"keep_ratio": 0.3, "drop_ratio": 0.3, "score": "log_sum_exp", "kv_lengths": torch.tensor([450, 84])},
        {
            "keep_ratio": 0.1,
            "score": "log_sum_exp",
            "keep_mass": 0.6,
            "max_keep_ratio": 0.6,
            "protected_keys": (400, 450),
        },
        {"keep_ratio": 0.1, "fixed": fixed},
        {"keep_ratio": 0.1, "drop_ratio": 0.8, "fixed": fixed, "kv_lengths": torch.tensor([450, 88])},
    ]
    ratios = {"keep_ratio": (0.1, 0.5), "fixed": fixed}
    by_head = [
        ratios | {"keep_mass": 0.4, "max_keep_ratio": 0.6},
        ratios | {"drop_ratio": 0.4, "kv_lengths": torch.tensor([450, 88])},
    ]
    for option in options + by_head:
        if option is by_head[0]:
            query, key = query.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1)
        module.fits_kernel = lambda *_: False
        expected = select_blocks(query, key, block_q=64, block_k=16, **option)
        module.fits_kernel = lambda *_: True
        for kernel.SCORE_BYTES in (2**20, 1) if "kv_lengths" in option else (2**20,):
            ours = select_blocks(query, key, block_q=64, block_k=16, **option)
            assert torch.equal(ours.critical_count, expected.critical_count), option
            assert torch.equal(ours.critical, expected.critical), option
            assert (ours.marginal is None) == (expected.marginal is None), option
            assert torch.equal(ours.labels(), expected.labels()), option
            if ours.marginal is not None:
                padded = ours.marginal._base
                assert padded.shape[-1] % 64 == padded.shape[-2] % 64 == 0
                assert padded.sum() == ours.marginal.sum()


def run_states() -> None:
    """Pooled blocks and key states of strided tensors whose blocks have 63 valid tokens, 64, or none."""
    import torch

    from foveal.kernels.triton.linear import Keys, Means, key_state_sums, key_states
    from foveal.kernels.triton.masked_sum import masked_sum
    from foveal.kernels.triton.pooling import pool
    from foveal.testing import make_inputs, relative_error

    made = make_inputs(batch=2, heads=2, query_length=127, head_dim=64, dtype=torch.bfloat16)
    lengths = {"length": ((64, 63), (64, 63)), "sizes": ((64, 63), (63, 0)), "two tiles": ((127,), (127,))}
    for name, rows in lengths.items():
        _, key, value = all_strided(*made)
        block, counts = 128 if name == "two tiles" else 64, torch.tensor(rows, dtype=torch.int32)
        sizes = counts if name == "sizes" else None
        valid = (torch.arange(127) % block < counts.repeat_interleave(block, 1)[:, :127])[:, None, :, None]
        sums = torch.zeros(2, 127, counts.shape[1]).double()
        sums[:, torch.arange(127), torch.arange(127) // block] = 1
        if sizes is not None:
            key, value = (torch.where(valid, x, float("nan")) for x in (key, value))
            key, value = strided(key, "LBH", 16), strided(value, "HBL", 24)
        k, v = (torch.where(valid, x, 0).double() for x in (key, value))
        phi = torch.where(valid, torch.nn.functional.elu(k) + 1, 0)
        blocks = (sums[:, None, ..., None] * phi[:, :, :, None]).permute(0, 1, 3, 4, 2)
        expected = (blocks @ v[:, :, None]).flatten(0, 1)
        means = sums.transpose(1, 2)[:, None] @ k / counts.clamp(min=1)[:, None, :, None]
        norms = blocks.sum(-1).flatten(0, 1)
        for descriptors in (True, False):
            pretend_to_be_on("sm_90" if descriptors else "sm_80")
            state, norm = torch.empty_like(expected, dtype=torch.bfloat16), torch.empty_like(norms, dtype=torch.float32)
            pooled = torch.empty_like(norm)
            key_states(Keys(key, value, sizes, block, "elu"), range(4), pooled, state, norm)
            apart = pool(key, block, sizes)
            assert torch.equal(pooled.unflatten(0, (2, 2)), apart), name
            assert relative_error(apart, means) < 1e-6, name
            assert relative_error(state, expected) < 4e-3, name
            assert relative_error(norm, norms) < 1e-3, name
            state, norm = key_state_sums(Keys(key, value, sizes, block, "elu"), pooled)
            assert torch.equal(pooled.unflatten(0, (2, 2)), apart), name
            assert relative_error(state, expected.sum(1, keepdim=True)) < 4e-3, name
            assert relative_error(norm, norms.sum(1, keepdim=True)) < 1e-3, name
            quarters = pool(key, block, sizes, quarters=True).flatten(0, 1)
            pooled = torch.full_like(quarters, float("nan"))
            key_state_sums(Keys(key, value, sizes, block, "elu"), pooled)
            assert torch.equal(pooled, quarters), name
            # Of V - m, where V has a mean that the states would drown in.
            weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
            for whole in (False, True):
                centers = Means(*torch.full((2, 4, 64), float("nan")), weight)
                if whole:
                    state, norm = key_state_sums(Keys(key, value + 16, sizes, block, "elu"), None, centers)
                else:
                    state, norm = torch.empty_like(expected, dtype=torch.bfloat16), torch.empty_like(norms).float()
                    key_states(Keys(key, value + 16, sizes, block, "elu"), range(4), None, state, norm, centers)
                mean = centers.mean.double()
                rows = torch.where(valid, (value + 16).double() - mean.unflatten(0, (2, 2))[:, :, None], 0)
                wanted = (blocks @ rows[:, :, None]).flatten(0, 1)
                wanted = wanted.sum(1, keepdim=True) if whole else wanted
                assert relative_error(state, wanted) < 4e-3, (name, whole)
                assert relative_error(centers.projected, mean @ weight.double().t()) < 1e-5, (name, whole)
                if not whole:
                    valid_rows = valid.sum(2).clamp(min=1).repeat_interleave(2, 0)[:, 0]
                    sums_of_rows = torch.where(valid, (value + 16).double(), 0).sum(2).flatten(0, 1)
                    assert relative_error(mean, sums_of_rows / valid_rows) < 1e-6, name
    mask = (torch.rand(2, 64, 64) < 0.5).bfloat16().transpose(1, 2)
    terms = torch.rand(2, 64, 64)
    assert relative_error(masked_sum(mask, terms), mask.double() @ terms.double()) < 1e-5

    from foveal.kernels.hopper.shared_sums import shared_sums
    from foveal.kernels.values import LinearTerm

    # 33 parts and 70 blocks of three heads: more than a program adds at a time, and not a multiple of it.
    parts, norms, biases = torch.randn(3, 33, 64, 64), torch.randn(3, 70, 64), torch.randn(3, 70, 64)
    state, norm = torch.randn(3, 1, 64, 64).bfloat16(), torch.rand(3, 1, 64)
    for projection in (None, weight):
        term = LinearTerm("elu", projection, state=state, norm=norm, means=torch.randn(2, 3, 1, 64))
        found, total = shared_sums(term, parts, norms, biases), parts.double().sum(1)
        assert relative_error(found.norm, norms.double().sum(1, keepdim=True)) < 1e-6
        if projection is None:
            assert relative_error(found.state[:, 0], total) < 4e-3
            assert found.weight is found.bias is None
        else:
            whole = (state + norm[..., None] * term.means[0][:, :, None]).double()
            assert relative_error(found.state[:, 0], total @ weight.double()) < 8e-3
            assert relative_error(found.weight, total.flatten(0, 1).t() @ whole.flatten(0, 2)) < 1e-5
            assert relative_error(found.bias, biases.double().sum((0, 1))) < 1e-6


# name: (feature_map, linear_scope, projection, block_q, block_k, D, heads, Lq, Lk, kv_lengths). In groups of one head
# both ways; 14B models at 720p need eight groups.
SLA_CASES = {
    "sla softmax": ("softmax", "marginal", True, 64, 64, 64, 2, 200, 127, None),
    "sla elu, no projection": ("elu", "noncritical", False, 128, 64, 64, 2, 130, 150, None),
    "sla relu, all": ("relu", "all", True, 64, 128, 64, 2, 130, 191, None),
    "sla padding keys": ("softmax", "marginal", True, 64, 64, 64, 2, 130, 150, (127, 63)),
    "sla D 128": ("elu", "marginal", True, 64, 128, 128, 1, 70, 150, None),
}


def run_sla(name: str) -> None:
    import torch
    from on_kernels import sla_attention_gpu

    from foveal import SLAConfig
    from foveal.methods.sla import gpu_backward, gpu_forward
    from foveal.methods.sla.reference import sla_attention_reference
    from foveal.testing import (
        assert_close_to_reference,
        make_inputs,
        output_and_gradients,
        random_selection,
        relative_error,
    )

    feature_map, scope, projection, block_q, block_k, head_dim, heads, *lengths, kv_lengths = SLA_CASES[name]
    pretend_to_be_on("sm_90" if head_dim == 64 else "sm_80")
    gpu_forward.GROUP_BYTES = gpu_backward.GROUP_BYTES = 1
    kv_lengths = None if kv_lengths is None else torch.tensor(kv_lengths)
    sizes = {"batch": 1 if kv_lengths is None else 2, "heads": heads}
    sizes |= {"query_length": lengths[0], "key_length": lengths[1]}
    selection = random_selection(
        **sizes, block_q=block_q, block_k=block_k, critical=0.5, negligible=0.1, kv_lengths=kv_lengths
    )
    labels = selection.labels()
    assert ((labels == 1).any(-1) & (labels == 0).any(-1)).any(), "no row has both branches"
    selection = with_strided_lists(selection)
    config = SLAConfig(
        keep_ratio=0.3, drop_ratio=0.3, feature_map=feature_map, linear_scope=scope, projection=projection
    )
    dtype = torch.bfloat16
    query, key, value = make_inputs(**sizes, head_dim=head_dim, dtype=dtype)
    # With a mean, or averages over many keys would be next to nothing, and errors in them too.
    inputs = all_strided(query, key, value + 1)
    generator = torch.Generator().manual_seed(2)
    weights = ()
    if projection:
        weights = (
            torch.randn(head_dim, head_dim, generator=generator).div(head_dim**0.5).to(dtype),
            torch.randn(head_dim, generator=generator).to(dtype),
        )
    scale = head_dim**-0.5

    def ours(query, key, value, weight=None, bias=None):
        return sla_attention_gpu(query, key, value, config, selection, scale, weight, bias, "triton")

    def reference(query, key, value, weight=None, bias=None):
        return sla_attention_reference(
            query, key, value, config=config, selection=selection, scale=scale, proj_weight_DD=weight, proj_bias_D=bias
        )

    results = output_and_gradients(with_strided_gradients(ours), inputs + weights)
    exact = output_and_gradients(reference, [x.double() for x in inputs + weights])
    plain = output_and_gradients(reference, inputs + weights)
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")
    for label, x, y, z in zip(names, results, exact, plain, strict=False):
        assert_close_to_reference(x, y, z, name=f"{name}: {label}")
        # Without the floor of two units in the last place, ten times plain PyTorch's error in the Euclidean norm.
        errors = relative_error(x, y), relative_error(z, y)
        assert errors[0] <= 2 * errors[1], f"{name}: {label}: relative errors of ours and plain PyTorch: {errors}"


# name: (linear_scope, block_k, heads, GROUP_BYTES, options of the selection)
SELECTING_CASES = {
    "selecting": ("marginal", 64, 2, 1, {"protected_keys": (200, 201)}),
    "selecting, two tiles a block": ("marginal", 128, 1, 2**30, {}),
    "selecting, all": ("all", 64, 1, 1, {"kv_lengths": (201, 80)}),
    # Three groups of two heads, the second with one of each sample.
    "selecting, padding keys": ("noncritical", 64, 3, 2 * 2**20, {"kv_lengths": (201, 80)}),
    "selecting, quarters": ("marginal", 64, 2, 1, {"score": "log_sum_exp", "protected_keys": (200, 201)}),
    "selecting, all, spread": ("all", 64, 1, 1, {"score": "mean_spread", "kv_lengths": (201, 80)}),
    "selecting, padding keys, quarters": (
        "noncritical",
        64,
        3,
        2 * 2**20,
        {"score": "log_sum_exp", "kv_lengths": (201, 80), "keep_mass": 0.6},
    ),
}
JOINED = ("selecting, padding keys", "selecting, quarters")  # which another case joins


def run_selecting(name: str) -> None:
    """A selection made on the way is the one made beforehand, to the bit, however heads are grouped."""
    import torch
    from on_kernels import selection_rule, sla_attention_gpu

    from foveal import SLAConfig, select_blocks
    from foveal.kernels import api as module
    from foveal.methods.sla import gpu_forward
    from foveal.testing import make_inputs, output_and_gradients

    scope, block_k, heads, group_bytes, options = SELECTING_CASES[name]
    module.fits_kernel = lambda *_: True
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"])
    ratios = {"keep_ratio": 0.3, "drop_ratio": 0.4 if scope == "marginal" else 0.0, "block_q": 64, "block_k": block_k}
    batch = 2 if "kv_lengths" in options else 1
    inputs = make_inputs(batch=batch, heads=heads, query_length=70, key_length=201, head_dim=64, dtype=torch.bfloat16)
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).div(8), torch.ones(64)
    given = select_blocks(*inputs[:2], **ratios, **options)
    rule = selection_rule(*inputs[:2], **ratios, **options)

    def run(selection, group_bytes):
        gpu_forward.GROUP_BYTES = group_bytes
        config = SLAConfig(linear_scope=scope, **ratios)

        def attention(query, key, value, weight, bias):
            return sla_attention_gpu(query, key, value, config, selection, 0.125, weight, bias, "triton")

        if name == "selecting":
            return output_and_gradients(attention, (*inputs, *weights))
        with torch.no_grad():
            return (attention(*inputs, *weights),)

    for x, y in zip(run(rule, group_bytes), run(given, 2**30), strict=True):
        assert torch.equal(x, y), name


WAYS = ["ways: sparse", "ways: sla", "ways: vsa"]


def run_ways(name: str) -> None:
    """Plain eager calls, custom ops, compiled, checkpointed and hooked ones give the same bits; jvp is refused."""
    from functools import partial

    import on_kernels
    import torch
    from on_kernels import selection_rule
    from torch.autograd import forward_ad
    from torch.utils.checkpoint import checkpoint

    from foveal import SLAConfig, VideoGrid, VSAConfig
    from foveal.kernels import operator
    from foveal.kernels.triton import select
    from foveal.methods.vsa.layout import CubeLayout
    from foveal.testing import make_inputs, output_and_gradients, random_selection

    query, key, value = make_inputs(batch=1, heads=1, query_length=100, head_dim=64, dtype=torch.bfloat16)
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8, torch.ones(64)
    blocks = {"block_q": 64, "block_k": 64}
    if name == "ways: sparse":
        selection = random_selection(batch=1, heads=1, query_length=100, key_length=100, **blocks)
        tensors = query, key, value

        def attention(*tensors):
            return on_kernels.block_sparse_attention_gpu(*tensors, selection, 0.125, "triton")
    elif name == "ways: sla":
        rule = selection_rule(query, key, **blocks, keep_ratio=0.5, drop_ratio=0.0)
        tensors = query, key, value, *weights

        def attention(query, key, value, weight, bias):
            config = SLAConfig(keep_ratio=0.5, drop_ratio=0.0)
            return on_kernels.sla_attention_gpu(query, key, value, config, rule, 0.125, weight, bias, "triton")
    else:
        layout = CubeLayout(VSAConfig(topk=1), VideoGrid(4, 5, 5), key, None)
        tensors = query, key, value, query.flip(2)

        def attention(query, key, value, gate):
            return on_kernels.vsa_attention_gpu(query, key, value, layout, None, 0.125, gate, None, "triton")

    ways = {
        "checkpointed": partial(checkpoint, attention, use_reentrant=False),
        "compiled": torch.compile(attention, backend="aot_eager", fullgraph=True),
    }

    def first_of(outputs):
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    expected = output_and_gradients(attention, tensors)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        results = {"hooked": output_and_gradients(attention, tensors)}
    results |= {way: output_and_gradients(function, tensors) for way, function in ways.items()}
    # The gradient of a sum is one number, expanded.
    leaves = [x.detach().requires_grad_() for x in tensors]
    total, ones = (first_of(attention(*leaves)) for _ in range(2))
    grads = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
    for x, y in zip(grads, torch.autograd.grad(ones, leaves, torch.ones_like(ones), allow_unused=True), strict=True):
        assert x is y or torch.equal(x, y), "expanded gradient"
    for module in (operator, select):
        module.is_plain = lambda *_: False
    results["custom ops"] = output_and_gradients(attention, tensors)
    results["custom ops, checkpointed"] = output_and_gradients(ways["checkpointed"], tensors)
    for way, got in results.items():
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), way
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivative"):
        attention(query, key, forward_ad.make_dual(value, value), *tensors[3:])
    with pytest.raises(NotImplementedError, match="forward-mode derivative"):
        torch.func.jvp(lambda value: attention(query, key, value, *tensors[3:]), (value,), (value,))


def main(names) -> None:
    mend_interpreter()
    for name in names:
        if name == "lists":
            run_lists()
        elif name == "selection":
            run_selection()
        elif name == "states":
            run_states()
        elif name in SLA_CASES:
            run_sla(name)
        elif name in SELECTING_CASES:
            run_selecting(name)
        elif name in WAYS:
            run_ways(name)
        else:
            run_case(name)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in CASES if "63" not in name and "strides" not in name], id="attention"),
        pytest.param([name for name in CASES if "63" in name], id="63 keys"),
        pytest.param([name for name in CASES if "strides" in name], id="strides"),
        pytest.param(["lists"], id="lists"),
        pytest.param(["selection"], id="selection", marks=pytest.mark.exhaustive),
        pytest.param(["states"], id="states"),
        *(pytest.param([name], id=name) for name in SLA_CASES),
        *(
            pytest.param([name], id=name, marks=pytest.mark.exhaustive if name in JOINED else pytest.mark.slow)
            for name in SELECTING_CASES
        ),
        pytest.param(WAYS, id="ways"),
    ],
)
def test_interpreted(names):
    pytest.importorskip("triton")
    run_interpreted(__file__, names)


if __name__ == "__main__":
    main(sys.argv[1:])
