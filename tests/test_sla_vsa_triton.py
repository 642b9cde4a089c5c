"""SLA and VSA in one on Triton's kernels without a GPU: interpreted, see `interpreted`. The same cases run on GPUs."""

import sys

import pytest
from interpreted import mend_interpreter, pretend_to_be_on, run_interpreted

# name: (grid, tile, topk, heads, D, valid text keys of each sample or None or `PACKED`, gates, linear_scope, coarse)
PACKED = {"before": (7, 1), "after": (70,)}
CASES = {
    "partial cubes": ((3, 5, 9), (4, 4, 4), 2, 2, 64, None, "both", "noncritical", True),
    "text": ((2, 5, 7), (4, 4, 4), 1, 1, 64, (70, 3), "coarse", "noncritical", True),
    "all keys": ((3, 5, 9), (4, 4, 4), 2, 1, 64, None, "coarse", "all", True),
    "no coarse branch": ((3, 5, 9), (4, 4, 4), 2, 1, 64, None, "none", "noncritical", False),
    "no linear branch": ((3, 5, 9), (4, 4, 4), 2, 1, 64, None, "both", "none", True),
    "whole cubes in slots": ((3, 10, 8), (3, 5, 4), 2, 1, 128, None, "coarse", "noncritical", True),
    "packed": ((4, 5, 5), (4, 4, 4), 1, 1, 64, PACKED, "both", "noncritical", True),
    "wide": ((3, 10, 8), "wide", 1, 1, 128, None, "coarse", "noncritical", True),
    "eight bits": ((3, 5, 9), (4, 4, 4), 2, 2, 64, None, "both", "noncritical", True),
    "eight bits, no linear branch": ((2, 5, 7), (4, 4, 4), 1, 1, 64, (70, 3), "coarse", "none", True),
}


def make_case(name, device):
    """(query, key, value) and what else is differentiated in by name, the layout, the configuration, and kv_lengths."""
    import torch

    from foveal import SLAVSAConfig, TokenLayout, VideoGrid
    from foveal.testing import make_inputs

    sides, tile, topk, heads, head_dim, text, gates, scope, coarse = CASES[name]
    layout, text = (TokenLayout(VideoGrid(*sides), **text), None) if text is PACKED else (VideoGrid(*sides), text)
    config = SLAVSAConfig(topk=topk, tile=tile, fine_gate=gates == "both", linear_scope=scope, coarse=coarse)
    config = config.replace(precision="int8") if name.startswith("eight bits") else config
    sizes = {"batch": 1 if text is None else len(text), "heads": heads, "head_dim": head_dim, "dtype": torch.bfloat16}
    length = layout.num_tokens
    sizes |= {"layout": "BLHD", "device": device}
    query, key, value = make_inputs(query_length=length, key_length=length + (70 if text else 0), **sizes)
    both = make_inputs(query_length=length, seed=5, **sizes)[:2]
    rest = {}
    if coarse:
        rest["gate_coarse"] = both[0]
    if config.fine_gate:
        rest["gate_fine"] = both[1]
    if scope != "none":
        generator = torch.Generator().manual_seed(2)
        for entry, shape in (("proj_weight", (head_dim, head_dim)), ("proj_bias", (head_dim,))):
            rest[entry] = (torch.randn(shape, generator=generator) / head_dim**0.5).to(device, torch.bfloat16)
    lengths = None if text is None else torch.tensor([length + n for n in text], device=device)
    return (query, key, value + 1), rest, layout, config, lengths


def check_case(name, device, impl, wrap=lambda function: function):
    import torch

    from foveal import sla_vsa_attention
    from foveal.methods.vsa.attention import select_cubes
    from foveal.testing import assert_close_to_reference, output_and_gradients, poison_empty

    qkv, rest, layout, config, lengths = make_case(name, device)
    options = {"config": config, "layout": layout, "kv_lengths": lengths}
    selection = select_cubes(*qkv[:2], config=config.cubes, layout=layout, kv_lengths=lengths)

    def attend(impl, selection):
        def function(query, key, value, *given):
            named = dict(zip(rest, given, strict=True))
            return sla_vsa_attention(query, key, value, selection=selection, impl=impl, **options, **named)

        return function

    inputs = poisoned = (*qkv, *rest.values())
    if lengths is not None:
        padding = (torch.arange(qkv[1].shape[2], device=device) >= lengths[:, None])[:, None, :, None]
        poisoned = (inputs[0], *(x.masked_fill(padding, torch.nan) for x in qkv[1:]), *inputs[3:])
    exact = output_and_gradients(attend("reference", selection), [x.double() for x in inputs])
    plain = output_and_gradients(attend("reference", selection), inputs)
    for given in (selection, None):
        with poison_empty():
            ours = output_and_gradients(wrap(attend(impl, given)), poisoned)
        labels = ("output", "grad_query", "grad_key", "grad_value", *(f"grad_{entry}" for entry in rest))
        for label, x, y, z in zip(labels, ours, exact, plain, strict=True):
            assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def pretend_to_have_triton():
    from foveal.kernels import api

    pretend_to_be_on("sm_90")
    api.why_not = lambda backend, *_, **__: None if backend == "triton" else "interpreted"


def run_ways() -> None:
    """The custom operators, checkpointed or not, give the bits of the autograd function."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from foveal import sla_vsa_attention
    from foveal.kernels import operator
    from foveal.testing import output_and_gradients, relative_error

    qkv, rest, layout, config, _ = make_case("no coarse branch", "cpu")

    def attend(query, key, value, *given):
        named = dict(zip(rest, given, strict=True))
        return sla_vsa_attention(query, key, value, config=config, layout=layout, impl="triton", **named)

    inputs = (*qkv, *rest.values())
    expected = output_and_gradients(attend, inputs)
    operator.is_plain = lambda *_: False
    for way in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        got = output_and_gradients(way, inputs)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    with torch.no_grad():  # which keeps no states, and rounds Z as it rounds H
        assert relative_error(attend(*inputs), expected[0]) < 5e-3


def main(names) -> None:
    mend_interpreter()
    pretend_to_have_triton()
    for name in names:
        if name == "ways":
            run_ways()
        else:
            check_case(name, "cpu", "triton")


# The interpreter takes seconds for a case. The others are left out unless asked for.
QUICK = ("partial cubes", "packed")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.exhaustive) for x in (*CASES, "ways")]
)
def test_interpreted(name):
    pytest.importorskip("triton")
    run_interpreted(__file__, [name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["triton", "gluon"])
def test_on_gpu(name, impl):
    import torch
    from on_kernels import skip_without

    from foveal.methods.sla_vsa.attention import SparseLinearVideoAttention

    qkv, _, layout, config, _ = make_case(name, "cuda")
    blocks = SparseLinearVideoAttention.kernel_blocks(config, getattr(layout, "grid", layout))
    skip_without(impl, *qkv, *blocks, config.precision)
    for _ in range(4):  # the third forward and the fourth backward are replayed
        check_case(name, "cuda", impl)
    torch._dynamo.reset()
    check_case(name, "cuda", impl, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))


if __name__ == "__main__":
    main(sys.argv[1:])
