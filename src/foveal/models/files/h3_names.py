"""MiniMax-H3's weights under the names of its own repository, as ComfyUI has them: read, and written.

There an attention has one `qkv_proj`, queries, keys and values stacked, and the halves of a gated feed-forward layer
are the other way around. diffusers has the conversion. Here it is given six numbers in the place of each tensor's rows,
and what it returns says which sixths of which tensor make up a tensor of diffusers' model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.models.files.tensor_files import TensorFile, enumerated

NATIVE = re.compile(r"(?:token_refiner\.)?blocks\.\d+\.attn\.(?:qkv_proj|to_gate_compress)\.weight")
PRUNED = "adaln_t_table"
QUANTIZED = (".comfy_quant", ".weight_scale", ".scale_weight")
# ComfyUI reads the frequencies of the rotary embedding from the file; diffusers' model computes them.
FREQUENCIES = "rope.inv_freq"
# Stacks of two and of three are both whole parts.
PARTS = 6


class Cut(NamedTuple):
    """Of which tensor another one is made: runs of its sixth parts, first to last, in order."""

    name: str
    runs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """How many sixths there are."""
        return sum(last - first for first, last in self.runs)


def renamed(file: TensorFile, names: dict[str, str]) -> TensorFile:
    """The same file under the names of diffusers.

    Args:
        names: the file's names without a prefix, with their names in the file.

    Raises:
        ValueError: weights that diffusers' model has no place for: pruned or quantized for ComfyUI.
    """
    if PRUNED in names:
        raise ValueError(
            f"{file.path} is a pruned file for ComfyUI: {PRUNED} stands in the place of the time embedder, which "
            "diffusers' model has no place for; load the file that is not pruned"
        )
    quantized = [name for name in names if name.endswith(QUANTIZED)]
    if quantized:
        raise ValueError(
            f"{file.path} is quantized for ComfyUI ({enumerated(quantized)}); load the file that is in bfloat16"
        )
    cuts = _cuts(name for name in names if name != FREQUENCIES)
    rows = {cut.name: (*file.shapes[names[cut.name]], 1)[0] for cut in cuts.values()}
    uneven = [cut.name for cut in cuts.values() if any(end * rows[cut.name] % PARTS for run in cut.runs for end in run)]
    if uneven:
        raise ValueError(f"{file.path}: the rows of {enumerated(list(dict.fromkeys(uneven)))} are no whole stack")
    shapes = {name: _shape(file.shapes[names[cut.name]], cut) for name, cut in cuts.items()}
    integers = frozenset(name for name, cut in cuts.items() if names[cut.name] in file.not_floating)
    # The parts of a stack are asked for one after the other.
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        cut = cuts[name]
        if cut.name not in last:
            last.clear()
            last[cut.name] = file.read(names[cut.name])
        tensor = last[cut.name]
        if cut.runs == ((0, PARTS),):
            return tensor
        ends = [[end * rows[cut.name] // PARTS for end in run] for run in cut.runs]
        pieces = [tensor[first:last] for first, last in ends]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return dataclasses.replace(file, shapes=shapes, not_floating=integers, read=read)


def is_native(names: Iterable[str]) -> bool:
    """Whether names, without a prefix, are those of MiniMax-H3's own repository."""
    return any(NATIVE.fullmatch(name) for name in names)


def native(tensors: dict[str, Tensor], frequencies: Tensor) -> dict[str, Tensor]:
    """Tensors of diffusers' names under the names of MiniMax-H3's own repository.

    Args:
        tensors: the tensors of a whole transformer, and its gates.
        frequencies: the frequencies of its rotary embedding.

    Raises:
        ValueError: the repository has no names for some of them.
    """
    counts = [
        1 + max(int(found[1]) for name in tensors if (found := re.match(rf"{stack}\.(\d+)\.", name)))
        for stack in (r"transformer_blocks", r"token_refiner\.refiner_blocks")
    ]
    cuts = _cuts(native_names(*counts))
    unknown = [name for name in tensors if name not in cuts]
    if unknown:
        raise ValueError(f"MiniMax-H3's repository has no names for {enumerated(unknown)}")
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        cut = cuts[name]
        if cut.runs == ((0, PARTS),):
            made[cut.name] = tensor
            continue
        made[cut.name] = _put(tensor, cut, tensor.new_empty, made.get(cut.name))
    return made | {FREQUENCIES: frequencies}


