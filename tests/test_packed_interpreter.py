"""Packed sequences with the Triton kernels, interpreted, against plain loops in float64.

The cases run in a process of their own: this file, started as a script (see `interpreted.py`).
"""

import sys

import pytest
import torch
from interpreted import all_strided, mend_interpreter, run_interpreted, with_strided_gradients
from packed_loops import sla_loops

# name: (linear_scope, token_order, frames, before, after)
SLA_CASES = {
    "sla": ("marginal", "tile", 2, (7, 1), (20,)),
    "sla, all keys": ("all", "raster", 2, (1,), ()),
}


def run_sla(name: str) -> None:
    from foveal import SLAConfig, TokenLayout, VideoGrid, sla_attention
    from foveal.kernels import api
    from foveal.methods.sla import attention as module
    from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients

    scope, token_order, frames, before, after = SLA_CASES[name]
    layout = TokenLayout(VideoGrid(frames, 5, 9), before, after)
    config = SLAConfig(keep_ratio=0.5, drop_ratio=0.0, linear_scope=scope, token_order=token_order, feature_map="elu")
    query, key, value = make_inputs(heads=1, query_length=layout.num_tokens, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(*shape, generator=generator).div(8).bfloat16() for shape in ((64, 64), (64,)))
    inputs = *all_strided(query, key, value + 1), *weights

    def run(impl):
        module.resolve_impl = lambda *_: impl
        api.fits_kernel = lambda *_: impl == "triton"

        def attention(query, key, value, weight, bias):
            return sla_attention(query, key, value, config=config, layout=layout, proj_weight=weight, proj_bias=bias)

        return output_and_gradients(with_strided_gradients(attention) if impl == "triton" else attention, inputs)

    def loops(query, key, value, weight, bias):
        return sla_loops(query, key, value, layout, config, config.tile_for(layout.grid), weight, bias)

    exact = output_and_gradients(loops, [x.double() for x in inputs])
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")
    for label, x, y, z in zip(names, run("triton"), exact, run("reference"), strict=True):
        assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def main(names) -> None:
    mend_interpreter()
    for name in names:
        run_sla(name)


@pytest.mark.parametrize("name", SLA_CASES)
def test_interpreted(name):
    pytest.importorskip("triton")
    run_interpreted(__file__, [name])


if __name__ == "__main__":
    main(sys.argv[1:])
