"""The smoke test of the hub's kernel, in the folder that has its build: each function and its gradients.

FOLDER/tests$ python -m pytest test_foveal.py
"""

from pathlib import Path

import kernels
import pytest
import torch
from torch.nn import functional

foveal = kernels.get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, TOLERANCE = (torch.bfloat16, 2e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)
GRID = foveal.VideoGrid(4, 8, 16)


def tensors(number, head_dim):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, GRID.num_tokens, head_dim)
    drawn = (torch.randn(shape, generator=generator) for _ in range(number))
    return [x.to(DEVICE, DTYPE).requires_grad_() for x in drawn]


def assert_same(function, expected, inputs):
    """Values and gradients of a function of the inputs, against one in float32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    output, reference = function(*inputs), expected(*wide)
    weight = torch.linspace(-1, 1, reference.numel(), device=DEVICE).view_as(reference)
    got = [output, *torch.autograd.grad((output * weight).sum(), inputs)]
    exact = [reference, *torch.autograd.grad((reference * weight).sum(), wide)]
    for ours, theirs in zip(got, exact, strict=True):
        assert float(((ours.float() - theirs).norm() / theirs.norm()).detach()) < TOLERANCE


def dense(query, key, value, mask=None):
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def token_mask(selection):
    blocks = selection.labels() == 1
    return blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_sparse_attention(head_dim):
    inputs = tensors(3, head_dim)
    selection = foveal.select_blocks(*inputs[:2], block_q=64, block_k=64, keep_ratio=0.5)
    mask = token_mask(selection)
    assert_same(lambda *x: foveal.block_sparse_attention(*x, selection), lambda *x: dense(*x, mask), inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sla(head_dim):
    """The linear branch over all keys, which has a closed form, besides the block-sparse one."""
    inputs = tensors(3, head_dim)
    config = foveal.SLAConfig(keep_ratio=0.5, drop_ratio=0.0, linear_scope="all", projection=False)
    module = foveal.SparseLinearAttention(head_dim, config)
    mask = token_mask(module.select(*inputs[:2]))

    def expected(query, key, value):
        phi_query, phi_key = query.softmax(-1), key.softmax(-1)
        linear = phi_query @ (phi_key.mT @ value) / (phi_query @ phi_key.sum(2, keepdim=True).mT + 1e-5)
        return dense(query, key, value, mask) + linear

    assert_same(module, expected, inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("head_dim", [64, 128])
def test_vsa_with_everything_kept(head_dim):
    """Its fine stage is dense then, and its coarse stage is attention over the means of the cubes."""
    inputs = tensors(4, head_dim)
    config = foveal.VSAConfig(keep_ratio=1.0, tile=(4, 4, 4))

    def function(query, key, value, gate):
        return foveal.vsa_attention(query, key, value, config=config, grid=GRID, gate_coarse=gate)

    def expected(query, key, value, gate):
        cubes = [GRID.to_tile_order(x, (4, 4, 4)).unflatten(2, (-1, 64)).mean(3) for x in (query, key, value)]
        coarse = GRID.to_raster_order(dense(*cubes).repeat_interleave(64, 2), (4, 4, 4))
        return dense(query, key, value) + gate * coarse

    assert_same(function, expected, inputs)
