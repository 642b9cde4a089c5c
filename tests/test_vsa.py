"""Video sparse attention: the reference, the plain PyTorch implementation, its two branches and the module."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from foveal import VideoGrid, VideoSparseAttention, VSAConfig, vsa_attention
from foveal.methods.vsa.attention import resolve_tile, select_cubes, slot_size
from foveal.methods.vsa.layout import SplitCubes
from foveal.testing import assert_close_to_reference, make_inputs, output_and_gradients, poison_empty
from foveal.token_order import tile_order

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
GRID = VideoGrid(3, 5, 6)
CONFIG = VSAConfig(keep_ratio=0.4, tile=(2, 2, 4))
CASES = {
    "partial cubes": (GRID, CONFIG),
    "exact cubes": (VideoGrid(4, 4, 8), VSAConfig(topk=1, tile=(2, 4, 4))),
    "one cube": (VideoGrid(2, 3, 2), VSAConfig(topk=5, tile=(4, 4, 4))),
    "image": (VideoGrid(1, 9, 10), VSAConfig(topk=3, tile=(1, 4, 4))),
    "auto tile": (VideoGrid(3, 7, 9), VSAConfig(keep_ratio=0.3, tile="auto")),
    "one token": (VideoGrid(1, 1, 1), VSAConfig(topk=1)),
}


def attend(grid, config, impl, selection=None):
    """A function of query, key, value and the two gates."""

    def function(query, key, value, gate_coarse=None, gate_fine=None):
        return vsa_attention(
            query,
            key,
            value,
            config=config,
            grid=grid,
            gate_coarse=gate_coarse,
            gate_fine=gate_fine,
            selection=selection,
            impl=impl,
        )

    return function


def make_arguments(grid, head_dim=8, dtype=torch.float64, **options):
    """Query, key, value and two gates."""
    gates = make_inputs(query_length=grid.num_tokens, head_dim=head_dim, dtype=dtype, seed=5, **options)[:2]
    return (*make_inputs(query_length=grid.num_tokens, head_dim=head_dim, dtype=dtype, **options), *gates)


def assert_same(ours, expected, **tolerance):
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or TIGHT))


def cube_slices(grid, tile):
    """Each cube as slices of [..., T, H, W], cubes in (t, h, w) order, by plain loops."""
    edges = ((range(0, side, edge), edge) for side, edge in zip(grid.shape, tile, strict=True))
    starts = [[slice(start, start + edge) for start in values] for values, edge in edges]
    return list(itertools.product(*starts))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("grid", "config"), CASES.values(), ids=CASES)
def test_torch_matches_reference(grid, config, gated):
    arguments = make_arguments(grid)[: 5 if gated else 3]
    with poison_empty():
        ours = output_and_gradients(attend(grid, config, "torch"), arguments)
    assert_same(ours, output_and_gradients(attend(grid, config, "reference"), arguments))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl):
    grid, config = VideoGrid(2, 3, 2), VSAConfig(topk=2, tile=(1, 2, 2))
    arguments = [x[:, :1].clone().requires_grad_() for x in make_arguments(grid, head_dim=3)]
    selection = select_cubes(*arguments[:2], config=config, grid=grid)
    assert torch.autograd.gradcheck(attend(grid, config, impl, selection), arguments)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_coarse_branch_is_attention_over_pooled_tokens(impl):
    def written_out(query, key, value):
        cubes = cube_slices(GRID, CONFIG.tile)
        pooled = []
        for x in (query, key, value):
            video = x.unflatten(2, GRID.shape)
            pooled.append(torch.stack([video[:, :, t, h, w].mean((2, 3, 4)) for t, h, w in cubes], 2))
        attended = F.scaled_dot_product_attention(*pooled)
        output = torch.zeros(1, 2, *GRID.shape, 8, dtype=torch.float64)
        for index, (t, h, w) in enumerate(cubes):
            output[:, :, t, h, w] = attended[:, :, index, None, None, None]
        return output.flatten(2, 4)

    inputs = make_arguments(GRID)[:3]
    no_fine = torch.zeros_like(inputs[0])
    ours = output_and_gradients(lambda *qkv: attend(GRID, CONFIG, impl)(*qkv, None, no_fine), inputs)
    assert_same(ours, output_and_gradients(written_out, inputs))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_fine_branch_is_attention_to_the_chosen_cubes(impl):
    inputs = make_arguments(GRID)[:3]
    labels = select_cubes(*inputs[:2], config=CONFIG, grid=GRID).labels()
    cubes = cube_slices(GRID, CONFIG.tile)
    member = torch.zeros(len(cubes), *GRID.shape, dtype=torch.bool)
    for index, (t, h, w) in enumerate(cubes):
        member[index, t, h, w] = True
    cube_of = member.flatten(1).int().argmax(0)
    token_mask = (labels == 1)[:, :, cube_of][..., cube_of]
    assert not token_mask.all()

    no_coarse = torch.zeros_like(inputs[0])
    ours = output_and_gradients(lambda *qkv: attend(GRID, CONFIG, impl)(*qkv, no_coarse), inputs)
    expected = output_and_gradients(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=token_mask), inputs)
    assert_same(ours, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_all_cubes_are_dense_attention(impl):
    inputs = make_arguments(GRID)[:3]
    no_coarse = torch.zeros_like(inputs[0])
    everything = CONFIG.replace(topk=10**6, keep_ratio=None)
    ours = output_and_gradients(lambda *qkv: attend(GRID, everything, impl)(*qkv, no_coarse), inputs)
    assert_same(ours, output_and_gradients(F.scaled_dot_product_attention, inputs))


def test_selection_is_the_top_of_the_pooled_scores():
    query, key, _ = make_arguments(GRID)[:3]
    cubes = cube_slices(GRID, CONFIG.tile)
    pooled = [
        torch.stack([x.unflatten(2, GRID.shape)[:, :, t, h, w].mean((2, 3, 4)) for t, h, w in cubes], 2)
        for x in (query, key)
    ]
    scores = pooled[0] @ pooled[1].mT
    selection = select_cubes(query, key, config=CONFIG, grid=GRID)
    kept = math.ceil(CONFIG.keep_ratio * len(cubes))
    assert kept == 5
    expected = torch.zeros_like(scores, dtype=torch.int8).scatter(-1, scores.topk(kept).indices, 1)
    assert torch.equal((selection.labels() == 1).to(torch.int8), expected)
    assert selection.key_block_sizes.tolist() == [[math.prod(m) for m in sizes_of(cubes)]]


def sizes_of(cubes):
    return [[min(s.stop, side) - s.start for s, side in zip(cube, GRID.shape, strict=True)] for cube in cubes]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_fixed_selection_decides(impl):
    arguments = make_arguments(GRID)
    fixed = select_cubes(arguments[1], arguments[0], config=CONFIG, grid=GRID)
    output = attend(GRID, CONFIG, impl, fixed)(*arguments)
    assert not torch.allclose(output, attend(GRID, CONFIG, impl)(*arguments))
    own = select_cubes(*arguments[:2], config=CONFIG, grid=GRID)
    torch.testing.assert_close(attend(GRID, CONFIG, impl, own)(*arguments), attend(GRID, CONFIG, impl)(*arguments))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_against_float64(dtype, head_dim):
    grid, config = VideoGrid(3, 7, 9), VSAConfig(topk=3)
    arguments = make_arguments(grid, head_dim, dtype)
    selection = select_cubes(*arguments[:2], config=config, grid=grid)
    exact = [x.double() for x in arguments]
    reference = output_and_gradients(attend(grid, config, "reference", selection), exact)
    plain = output_and_gradients(attend(grid, config, "reference", selection), arguments)
    ours = output_and_gradients(attend(grid, config, "torch", selection), arguments)
    assert ours[0].dtype == dtype
    names = ("output", "query", "key", "value", "gate_coarse", "gate_fine")
    for name, *results in zip(names, ours, reference, plain, strict=True):
        assert_close_to_reference(*results, name=name)


def test_strided_views():
    expected = output_and_gradients(attend(GRID, CONFIG, "torch"), make_arguments(GRID))
    views = make_arguments(GRID, layout="BLHD")
    assert not views[0].is_contiguous()
    assert_same(output_and_gradients(attend(GRID, CONFIG, "torch"), views), expected)


@given(
    sides=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    tile=st.one_of(st.just("auto"), st.tuples(*[st.integers(1, 4)] * 3)),
    topk=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_grid_and_tile(sides, tile, topk, seed):
    grid, config = VideoGrid(*sides), VSAConfig(topk=topk, tile=tile)
    inputs = make_inputs(heads=1, query_length=grid.num_tokens, head_dim=4, seed=seed)
    selection = select_cubes(*inputs[:2], config=config, grid=grid)
    ours = output_and_gradients(attend(grid, config, "torch", selection), inputs)
    assert_same(ours, output_and_gradients(attend(grid, config, "reference", selection), inputs))


@pytest.mark.parametrize("tile", [(2, 2, 4), "auto"])
def test_compiles_without_graph_break(tile):
    config = CONFIG.replace(tile=tile)
    arguments = make_arguments(GRID)
    compiled = torch.compile(attend(GRID, config, "torch"), fullgraph=True, backend="aot_eager")
    assert_same(
        output_and_gradients(compiled, arguments), output_and_gradients(attend(GRID, config, "torch"), arguments)
    )


def test_one_compiled_function_takes_several_grids():
    compiled = torch.compile(
        lambda *qkv, grid: attend(grid, CONFIG, "torch")(*qkv), fullgraph=True, backend="aot_eager"
    )
    for grid in (VideoGrid(2, 4, 6), VideoGrid(3, 5, 6), VideoGrid(1, 7, 9)):
        inputs = make_arguments(grid)[:3]
        torch.testing.assert_close(compiled(*inputs, grid=grid), attend(grid, CONFIG, "torch")(*inputs), **TIGHT)


def test_activation_checkpointing_gives_the_same_gradients():
    arguments = make_arguments(GRID)
    function = attend(GRID, CONFIG, "torch")
    again = output_and_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), arguments)
    assert all(torch.equal(x, y) for x, y in zip(again, output_and_gradients(function, arguments), strict=True))


@pytest.mark.parametrize(("tile", "slot"), [((4, 4, 4), 64), ((3, 5, 4), 64), ((1, 1, 1), 16), ((6, 8, 8), 512)])
def test_slot_holds_the_cube(tile, slot):
    assert slot_size(tile) == slot


def test_auto_tile_is_the_grids():
    grid = VideoGrid(21, 30, 52)
    assert resolve_tile(VSAConfig(tile="auto"), grid) == (3, 5, 4)
    assert resolve_tile(VSAConfig(), grid) == (4, 4, 4)


class TestText:
    """Keys past the video's."""

    TEXT = 21  # with slots of 16 tokens a full block and a partial one

    def arguments(self, batch=1, text=TEXT, **options):
        gates = make_arguments(GRID, batch=batch)[3:]
        lengths = {"query_length": GRID.num_tokens, "key_length": GRID.num_tokens + text}
        return (*make_inputs(batch=batch, head_dim=8, **lengths, **options), *gates)

    @staticmethod
    def attend(impl, config=CONFIG, **options):
        def function(query, key, value, gate_coarse=None, gate_fine=None):
            gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
            return vsa_attention(query, key, value, config=config, grid=GRID, impl=impl, **gates, **options)

        return function

    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_every_cube_attends_to_text_and_its_own_choice(self, impl):
        inputs = self.arguments()[:3]
        num_tokens = GRID.num_tokens
        video_only = select_cubes(inputs[0], inputs[1][:, :, :num_tokens], config=CONFIG, grid=GRID)
        cubes = cube_slices(GRID, CONFIG.tile)
        cube_of = torch.zeros(GRID.shape, dtype=torch.long)
        for index, (t, h, w) in enumerate(cubes):
            cube_of[t, h, w] = index
        cube_of = cube_of.flatten()
        mask = video_only.critical_mask()[:, :, cube_of][..., cube_of]
        mask = torch.cat([mask, torch.ones(*mask.shape[:3], self.TEXT, dtype=torch.bool)], -1)

        no_coarse = torch.zeros_like(inputs[0])
        ours = output_and_gradients(lambda *qkv: self.attend(impl)(*qkv, no_coarse), inputs)
        assert_same(ours, output_and_gradients(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), inputs))

    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_the_coarse_stage_sees_the_video_alone(self, impl):
        query, key, value, *_ = self.arguments()
        no_fine = torch.zeros_like(query)
        output = self.attend(impl)(query, key, value, None, no_fine)
        video = (x[:, :, : GRID.num_tokens] for x in (key, value))
        torch.testing.assert_close(output, self.attend(impl)(query, *video, None, no_fine), **TIGHT)

    @pytest.mark.parametrize("text", [1, 16, 21])
    def test_torch_matches_reference(self, text):
        arguments = self.arguments(batch=2, text=text)
        with poison_empty():
            ours = output_and_gradients(self.attend("torch"), arguments)
        assert_same(ours, output_and_gradients(self.attend("reference"), arguments))

    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_padding_is_as_if_it_were_not_there(self, impl):
        arguments = list(self.arguments(batch=3))
        valid = [GRID.num_tokens + text for text in (0, 7, 21)]
        for index in (1, 2):
            for sample, length in enumerate(valid):
                arguments[index][sample, :, length:] = math.nan
        padded = output_and_gradients(self.attend(impl, kv_lengths=torch.tensor(valid)), arguments)
        for sample, length in enumerate(valid):
            query, key, value, *gates = (x[sample : sample + 1] for x in arguments)
            alone = self.attend(impl)(query, key[:, :, :length], value[:, :, :length], *gates)
            torch.testing.assert_close(padded[0][sample : sample + 1], alone, **TIGHT)
            assert not padded[2][sample, :, length:].any()
            assert not padded[3][sample, :, length:].any()
        assert all(x.isfinite().all() for x in padded)

    def test_padding_has_the_reference_gradients(self):
        arguments, lengths = self.arguments(batch=2), torch.tensor([GRID.num_tokens + 18, GRID.num_tokens + 3])
        ours = output_and_gradients(self.attend("torch", kv_lengths=lengths), arguments)
        assert_same(ours, output_and_gradients(self.attend("reference", kv_lengths=lengths), arguments))

    def test_selection_lists_the_cubes_and_then_the_text(self):
        query, key, *_ = self.arguments(batch=2)
        lengths = torch.tensor([GRID.num_tokens + 18, GRID.num_tokens + 3])
        video = select_cubes(query, key[:, :, : GRID.num_tokens], config=CONFIG, grid=GRID)
        selection = select_cubes(query, key, config=CONFIG, grid=GRID, kv_lengths=lengths)
        num_cubes = video.num_key_blocks
        assert selection.key_block_sizes[:, num_cubes:].tolist() == [[16, 2], [3, 0]]
        labels = selection.labels()
        assert torch.equal(labels[..., :num_cubes], video.labels())
        assert labels[0, ..., num_cubes:].eq(1).all()
        assert labels[1, ..., num_cubes:].flatten(0, 1).unique(dim=0).shape[0] == 1
        assert selection.critical_count[:, 0, 0].tolist() == [7, 6]

    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_a_fixed_selection_decides(self, impl):
        arguments, lengths = self.arguments(batch=2), torch.tensor([GRID.num_tokens + 18, GRID.num_tokens + 3])
        selection = select_cubes(*arguments[:2], config=CONFIG, grid=GRID)
        given = self.attend(impl, selection=selection, kv_lengths=lengths)(*arguments)
        torch.testing.assert_close(given, self.attend(impl, kv_lengths=lengths)(*arguments), **TIGHT)

    def test_compiles_without_graph_break(self):
        arguments, lengths = self.arguments(), torch.tensor([GRID.num_tokens + 18])
        function = self.attend("torch", kv_lengths=lengths)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(output_and_gradients(compiled, arguments), output_and_gradients(function, arguments))

    def test_module_takes_text(self):
        query, key, value, *_ = (x.float() for x in self.arguments(batch=2))
        hidden = torch.randn(2, GRID.num_tokens, 24, generator=torch.Generator().manual_seed(1))
        lengths = torch.tensor([GRID.num_tokens + 18, GRID.num_tokens + 3])
        module = VideoSparseAttention(24, 2, 8, CONFIG)
        closed = torch.zeros_like(query)
        expected = self.attend("torch", kv_lengths=lengths)(query, key, value, closed)
        torch.testing.assert_close(module(query, key, value, hidden, grid=GRID, kv_lengths=lengths), expected)
        selection = module.select(query, key, grid=GRID, kv_lengths=lengths)
        assert torch.equal(selection.key_block_sizes[:, -1], torch.tensor([2, 0], dtype=torch.int32))

    @pytest.mark.parametrize(
        ("lengths", "error", "message"),
        [
            ([90, 90], TypeError, r"kv_lengths must be an integer tensor"),
            (torch.tensor([90]), ValueError, r"kv_lengths must have shape \[2\], got \[1\]"),
            (torch.tensor([89, 100]), ValueError, r"between the video's 90 tokens and all 111 keys, got \[89, 100\]"),
            (torch.tensor([90, 112]), ValueError, r"between the video's 90 tokens and all 111 keys, got \[90, 112\]"),
        ],
    )
    def test_wrong_lengths(self, lengths, error, message):
        with pytest.raises(error, match=message):
            self.attend("torch", kv_lengths=lengths)(*self.arguments(batch=2))


