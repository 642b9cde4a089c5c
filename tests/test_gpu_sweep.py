"""Long sequences, odd lengths and many repetitions on a GPU: what is too slow for every backend test."""

import pytest
import torch

from foveal import SLAConfig, VideoGrid, VSAConfig, block_sparse_attention, select_blocks, sla_attention, vsa_attention
from foveal.lab.bench.oracle import head_of, in_chunks
from foveal.testing import assert_close_to_reference, output_and_gradients, poison_empty, relative_error

pytestmark = pytest.mark.gpu

LENGTHS = ((1, 1), (63, 63), (64, 64), (65, 65), (4097, 4097), (32760, 32760), (75600, 75600), (4097, 130), (65, 4097))
# What is special about a selection: (keep_ratio, drop_ratio, factor on the queries).
SELECTIONS = {
    "usual": (0.05, 0.10, 1.0),
    "one block": (1e-6, 0.10, 1.0),
    "all blocks": (1.0, 0.0, 1.0),
    "no marginal block": (0.2, 0.8, 1.0),
    "logits of scale 30": (0.05, 0.10, 30.0),
}
CASES = [(lengths, "usual") for lengths in LENGTHS] + [((2100, 2100), name) for name in list(SELECTIONS)[1:]]


@pytest.mark.parametrize(("lengths", "kind"), CASES, ids=[f"{q}x{k} {kind}" for (q, k), kind in CASES])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64)], ids=["64x64", "128x64"])
def test_sla(lengths, kind, blocks):
    keep_ratio, drop_ratio, factor = SELECTIONS[kind]
    block_q, block_k = blocks
    config = SLAConfig(keep_ratio=keep_ratio, drop_ratio=drop_ratio, block_q=block_q, block_k=block_k)
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, length, 2, 128, device="cuda", generator=generator).bfloat16().transpose(1, 2)
        for length in (lengths[0], lengths[1], lengths[1])
    )
    query = query * factor
    weight = torch.randn(128, 128, device="cuda", generator=generator) / 128**0.5
    ratios = {"keep_ratio": keep_ratio, "drop_ratio": drop_ratio}
    selection = select_blocks(query, key, block_q=block_q, block_k=block_k, **ratios)

    def attend(query, key, value, selection, impl="auto", weight=weight):
        return sla_attention(
            query, key, value, config=config, selection=selection, proj_weight=weight, proj_bias=weight[0], impl=impl
        )

    with poison_empty():
        ours = output_and_gradients(lambda *qkv: attend(*qkv, selection), (query, key, value))
    ours = tuple(x[:, 1:] for x in ours)

    def oracle(dtype):
        # The projection stays in float32 where the tensors are half precision.
        wide = weight.to(torch.promote_types(dtype, torch.float32))

        def rows(query, key, value, selection):
            return attend(query, key, value, selection, "reference", wide)

        def whole(query, key, value):
            heads = (x[:, 1:] for x in (query, key, value))
            head = in_chunks(rows, *heads, head_of(selection, 0, 1), dtype)
            # The same random tensor meets the output as in `ours`.
            return torch.cat([torch.zeros_like(head), head], 1)

        found = output_and_gradients(whole, [x.double() for x in (query, key, value)])
        return tuple(x[:, 1:].to(dtype) for x in found)

    names = ("output", "grad_query", "grad_key", "grad_value")
    exact = oracle(torch.float64)
    for name, x, y, z in zip(names, ours, exact, oracle(torch.bfloat16), strict=True):
        if not y.any():
            # A softmax over one key does not move: two equal terms of this size cancel, and leave their rounding.
            sizes = [tensor[:, 1:].double().norm() for tensor in (query, key, value)]
            size = exact[3].norm() * sizes[2] * max(sizes[:2]) / 128**0.5
            assert x.norm() <= torch.finfo(x.dtype).eps * size, name
            continue
        # Twice plain PyTorch's error, four times its largest entry: the more entries, the wider their spread.
        assert relative_error(x, y) <= max(2 * relative_error(z, y), 2 * torch.finfo(x.dtype).eps), name
        assert_close_to_reference(x, y, z, name=name, factor=4.0)


METHODS = {
    "block-sparse 64x64": SLAConfig(keep_ratio=0.1, drop_ratio=0.0, linear_scope="none"),
    "block-sparse 128x64": SLAConfig(keep_ratio=0.1, drop_ratio=0.0, linear_scope="none", block_q=128),
    "SLA 64x64": SLAConfig(keep_ratio=0.1, drop_ratio=0.2),
    "SLA 128x64 all": SLAConfig(keep_ratio=0.1, drop_ratio=0.0, block_q=128, linear_scope="all"),
    "VSA": VSAConfig(keep_ratio=0.2, tile="auto"),
    "VSA wide": VSAConfig(keep_ratio=0.2, tile="wide"),
}
# grid, heads, D, runs. The second fills an H100 several times over: a race in a kernel's shared memory changed one of
# its launches in three hundred, and none of the first.
REPEATS = {"small": (VideoGrid(5, 15, 26), 4, 128, 200), "large": (VideoGrid(9, 32, 56), 16, 64, 1500)}


@pytest.mark.parametrize("case", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_the_same_bits_each_time(config, case):
    grid, heads, head_dim, runs = case
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(1, grid.num_tokens, heads, head_dim, device="cuda", generator=generator).bfloat16().transpose(1, 2)
        for _ in range(4)
    ]
    weight = torch.randn(head_dim, head_dim, device="cuda", generator=generator) / head_dim**0.5

    def attend(query, key, value, gate):
        if isinstance(config, VSAConfig):
            return vsa_attention(query, key, value, config=config, grid=grid, gate_coarse=gate)
        if config.linear_scope == "none":
            ratios = {"block_q": config.block_q, "block_k": config.block_k, "keep_ratio": config.keep_ratio}
            return block_sparse_attention(query, key, value, select_blocks(query, key, **ratios))
        return sla_attention(query, key, value, config=config, proj_weight=weight)

    leaves = [x.requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[0])

    def run():
        output = attend(*leaves)
        grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
        return [output.detach(), *(x for x in grads if x is not None)]

    first = run()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(runs):
        for x, y in zip(first, run(), strict=True):
            differing += (x != y).sum()
    assert int(differing) == 0
    assert all(bool(x.isfinite().all()) for x in first)
