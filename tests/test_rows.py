"""Tokens to tile order and back by the kernel that copies rows: interpreted, and on a GPU."""

import functools
import sys

import pytest
from interpreted import mend_interpreter, pretend_to_be_on, run_interpreted


def check(device):
    """Values and gradients are those of `TileOrder`, to the bit, for tensors that lie in several ways."""
    import torch

    from foveal import VideoGrid
    from foveal.kernels.order import sort_tokens, unsort_tokens
    from foveal.testing import make_inputs, output_and_gradients, poison_empty

    grid = VideoGrid(3, 5, 9)  # 135 tokens: two programs and a part of one
    order = grid.tile_order((2, 2, 4), None, torch.device(device))
    for layout, head_dim, dtype in (("BLHD", 64, torch.bfloat16), ("BHLD", 128, torch.float16)):
        sizes = {"batch": 2, "heads": 3, "query_length": 135, "head_dim": head_dim, "dtype": dtype, "device": device}
        whole = make_inputs(layout=layout, **sizes)[0]
        wider = make_inputs(layout=layout, **sizes | {"query_length": 150})[0]
        for x in (whole, wider[:, :, 15:], whole.transpose(2, 3).contiguous().transpose(2, 3)):
            for ours, theirs in ((sort_tokens, order.sort), (unsort_tokens, order.unsort)):
                with poison_empty():
                    found = output_and_gradients(lambda x, ours=ours: ours(x, order, True), [x])
                expected = output_and_gradients(theirs, [x])
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                assert (found[0].stride(1) < found[0].stride(2)) == (x.stride(-1) == 1 and layout == "BLHD")
        back = unsort_tokens(sort_tokens(whole, order, True), order, True)
        assert torch.equal(back, whole)
        assert back.stride() == whole.stride()


def test_interpreted():
    pytest.importorskip("triton")
    run_interpreted(__file__, ["rows"])


@pytest.mark.gpu
def test_on_gpu():
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("protected", [(), (40,)])
def test_methods_on_a_gpu(protected):
    """In tile order, by the kernel and by PyTorch, to the bit."""
    import torch

    from foveal import SLA2Config, SLAConfig, TokenLayout, VideoGrid, sla2_attention, sla_attention
    from foveal.kernels import order
    from foveal.testing import make_inputs, output_and_gradients

    layout = TokenLayout(VideoGrid(5, 9, 14), after=protected)
    inputs = make_inputs(query_length=layout.num_tokens, head_dim=128, dtype=torch.bfloat16, device="cuda")
    for attend, config in (
        (sla_attention, SLAConfig(keep_ratio=0.2, token_order="tile", projection=False)),
        (sla2_attention, SLA2Config(keep_ratio=0.2, token_order="tile", linear_scope="none")),
    ):
        results, run = [], functools.partial(attend, config=config, layout=layout)
        for plain in (order.is_plain, lambda *_: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(order, "is_plain", plain)
                output, query, key, value = output_and_gradients(run, inputs)
                # cuDNN gives the gradient of protected queries, and adds it up in any order.
                results.append((output, query[:, :, : layout.grid.num_tokens], key, value))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


if __name__ == "__main__":
    mend_interpreter()
    pretend_to_be_on("sm_90")
    for _ in sys.argv[1:]:
        check("cpu")