class TestModule:
    inputs = make_inputs(query_length=GRID.num_tokens, head_dim=8, dtype=torch.float32)
    hidden = torch.randn(1, GRID.num_tokens, 24, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("fine_gate", [True, False])
    def test_starts_as_the_fine_branch(self, fine_gate):
        module = VideoSparseAttention(24, 2, 8, CONFIG.replace(fine_gate=fine_gate))
        closed = torch.zeros_like(self.inputs[0])
        expected = vsa_attention(*self.inputs, config=CONFIG, grid=GRID, gate_coarse=closed)
        torch.testing.assert_close(module(*self.inputs, self.hidden, grid=GRID), expected)
        names = {"to_gate_coarse.weight", "to_gate_coarse.bias"}
        if fine_gate:
            names |= {"to_gate_fine.weight", "to_gate_fine.bias"}
        assert set(module.state_dict()) == names

    def test_gates_are_linear_in_the_hidden_states(self):
        module = VideoSparseAttention(24, 2, 8, CONFIG.replace(fine_gate=True))
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
        gates = [
            linear(self.hidden).view(1, GRID.num_tokens, 2, 8).transpose(1, 2)
            for linear in (module.to_gate_coarse, module.to_gate_fine)
        ]
        expected = vsa_attention(*self.inputs, config=CONFIG, grid=GRID, gate_coarse=gates[0], gate_fine=gates[1])
        torch.testing.assert_close(module(*self.inputs, self.hidden, grid=GRID), expected)

    def test_coarse_branch_can_grow(self):
        module = VideoSparseAttention(24, 2, 8, CONFIG)
        module(*self.inputs, self.hidden, grid=GRID).square().sum().backward()
        assert module.to_gate_coarse.weight.grad.abs().sum() > 0

    def test_wrong_arguments(self):
        module = VideoSparseAttention(24, 2, 8, CONFIG)
        with pytest.raises(ValueError, match=r"query must have \(heads, head_dim\) \(2, 8\), got \(2, 4\)"):
            module(*(x[..., :4] for x in self.inputs), self.hidden, grid=GRID)
        with pytest.raises(ValueError, match=r"hidden_states must have shape \(1, 90, 24\), got \(1, 90, 8\)"):
            module(*self.inputs, self.hidden[..., :8], grid=GRID)
        with pytest.raises(TypeError, match=r"config must be a VSAConfig, got tuple"):
            VideoSparseAttention(24, 2, 8, (4, 4, 4))
        with pytest.raises(ValueError, match=r"num_heads must be at least 1, got 0"):
            VideoSparseAttention(24, 0, 8, CONFIG)


class TestErrors:
    inputs = make_inputs(query_length=GRID.num_tokens, head_dim=8, dtype=torch.float32)

    def attend(self, *, inputs=inputs, config=CONFIG, grid=GRID, **options):
        return vsa_attention(*inputs, config=config, grid=grid, **options)

    def test_config_of_another_type(self):
        with pytest.raises(TypeError, match=r"config must be a VSAConfig, got NoneType"):
            self.attend(config=None)

    def test_grid_of_another_type(self):
        with pytest.raises(TypeError, match=r"grid must be a VideoGrid, got \(3, 5, 6\)"):
            self.attend(grid=(3, 5, 6))

    def test_grid_of_another_length(self):
        with pytest.raises(ValueError, match=r"grid 3x5x5 has 75 tokens, but the tensors have 90"):
            self.attend(grid=VideoGrid(3, 5, 5))

    def test_query_and_key_lengths_differ(self):
        query, key, value = self.inputs
        with pytest.raises(ValueError, match=r"key must hold the 90 tokens of the video.*got 80"):
            self.attend(inputs=(query, key[:, :, :80], value[:, :, :80]))
        with pytest.raises(ValueError, match=r"grid 3x5x6 has 90 tokens, but the tensors have 80"):
            self.attend(inputs=(query[:, :, :80], key, value))

    @pytest.mark.parametrize("name", ["gate_coarse", "gate_fine"])
    def test_gate_of_another_shape(self, name):
        with pytest.raises(ValueError, match=rf"{name} must have the shape of query.*got \(1, 2, 90\)"):
            self.attend(**{name: torch.ones(1, 2, 90)})

    def test_gate_of_another_type(self):
        with pytest.raises(ValueError, match=r"gate_coarse must have the shape of query.*got float"):
            self.attend(gate_coarse=1.0)

    def test_gate_on_another_device(self):
        with pytest.raises(ValueError, match=r"gate_coarse is on meta, but query is on cpu"):
            self.attend(gate_coarse=torch.ones(1, 2, 90, 8, device="meta"))

    def test_selection_of_another_tile(self):
        other = select_cubes(*self.inputs[:2], config=CONFIG.replace(tile=(4, 4, 4)), grid=GRID)
        with pytest.raises(ValueError, match=r"selection was made for"):
            self.attend(selection=other)

    def test_selection_with_other_blocks(self):
        own = select_cubes(*self.inputs[:2], config=CONFIG, grid=GRID)
        with pytest.raises(ValueError, match=r"selection must have blocks of 16x16 for tile \(2, 2, 4\), got 8x16"):
            self.attend(selection=dataclasses.replace(own, block_q=8))

    def test_unknown_impl(self):
        with pytest.raises(ValueError, match=r"unknown impl 'flash'; expected one of \('auto', 'reference', 'torch'"):
            self.attend(impl="flash")


SIDES = st.tuples(*(st.integers(1, 12) for _ in range(3)))
SEGMENTS = st.lists(st.integers(1, 600), max_size=2).map(tuple)


@given(shape=SIDES, before=SEGMENTS, after=SEGMENTS, tile=st.sampled_from([(4, 8, 8), (3, 8, 8), (5, 5, 7)]))
def test_cubes_in_two_slots_have_every_token_once(shape, before, after, tile):
    """And a compiler is told the shapes that they have."""
    from torch._subclasses import FakeTensorMode

    given = shape, before, after, tile
    found = SplitCubes.of(*given, torch.device("cpu"))
    tokens, sizes = found.places.view(-1, 128), found.sizes
    assert torch.equal((tokens >= 0).sum(1).int(), sizes)
    assert sizes.min() > 0
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(math.prod(shape) + sum((*before, *after))))
    whole = tile_order(*given, 256, torch.device("cpu"))
    held = torch.zeros_like(whole.cube_sizes).index_add_(0, found.owner, sizes)
    assert torch.equal(held, whole.cube_sizes)
    assert torch.equal(found.counts, torch.bincount(found.owner).int())
    torch.testing.assert_close(found.shares[:, 0], sizes / held[found.owner])
    with FakeTensorMode():
        told = torch.ops.foveal.vsa_split_cubes(*map(list, given), torch.device("cpu"))
    assert [(x.shape, x.dtype) for x in told] == [(x.shape, x.dtype) for x in found]
