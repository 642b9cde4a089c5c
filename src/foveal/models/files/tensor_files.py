"""Files of named tensors: safetensors, one file or a folder of shards, and PyTorch's own.

Names and shapes are known as soon as a file is open; values are read one by one. Files are written aside and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.models.files.simpletuner import flattened, is_sla_state
from foveal.output_folder import flush, scratch_folder

SAFETENSORS = (".safetensors",)
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
# Where a pickled file may have its named tensors.
WRAPPERS = ("state_dict", "generator", "model")


@dataclass(frozen=True)
class TensorFile:
    """An open checkpoint.

    Args:
        path: the path that was asked for.
        shapes: every tensor's shape by its name.
        not_floating: names of the tensors whose dtype is no floating-point one.
        metadata: the text entries of a safetensors header, or SimpleTuner's settings; empty for other files and shards.
        read: name to tensor, on the CPU.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    not_floating: frozenset[str]
    metadata: dict[str, str]
    read: Callable[[str], Tensor]


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Opens a `.safetensors` file, a `.pth`, `.pt`, `.bin` or `.ckpt` file, or a folder of safetensors.

    A folder holds one safetensors file, or shards and their index; of a whole pipeline's folder, the transformer's is
    read. Pickled files are loaded with `weights_only=True`: they may hold tensors and nothing that runs.

    Raises:
        FileNotFoundError: no such file, or shards that the index lists but the folder lacks.
        ValueError: a file that is corrupt, cut short, of another kind, or that holds more than named tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir() and path.suffix in PICKLES:
        tensors, metadata = _load_pickle(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        not_floating = frozenset(name for name, tensor in tensors.items() if not tensor.is_floating_point())
        yield TensorFile(path, shapes, not_floating, metadata, tensors.__getitem__)
        return
    if not path.is_dir() and path.suffix not in SAFETENSORS:
        raise ValueError(f"{path} must end in one of {SAFETENSORS + PICKLES}, or be a folder of safetensors")
    with contextlib.ExitStack() as stack:
        yield _open_safetensors(path, stack)


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    files, listed = _shards(path) if path.is_dir() else ([path], None)
    owners, shapes, not_floating, metadata = {}, {}, set(), {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt or cut short: {error}") from None
        if len(files) == 1:
            metadata = opened.metadata() or {}
        for name in opened.keys():  # noqa: SIM118, a file is no dict
            if name in owners:
                raise ValueError(f"{path} has {name} in more than one shard")
            view = opened.get_slice(name)
            owners[name], shapes[name] = opened, tuple(view.get_shape())
            if not view.get_dtype().startswith(("F", "BF")):
                not_floating.add(name)
    if listed is not None and set(listed) != set(owners):
        odd = sorted(set(listed) ^ set(owners))
        raise ValueError(f"{path}: the index and the shards disagree about {enumerated(odd)}")
    return TensorFile(path, shapes, frozenset(not_floating), metadata, lambda name: owners[name].get_tensor(name))


def _shards(folder: Path) -> tuple[list[Path], list[str] | None]:
    """The safetensors files of a folder, and the names that its index lists (None without an index)."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = enumerated([file.name for file in files]) or "none"
            raise ValueError(f"{folder} must hold one safetensors file, or shards with an index; found {found}")
        return files, None
    if len(indices) > 1:
        raise ValueError(f"{folder} has several indices: {enumerated([index.name for index in indices])}; name a file")
    try:
        weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{indices[0]} is no index of shards: {error!r}") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{indices[0]} lists shards outside its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {enumerated(missing)}, which {indices[0].name} lists")
    return [folder / name for name in names], list(weight_map)


def _load_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # A zip archive is mapped into memory, so that a checkpoint of 28 GB is not read twice; older files cannot be.
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            # Of a file that is no pickle at all, torch warns that its version of pickle is unusual.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is corrupt, or holds more than tensors, which is not loaded{_what_more(error)}"
        ) from None
    except Exception as error:  # Junk can raise anything: KeyError, struct.error, and so on.
        raise ValueError(f"{path} is corrupt or cut short ({type(error).__name__}: {_first_line(error)})") from None
    if is_sla_state(loaded):
        return flattened(loaded, str(path))
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{path} must hold a dict of named tensors, got {type(loaded).__name__}")
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} must hold only named tensors, but {enumerated(others)} are of other types")
    return dict(loaded), {}


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], entry: str, text: str) -> None:
    """Write a `.safetensors` file with an entry in its header, or a `.pth` or `.pt` file, which has no place for one.

    Raises:
        ValueError: the path has another ending.
        FileExistsError: the file exists and has no such entry.
    """
    path = Path(path)
    if path.suffix not in (*SAFETENSORS, ".pth", ".pt"):
        raise ValueError(f"path must end in .safetensors, .pth or .pt, got {path}")
    check_replaceable(path, entry)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with scratch_folder(path.parent) as scratch:
        aside = scratch / path.name
        if path.suffix in SAFETENSORS:
            save_tensors(tensors, aside, {"format": "pt", entry: text})
        else:
            torch.save({name: _alone(tensor) for name, tensor in tensors.items()}, aside)
        flush(aside)
        os.replace(aside, path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` of safetensors, which reports the system's errors as text, with errors that are the system's.

    Raises:
        OSError: the file could not be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error), str(path)) from error


def check_replaceable(path: Path, entry: str) -> None:
    """Raise a FileExistsError for an existing file without this header entry, which foveal did not write."""
    if os.path.lexists(path) and header_entry(path, entry) is None:
        raise FileExistsError(
            f"{path} was not written by foveal, or does not say so, and is left as it is; move it away, "
            "or choose another path"
        )


def header_entry(path: Path, entry: str) -> str | None:
    """An entry of a safetensors file's header; None if there is no such entry or no such file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return (file.metadata() or {}).get(entry)
    except SafetensorError:
        return None


def _alone(tensor: Tensor) -> Tensor:
    """A copy of a tensor that is part of a larger storage, all of which torch.save would write."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def enumerated(names: list[str]) -> str:
    """The first five names, and how many more."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _what_more(error: pickle.UnpicklingError) -> str:
    """The class or function that a pickle asks for, where torch names one; its advice is to run it."""
    named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    return f": it asks for {named.group(1)}" if named else ""


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
