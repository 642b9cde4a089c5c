"""Packed sequences with the Triton kernels, interpreted, against plain loops in float64.

The cases run in a process of their own: this file, started as a script (see `interpreted.py`).
"""

import sys

import pytest
import torch
from interpreted import all_strided, mend_interpreter, run_interpreted, with_strided_gradients
from packed_loops import sla_loops, vsa_loops

# name: (linear_scope, token_order, frames, before, after)
SLA_CASES = {
    "sla": ("marginal", "tile", 2, (7, 1), (20,)),
    "sla, all keys": ("all", "raster", 2, (1,), ()),
}


# name: (grid, tile, before, after, gates); in the first and the last cubes are partial, and a chunk has two slots.
VSA_CASES = {
    "vsa": ((4, 5, 5), (4, 4, 4), (7, 1), (70,), 1),
    "vsa, both gates": ((4, 4, 8), (4, 4, 4), (), (64, 3), 2),
    "vsa, two slots": ((5, 8, 8), (4, 8, 8), (200,), (1,), 1),
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
        module.choose_impl = lambda *_: api.Ran(impl)
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


def run_vsa(name: str) -> None:
    from foveal import TokenLayout, VideoGrid, VSAConfig, vsa_attention
    from foveal.kernels import api
    from foveal.methods.vsa import attention as module
    from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients

    grid, tile, before, after, gates = VSA_CASES[name]
    layout, config = TokenLayout(VideoGrid(*grid), before, after), VSAConfig(topk=1, tile=tile)
    sizes = {"heads": 1, "query_length": layout.num_tokens, "dtype": torch.bfloat16}
    query, key, value = make_inputs(**sizes)
    inputs = all_strided(query, key, value + 1, *make_inputs(**sizes, seed=3)[:gates])

    def run(impl):
        module.choose_impl = lambda *_: api.Ran(impl)

        def attention(query, key, value, coarse, fine=None):
            return vsa_attention(query, key, value, config=config, layout=layout, gate_coarse=coarse, gate_fine=fine)

        return output_and_gradients(with_strided_gradients(attention) if impl == "triton" else attention, inputs)

    def loops(query, key, value, *gates):
        return vsa_loops(query, key, value, layout, tile, 1, *gates)

    exact = output_and_gradients(loops, [x.double() for x in inputs])
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_coarse", "grad_fine")
    for label, x, y, z in zip(names, run("triton"), exact, run("reference"), strict=False):
        assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def run_heads_in_groups() -> None:
    """Without gradients, copies that take too much memory are those of a few heads at a time: the same bits."""
    from foveal import TokenLayout, VideoGrid, VSAConfig, vsa_attention
    from foveal.kernels import api
    from foveal.methods.vsa import attention as module
    from foveal.methods.vsa import gpu
    from foveal.testing import make_inputs

    module.choose_impl = lambda *_: api.Ran("triton")
    layout = TokenLayout(VideoGrid(2, 5, 5), (7, 1), (3,))
    sizes = {"heads": 3, "query_length": layout.num_tokens, "dtype": torch.bfloat16}
    inputs = all_strided(*make_inputs(**sizes), *make_inputs(**sizes, seed=3)[:2])
    names = ("query", "key", "value", "gate_coarse", "gate_fine")
    call = dict(zip(names, inputs, strict=True)) | {"config": VSAConfig(topk=1), "layout": layout}
    whole = vsa_attention(**call)
    found, groups = [], gpu.head_groups
    gpu.head_groups = lambda *given: found.append(groups(*given)) or found[-1]
    gpu.COPIES_BYTES = 2 * 3 * 7 * 64 * 64 * 2
    assert torch.equal(vsa_attention(**call), whole)
    assert found == [[slice(0, 2), slice(2, 3)]], found


def main(names) -> None:
    mend_interpreter()
    for name in names:
        if name == "heads in groups":
            run_heads_in_groups()
            continue
        if name in SLA_CASES:
            run_sla(name)
        else:
            run_vsa(name)


@pytest.mark.parametrize("names", [list(SLA_CASES), [*VSA_CASES, "heads in groups"]], ids=["sla", "vsa"])
def test_interpreted(names):
    pytest.importorskip("triton")
    run_interpreted(__file__, names)


if __name__ == "__main__":
    main(sys.argv[1:])
