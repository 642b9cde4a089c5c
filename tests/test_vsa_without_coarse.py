"""VSA without its coarse branch: the cubes that are read, by a router or by means, and no gate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_wan import tiny_transformer

import foveal
from foveal import TokenLayout, VideoGrid, VideoSparseAttention, VSAConfig, vsa_attention
from foveal.methods.vsa.attention import select_cubes
from foveal.models.processor import sparse_processors

GRID = VideoGrid(5, 7, 9)
CONFIG = VSAConfig(keep_ratio=0.3, tile=(2, 3, 4), coarse=False)
LAYOUTS = {"video": GRID, "packed": TokenLayout(GRID, before=(3,), after=(30,))}
GPU = pytest.param("auto", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def inputs(length, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(4)]


def dense_over(query, key, value, selection, places):
    """Attention in tile order over the keys of listed blocks, by one mask, in the order of the tokens."""
    blocks = selection.labels() > 0
    mask = blocks.repeat_interleave(selection.block_q, 2).repeat_interleave(selection.block_k, 3)[:, :, places][
        ..., places
    ]
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("router", ["none", "per_head"])
def test_it_is_attention_over_the_cubes_that_are_read(router):
    query, key, value, grad = inputs(GRID.num_tokens, torch.float64)
    config = CONFIG.replace(router=router)
    module = VideoSparseAttention(24, 3, 64, config, impl="torch").double()
    assert module.to_gate_coarse is None
    if router != "none":
        with torch.no_grad():
            for x in module.router.parameters():
                x.add_(0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    hidden = torch.zeros(2, GRID.num_tokens, 24, dtype=torch.float64)
    output = module(query, key, value, hidden, grid=GRID)
    selection = module.select(query, key, grid=GRID)
    places = module.token_places(GRID)
    expected = dense_over(query, key, value, selection, places)
    torch.testing.assert_close(output, expected)
    ours, theirs = (torch.autograd.grad(x, (query, key, value), grad.detach()) for x in (output, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["reference", "torch", GPU])
def test_a_zero_gate_gives_the_same(layout, impl):
    gpu = impl == "auto"
    where = LAYOUTS[layout]
    length = where.num_tokens
    query, key, value, grad = inputs(length, torch.bfloat16 if gpu else torch.float64, "cuda" if gpu else "cpu")
    named = {"layout" if layout == "packed" else "grid": where, "impl": impl}
    gate = torch.zeros_like(query)
    for _ in range(3):  # replayed calls too
        ours = vsa_attention(query, key, value, config=CONFIG, **named)
        theirs = vsa_attention(query, key, value, config=CONFIG.replace(coarse=True), gate_coarse=gate, **named)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        ours, theirs = (torch.autograd.grad(x, (query, key, value), grad.detach()) for x in (ours, theirs))
        close = {"rtol": 1e-2, "atol": 1e-2} if gpu else {}  # dQ of protected queries is cuDNN's
        torch.testing.assert_close(ours, theirs, **close)


def test_a_gate_is_an_error():
    query, key, value, _ = inputs(GRID.num_tokens, torch.float32)
    with pytest.raises(ValueError, match="gate_coarse was given, but config has coarse=False"):
        vsa_attention(query, key, value, config=CONFIG, grid=GRID, gate_coarse=torch.ones_like(query))
    with pytest.raises(TypeError, match="coarse must be a bool, got 1"):
        VSAConfig(coarse=1)


def test_a_model_has_no_gates_and_is_saved_without_them(tmp_path):
    model = tiny_transformer()
    config = VSAConfig(keep_ratio=0.5, tile=(2, 2, 2), coarse=False, router="per_head")
    foveal.sparsify(model, config)
    names = set(foveal.sparse_parameters(model))
    assert names
    assert all(".router." in name for name in names)
    foveal.save(model, tmp_path)
    again = foveal.load(tiny_transformer(), tmp_path)
    assert next(iter(sparse_processors(again).values())).config == config
    assert set(foveal.sparse_parameters(again)) == names
    # A file of before has no such field, and has the gates.
    fields = {name: x for name, x in config.to_dict().items() if name != "coarse"}
    assert VSAConfig.from_saved(fields) == dataclasses.replace(config, coarse=True)


def test_formats_with_gates_refuse_it(tmp_path):
    """Nothing is dropped silently: neither on the way out, nor what a file has."""
    model, path = tiny_transformer(), tmp_path / "gated.safetensors"
    foveal.sparsify(model, VSAConfig(keep_ratio=0.5, coarse=False))
    with pytest.raises(ValueError, match="stands for coarse=True, got False"):
        foveal.export_checkpoint(model, tmp_path / "no.safetensors", format="fastvideo-vsa")
    gated = foveal.sparsify(tiny_transformer(), VSAConfig(keep_ratio=0.5))
    foveal.export_checkpoint(gated, path, format="fastvideo-vsa")
    with pytest.raises(ValueError, match="stands for coarse=True, got False"):
        foveal.load_checkpoint(tiny_transformer(), path, coarse=False)


def test_its_cost_has_no_gates():
    shape = {"grid": GRID, "heads": 3, "head_dim": 64}
    plain, gated = (foveal.attention_cost(x, **shape) for x in (CONFIG, CONFIG.replace(coarse=True)))
    assert {part.name for part in gated.parts} - {part.name for part in plain.parts} == {"gates"}
    assert plain.flops < gated.flops


def test_the_selection_is_that_of_vsa():
    query, key, *_ = inputs(GRID.num_tokens, torch.float32)
    ours, theirs = (select_cubes(query, key, config=x, grid=GRID) for x in (CONFIG, CONFIG.replace(coarse=True)))
    assert torch.equal(ours.critical, theirs.critical)
