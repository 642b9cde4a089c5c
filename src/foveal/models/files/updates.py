"""FastVideo's adapters, `fastvideo-lora-v2`: low-rank and whole updates of base weights, and the gates of VSA.

Of a module there may be `.lora_A.weight` and `.lora_B.weight`, whose product is added without a factor; `.diff` and
`.diff_b`, added to its weight and bias; and `.set_weight`, put in the weight's place, which only the gates have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.models.files.tensor_files import TensorFile, enumerated

FORMAT = "fastvideo-lora-v2"
KINDS = (".lora_A.weight", ".lora_B.weight", ".diff", ".diff_b", ".set_weight")


class Updates(NamedTuple):
    """What a file does to a model, by the names of what it is in the file.

    low_rank: parameter to the names of A and B.
    added: parameter to the name of what is added to it.
    gates: module to the name of its weight.
    """

    low_rank: dict[str, tuple[str, str]]
    added: dict[str, str]
    gates: dict[str, str]

    @torch.no_grad()
    def apply(self, parameters: dict[str, Tensor], file: TensorFile) -> int:
        """Adds the updates to parameters, in float32, each rounded once; returns how many tensors of the file."""
        for name in dict.fromkeys((*self.low_rank, *self.added)):
            target = parameters[name]
            total = target.float()
            if name in self.low_rank:
                a, b = (file.read(x).to(total) for x in self.low_rank[name])
                total = total + b @ a
            if name in self.added:
                total = total + file.read(self.added[name]).to(total)
            target.copy_(total)
        return 2 * len(self.low_rank) + len(self.added)


def read_updates(file: TensorFile, names: dict[str, str], parameters: dict[str, Tensor]) -> Updates:
    """What a file holds, checked against a model's parameters.

    Raises:
        ValueError: names of no known kind, half a pair, or what the model does not have or has in another shape.
    """
    parts: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    unknown = []
    for name, given in names.items():
        kind = next((kind for kind in KINDS if name.endswith(kind)), None)
        if kind is None:
            unknown.append(given)
        else:
            parts[kind][name.removesuffix(kind)] = given
    if unknown:
        raise ValueError(f"{file.path} has {enumerated(unknown)}; expected names that end in {', '.join(KINDS)}")
    a, b, weights, biases, gates = parts.values()
    halves = sorted(set(a) ^ set(b))
    if halves:
        raise ValueError(f"{file.path} has only one of lora_A and lora_B for {enumerated(halves)}")
    low_rank = {f"{module}.weight": (a[module], b[module]) for module in a}
    added = {f"{module}.weight": name for module, name in weights.items()}
    added |= {f"{module}.bias": name for module, name in biases.items()}
    shapes = {name: (file.shapes[up][0], file.shapes[down][1]) for name, (down, up) in low_rank.items()}
    ranks = [name for name, (down, up) in low_rank.items() if file.shapes[up][1:] != file.shapes[down][:1]]
    if ranks:
        raise ValueError(f"{file.path} has lora_A and lora_B of different ranks for {enumerated(ranks)}")
    for found in (shapes, {name: file.shapes[given] for name, given in added.items()}):
        missing = sorted(name for name in found if name not in parameters)
        if missing:
            raise ValueError(f"{file.path} updates {enumerated(missing)}, which the model does not have")
        for name, shape in found.items():
            expected = tuple(parameters[name].shape)
            if shape != expected:
                raise ValueError(f"{file.path} updates {name} by {shape}, the model's is {expected}: another size?")
    return Updates(low_rank, added, gates)


def is_update(file: TensorFile) -> bool:
    """Whether a file says that it is of this kind."""
    return file.metadata.get("format") == FORMAT
