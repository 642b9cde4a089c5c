"""The numerics of VSA's Triton kernels on small odd grids, without a GPU: interpreted, see `interpreted`."""

import sys

import pytest
from interpreted import all_strided, mend_interpreter, run_interpreted, with_strided_gradients, with_strided_lists

# name: (grid, tile, topk, heads, D, text keys of each sample or None, gates)
CASES = {
    "partial cubes": ((3, 5, 9), (4, 4, 4), 3, 2, 64, None, "both"),
    "whole cubes in slots": ((3, 10, 8), "auto", 2, 1, 64, None, "coarse"),
    "full slots": ((4, 4, 8), (4, 4, 4), 1, 2, 64, None, "none"),
    "large coarse gate": ((3, 5, 9), (4, 4, 4), 3, 2, 64, None, "large"),
    "image, expanded gates": ((1, 17, 9), (1, 8, 8), 4, 1, 64, None, "expanded"),
    "wide slots": ((4, 5, 9), (4, 4, 8), 2, 1, 128, None, "fine"),
    "whole wide cubes": ((3, 10, 8), "wide", 1, 1, 64, None, "coarse"),
    "wide with text": ((2, 9, 8), (2, 8, 8), 1, 1, 64, (70, 3), "both"),
    "two slots": ((5, 9, 9), (4, 8, 8), 3, 1, 64, None, "both"),
    "two slots with text": ((4, 8, 9), (4, 8, 8), 1, 1, 64, (70, 3), "coarse"),
    "text": ((2, 5, 7), (4, 4, 4), 2, 1, 64, (70, 70), "coarse"),
    "text with padding": ((2, 5, 7), (4, 4, 4), 2, 1, 64, (68, 3), "both"),
    "63 tokens of 64": ((3, 3, 14), (3, 3, 7), 1, 2, 64, None, "both"),
    "strides": ((2, 5, 7), (4, 4, 4), 2, 2, 64, (70, 3), "both"),
    "strides, one gate": ((2, 5, 7), (4, 4, 4), 2, 2, 64, None, "coarse"),
}

RULES = {
    "sinks": {"topk": 2, "sink_frames": 1, "tile": (2, 2, 4)},
    "window": {"topk": 1, "window": (1, 2, 1), "tile": (2, 2, 4)},
    "heads": {"keep_ratio": (0.1, 0.6), "tile": (2, 2, 4)},
    "mass": {"topk": 1, "keep_mass": 0.5, "max_keep_ratio": 0.9, "tile": (2, 2, 4)},
    "quarters": {"score": "log_sum_exp"},
    "quarters, small": {"score": "log_sum_exp", "topk": 3, "tile": (2, 2, 4)},
    "quarters, mass": {"score": "log_sum_exp", "keep_ratio": 0.1, "keep_mass": 0.6, "max_keep_ratio": 0.8},
    "spread": {"score": "mean_spread"},
    "spread, window": {"score": "mean_spread", "topk": 1, "window": (1, 2, 1), "tile": (2, 2, 4)},
}
RAGGED = ("sinks", "window", "heads", "mass", "quarters, mass", "spread, window")


def make_case(name, dtype, device):
    """(query, key, value), gates, grid, config and kv_lengths.

    They lie as transformers hold them; in cases of "strides" each tensor lies in its own way.
    """
    import torch

    from foveal import VideoGrid, VSAConfig
    from foveal.testing import make_inputs

    sides, tile, topk, heads, head_dim, text, gates = CASES[name]
    grid, config = VideoGrid(*sides), VSAConfig(topk=topk, tile=tile)
    batch = 1 if text is None else len(text)
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype": dtype, "device": device}
    length = grid.num_tokens
    qkv = make_inputs(query_length=length, key_length=length + (70 if text else 0), layout="BLHD", **sizes)
    both = make_inputs(query_length=length, seed=5, layout="BLHD", **sizes)[:2]
    if name.startswith("strides"):
        *qkv, coarse, fine = all_strided(*qkv, *both)
        both = (coarse, fine)
    expanded = (both[0][:, :, :, :1].expand_as(both[0]), both[1][:, :1, :1].expand_as(both[1]))
    gates = {
        "both": both,
        "coarse": (both[0], None),
        "fine": (None, both[1]),
        "none": (None, None),
        # The fine stage is a small part of the output then; without a gate of its own the backward has it from there.
        "large": (16 * both[0], None),
        "expanded": expanded,
    }[gates]
    lengths = None if text is None else torch.tensor([length + n for n in text], device=device)
    return qkv, gates, grid, config, lengths


