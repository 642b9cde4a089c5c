"""Checkpoints: a folder a step, written aside and renamed, so that a folder of that name is always whole.

    step-00000250/
      checkpoint.json             step, files with their lengths and checksums, and all state that is no tensor
      model-00001.safetensors     trained parameters by name, at most SHARD_BYTES a file
      optimizer-00001.safetensors "exp_avg/" + name of the parameter, and so on
      ema-00001.safetensors, rng-00001.safetensors

If FSDP2 has sharded the tensors, each process writes its own rows and nothing is gathered. The files of the first
process are named as above, and those of the next one model.rank-001-00001.safetensors. A tensor consists of the rows in
all files that have it, in the order of the processes, so any number of processes can resume. All processes must see the
folder when they save, as they must when they resume.

Nothing is pickled. This module does not use torch.distributed.checkpoint: its default storage pickles the metadata, and
its safetensors storage, which torch 2.6 does not have, keeps no checksums and does not commit a checkpoint by a rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.models.files.tensor_files import save_tensors
from foveal.output_folder import flush, scratch_folder

# Format 1 has whole tensors. Format 2 has the rows of tensors in the files of several processes.
FORMATS = (1, 2)
MANIFEST = "checkpoint.json"
SHARD_BYTES = 4 * 2**30
NAME = re.compile(r"step-(\d{8})")
FILE = re.compile(r"(?P<group>\w+)(?P<rank>\.rank-\d+)?-\d+\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; what was there before is as it was."""


