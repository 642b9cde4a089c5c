"""TurboDiffusion's `-quant` files: linear layers in int8, read as the floating-point weights that they stand for.

In the place of `.weight` [N, K] a layer has `.int8_weight` [N, K] and `.scale` [ceil(N / 128), ceil(K / 128)]: one
factor for each block of 128 x 128 weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foveal.models.files.tensor_files import TensorFile, enumerated

BLOCK = 128
INTEGERS, FACTORS, WEIGHT = ".int8_weight", ".scale", ".weight"


def dequantized(file: TensorFile) -> tuple[TensorFile, int]:
    """The same file with the weights of its int8 layers in float32, each made when it is read; how many there are.

    Raises:
        ValueError: a layer that has no factors, or factors for another number of blocks, or a weight besides; int8
            weights that are not a matrix of integers.
    """
    layers = [name.removesuffix(INTEGERS) for name in file.shapes if name.endswith(INTEGERS)]
    if not layers:
        return file, 0
    bare = [layer for layer in layers if layer + FACTORS not in file.shapes]
    if bare:
        raise ValueError(f"{file.path} lacks {enumerated([layer + FACTORS for layer in bare])} of its int8 weights")
    twice = [layer + WEIGHT for layer in layers if layer + WEIGHT in file.shapes]
    if twice:
        raise ValueError(f"{file.path} has {enumerated(twice)} and int8 weights of the same layers")
    for layer in layers:
        _check_layer(file, layer)
    parts = {layer + ending for layer in layers for ending in (INTEGERS, FACTORS)}
    shapes = {name: shape for name, shape in file.shapes.items() if name not in parts}
    shapes |= {layer + WEIGHT: file.shapes[layer + INTEGERS] for layer in layers}
    made = {layer + WEIGHT: layer for layer in layers}

    def read(name: str) -> Tensor:
        return file.read(name) if name not in made else _weight(file, made[name])

    return dataclasses.replace(file, shapes=shapes, not_floating=file.not_floating - parts, read=read), len(layers)


def _check_layer(file: TensorFile, layer: str) -> None:
    shape, factors = file.shapes[layer + INTEGERS], file.shapes[layer + FACTORS]
    if len(shape) != 2 or layer + INTEGERS not in file.not_floating:
        raise ValueError(f"{file.path}: {layer}{INTEGERS} must be a matrix of int8, got shape {shape}")
    expected = tuple(-(-size // BLOCK) for size in shape)
    if factors != expected:
        raise ValueError(
            f"{file.path}: {layer}{FACTORS} has shape {factors}, expected {expected}: one factor for each block of "
            f"{BLOCK}x{BLOCK} weights"
        )


def _weight(file: TensorFile, layer: str) -> Tensor:
    """[N, K] in float32."""
    weight = file.read(layer + INTEGERS).to(torch.float32)
    factors = file.read(layer + FACTORS).to(torch.float32)
    for dim, size in enumerate(weight.shape):
        factors = factors.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return weight.mul_(factors)
