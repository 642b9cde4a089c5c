"""TurboDiffusion's `-quant` files: int8 linear layers with a factor for each block of 128 x 128 weights."""

import pytest
import torch
from checkpoint_files import LAYERS, SMALL_SLA, outputs, projections, refused, trained, turbo, wan_state, write
from tiny_wan import tiny_transformer

from foveal.models.files.checkpoints import check_checkpoint, load_checkpoint
from foveal.models.files.quantized import dequantized
from foveal.models.files.tensor_files import open_tensors

LINEAR = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]


def quantized(weight):
    """(int8, factors, the weight that they stand for) of a matrix, block by block."""
    size = [-(-x // 128) for x in weight.shape]
    integers, factors = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(size)
    stands = torch.zeros_like(weight)
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            factor = weight[rows, columns].abs().max() / 128
            block = (weight[rows, columns] / factor).round().clamp(-128, 127)
            integers[rows, columns], factors[i, j] = block.to(torch.int8), factor
            stands[rows, columns] = block * factor
    return integers, factors, stands


def quantize(state):
    """Replace the linear layers of the blocks; returns the weights that stand in the file afterwards."""
    stands = {}
    for index in range(LAYERS):
        for name in LINEAR:
            layer = f"blocks.{index}.{name}"
            weight = state.pop(f"{layer}.weight")
            state[f"{layer}.int8_weight"], state[f"{layer}.scale"], stands[f"{layer}.weight"] = quantized(weight)
    return stands


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_quantized_layers_load_as_the_weights_that_they_stand_for(tmp_path, suffix):
    whole = wan_state(trained()) | projections()
    state = dict(whole)
    stands = quantize(state)
    path = write(tmp_path / f"TurboWan-quant{suffix}", state)
    check_checkpoint(path)
    model, plain = (tiny_transformer(num_layers=LAYERS) for _ in range(2))
    report = load_checkpoint(model, path, **SMALL_SLA)
    load_checkpoint(plain, write(tmp_path / "plain.pth", whole | stands), **SMALL_SLA)
    assert torch.equal(outputs(model), outputs(plain))
    assert f"the int8 weights of {LAYERS * len(LINEAR)} linear layers were dequantized" in str(report)
    assert report.base_tensors == len(whole) - 2 * LAYERS
    exact = tiny_transformer(num_layers=LAYERS)
    load_checkpoint(exact, write(tmp_path / "exact.pth", whole), **SMALL_SLA)
    assert 0 < (outputs(model) - outputs(exact)).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(128, 128), (300, 130), (5, 257)])
def test_blocks_of_any_matrix(tmp_path, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    integers, factors, stands = quantized(weight)
    path = write(tmp_path / "one.safetensors", {"a.int8_weight": integers, "a.scale": factors, "a.bias": weight[0]})
    with open_tensors(path) as stored:
        file, layers = dequantized(stored)
        assert layers == 1
        assert file.shapes == {"a.bias": (shape[1],), "a.weight": shape}
        assert file.read("a.weight").dtype == torch.float32
        assert torch.equal(file.read("a.weight"), stands)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("blocks.1.ffn.0.scale"), r"lacks blocks\.1\.ffn\.0\.scale of its int8 weights"),
        (lambda s: s.update({"blocks.1.ffn.0.scale": torch.ones(32, 1)}), r"has shape \(32, 1\), expected \(1, 1\)"),
        (lambda s: s.update({"blocks.1.ffn.0.int8_weight": torch.ones(32, 32)}), "must be a matrix of int8"),
        (lambda s: s.update({"blocks.1.ffn.0.weight": torch.ones(32, 32)}), r"has blocks\.1\.ffn\.0\.weight and int8"),
        (
            lambda s: s.update({"blocks.1.ffn.0.int8_weight": torch.ones(30, 32, dtype=torch.int8)}),
            r"blocks\.1\.ffn\.0\.weight has shape \(30, 32\), the model's is \(32, 32\)",
        ),
    ],
)
def test_quantized_layers_that_do_not_fit_are_refused(tmp_path, change, match):
    def damaged(state):
        quantize(state)
        change(state)

    refused(tiny_transformer(num_layers=LAYERS), turbo(tmp_path, damaged), ValueError, match, **SMALL_SLA)
