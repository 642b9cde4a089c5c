"""Sinks and windows: the blocks that rows keep whatever their scores, against loops over the tokens of the video."""

import itertools
import json

import pytest
import torch
from tiny_wan import check_compiled_over_grids, run, tiny_transformer

import foveal
from foveal import (
    SLAConfig,
    SparseLinearAttention,
    TokenLayout,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.fixed_blocks import fixed_blocks
from foveal.testing import make_inputs, output_and_gradients

GRID = VideoGrid(5, 5, 7)
CPU = torch.device("cpu")


def cube_of(token, grid, tile):
    _, height, width = grid.shape
    place = token // (height * width), token // width % height, token % width
    return tuple(x // edge for x, edge in zip(place, tile, strict=True))


def window_around(cube, sides, window):
    """The cubes around one, as many along each side as the window says, or all."""
    ranges = []
    for place, side, edge in zip(cube, sides, window, strict=True):
        edge = min(edge, side)
        start = max(0, min(place - edge // 2, side - edge))
        ranges.append(range(start, start + edge))
    return set(itertools.product(*ranges))


def fixed_by_hand(grid, tile, blocks, sink_frames, window):
    """bool [Tq, Tk]. Blocks are lists of tokens here; None for a block of each cube."""
    _, height, width = grid.shape
    tokens = list(range(grid.num_tokens))
    sides = None if tile is None else [-(-side // edge) for side, edge in zip(grid.shape, tile, strict=True)]
    if tile is not None:
        tokens.sort(key=lambda token: (cube_of(token, grid, tile), token))
    if blocks is None:
        cut = [[list(group) for _, group in itertools.groupby(tokens, lambda x: cube_of(x, grid, tile))]] * 2
    else:
        cut = [[tokens[i : i + block] for i in range(0, len(tokens), block)] for block in blocks]
    rows, columns = cut

    def is_sink(column):
        if tile is None:
            return any(token < sink_frames * height * width for token in column)
        return any(cube_of(token, grid, tile)[0] * tile[0] < sink_frames for token in column)

    kept = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        kept[i, j] = is_sink(column)
        if window is not None:
            around = set().union(*(window_around(cube_of(token, grid, tile), sides, window) for token in row))
            kept[i, j] |= any(cube_of(token, grid, tile) in around for token in column)
    return kept


def as_mask(fixed, columns):
    """bool [Tq, Tk] of the ranges, which must ascend."""
    kept = torch.zeros(fixed.ranges.shape[0], columns, dtype=torch.bool)
    for row, ranges in zip(kept, fixed.ranges.tolist(), strict=True):
        filled = [x for x in ranges if x != [0, 0]]
        assert filled == sorted(filled)
        assert all(start < stop for start, stop in filled)
        for start, stop in filled:
            assert not row[start:stop].any()
            row[start:stop] = True
    return kept


BLOCKS = [(16, 8), (8, 16), (6, 10)]
WINDOWS = [(1, None), (3, None), (9, None), (0, (1, 1, 1)), (0, (3, 2, 3)), (1, (2, 9, 1))]


@pytest.mark.parametrize(
    ("tile", "blocks", "sink_frames", "window"),
    [
        *((tile, x, *y) for tile in [(2, 2, 4), (4, 4, 4), (1, 8, 8)] for x in [*BLOCKS, None] for y in WINDOWS),
        *((None, x, *y) for x in BLOCKS for y in WINDOWS[:3]),  # raster order has no cubes
    ],
    ids=str,
)
def test_ranges_hold_the_blocks_of_sinks_and_windows(tile, blocks, sink_frames, window):
    fixed = fixed_blocks(GRID.shape, tile, blocks, sink_frames, window, CPU)
    expected = fixed_by_hand(GRID, tile, blocks, sink_frames, window)
    assert torch.equal(as_mask(fixed, expected.shape[1]), expected)
    assert fixed.most == expected.sum(1).max()


def test_windows_have_as_many_cubes_at_the_borders():
    kept = as_mask(fixed_blocks((6, 10, 16), (2, 2, 4), None, 0, (3, 3, 3), CPU), 3 * 5 * 4)
    assert (kept.sum(1) == 27).all()


@pytest.mark.parametrize("lengths", [None, (175, 61)])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.1}, {"keep_ratio": 0.1, "keep_mass": 0.6}], ids=["ratio", "mass"])
def test_rows_keep_what_is_fixed_beside_what_they_pick(budget, lengths):
    fixed = fixed_blocks(GRID.shape, (2, 2, 4), (16, 8), 1, (1, 2, 2), CPU)
    query, key, _ = make_inputs(batch=2, query_length=175, head_dim=8, dtype=torch.float64)
    blocks = {"block_q": 16, "block_k": 8, "kv_lengths": None if lengths is None else torch.tensor(lengths)}
    picked = select_blocks(query, key, **blocks, **budget).critical_mask()
    selection = select_blocks(query, key, **blocks, **budget, drop_ratio=0.5, fixed=fixed)
    valid = torch.ones(query.shape[0], 22, dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(22) < -(-torch.tensor(lengths) // 8)[:, None]
    expected = (picked | as_mask(fixed, 22)) & valid[:, None, None]
    assert torch.equal(selection.critical_mask(), expected)
    assert selection.critical_count.unique().numel() > 1
    labels = selection.labels()
    assert not ((labels != 1) & expected).any()
    dropped = (labels == -1) & valid[:, None, None]
    wanted = (valid.sum(1) * 0.5 + 1e-6).long()[:, None, None]
    assert torch.equal(dropped.sum(-1), wanted.minimum((valid[:, None, None] & ~expected).sum(-1)))


SLA = {"keep_ratio": 0.1, "drop_ratio": 0.2, "block_q": 16, "block_k": 8, "projection": False}
# name: (fields, token_order)
SLA_CASES = {
    "raster sinks": ({"sink_frames": 1}, "raster"),
    "sinks": ({"sink_frames": 1}, "tile"),
    "window": ({"window": (1, 2, 2)}, "tile"),
    "both, a mass": ({"sink_frames": 1, "window": (2, 1, 1), "keep_mass": 0.4}, "tile"),
    "only sinks": ({"sink_frames": 1, "keep_ratio": 0.0}, "tile"),
}


def tensors_of(length, text=0, batch=2):
    query, key, value = make_inputs(
        batch=batch, query_length=length, key_length=length + text, dtype=torch.float64, head_dim=16
    )
    return query * torch.linspace(0.2, 6, length, dtype=torch.float64)[:, None], key, value


@pytest.mark.parametrize("case", SLA_CASES)
@pytest.mark.parametrize("where", ["grid", "text", "packed"])
def test_sla_keeps_them(case, where):
    fields, order = SLA_CASES[case]
    config = SLAConfig(**SLA | fields, token_order=order)
    layout = TokenLayout(GRID, (6,), (9,)) if where == "packed" else GRID
    text = 21 if where == "text" else 0
    options = {"layout": layout}
    if text:
        options |= {"protected_keys": (175, 196), "kv_lengths": torch.tensor([196, 178])}
    tensors = tensors_of(layout.num_tokens, text)
    plain = config.replace(sink_frames=0, window=None) if config.keep_ratio else None
    selection = SparseLinearAttention(16, config).select(*tensors[:2], **options)
    kept = selection.critical_mask()
    tile = (4, 4, 4) if order == "tile" else None
    fixed = fixed_by_hand(GRID, tile, (16, 8), config.sink_frames, config.window)
    expected = fixed.expand(2, tensors[0].shape[1], -1, -1)
    if plain is not None:
        expected = expected | SparseLinearAttention(16, plain).select(*tensors[:2], **options).critical_mask()[..., :22]
    if text:
        expected = expected.clone()
        expected[..., 21] = True  # where the text starts
    assert torch.equal(kept[..., :22], expected)
    if where == "packed":
        assert kept[..., 22:].all()
    assert torch.equal(kept.sum(-1), selection.critical_count)

    def attention(impl, chosen=None):
        where = {name: x for name, x in options.items() if chosen is None or name == "layout"}
        return lambda *x: sla_attention(*x, config=config, selection=chosen, impl=impl, **where)

    ours, exact, given = (
        output_and_gradients(f, tensors)
        for f in (attention("torch"), attention("reference"), attention("torch", selection))
    )
    for x, y, z in zip(ours, exact, given, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x, z, rtol=0, atol=0)


VSA_CASES = {
    "sinks": {"sink_frames": 1},
    "window": {"window": (1, 2, 2)},
    "both, a mass": {"sink_frames": 1, "window": (3, 1, 1), "keep_mass": 0.4, "max_keep_ratio": 0.5},
}


@pytest.mark.parametrize("case", VSA_CASES)
@pytest.mark.parametrize("where", ["grid", "text", "packed"])
@pytest.mark.parametrize("budget", [{"topk": 2}, {"keep_ratio": 0.1}], ids=["topk", "ratio"])
def test_vsa_keeps_them(case, where, budget):
    config = VSAConfig(**budget, tile=(2, 2, 4), **VSA_CASES[case])
    layout = TokenLayout(GRID, (6,), (9,)) if where == "packed" else GRID
    text = 21 if where == "text" else 0
    options = {"layout": layout}
    if text:
        options["kv_lengths"] = torch.tensor([196, 178])
    tensors = tensors_of(layout.num_tokens, text)
    selection = VideoSparseAttention(32, 2, 16, config).select(*tensors[:2], **options)
    kept = selection.critical_mask()
    plain = VideoSparseAttention(32, 2, 16, config.replace(sink_frames=0, window=None)).select(*tensors[:2], **options)
    fixed = fixed_by_hand(GRID, (2, 2, 4), None, config.sink_frames, config.window)
    cubes = fixed.shape[1]
    assert torch.equal(kept[..., :cubes], plain.critical_mask()[..., :cubes] | fixed)
    assert torch.equal(kept[..., cubes:], plain.critical_mask()[..., cubes:])
    assert torch.equal(kept.sum(-1), selection.critical_count)

    def attention(impl):
        return lambda *x: vsa_attention(*x, config=config, impl=impl, **options)

    for x, y in zip(*(output_and_gradients(attention(i), tensors) for i in ("torch", "reference")), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        SLAConfig(**SLA, sink_frames=1),
        SLAConfig(**SLA | {"projection": True}, token_order="tile", sink_frames=1, window=(1, 2, 2)),
        VSAConfig(topk=1, tile=(2, 2, 4), window=(1, 2, 2)),
        VSAConfig(topk=1, tile=(2, 2, 4), sink_frames=1),
    ],
    ids=["sla sinks", "sla both", "vsa window", "vsa sinks"],
)
def test_compiled_models_keep_them(config):
    check_compiled_over_grids(config)


def test_functions_compile_with_a_grid_of_their_own():
    query, key, value = (x.float() for x in tensors_of(GRID.num_tokens, batch=1))
    config = VSAConfig(topk=1, tile=(2, 2, 4), sink_frames=1, window=(1, 2, 2))
    expected = vsa_attention(query, key, value, config=config, grid=GRID)
    compiled = torch.compile(vsa_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, config=config, grid=GRID), expected)


@pytest.mark.parametrize(
    "config",
    [
        SLAConfig(token_order="tile", sink_frames=1, window=(3, 3, 1)),
        VSAConfig(topk=2, sink_frames=1, window=(3, 3, 1)),
    ],
    ids=["sla", "vsa"],
)
def test_models_keep_the_fields(config, tmp_path):
    model = foveal.sparsify(tiny_transformer(num_layers=1), config)
    foveal.save(model, tmp_path)
    loaded = foveal.load(tiny_transformer(num_layers=1), tmp_path)
    assert foveal.summary(loaded).rows[0].config == config
    assert "sinks 1, window 3x3x1" in str(foveal.summary(loaded))
    run(loaded)
    assert foveal.report(loaded).rows[0].ran.kept is None  # the device knows
    fields = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(fields) == config
    older = {name: value for name, value in fields.items() if name not in ("sink_frames", "window")}
    assert type(config).from_saved(older) == config.replace(sink_frames=0, window=None)


MISTAKES = {
    "negative": ({"sink_frames": -1}, ValueError, "sink_frames must be at least 0, got -1"),
    "a ratio": ({"sink_frames": 0.5}, TypeError, "sink_frames must be an int, got 0.5"),
    "a bool": ({"sink_frames": True}, TypeError, "sink_frames must be an int, got True"),
    "one side": ({"window": 3}, TypeError, "window must be a tuple of three ints"),
    "no side": ({"window": (3, 0, 3)}, ValueError, "window height must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("make", [lambda **x: SLAConfig(token_order="tile", **x), VSAConfig], ids=["sla", "vsa"])
def test_mistakes(make, name):
    fields, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        make(**fields)


def test_windows_need_cubes_and_sinks_a_grid():
    with pytest.raises(ValueError, match=r'window counts cubes.*expected token_order="tile"'):
        SLAConfig(window=(3, 3, 3))
    tensors = make_inputs(query_length=100, head_dim=16)
    with pytest.raises(ValueError, match="grid is required for sink_frames and window"):
        sla_attention(*tensors, config=SLAConfig(sink_frames=1, projection=False))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "budget", [{"keep_ratio": 0.1}, {"keep_ratio": (0.1, 0.4), "drop_ratio": 0.2}], ids=["one", "heads"]
)
@pytest.mark.parametrize("mass", [{}, {"keep_mass": 0.5, "max_keep_ratio": 0.6}], ids=["ratio", "mass"])
def test_the_kernels_keep_what_pytorch_keeps(budget, mass):
    shape, rule = (5, 12, 26), {"block_q": 64, "block_k": 64, **budget, **mass}
    query, key, _ = make_inputs(heads=2, query_length=1560, head_dim=128, dtype=torch.bfloat16)
    fixed = [fixed_blocks(shape, (4, 4, 4), (64, 64), 1, (1, 3, 3), torch.device(x)) for x in ("cpu", "cuda")]
    expected = select_blocks(query, key, **rule, fixed=fixed[0]).labels()
    ours = select_blocks(query.cuda(), key.cuda(), **rule, fixed=fixed[1]).labels()
    assert (ours.cpu() == expected).double().mean() > 0.995  # sums in another order may part neighbors in rank
    config = VSAConfig(keep_ratio=budget["keep_ratio"], tile="auto", sink_frames=1, window=(1, 3, 3), **mass)
    module, grid = VideoSparseAttention(256, 2, 128, config), VideoGrid(*shape)
    expected = module.select(query, key, grid=grid).labels()
    assert (module.select(query.cuda(), key.cuda(), grid=grid).labels().cpu() == expected).double().mean() > 0.995