def native_lora(updates: dict[str, tuple[Tensor, Tensor]], num_layers: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank updates of diffusers' layers under the names of the layers of MiniMax-H3's own repository.

    Those of queries, keys, and values become one of their stack, whose rank is the sum of theirs.

    Args:
        updates: by layer, A and B of B A, [rank, inputs] and [outputs, rank].
        num_layers: of the transformer.

    Raises:
        ValueError: the repository has no names for some of them.
    """
    refiners = [int(found[1]) for name in updates if (found := re.match(r"token_refiner\.refiner_blocks\.(\d+)", name))]
    cuts = _cuts(native_names(num_layers, 1 + max(refiners, default=0)))
    unknown = [name for name in updates if f"{name}.weight" not in cuts]
    if unknown:
        raise ValueError(f"MiniMax-H3's repository has no names for {enumerated(unknown)}")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, (down, up) in updates.items():
        cut = cuts[f"{name}.weight"]
        whole = up if cut.runs == ((0, PARTS),) else _put(up, cut, up.new_zeros)
        parts.setdefault(cut.name.removesuffix(".weight"), []).append((down, whole))
    return {name: (torch.cat([x for x, _ in of]), torch.cat([x for _, x in of], 1)) for name, of in parts.items()}


def native_names(num_layers: int, num_refiner_layers: int) -> list[str]:
    """Every name that a sparse MiniMax-H3 transformer has in its own repository, without `rope.inv_freq`."""
    biased = ["video_patch_proj", "audio_patch_proj", "condition_proj", "time_embedder.proj_in"]
    biased += ["time_embedder.proj_out", "final_layer.adaln_proj.linear", "final_layer.video_out"]
    biased += ["final_layer.audio_out", *(f"blocks.{index}.adaln_proj.linear" for index in range(num_layers))]
    parts = [
        "norm1",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"attn.{x}" for x in ("qkv_proj", "q_norm", "k_norm", "out_proj")),
    ]
    stacks = [f"blocks.{index}" for index in range(num_layers)]
    plain = ["final_layer.norm", "token_refiner.final_norm", *(f"{block}.attn.to_gate_compress" for block in stacks)]
    stacks += [f"token_refiner.blocks.{index}" for index in range(num_refiner_layers)]
    plain += [f"{block}.{part}" for block in stacks for part in parts]
    return [f"{owner}.weight" for owner in biased + plain] + [f"{owner}.bias" for owner in biased]


def _put(tensor: Tensor, cut: Cut, new: Callable[..., Tensor], whole: Tensor | None = None) -> Tensor:
    """The whole that a cut is of, `new` if it is not given, with a tensor of diffusers' name in its rows."""
    part = tensor.shape[0] // cut.size
    whole = new(PARTS * part, *tensor.shape[1:]) if whole is None else whole
    pieces = tensor.split([(end - first) * part for first, end in cut.runs])
    for (first, end), piece in zip(cut.runs, pieces, strict=True):
        whole[first * part : end * part] = piece
    return whole


def _cuts(names: Iterable[str]) -> dict[str, Cut]:
    """What the tensors of diffusers' names are made of, given the names in MiniMax-H3's repository."""
    from diffusers.loaders.single_file_utils import convert_minimax_h3_transformer_checkpoint_to_diffusers as convert

    owners = list(names)
    numbers = {name: torch.arange(PARTS) + PARTS * index for index, name in enumerate(owners)}
    cuts = {}
    for name, found in convert(numbers, config=None).items():
        places, inside = (found // PARTS).tolist(), (found % PARTS).tolist()
        runs: list[tuple[int, int]] = []
        for part in inside:
            if runs and runs[-1][1] == part:
                runs[-1] = (runs[-1][0], part + 1)
            else:
                runs.append((part, part + 1))
        cuts[name] = Cut(owners[places[0]], tuple(runs))
    return cuts


def _shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    return shape if cut.size == PARTS else (shape[0] * cut.size // PARTS, *shape[1:])
