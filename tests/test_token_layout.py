"""`TokenLayout` itself, and what counts with it: `attention_cost` and `explain`."""

import pytest
import torch

from foveal import SLAConfig, TokenLayout, VideoGrid, VSAConfig, attention_cost, explain
from foveal.layout import resolve_layout
from foveal.testing import make_inputs

GRID = VideoGrid(3, 5, 6)
LAYOUT = TokenLayout(GRID, before=(7, 1), after=(20,))
SHAPE = {"heads": 2, "head_dim": 64, "batch": 3}


def test_what_a_layout_says():
    assert (LAYOUT.lengths, LAYOUT.num_tokens, LAYOUT.num_protected) == ((8, 90, 20), 118, 28)
    assert LAYOUT.video == slice(8, 98)
    assert LAYOUT.num_chunks(8) == 1 + 1 + 3
    assert TokenLayout(GRID, (7, 1), (20,)) == LAYOUT
    assert len({LAYOUT, TokenLayout(GRID, (7, 1), (20,)), TokenLayout(GRID)}) == 2
    assert TokenLayout(GRID).num_tokens == GRID.num_tokens
    with pytest.raises(AttributeError):
        LAYOUT.before = ()


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout(GRID, (7, 1)), TokenLayout(GRID, (), (20,)), TokenLayout(GRID)])
def test_split_and_join(layout):
    x = torch.arange(layout.num_tokens).view(1, 1, -1, 1)
    video, protected = layout.split(x)
    assert torch.equal(video, x[:, :, layout.video])
    assert video.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert protected.flatten().tolist() == [i for i in range(layout.num_tokens) if i not in video]
    assert torch.equal(layout.join(video, protected), x)
    by_rows = layout.split(x[0, 0].T, 1)
    assert torch.equal(by_rows[1][0], protected.flatten())
    assert torch.equal(layout.join(*by_rows, 1)[0], x.flatten())
    # As transformers hold heads, and as their next layer reads them.
    heads = torch.randn(2, layout.num_tokens, 3, 8).transpose(1, 2)
    joined = layout.join(*layout.split(heads))
    assert torch.equal(joined, heads)
    assert joined.stride() == heads.stride()


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        (((3, 5, 6),), TypeError, r"grid must be a VideoGrid, got \(3, 5, 6\)"),
        ((GRID, 7), TypeError, "before must be a tuple of lengths in tokens, got 7"),
        ((GRID, (), [7]), TypeError, r"after must be a tuple of lengths in tokens, got \[7\]"),
        ((GRID, (7, 0)), ValueError, r"before\[1\] must be at least 1, got 0"),
        ((GRID, (), (7.0,)), TypeError, r"after\[0\] must be an int, got 7\.0"),
        ((GRID, (True,)), TypeError, r"before\[0\] must be an int, got True"),
    ],
)
def test_wrong_fields(fields, error, match):
    with pytest.raises(error, match=match):
        TokenLayout(*fields)


def test_one_resolver():
    assert resolve_layout(None, None) == (None, None)
    assert resolve_layout(GRID, None) == resolve_layout(None, GRID) == (GRID, None)
    assert resolve_layout(None, TokenLayout(GRID)) == (GRID, None)
    assert resolve_layout(None, LAYOUT) == (GRID, LAYOUT)
    with pytest.raises(ValueError, match="give grid or layout, not both"):
        resolve_layout(GRID, LAYOUT)
    with pytest.raises(TypeError, match=r"grid must be a VideoGrid, got .* a TokenLayout goes to layout"):
        resolve_layout(LAYOUT, None)
    with pytest.raises(TypeError, match=r"layout must be a VideoGrid or a TokenLayout, got \(3, 5, 6\)"):
        resolve_layout(None, (3, 5, 6))


def test_explain_takes_a_layout():
    inputs = make_inputs(query_length=118, dtype=torch.float32)
    assert explain(*inputs, VSAConfig(tile=(2, 2, 2)), LAYOUT).blocks == (16, 16)
    assert explain(*inputs, SLAConfig(), TokenLayout(GRID)).blocks == (64, 64)


@pytest.mark.parametrize("config", [SLAConfig(block_q=16, block_k=16, keep_ratio=0.2), VSAConfig(tile=(2, 2, 2)), None])
def test_cost_without_segments_is_that_of_the_grid(config):
    grid = attention_cost(config, grid=GRID, **SHAPE)
    assert attention_cost(config, layout=TokenLayout(GRID), **SHAPE) == grid
    assert attention_cost(config, layout=GRID, **SHAPE) == grid
    with pytest.raises(ValueError, match="give grid or layout, not both"):
        attention_cost(config, grid=GRID, layout=LAYOUT, **SHAPE)
    with pytest.raises(ValueError, match="give grid or lengths, not both"):
        attention_cost(config, layout=LAYOUT, query_length=118, **SHAPE)


def test_cost_of_sla_over_a_packed_sequence():
    """6 blocks of video and 2 of protected keys: each row reads floor(0.4 * 6) and 2, and protected rows read all."""
    config = SLAConfig(block_q=16, block_k=16, keep_ratio=0.4, projection=False)
    cost = attention_cost(config, layout=LAYOUT, **SHAPE)
    pairs = 6
    assert cost.dense.flops == 4 * pairs * 118 * 118 * 64
    assert cost.part("sparse").flops == 4 * pairs * 96 * (2 + 2) * 16 * 64
    assert cost.part("protected").flops == 4 * pairs * 28 * 118 * 64
    assert cost.part("protected").backward == 2.5
    assert cost.part("selection").flops == pairs * (90 + 90) * 64 + 2 * pairs * 6 * 6 * 64
    assert cost.part("mask GEMM").flops == 2 * pairs * 6 * 8 * 64 * 65
    assert cost.part("reorder").bytes == 4 * pairs * 118 * 64 * 2


def test_cost_of_vsa_over_a_packed_sequence():
    """2 x 3 x 3 cubes and 1 + 1 + 3 chunks: each cube reads ceil(0.125 * 18) cubes and all chunks."""
    cost = attention_cost(VSAConfig(tile=(2, 2, 2)), layout=LAYOUT, **SHAPE)
    pairs = 6
    assert cost.part("fine").flops == 4 * pairs * (18 * 16) * (3 + 5) * 16 * 64
    assert cost.part("coarse").flops == pairs * (3 * 23 * 16 * 64 + 4 * 23 * 23 * 64)
    assert cost.part("gates").flops == 2 * 3 * 118 * 128 * 128
    assert cost.part("combine").flops == 2 * pairs * 118 * 64
    assert cost.part("protected").flops == 4 * pairs * 28 * 118 * 64