@dataclass(frozen=True)
class Peers:
    """The processes of a run, from the view of one of them.

    Args:
        rank: the rank of this process; 0 is the main one.
        gather: a collective that takes a picklable value and returns the values of all processes, by rank.
    """

    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on the disk.

    Args:
        folder: where it is.
        manifest: what `checkpoint.json` says.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest["step"]

    @property
    def held_out_loss(self) -> float | None:
        """Of the state that was saved; None if it was not evaluated."""
        return self.manifest["held_out_loss"]

    @property
    def state(self) -> dict[str, Any]:
        """What `CheckpointStore.save` was given as `state`."""
        return self.manifest["state"]

    def tensors(self, group: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one group ("model", "optimizer", ...), whole, one at a time, on the CPU."""
        from safetensors import safe_open

        with contextlib.ExitStack() as stack:
            # The manifest lists files in the order of the processes, which is the order of the rows.
            holders: dict[str, list[Any]] = {}
            for name in self.manifest["files"]:
                if FILE.fullmatch(name)["group"] == group:
                    file = stack.enter_context(safe_open(self.folder / name, framework="pt", device="cpu"))
                    for key in file.keys():  # noqa: SIM118, a file is no dict
                        holders.setdefault(key, []).append(file)
            for key, files in holders.items():
                rows = [file.get_tensor(key) for file in files]
                yield key, rows[0] if len(rows) == 1 else torch.cat(rows)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: that holds them; created by the first `save`.
        keep: how many of the latest are kept, beside the one of the lowest held-out loss.
        report: called with a line on what went wrong with a checkpoint.
    """

    def __init__(self, folder: Path, *, keep: int = 3, report: Callable[[str], None] = print) -> None:
        self.folder, self.keep, self.report = Path(folder), keep, report
        # Old checkpoints that stay because they hold files of a user.
        self._left: set[Path] = set()

    def save(
        self,
        step: int,
        groups: dict[str, Iterable[tuple[str, Tensor]]],
        state: dict[str, Any],
        *,
        held_out_loss: float | None = None,
        peers: Peers = Peers(),
    ) -> None:
        """Writes a checkpoint, then removes those that are no longer kept. Every process calls it.

        Args:
            step: optimizer steps taken.
            groups: names and tensors, by group. Each process writes its rows of a DTensor; the main process writes all
                other tensors.
            state: anything that JSON can hold; the main process's counts.
            held_out_loss: the held-out loss of this state, if it was evaluated.
            peers: the processes that save together.

        Raises:
            CheckpointError: in every process, if one of them could not write its part, the disk full say; the earlier
                checkpoints are as they were.
        """
        final, main = self.folder / f"step-{step:08d}", peers.rank == 0
        try:
            with contextlib.ExitStack() as stack:
                asides = _together(peers, lambda: stack.enter_context(self._aside(final.name)) if main else None)
                written = _together(peers, lambda: _write_groups(asides[0], groups, peers.rank))
                files = {name: entry for of_process in written for name, entry in of_process.items()}
                sharded = any(FILE.fullmatch(name)["rank"] for name in files)
                manifest = {
                    "format": FORMATS[sharded],
                    "step": step,
                    "held_out_loss": held_out_loss,
                    "files": files,
                    "state": state,
                }
                _together(peers, lambda: self._commit(asides[0], final, manifest) if main else None)
        except OSError as error:
            raise CheckpointError(self._complaint(step, error)) from error
        if main:
            self._prune()

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """A folder for a checkpoint in the making. It is removed unless the block gives it another name."""
        with scratch_folder(self.folder) as scratch:
            aside = scratch / name
            aside.mkdir()
            yield aside

    def _commit(self, aside: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Gives a checkpoint whose tensors are written its manifest and its name."""
        _write_text(aside / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        flush(aside)
        if final.exists():
            self._remove(final)
        os.rename(aside, final)
        flush(self.folder)

    def latest(self) -> Checkpoint | None:
        """The latest checkpoint that is whole; None if there is none. Says which ones it passed over, and why."""
        for folder in reversed(self._folders()):
            try:
                return read_checkpoint(folder)
            except CheckpointError as error:
                self.report(f"checkpoint {folder.name} is damaged, falling back to the one before: {error}")
        return None

    def exists(self) -> bool:
        """Whether there is any checkpoint, damaged or not."""
        return bool(self._folders())

    def _folders(self) -> list[Path]:
        """Checkpoints by step, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())

    def _prune(self) -> None:
        folders = self._folders()
        losses = {}
        for folder in folders:
            with contextlib.suppress(OSError, ValueError, KeyError):
                loss = json.loads((folder / MANIFEST).read_bytes())["held_out_loss"]
                if loss is not None:
                    losses[folder] = loss
        best = min(losses, key=losses.get) if losses else None
        for folder in folders[: -self.keep]:
            if folder != best:
                try:
                    self._remove(folder)
                except FileExistsError as error:
                    if folder not in self._left:
                        self.report(f"an old checkpoint is kept: {error}")
                    self._left.add(folder)
                except OSError:
                    pass

    def _remove(self, folder: Path) -> None:
        """Remove a checkpoint.

        Raises:
            FileExistsError: the folder holds a file that its manifest does not list. Nothing is removed.
        """
        ours = {folder / MANIFEST, *(folder / name for name in _files_of(folder))}
        for path in folder.rglob("*"):
            if path not in ours:
                raise FileExistsError(f"{path} is not a file of that checkpoint; move it away")
        # Renamed first: removing takes a while, and half a checkpoint must not bear a checkpoint's name.
        with scratch_folder(self.folder) as scratch:
            os.rename(folder, scratch / folder.name)

    def _complaint(self, step: int, error: OSError) -> str:
        folders = self._folders()
        kept = "there is no earlier one"
        if folders:
            kept = f"the checkpoint of step {int(NAME.fullmatch(folders[-1].name)[1])} is intact"
        if error.errno == errno.ENOSPC:
            return f"the disk of {self.folder} is full: the checkpoint of step {step} was not written; {kept}"
        return f"the checkpoint of step {step} was not written to {self.folder} ({error}); {kept}"


def _files_of(folder: Path) -> list[str]:
    """The files that a checkpoint's manifest lists; none if it cannot be read."""
    try:
        return list(json.loads((folder / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose every file has been checked.

    Raises:
        CheckpointError: naming the file that is missing, shorter or other than what was written.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in FORMATS:
        raise CheckpointError(f"{path} is not of checkpoint format {' or '.join(map(str, FORMATS))}")
    for name, expected in manifest["files"].items():
        file = Path(folder) / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, {expected['bytes']} were written")
        if _checksum(file) != expected["crc32"]:
            raise CheckpointError(f"{file} is not what was written: its checksum differs")
    return Checkpoint(Path(folder), manifest)


def restore(parameters: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copies saved tensors into parameters of the same names, sharded or not.

    Raises:
        CheckpointError: for names or shapes that differ.
    """
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                raise CheckpointError(f"{source} has {name}, which this run does not train")
            if parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(spread(tensor, parameters[name]))
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{source} lacks {sorted(missing)[:5]} and so on, {len(missing)} in all")


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is: on its device, and sharded as it is."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole tensor: each keeps its part, and nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _together(peers: Peers, part: Callable[[], Any]) -> list[Any]:
    """Run one part in every process, and return the results by rank.

    Raises:
        OSError: in every process, if any of them raised one.
    """
    result, problem = None, None
    try:
        result = part()
    except OSError as error:
        problem = error
    failure = None if problem is None else (problem.errno, problem.strerror or str(problem))
    answers = peers.gather((result, failure))
    failures = [failure for _, failure in answers if failure is not None]
    if failures:
        raise problem or OSError(*failures[0])
    return [result for result, _ in answers]


def _write_groups(folder: Path, groups: dict[str, Iterable[tuple[str, Tensor]]], rank: int) -> dict[str, Any]:
    """Write this process's part of all groups, and return the manifest's entries for its files."""
    files = {}
    for group, tensors in groups.items():
        stem = group if rank == 0 else f"{group}.rank-{rank:03d}"
        for number, shard in enumerate(_shards(_own(tensors, rank)), 1):
            path = folder / f"{stem}-{number:05d}.safetensors"
            save_tensors(shard, path)
            flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    return files


def _own(tensors: Iterable[tuple[str, Tensor]], rank: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this process writes: its rows of sharded tensors and, in the main process, all others."""
    for name, tensor in tensors:
        part = tensor.detach()
        if hasattr(part, "placements"):
            # `parallel.shard` shards the first dimension over all processes, in their order.
            assert part.device_mesh.ndim == 1, part.device_mesh
            assert [placement.is_shard(0) for placement in part.placements] == [True], part.placements
            part = part.to_local()
            if not len(part):
                continue
        elif rank:
            continue
        # A copy of each, since safetensors refuses tensors that share memory, as tables of eight-bit optimizers do.
        yield name, part.to("cpu", copy=True).contiguous()


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush(path)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value