def check_case(name, dtype, device, attend):
    """`attend`(query, key, value, gates, grid, config, selection, lengths) against the reference, all gradients."""
    import torch

    from foveal import vsa_attention
    from foveal.methods.vsa.attention import select_cubes
    from foveal.testing import assert_close_to_reference, output_and_gradients, poison_empty

    qkv, gates, grid, config, lengths = make_case(name, dtype, device)
    selection = select_cubes(*qkv[:2], config=config, grid=grid, kv_lengths=lengths)
    if name.startswith("strides"):
        selection = with_strided_lists(selection)
    named = [f"gate_{kind}" for kind, gate in zip(("coarse", "fine"), gates, strict=True) if gate is not None]
    inputs = (*qkv, *(gate for gate in gates if gate is not None))

    def reference(query, key, value, *given):
        return vsa_attention(
            query,
            key,
            value,
            config=config,
            grid=grid,
            selection=selection,
            kv_lengths=lengths,
            impl="reference",
            **dict(zip(named, given, strict=True)),
        )

    def ours(query, key, value, *given):
        given = dict(zip(named, given, strict=True))
        pair = (given.get("gate_coarse"), given.get("gate_fine"))
        return attend(query, key, value, pair, grid, config, selection, lengths)

    poisoned = inputs
    if lengths is not None:
        padding = torch.arange(qkv[1].shape[2], device=device) >= lengths[:, None]
        poisoned = (inputs[0], *(x.masked_fill(padding[:, None, :, None], float("nan")) for x in qkv[1:]), *inputs[3:])
    with poison_empty():
        results = output_and_gradients(with_strided_gradients(ours), poisoned)
    exact = output_and_gradients(reference, [x.double() for x in inputs])
    plain = output_and_gradients(reference, inputs)
    labels = ("output", "grad_query", "grad_key", "grad_value", *named)
    for label, x, y, z in zip(labels, results, exact, plain, strict=True):
        assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def run_case(name: str) -> None:
    import torch
    from on_kernels import vsa_attention_gpu

    from foveal.methods.vsa.layout import CubeLayout

    def attend(query, key, value, gates, grid, config, selection, lengths):
        layout = CubeLayout(config, grid, key, lengths)
        selection = layout.checked(selection, query)
        return vsa_attention_gpu(query, key, value, layout, selection, query.shape[-1] ** -0.5, *gates, "triton")

    check_case(name, torch.float16, "cpu", attend)


def run_selection(name: str) -> None:
    """The choice made inside, and by `select_cubes_gpu`, is that of plain PyTorch."""
    import torch

    from foveal.methods.vsa.attention import select_cubes
    from foveal.methods.vsa.gpu import VSACall, choice_of, coarse_stage, select_cubes_gpu
    from foveal.methods.vsa.layout import CubeLayout

    name, _, rule = name.partition(": ")
    (query, key, value), _, grid, config, lengths = make_case(name, torch.float16, "cpu")
    # Channels that vary, and one of whose means are not 0.
    key = key * torch.linspace(0.2, 2, key.shape[-1]).to(key.dtype) + 3
    config = config.replace(**RULES.get(rule, {}))
    layout = CubeLayout(config, grid, key, lengths)
    expected = select_cubes(query, key, config=config, grid=grid, kv_lengths=lengths)
    ours = select_cubes_gpu(query, key, layout, query.shape[-1] ** -0.5)
    assert torch.equal(ours.labels(), expected.labels())
    assert torch.equal(ours.critical_count, expected.critical_count)
    assert torch.equal(ours.key_block_sizes, expected.key_block_sizes)
    assert rule not in RAGGED or ours.critical_count.unique().numel() > 1
    call = VSACall(query, key, value, None, None, None, None, layout.cubes(), choice_of(layout, None))
    *_, made = coarse_stage(call, query.shape[-1] ** -0.5, "qkv")
    lists = ours.critical, ours.critical_count
    if call.cubes.spans is not None:
        lists = call.cubes.spans.lists(*lists)
        assert lists[1].max() > ours.critical_count.max()
    assert torch.equal(made.critical, lists[0])
    assert torch.equal(made.critical_count, lists[1])


