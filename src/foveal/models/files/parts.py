"""The parts of a released Wan checkpoint, sparse parameters and the rest, for a host that builds the model itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveal.methods.base import Config, method_of
from foveal.models.files.checkpoints import choose_format, configuration, file_header, translated
from foveal.models.files.formats import CheckpointFormat, to_diffusers, wan_names, without_prefix
from foveal.models.files.tensor_files import TensorFile, enumerated, open_tensors

PATCH_EMBEDDING = "patch_embedding.weight"
PATCH = (1, 2, 2)


@dataclass(frozen=True)
class SparseParameters:
    """The sparse parameters of a checkpoint, on the CPU, in the file's dtypes.

    Args:
        path: the path of the file.
        format: the name of its format, one of `FORMATS`.
        source: who writes that format.
        config: what the layers run with.
        from_file: whether the file said so; otherwise it is what the released weights were made with.
        layers: for each layer, in order of depth, the parameters of the method's module by name.
    """

    path: str
    format: str
    source: str
    config: Config
    from_file: bool
    layers: tuple[dict[str, Tensor], ...]

    def __str__(self) -> str:
        origin = "said by the file" if self.from_file else f"as {self.source}'s weights were made"
        return f"{method_of(self.config).name} parameters of {len(self.layers)} layers; {self.config}, {origin}"


def read_sparse_parameters(
    path: str | os.PathLike[str], *, format: str | None = None, **changes: Any
) -> SparseParameters:
    """The sparse parameters of a file or folder that `load_checkpoint` reads, for models of Wan.

    Args:
        path, format, changes: as `load_checkpoint` takes them.

    Raises:
        FileNotFoundError: no such file, or missing shards.
        ValueError: a file that is corrupt, of no known format, or for another family; a LoRA, which has no sparse
            parameters; layers that lack some; a change of a field that is unknown or fixed.
    """
    with _opened(path, format) as (file, names, header, found):
        indices = _layer_indices(names, found)
        lacking = [
            key.format(index=index)
            for index in range(max(indices) + 1)
            for key in found.sparse_keys.values()
            if key.format(index=index) not in names
        ]
        if lacking:
            raise ValueError(f"{path} lacks {enumerated(lacking)}")
        layers = tuple(
            {name: file.read(names[key.format(index=index)]) for name, key in found.sparse_keys.items()}
            for index in sorted(indices)
        )
    width = next(iter(layers[0].values())).shape[-1]
    config = configuration(found, header, None, width, changes)
    return SparseParameters(str(path), found.name, found.source, config, header is not None, layers)


def read_base_weights(path: str | os.PathLike[str], *, format: str | None = None) -> dict[str, Tensor]:
    """The other weights of such a file by their names in the Wan repository, on the CPU, in the file's dtypes.

    int8 weights are dequantized, and a patch embedding stored as a matrix becomes a convolution's.

    Raises:
        FileNotFoundError, ValueError: as `read_sparse_parameters`; also for a file without them, and for names that the
            Wan repository does not have.
        ImportError: the file has diffusers' names, and diffusers, which knows what they mean, is not installed.
    """
    with _opened(path, format) as (file, names, _, found):
        sparse = {key.format(index=i) for key in found.sparse_keys.values() for i in _layer_indices(names, found)}
        base = [name for name in names if name not in sparse]
        if not base:
            raise ValueError(f"{path} has only sparse parameters; load the model from its own file")
        renamed = {name: name for name in base}
        if found.layout == "diffusers":
            known = to_diffusers(wan_names(max(_layer_indices(names, found)) + 1), "wan")
            unknown = [name for name in base if name not in known]
            if unknown:
                raise ValueError(f"the Wan repository has no names for {enumerated(unknown)} of {path}")
            renamed = {name: known[name] for name in base}
        weights = {renamed[name]: file.read(names[name]) for name in base}
    patches = weights.get(PATCH_EMBEDDING)
    if patches is not None and patches.dim() == 2:
        weights[PATCH_EMBEDDING] = patches.unflatten(1, (-1, *PATCH))
    return weights


@contextmanager
def _opened(
    path: str | os.PathLike[str], format: str | None
) -> Iterator[tuple[TensorFile, dict[str, str], dict[str, Any] | None, CheckpointFormat]]:
    with open_tensors(path) as stored:
        file, _ = translated(stored)
        names, header = without_prefix(file.shapes), file_header(file)
        found = choose_format(file, names, header, format)
        if "wan" not in found.families:
            raise ValueError(f"{path} is for models of family {' or '.join(found.families)}, expected wan")
        if not found.sparse_keys or found.shared:
            raise ValueError(f"{path} is of format {found.name!r}, which has no sparse parameters of each layer")
        yield file, names, header, found


def _layer_indices(names: dict[str, str], found: CheckpointFormat) -> set[int]:
    patterns = [re.compile(re.escape(key).replace(r"\{index\}", r"(\d+)")) for key in found.sparse_keys.values()]
    matches = (pattern.fullmatch(name) for name in names for pattern in patterns)
    return {int(match[1]) for match in matches if match}
