"""SLA over video and text in one sequence: protected keys, lengths that differ from sample to sample, tile order."""

import pytest
import torch
import torch.nn.functional as F

from foveal import SLAConfig, SparseLinearAttention, VideoGrid, sla_attention
from foveal.kernels.api import select_blocks
from foveal.methods.sla.reference import sla_attention_reference
from foveal.testing import make_inputs

GRID = VideoGrid(3, 5, 6)
VIDEO, TEXT = 90, 21
LENGTHS = torch.tensor([VIDEO + 4, VIDEO + TEXT])
CONFIG = SLAConfig(keep_ratio=0.25, drop_ratio=0.2, block_q=16, block_k=16, projection=False)
RASTER_AND_TILE = pytest.mark.parametrize("token_order", ["raster", "tile"])


def text_inputs(**options):
    return make_inputs(batch=2, query_length=VIDEO, key_length=VIDEO + TEXT, head_dim=8, **options)


def attend(inputs, config=CONFIG, **options):
    options = {"grid": GRID, "protected_keys": (VIDEO, VIDEO + TEXT), "kv_lengths": LENGTHS} | options
    return sla_attention(*inputs, config=config, **options)


@pytest.mark.parametrize("linear_scope", ["marginal", "noncritical", "all", "none"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@RASTER_AND_TILE
def test_equals_the_reference_on_the_order_that_blocks_are_cut_from(token_order, linear_scope, impl):
    inputs = text_inputs(requires_grad=True)
    config = CONFIG.replace(token_order=token_order, linear_scope=linear_scope)
    output = attend(inputs, config, impl=impl)
    ours = torch.autograd.grad(output.square().sum(), inputs)

    tile = config.tile_for(GRID)
    ordered = inputs
    if tile is not None:
        to_tile = GRID.to_tile_order(torch.arange(VIDEO), tile, dim=0)
        places = torch.cat((to_tile, torch.arange(VIDEO, VIDEO + TEXT)))
        ordered = inputs[0][:, :, to_tile], *(x[:, :, places] for x in inputs[1:])
    rule = {"block_q": 16, "block_k": 16, "keep_ratio": 0.25, "drop_ratio": 0.2}
    selection = select_blocks(*ordered[:2], **rule, protected_keys=(VIDEO, VIDEO + TEXT), kv_lengths=LENGTHS)
    expected = sla_attention_reference(*ordered, config=config, selection=selection, scale=8**-0.5)
    if tile is not None:
        expected = expected[:, :, to_tile.argsort()]
    torch.testing.assert_close(output, expected)
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)
    # The first sample's padding is in nobody's sum.
    for gradient in ours[1:]:
        assert not gradient[0, :, VIDEO + 4 :].any()
        assert gradient[0, :, VIDEO : VIDEO + 4].abs().amin(-1).min() > 0


@RASTER_AND_TILE
def test_keeping_everything_is_dense_attention_under_a_mask(token_order):
    query, key, value = text_inputs()
    mask = (torch.arange(VIDEO + TEXT) < LENGTHS[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    key[0, :, VIDEO + 4 :], value[0, :, VIDEO + 4 :] = torch.nan, torch.nan
    config = CONFIG.replace(keep_ratio=1.0, drop_ratio=0.0, token_order=token_order)
    torch.testing.assert_close(attend((query, key, value), config), expected)


@RASTER_AND_TILE
def test_selection_for_reuse(token_order):
    inputs = text_inputs(dtype=torch.float32)
    module = SparseLinearAttention(8, CONFIG.replace(token_order=token_order))
    options = {"grid": GRID, "protected_keys": (VIDEO, VIDEO + TEXT), "kv_lengths": LENGTHS}
    selection = module.select(*inputs[:2], **options)
    assert torch.equal(module(*inputs, grid=GRID, selection=selection), module(*inputs, **options))
    # Blocks of 16 from key 80 on hold text; the last is all padding in the first sample.
    kept = selection.critical_mask()
    assert kept[:, :, :, 5].all()
    assert kept[1, :, :, 5:].all()
    assert not kept[0, :, :, 6].any()
    assert not kept[..., :5].all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"protected_keys": None}, ValueError, "grid 3x5x6 has 90 tokens, but the tensors have 111"),
        ({"protected_keys": (90, 100)}, ValueError, r"all keys after the video's, \(90, 111\).*got \(90, 100\)"),
        ({"protected_keys": (0, 90)}, ValueError, r"all keys after the video's, \(90, 111\).*got \(0, 90\)"),
        ({"kv_lengths": torch.tensor([89, 111])}, ValueError, r"at least the grid's 90 tokens.*got \[89, 111\]"),
        ({"kv_lengths": torch.tensor([90, 112])}, ValueError, r"kv_lengths must be in \[0, 111\]"),
        ({"kv_lengths": torch.tensor([90])}, ValueError, r"kv_lengths must have shape \[2\]"),
        ({"grid": VideoGrid(3, 5, 7)}, ValueError, "grid 3x5x7 has 105 tokens, but the tensors have 90"),
    ],
)
def test_wrong_arguments_in_tile_order(options, error, match):
    with pytest.raises(error, match=match):
        attend(text_inputs(), CONFIG.replace(token_order="tile"), **options)


def test_wrong_arguments():
    inputs = text_inputs()
    selection = select_blocks(*inputs[:2], block_q=16, block_k=16, keep_ratio=0.5)
    with pytest.raises(ValueError, match="give protected_keys or selection, not both"):
        attend(inputs, selection=selection, kv_lengths=None)
    with pytest.raises(ValueError, match="give kv_lengths or selection, not both"):
        attend(inputs, selection=selection, protected_keys=None)
    with pytest.raises(ValueError, match=r"protected_keys must satisfy 0 <= start <= stop <= 111"):
        attend(inputs, protected_keys=(90, 112))