def run_tiled(slot: int, gated: bool) -> None:
    """Tokens in tile order, as a host hands them over: padding may hold anything, and comes back as zeros."""
    import torch

    from foveal.hosts import fastvideo
    from foveal.kernels.api import Ran
    from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients, poison_empty

    fastvideo.choose_impl = lambda impl, *others: Ran(impl)  # it wants a GPU for "triton"
    sizes = torch.tensor([slot, 40, 1])
    valid = (torch.arange(slot) < sizes[:, None]).flatten()[:, None]
    lengths = {"heads": 1, "query_length": len(valid), "dtype": torch.float16}
    inputs = (*make_inputs(**lengths), *make_inputs(**lengths, seed=5)[:gated])

    def by(impl):
        def run(query, key, value, gate=None):
            tile = (4, 4, slot // 16)
            output = fastvideo.vsa_over_tiles(query, key, value, sizes, sizes, 2, tile, gate, impl)
            assert impl != "triton" or not (output * ~valid).any()
            return torch.where(valid, output, 0)

        return run

    with poison_empty():
        results = output_and_gradients(by("triton"), [x.masked_fill(~valid, float("nan")) for x in inputs])
    exact = output_and_gradients(by("reference"), [(x * valid).double() for x in inputs])
    plain = output_and_gradients(by("reference"), [x * valid for x in inputs])
    for number, found in enumerate(zip(results, exact, plain, strict=True)):
        assert_close_to_reference(*found, name=f"tiled, tensor {number}")


TILED = {"tiled": (64, True), "tiled, wide, no gate": (128, False)}


def main(names) -> None:
    mend_interpreter()
    for name in names:
        if name.startswith("selection: "):
            run_selection(name.removeprefix("selection: "))
        elif name in TILED:
            run_tiled(*TILED[name])
        else:
            run_case(name)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["partial cubes", "whole cubes in slots", "full slots"], id="cubes"),
        pytest.param(["image, expanded gates", "wide slots"], id="gates"),
        pytest.param(["text", "text with padding"], id="text"),
        pytest.param(["63 tokens of 64", "tiled"], id="63 tokens, and tiled"),
        pytest.param(["two slots", "selection: two slots with text"], id="two slots"),
        pytest.param(["two slots with text"], id="two slots with text", marks=pytest.mark.exhaustive),
        pytest.param(["tiled, wide, no gate"], id="tiled and wide", marks=pytest.mark.exhaustive),
        pytest.param(["strides", "strides, one gate"], id="strides"),
        pytest.param(["selection: partial cubes", "selection: text with padding"], id="selection"),
        pytest.param(
            [
                "selection: partial cubes: sinks",
                "selection: partial cubes: mass",
                "selection: partial cubes: heads",
                "selection: text with padding: window",
            ],
            id="selection by rules",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            [
                "selection: partial cubes: quarters",
                "selection: text with padding: quarters",
                "selection: partial cubes: quarters, small",
                "selection: partial cubes: quarters, mass",
                "selection: partial cubes: spread",
                "selection: wide slots: spread",
                "selection: wide slots: quarters",
                "selection: whole cubes in slots: spread",
                "selection: text with padding: spread, window",
            ],
            id="selection by scores",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interpreted(names):
    pytest.importorskip("triton")
    run_interpreted(__file__, names)


if __name__ == "__main__":
    main(sys.argv[1:])
