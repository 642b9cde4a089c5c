"""VSA with a learned router on kernels: interpreted, see `interpreted`, and on a GPU."""

import sys

import pytest
from interpreted import mend_interpreter, pretend_to_be_on, run_interpreted
from test_vsa_triton import make_case

# name: (a case of test_vsa_triton.py, router)
CASES = {
    "partial cubes": ("partial cubes", "per_head"),
    "full slots": ("full slots", "shared"),
    "wide slots": ("wide slots", "per_head"),
    "text with padding": ("text with padding", "per_head"),
    "packed": ("packed", "per_head"),
}
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_proj_query", "grad_proj_key")


def check_case(name, device, impl):
    """Chosen inside of the call, and given; both with all gradients, against the same in float64."""
    import torch

    from foveal import TokenLayout, VideoGrid, VSAConfig, vsa_attention
    from foveal.methods.vsa.attention import select_cubes
    from foveal.methods.vsa.router import CubeRouter
    from foveal.testing import (
        assert_close_to_reference,
        make_inputs,
        output_and_gradients,
        poison_empty,
        relative_error,
    )

    case, router = CASES[name]
    if case == "packed":
        layout = TokenLayout(VideoGrid(3, 5, 9), before=(7,), after=(70, 1))
        config, gates, lengths = VSAConfig(topk=3), (None, None), None
        sizes = {"batch": 2, "query_length": layout.num_tokens, "head_dim": 64, "dtype": torch.float16}
        inputs = make_inputs(**sizes, device=device)
    else:
        inputs, gates, layout, config, lengths = make_case(case, torch.float16, device)
    config, (heads, head_dim) = config.replace(router=router), (inputs[0].shape[1], inputs[0].shape[3])
    generator = torch.Generator().manual_seed(3)
    shape = (heads,) * (router == "per_head") + (head_dim, head_dim)
    weights = [torch.randn(shape, generator=generator).to(device) / head_dim**0.5 for _ in range(2)]
    named = {"config": config, "layout": layout, "kv_lengths": lengths}
    selection = select_cubes(*inputs[:2], **named, router=CubeRouter(*weights, config.temperature))

    def by(impl, selection=selection):
        def attend(query, key, value, proj_query, proj_key):
            named_gates = {
                f"gate_{kind}": None if gate is None else gate.to(query.dtype)
                for kind, gate in zip(("coarse", "fine"), gates, strict=True)
            }
            projections = {"proj_query": proj_query, "proj_key": proj_key}
            options = {"selection": selection, "impl": impl, **named, **named_gates, **projections}
            return vsa_attention(query, key, value, **options)

        return attend

    exact = output_and_gradients(by("torch"), [x.double() for x in (*inputs, *weights)])
    plain = output_and_gradients(by("torch"), (*inputs, *weights))
    for given in (selection, None):
        with poison_empty():
            ours = output_and_gradients(by(impl, given), (*inputs, *weights))
        for label, x, y, z in zip(NAMES, ours, exact, plain, strict=True):
            if label.startswith("grad_proj"):  # float32, made of half-precision tensors
                limit = max(2 * relative_error(z, y), 2 * torch.finfo(torch.float16).eps)
                assert 0 < relative_error(x, y) <= limit, f"{name}: {label}: {relative_error(x, y):.2e}, {limit:.2e}"
            else:
                assert_close_to_reference(x, y, z, name=f"{name}: {label}")
    with torch.no_grad():
        output = by(impl, None)(*inputs, *weights)
    assert_close_to_reference(output, exact[0], plain[0], name=f"{name}: output of a router that does not learn")


def run_case(name: str) -> None:
    from foveal.kernels import api

    pretend_to_be_on("sm_90")
    api.why_not = lambda backend, *_, **__: None if backend == "triton" else "interpreted"
    check_case(name, "cpu", "triton")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("partial cubes", "packed") else pytest.mark.exhaustive) for name in CASES],
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

    slot, tensor = 128 if "wide" in name else 64, torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.float16)
    skip_without(impl, tensor, tensor, tensor, slot, slot, "input")
    for _ in range(4):  # the third forward and the fourth backward are replayed
        check_case(name, "cuda", impl)


if __name__ == "__main__":
    mend_interpreter()
    for case in sys.argv[1:]:
        run_case(case)
