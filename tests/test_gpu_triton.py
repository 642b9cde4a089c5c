"""Both GPU backends as users meet them: numerics, determinism, host waits, graphs, torch.compile, recompilation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import gdc_launch_dependents  # noqa: E402

from foveal import (  # noqa: E402
    SLAConfig,
    VideoGrid,
    VSAConfig,
    block_sparse_attention,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.kernels import api as selection_module  # noqa: E402
from foveal.kernels.hopper.support import why_not  # noqa: E402
from foveal.testing import (  # noqa: E402
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    poison_empty,
    random_selection,
    relative_error,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "gluon"])
def impl(request):
    if request.param == "gluon":
        reason = why_not(*(torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda"),) * 3, 64, 64)
        if reason is not None:
            pytest.skip(f"gluon: {reason}")
    return request.param


NAMES = ("output", "lse", "grad_query", "grad_key", "grad_value")

# (batch, heads, Lq, Lk, D, block_q, block_k, dtype, layout)
SHAPES = {
    "one token": (1, 1, 1, 1, 128, 64, 64, torch.bfloat16, "BHLD"),
    "63": (1, 2, 63, 63, 64, 64, 64, torch.float16, "BHLD"),
    "64": (1, 2, 64, 64, 128, 64, 64, torch.bfloat16, "BHLD"),
    "65, two tiles a block": (1, 2, 65, 65, 128, 128, 128, torch.bfloat16, "BHLD"),
    "more keys": (2, 3, 200, 1000, 128, 128, 64, torch.bfloat16, "BLHD"),
    "more queries": (2, 3, 1000, 200, 64, 64, 128, torch.float16, "BLHD"),
    "many blocks": (1, 2, 4097, 4097, 128, 64, 64, torch.bfloat16, "BHLD"),
    "many large blocks": (1, 1, 4097, 4160, 128, 128, 128, torch.float16, "BLHD"),
    "128 x 64, D 64": (1, 2, 777, 901, 64, 128, 64, torch.bfloat16, "BHLD"),
}


def case(shape, *, scale_inputs=1.0, **selection):
    batch, heads, query_length, key_length, head_dim, block_q, block_k, dtype, layout = shape
    sizes = {"batch": batch, "heads": heads, "query_length": query_length, "key_length": key_length}
    chosen = random_selection(**sizes, block_q=block_q, block_k=block_k, device="cuda", **selection)
    inputs = make_inputs(**sizes, head_dim=head_dim, dtype=dtype, device="cuda", layout=layout)
    return tuple(x * scale_inputs for x in inputs), chosen


def attention(selection, impl):
    return lambda *qkv: block_sparse_attention(*qkv, selection, impl=impl, return_lse=True)


def check(inputs, selection):
    with poison_empty():
        ours = output_and_gradients(attention(selection, "triton"), inputs)
    exact = output_and_gradients(attention(selection, "reference"), [x.double() for x in inputs])
    plain = output_and_gradients(attention(selection, "reference"), inputs)
    for name, x, y, z in zip(NAMES, ours, exact, plain, strict=True):
        assert_close_to_reference(x, y, z, name=name)
    return ours


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape):
    check(*case(shape))


@pytest.mark.parametrize("block_k", [64, 128])
def test_padding_keys(block_k):
    inputs, selection = case(
        (3, 2, 300, 500, 128, 64, block_k, torch.bfloat16, "BLHD"), kv_lengths=torch.tensor([500, 130, 3])
    )
    ours = check(inputs, selection)
    valid = selection.key_valid()[:, None, :, None]
    query, key, value = inputs
    poisoned = (query, *(torch.where(valid, x, float("nan")) for x in (key, value)))
    for x, y in zip(ours, output_and_gradients(attention(selection, "triton"), poisoned), strict=True):
        assert torch.equal(x, y)


def test_keep_one_and_keep_all():
    shape = (1, 2, 700, 700, 128, 64, 64, torch.bfloat16, "BHLD")
    check(*case(shape, critical=1.0, negligible=0.0))
    check(*case(shape, critical=0.0, negligible=0.5))


def test_large_logits():
    check(*case((1, 2, 500, 500, 128, 64, 64, torch.bfloat16, "BHLD"), scale_inputs=5.0))


def test_offset_views():
    """Views into a fused projection, and ones that the bulk copy engine cannot address."""
    shape = (2, 2, 300, 300, 64, 64, 64, torch.bfloat16, "BHLD")
    inputs, selection = case(shape)
    fused = torch.empty(2, 300, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
    odd = torch.empty(3, 2, 2, 300, 67, dtype=torch.bfloat16, device="cuda")
    for i, x in enumerate(inputs):
        fused[:, :, i] = x.transpose(1, 2)
        odd[i, ..., 1:65] = x
    expected = block_sparse_attention(*inputs, selection, impl="triton")
    views = (fused[:, :, i].transpose(1, 2) for i in range(3))
    assert torch.equal(block_sparse_attention(*views, selection, impl="triton"), expected)
    views = (odd[i, ..., 1:65] for i in range(3))
    torch.testing.assert_close(block_sparse_attention(*views, selection, impl="triton"), expected, rtol=2e-2, atol=2e-2)


def test_output_keeps_the_layout_of_query():
    inputs, selection = case((1, 4, 200, 200, 64, 64, 64, torch.bfloat16, "BLHD"))
    assert block_sparse_attention(*inputs, selection, impl="triton").transpose(1, 2).is_contiguous()


def test_repeats_to_the_bit():
    inputs, selection = case((1, 4, 2048, 2048, 128, 64, 64, torch.bfloat16, "BHLD"))
    first = output_and_gradients(attention(selection, "triton"), inputs)
    for _ in range(20):
        for x, y in zip(first, output_and_gradients(attention(selection, "triton"), inputs), strict=True):
            assert torch.equal(x, y)


def forward_and_backward(inputs, selection, impl="triton"):
    output, lse = block_sparse_attention(*inputs, selection, impl=impl, return_lse=True)
    return output, *torch.autograd.grad(output.float().square().mean() + lse.mean(), inputs)


def test_no_host_synchronisation(impl):
    inputs, selection = case((1, 2, 500, 500, 128, 64, 64, torch.bfloat16, "BHLD"), critical=1.0)
    inputs = [x.requires_grad_() for x in inputs]
    forward_and_backward(inputs, selection, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(inputs, selection, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(impl):
    inputs, selection = case((1, 2, 500, 500, 128, 64, 64, torch.bfloat16, "BHLD"), critical=1.0)
    inputs = [x.requires_grad_() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(inputs, selection, impl)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(inputs, selection, impl)
    with torch.no_grad():
        inputs[0].mul_(0.5)
    graph.replay()
    for x, y in zip(captured, forward_and_backward(inputs, selection, impl), strict=True):
        assert torch.equal(x, y)


@triton.jit
def late_copy(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    """Lets the kernel after this one start at once, and copies some milliseconds later."""
    gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(4):
        place += tl.inline_asm_elementwise(
            "nanosleep.u32 1000000; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.store(target_ptr + place, tl.load(source_ptr + place, mask=place < count), mask=place < count)


@pytest.mark.parametrize("method", ["block-sparse", "vsa"])
def test_what_is_not_written_yet_is_awaited(method, impl):
    """Kernels start before the one before them has ended, whose results they need: inputs, gradients of outputs.

    Not SLA, whose first kernel is one of PyTorch's, and starts after the one before it.
    """
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("kernels start one after another here")
    grid = VideoGrid(5, 9, 10)
    inputs = make_inputs(query_length=grid.num_tokens, heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(query_length=grid.num_tokens, heads=2, device="cuda")
    run = {
        "block-sparse": lambda *qkv: block_sparse_attention(*qkv, selection, impl=impl),
        "vsa": lambda *qkv: vsa_attention(*qkv, config=VSAConfig(keep_ratio=0.3), grid=grid, impl=impl),
    }[method]
    source = torch.stack([*inputs, torch.randn_like(inputs[0])])
    target = source.clone()
    leaves, grad = [x.requires_grad_() for x in target[:3].unbind()], target[3]

    def write_late():
        """Poison, and the numbers over it while what follows starts."""
        target.data.fill_(float("nan"))  # what autograd has saved may change here
        late_copy[(triton.cdiv(target.numel(), 4096),)](source, target, target.numel(), BLOCK=4096)

    expected = run(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    with torch.no_grad():
        expected_inference = run(*leaves)
    for _ in range(5):
        with torch.no_grad():
            write_late()
            assert torch.equal(run(*leaves), expected_inference)
        output = run(*leaves)
        write_late()
        grads = torch.autograd.grad(output, leaves, grad)
        for x, y in zip((output, *grads), (expected, *expected_grads), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_compiles_whole(layout, impl):
    inputs, selection = case((1, 2, 300, 300, 64, 64, 64, torch.bfloat16, layout))

    def loss(query, key, value):
        return block_sparse_attention(query * 2, key, value, selection, impl=impl).float().square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)


def test_activation_checkpointing():
    inputs, selection = case((1, 2, 300, 300, 64, 64, 64, torch.bfloat16, "BHLD"))
    plain = output_and_gradients(attention(selection, "triton"), inputs)
    again = output_and_gradients(
        lambda *qkv: checkpoint(attention(selection, "triton"), *qkv, use_reentrant=False), inputs
    )
    for x, y in zip(plain, again, strict=True):
        assert torch.equal(x, y)


def test_auto_takes_the_fastest():
    inputs, selection = case((1, 2, 300, 300, 64, 64, 64, torch.bfloat16, "BHLD"))
    fastest = "triton" if selection_module.why_not("gluon", *inputs, 64, 64) else "gluon"
    expected = block_sparse_attention(*inputs, selection, impl=fastest)
    assert torch.equal(block_sparse_attention(*inputs, selection), expected)


def test_one_compilation_over_lengths():
    from foveal.kernels.triton import backward, forward

    kernels = (forward._block_sparse_fwd_kernel, backward._block_sparse_dq_kernel, backward._block_sparse_dkdv_kernel)
    compiled = None
    for length in (300, 17, 64, 128, 1, 1024, 999, 555, 640, 2048):
        inputs, selection = case((1, 2, length, length, 128, 64, 64, torch.bfloat16, "BHLD"), critical=1.0)
        forward_and_backward([x.requires_grad_() for x in inputs], selection)
        sizes = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        compiled = compiled or sizes
        assert sizes == compiled, f"length {length} compiled again"


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 0.05},
        {"keep_ratio": 0.05, "drop_ratio": 0.1},
        {"keep_ratio": 0.1, "drop_ratio": 0.2, "kv_lengths": torch.tensor([4097, 1000])},
        {"keep_ratio": 0.1, "drop_ratio": 0.2, "protected_keys": (4000, 4097), "protected_queries": (0, 100)},
    ],
    ids=["keep", "drop", "padding", "protected"],
)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64)], ids=str)
def test_selection_kernel_agrees_on_the_host(options, blocks):
    query, key, _ = make_inputs(
        batch=2, query_length=2049, key_length=4097, dtype=torch.bfloat16, device="cuda", layout="BLHD"
    )
    names = {"block_q": blocks[0], "block_k": blocks[1]}
    ours = select_blocks(query, key, **names, **options)
    # The same inputs in float64: where the two differ, the scores at the cut are a rounding error apart.
    exact = select_blocks(query.double().cpu(), key.double().cpu(), **names, **options)
    assert torch.equal(ours.critical_count.cpu(), exact.critical_count)
    same = ours.labels().cpu() == exact.labels()
    assert same.double().mean() > 0.9999
    again = select_blocks(query, key, **names, **options)
    assert torch.equal(ours.critical, again.critical)


def test_selection_kernel_breaks_ties_by_index(monkeypatch):
    query, key, _ = make_inputs(query_length=640, key_length=6400, head_dim=128, dtype=torch.bfloat16, device="cuda")
    key[:, :, 64:3200] = key[:, :, :64].repeat(1, 1, 49, 1)
    query[0, 0, :128] = 0
    ours = select_blocks(query, key, block_q=64, block_k=64, keep_ratio=0.3, drop_ratio=0.3)
    monkeypatch.setattr(selection_module, "fits_kernel", lambda *_: False)
    expected = select_blocks(query.cpu(), key.cpu(), block_q=64, block_k=64, keep_ratio=0.3, drop_ratio=0.3)
    assert torch.equal(ours.labels().cpu(), expected.labels())


# (Lq, Lk, D, block_q, block_k, feature_map, scope, projection, dtype)
SLA_SHAPES = {
    "marginal": (1000, 1000, 128, 64, 64, "softmax", "marginal", True, torch.bfloat16),
    "128 x 64, all": (1000, 1000, 128, 128, 64, "softmax", "all", True, torch.bfloat16),
    "elu, lengths": (300, 2000, 64, 64, 128, "elu", "noncritical", True, torch.bfloat16),
    "no projection": (900, 700, 64, 128, 128, "relu", "marginal", False, torch.bfloat16),
    "hedgehog": (300, 300, 64, 64, 64, "hedgehog", "marginal", True, torch.bfloat16),
    "half": (500, 500, 64, 64, 64, "softmax", "marginal", True, torch.float16),
}


def sla_case(shape):
    query_length, key_length, head_dim, block_q, block_k, feature_map, scope, projection, dtype = shape
    config = SLAConfig(
        keep_ratio=0.1,
        drop_ratio=0.2,
        block_q=block_q,
        block_k=block_k,
        feature_map=feature_map,
        linear_scope=scope,
        projection=projection,
    )
    sizes = {"batch": 2, "heads": 2, "query_length": query_length, "key_length": key_length}
    inputs = make_inputs(**sizes, head_dim=head_dim, dtype=dtype, device="cuda", layout="BLHD")
    selection = random_selection(**sizes, block_q=block_q, block_k=block_k, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(head_dim, head_dim, device="cuda", generator=generator) / head_dim**0.5
    weights = {}
    if projection:
        weights = {"proj_weight": weight, "proj_bias": weight[0] * 3}
    if feature_map == "hedgehog":
        weights["feature_weight"] = weight + 0
    return inputs, config, selection, weights


@pytest.mark.parametrize("shape", SLA_SHAPES.values(), ids=SLA_SHAPES)
def test_sla_matches_reference(shape, impl):
    inputs, config, selection, weights = sla_case(shape)

    def run(named_impl):
        def attention(query, key, value, *parameters):
            named = dict(zip(weights, parameters, strict=True))
            return sla_attention(query, key, value, config=config, selection=selection, impl=named_impl, **named)

        return attention

    tensors = (*inputs, *weights.values())
    with poison_empty():
        ours = output_and_gradients(run(impl), tensors)
    exact = output_and_gradients(run("reference"), [x.double() for x in tensors])
    plain = output_and_gradients(run("reference"), tensors)
    names = ("output", "grad_query", "grad_key", "grad_value", *weights)
    for name, x, y, z in zip(names, ours, exact, plain, strict=True):
        # Plain PyTorch runs the linear branch in float32; here its states are bfloat16, whatever the input dtype.
        exact_dtype = x.dtype in (torch.float32, torch.float16)
        if exact_dtype:
            assert (x.double() - y).norm() <= 0.01 * y.norm(), name
        else:
            assert_close_to_reference(x, y, z, name=name)
    with poison_empty():
        for x, y in zip(ours, output_and_gradients(run(impl), tensors), strict=True):
            assert torch.equal(x, y)


def test_sla_without_synchronisation_and_in_one_graph():
    inputs, config, _, weights = sla_case(SLA_SHAPES["marginal"])
    leaves = [x.detach().requires_grad_() for x in (*inputs, *weights.values())]

    def loss(query, key, value, weight, bias):
        output = sla_attention(query, key, value, config=config, proj_weight=weight, proj_bias=bias)
        return output.float().square().mean()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss(*leaves), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(loss, fullgraph=True)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("group_bytes", [1, 2**30])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_q": 128},
        {"block_q": 128, "block_k": 128},
        {"linear_scope": "all", "drop_ratio": 0.0, "block_q": 128},
        {"linear_scope": "noncritical"},
        {"kv_lengths": (1500, 200)},
        {"protected_keys": (1400, 1500)},
    ],
    ids=str,
)
def test_sla_selects_on_the_way(options, group_bytes, impl, monkeypatch):
    """A selection made on the way gives what one made beforehand does, to the bit, however the heads are grouped."""
    from foveal.methods.sla import gpu_forward

    monkeypatch.setattr(gpu_forward, "GROUP_BYTES", group_bytes)
    limits = {name: options[name] for name in ("kv_lengths", "protected_keys") if name in options}
    if "kv_lengths" in limits:
        limits["kv_lengths"] = torch.tensor(limits["kv_lengths"])
    config = SLAConfig(keep_ratio=0.1, **{"drop_ratio": 0.2, **{k: v for k, v in options.items() if k not in limits}})
    query, key, value = make_inputs(
        batch=2, heads=3, query_length=1000, key_length=1500, dtype=torch.bfloat16, device="cuda", layout="BLHD"
    )
    names = ("block_q", "block_k", "keep_ratio", "drop_ratio")
    selection = select_blocks(query, key, **{name: getattr(config, name) for name in names}, **limits)
    weight = torch.eye(query.shape[-1], device="cuda")

    def run(**how):
        def attention(*qkv):
            return sla_attention(*qkv, config=config, proj_weight=weight, impl=impl, **how)

        with torch.no_grad():
            inference = attention(query, key, value)
        return inference, *output_and_gradients(attention, (query, key, value))

    with poison_empty():
        for x, y in zip(run(**limits), run(selection=selection), strict=True):
            if "kv_lengths" in limits:
                # With sizes, the states are compiled with the pooling and without it, and not to the same bits.
                assert relative_error(x, y) <= 1e-3
            else:
                assert torch.equal(x, y)


def test_sla_kernels_compile_once_over_lengths():
    from foveal.kernels.triton import linear, masked_sum, pooling, scores

    config, compiled = SLAConfig(keep_ratio=0.1, drop_ratio=0.2), None
    kernels = (linear._key_state_kernel, masked_sum._masked_sum_kernel, pooling._pool_kernel, scores._score_kernel)
    for length in (300, 1024, 999, 640, 4097):
        inputs = make_inputs(query_length=length, head_dim=64, dtype=torch.bfloat16, device="cuda", layout="BLHD")
        with torch.no_grad():
            sla_attention(*inputs, config=config, impl="triton")
        sizes = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        compiled = compiled or sizes
        assert sizes == compiled, f"length {length} compiled again"


def test_vsa_matches_reference(impl):
    from foveal.methods.vsa.attention import select_cubes

    grid, config = VideoGrid(5, 9, 10), VSAConfig(keep_ratio=0.3)
    query, key, value = make_inputs(
        query_length=grid.num_tokens, head_dim=64, dtype=torch.bfloat16, device="cuda", layout="BLHD"
    )
    gates = make_inputs(query_length=grid.num_tokens, head_dim=64, dtype=torch.bfloat16, device="cuda", seed=3)[:2]
    selection = select_cubes(query, key, config=config, grid=grid)

    def run(named_impl):
        return lambda q, k, v, coarse, fine: vsa_attention(
            q, k, v, config=config, grid=grid, gate_coarse=coarse, gate_fine=fine, selection=selection, impl=named_impl
        )

    inputs = (query, key, value, *gates)
    ours = output_and_gradients(run(impl), inputs)
    exact = output_and_gradients(run("reference"), [x.double() for x in inputs])
    plain = output_and_gradients(run("reference"), inputs)
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_gate_coarse", "grad_gate_fine")
    for name, x, y, z in zip(names, ours, exact, plain, strict=True):
        assert_close_to_reference(x, y, z, name=name)
