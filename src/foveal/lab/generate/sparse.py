"""What makes a pipeline sparse for generation: a folder or a checkpoint of trained weights, or a method without any."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.checks import check_choice
from foveal.lab.generate.outputs import slug
from foveal.lab.terminal import Progress
from foveal.layout import VideoGrid
from foveal.methods.base import METHODS, Config, method_of
from foveal.models import load, sparsify
from foveal.models.families.table import components_of
from foveal.models.files.checkpoints import check_checkpoint, load_checkpoint
from foveal.models.files.exports import EXPORTED, load_export
from foveal.models.files.persist import WEIGHTS_FILE
from foveal.models.files.policy_file import read_policy
from foveal.models.files.tensor_files import open_tensors
from foveal.models.processor import sparse_processors
from foveal.models.report import report
from foveal.models.shipped import local_path


@dataclass(frozen=True)
class SparseChoice:
    """How to make a pipeline sparse. A pipeline that is sparse as it was loaded needs neither `path` nor `config`.

    Args:
        path: what `foveal.save` or `foveal train` wrote, or what `load_checkpoint` takes.
        config: a method's configuration, for a pipeline without trained sparse weights.
        policy: a policy file, for such a pipeline too.
        impl: see `block_sparse_attention`.
    """

    path: Path | None = None
    config: Config | None = None
    policy: Path | None = None
    impl: str = "auto"

    def describe(self) -> dict[str, Any]:
        """What the record of an output says about this choice, as plain JSON."""
        if self.path is not None:
            return {"path": str(self.path), "fingerprint": fingerprint(self.path), "impl": self.impl}
        if self.policy is not None:
            return {"policy": str(self.policy), "fingerprint": fingerprint(self.policy), "impl": self.impl}
        if self.config is None:
            return {"in_pipeline": True}
        name = method_of(self.config).name
        # Through JSON, which makes lists of tuples, so that it equals what is read back.
        return json.loads(json.dumps({"method": name, "config": self.config.to_dict(), "impl": self.impl}))

    @property
    def label(self) -> str:
        """Its name in file names. It depends on the configuration, but not on the weights in a folder."""
        described = self.describe()
        described.pop("fingerprint", None)
        if "in_pipeline" in described:
            return "sparse"
        file = self.policy or self.path
        readable = described["method"] if file is None else slug(file.stem, 20)
        return f"{readable}-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:4]}"

    def check(self) -> None:
        """Look at what `path` or `policy` is, without a model and without reading weights.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: a file is corrupt or has no known format.
        """
        if self.policy is not None:
            read_policy(self.policy)
        if self.path is None:
            return
        if not self.path.exists():
            raise FileNotFoundError(f"no such folder or checkpoint of sparse weights: {self.path}")
        for folder in (self.path, self.path / EXPORTED):
            if (folder / WEIGHTS_FILE).is_file():
                with open_tensors(folder / WEIGHTS_FILE):
                    return
        check_checkpoint(self.path)

    def install(self, pipe: Any) -> None:
        """Make a dense pipeline sparse, with the base weights that go with it, if any.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load`, `load_checkpoint` and `sparsify` do.
        """
        if self.config is not None:
            sparsify(pipe, self.config, impl=self.impl)
        elif self.policy is not None:
            sparsify(pipe, policy=self.policy, impl=self.impl)
        elif self.path is None:
            return
        elif (self.path / WEIGHTS_FILE).is_file():
            load(pipe, self.path, impl=self.impl)
        elif (self.path / EXPORTED / WEIGHTS_FILE).is_file():
            load_export(pipe, self.path, impl=self.impl)
        else:
            load_checkpoint(pipe, self.path, impl=self.impl)

    def check_grid(self, grid: VideoGrid, configs: list[Config]) -> None:
        """Raises a ValueError if a video of that size is a single block under one of the configurations."""
        for config in configs:
            blocks, block = method_of(config).key_blocks(config, grid)
            if blocks == 1:
                shape = "x".join(map(str, grid.shape))
                raise ValueError(
                    f"the video is too small for sparse attention: its {shape} tokens are one block of {block} tokens; "
                    "take more frames or a larger height and width"
                )


def choose_sparse(
    path: Path | None, method: str | None, *, policy: Path | None = None, impl: str, **fields: Any
) -> SparseChoice | None:
    """The choice that command line options make; None for dense.

    Args:
        path: trained sparse weights.
        method: the name of a method, without any.
        policy: a policy file, without any too.
        impl: see `block_sparse_attention`.
        fields: of the method's configuration, None for those that were not given.

    Raises:
        FileNotFoundError: no such folder, checkpoint, or policy file.
        ValueError: options that exclude each other, an unknown method, a field that it does not have or that is out
            of its range, or a folder or checkpoint of no known format.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if path is not None and (method is not None or given):
        raise ValueError("sparse weights have their own method and ratios: give --sparse, or --method and ratios")
    if policy is not None and (path is not None or method is not None or given):
        raise ValueError(
            "a policy file has its own method and ratios: give --policy, or --sparse, or --method and ratios"
        )
    if policy is not None:
        choice = SparseChoice(policy=policy, impl=impl)
        choice.check()
        return choice
    if path is not None:
        choice = SparseChoice(path=Path(local_path(path.as_posix())), impl=impl)
        choice.check()
        return choice
    if method is None:
        if given:
            raise ValueError(f"give --method with {' and '.join(given)}; expected one of {', '.join(METHODS)}")
        return None
    check_choice("method", method, tuple(METHODS))
    return SparseChoice(config=METHODS[method].configure(**given), impl=impl)


def configs_of(pipe: Any) -> list[Config]:
    """The configurations of a pipeline's sparse layers, each once; empty for a dense one."""
    try:
        transformers = components_of(pipe).values()
    except TypeError:
        # A family that foveal does not know has no sparse layers.
        return []
    found = {}
    for transformer in transformers:
        for processor in sparse_processors(transformer).values():
            found[processor.config] = None
    return list(found)


def say_what_ran(pipe: Any, progress: Progress) -> None:
    """Says what the forwards of a pipeline's sparse layers ran; nothing if there were none."""
    if configs_of(pipe):
        ran = report(pipe)
        if ran.rows:
            progress.say(str(ran))


def fingerprint(path: Path) -> str:
    """A hash of the names, sizes and modification times of a file, or of all files below a folder.

    Times, since a model that is trained on has files of the same names and sizes; not contents, which may be 30 GB.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
