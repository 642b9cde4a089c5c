"""SLA where keys or values have a mean, or few keys are marginal: gradients that cancel.

Interpreted on a CPU, see `interpreted`; on a GPU the sweep is whole. An error may be twice that of the reference in
plain PyTorch at the same precision, both against float64.
"""

import itertools
import sys

import pytest
from interpreted import mend_interpreter, pretend_to_be_on, run_interpreted

# queries x keys, and how likely a block is to be critical and to be negligible.
SHAPES = {
    "64 x 64": (64, 64, 0.0, 0.1),
    "127 x 640": (127, 640, 0.0, 0.2),
    "127 x 640, few marginal": (127, 640, 0.0, 0.8),
    "640 x 127": (640, 127, 0.0, 0.1),
    "300 x 1500": (300, 1500, 0.0, 0.2),
    "300 x 640, both branches": (300, 640, 0.3, 0.2),
    "300 x 640, few marginal in both": (300, 640, 0.4, 0.5),
}
# What is added to keys and to values.
OFFSETS = {"as they are": (0, 0), "v + 4": (0, 4), "v + 16": (0, 16), "k + 4": (4, 0), "k + 4, v + 16": (4, 16)}
FEATURE_MAPS, SCOPES = ("softmax", "elu", "relu"), ("marginal", "noncritical", "all")
# Means of keys and of values together are too much for the exact branch, with or without a linear one.
CASES = [
    (shape, *rest)
    for shape, *rest in itertools.product(SHAPES, OFFSETS, FEATURE_MAPS, SCOPES)
    if not ("both" in shape and rest[0].startswith("k"))
]
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")
# What an interpreter goes through in a minute; the first two in every run of the tests.
INTERPRETED = [
    ("64 x 64", "v + 16", "softmax", "noncritical"),
    ("64 x 64", "v + 4", "elu", "all"),
    ("64 x 64", "k + 4, v + 16", "relu", "noncritical"),
    ("127 x 640, few marginal", "v + 4", "elu", "marginal"),
    ("300 x 640, both branches", "v + 16", "softmax", "marginal"),
]


def errors(case, device, impl, head_dim=64, blocks=(64, 64)):
    """For each result: the relative errors of `impl` and of plain PyTorch."""
    import torch

    from foveal import SLAConfig, sla_attention
    from foveal.testing import make_inputs, output_and_gradients, poison_empty, random_selection, relative_error

    shape, offset, feature_map, scope = case
    query_length, key_length, critical, negligible = SHAPES[shape]
    of_keys, of_values = OFFSETS[offset]
    lengths = {"query_length": query_length, "key_length": key_length}
    block_q, block_k = blocks
    config = SLAConfig(block_q=block_q, block_k=block_k, feature_map=feature_map, linear_scope=scope)
    selection = random_selection(
        **lengths, block_q=block_q, block_k=block_k, critical=critical, negligible=negligible, device=device
    )
    query, key, value = make_inputs(**lengths, head_dim=head_dim, dtype=torch.bfloat16, device=device, layout="BLHD")
    generator = torch.Generator().manual_seed(2)
    # Small, as in a model. The exact branch's gradients read the rounded output, and the linear branch adds to that.
    weight = (torch.randn(head_dim, head_dim, generator=generator) / (4 * head_dim**0.5)).to(device, torch.bfloat16)
    bias = torch.randn(head_dim, generator=generator).to(device, torch.bfloat16)
    inputs = query, key + of_keys, value + of_values, weight, bias

    def attention(impl):
        def attend(query, key, value, weight, bias):
            given = {"config": config, "selection": selection, "impl": impl}
            return sla_attention(query, key, value, proj_weight=weight, proj_bias=bias, **given)

        return attend

    with poison_empty():
        ours = output_and_gradients(attention(impl), inputs)
    exact = output_and_gradients(attention("reference"), [x.double() for x in inputs])
    plain = output_and_gradients(attention("reference"), inputs)
    found = zip(NAMES, ours, exact, plain, strict=True)
    return {name: (relative_error(x, y), relative_error(z, y)) for name, x, y, z in found}


def check(case, device, impl, **options):
    found = errors(case, device, impl, **options)
    # Two units in the last place, for what the reference does in float32 inside. Four where K has a mean: phi(K) has
    # one then, which takes up digits of H.
    floor = (4 if OFFSETS[case[1]][0] else 2) * 2.0**-8
    # Where both branches run, the exact one reads the rounded output. On an H200 dQ of the Triton kernels was off by up
    # to 2.33 times as much as plain PyTorch's there; docs/limits.md says so.
    factor = 2.5 if impl == "triton" and "both" in case[0] else 2
    too_large = {name: pair for name, pair in found.items() if not pair[0] <= max(factor * pair[1], floor)}
    assert not too_large, f"{case}: errors of {impl} and of plain PyTorch: {too_large}"


def main(cases) -> None:
    from foveal.kernels import api

    mend_interpreter()
    pretend_to_be_on("sm_90")
    api.why_not = lambda backend, *_, **__: None if backend == "triton" else "interpreted"
    for case in cases:
        check(tuple(case.split(": ")), "cpu", "triton")


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(INTERPRETED[:2], id="two"),
        pytest.param([case for case in CASES if case not in INTERPRETED[:2]], id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_interpreted(cases):
    pytest.importorskip("triton")
    run_interpreted(__file__, [": ".join(case) for case in cases])


@pytest.mark.gpu
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("shape", "offset"), dict.fromkeys(case[:2] for case in CASES))
@pytest.mark.parametrize("impl", ["triton", "gluon"])
def test_on_gpu(impl, shape, offset, feature_map):
    import torch

    from foveal.kernels.api import why_not

    reason = why_not(impl, *(torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda"),) * 3, 64, 64)
    if reason is not None:
        pytest.skip(reason)
    for scope, head_dim, blocks in itertools.product(SCOPES, (64, 128), ((64, 64), (128, 64), (64, 128))):
        check((shape, offset, feature_map, scope), "cuda", impl, head_dim=head_dim, blocks=blocks)


if __name__ == "__main__":
    main(sys.argv[1:])
