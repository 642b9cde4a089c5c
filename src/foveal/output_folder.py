"""Output folders: foveal lists the files that it writes there, and never replaces or removes any other file.

The list is `foveal-files.jsonl`. Each file gets a line before a rename puts the file in place:

    {"foveal": "demo", "file": "index.html", "bytes": 20731, "sha256": "..."}

A command owns a file if the file matches one of the command's lines. A line without "bytes" is for a file that grows,
such as a log. Lines are only ever added, so several processes can write into one folder.

New files are made in a scratch folder, named `.foveal-` and eight letters, which is locked as long as its process
lives. A scratch folder without a lock was left by a process that was killed. The next process to write there removes
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except (
    ImportError
):  # Not a POSIX system: nothing is locked there, and no scratch folder of a killed process is removed.
    fcntl = None

LIST_FILE = "foveal-files.jsonl"
# Larger files are recognized by their size only.
HASHED_BYTES = 64 * 2**20
USE_FILE = ".foveal-in-use"
SCRATCH_PREFIX = ".foveal-"
LINE_START = b'{"foveal": '
LOCK_FILE, LOCK_TEXT = "lock", "scratch folder of foveal, process {}\n"


class OutputFolder:
    """A folder that a command writes into.

    Args:
        path: the folder. The first write creates it.
        command: the command that owns the files, like "demo". Files of another command are treated like a user's.
    """

    def __init__(self, path: str | os.PathLike[str], command: str) -> None:
        self.path, self.command = Path(path), command
        self._own: dict[str, list[tuple[int | None, str | None]]] = {}
        self._read_to = 0

    def check(self, names: Iterable[str] = ()) -> None:
        """Check that files with these names can be written or replaced without touching anything else.

        Raises:
            ValueError: the path is a file, is below a file, is a dead link, or cannot be written to.
            FileExistsError: a file that the command does not own has one of these names. The message names the file.
        """
        check_folder(self.path)
        self._read_list()
        problems = [problem for name in names if (problem := self._problem(name)) is not None]
        if problems:
            more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
            raise FileExistsError(
                f"{problems[0]}{more}, and is left as it is: move it away, delete it, or choose another output. "
                f"foveal replaces what {LIST_FILE} names; versions before it left no such list"
            )

    def check_alone(self) -> None:
        """Check that the folder is new, is empty but for hidden files, or has files of this command.

        Raises:
            ValueError: as in `check`, or the folder holds only other files. The message names one of them.
        """
        self.check()
        if self._own or not self.path.exists():
            return
        found = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if found:
            raise ValueError(
                f"output {self.path} holds something else ({found[0]}), nothing of foveal {self.command}; "
                "choose a new or empty folder"
            )

    def owns(self, name: str) -> bool:
        """Whether this command wrote the file of this name, and nobody has changed it since."""
        self._read_list()
        path = self.path / name
        if name not in self._own or path.is_symlink() or not path.is_file():
            return False
        versions = self._own[name]
        size = path.stat().st_size
        if (None, None) in versions or (size, None) in versions:
            return True
        return any(version[0] == size for version in versions) and _version(path) in versions

    @contextlib.contextmanager
    def writing(self, name: str, *, grows: bool = False) -> Iterator[Path]:
        """Give a path for a new file. The file is put in place under `name` if the block succeeds.

        Args:
            name: the file's name.
            grows: the command appends to the file later, so it owns the file whatever its content.

        Raises:
            FileExistsError, ValueError: as in `check`, both before and after the block.
        """
        self.check([name])
        with scratch_folder(self.path) as scratch:
            aside = scratch / Path(name).name
            yield aside
            self._put(aside, name, grows=grows)

    @contextlib.contextmanager
    def renewing(self, *, last: str, below: str = "") -> Iterator[Path]:
        """Give an empty folder for new files. They replace all files of the command if the block succeeds.

        Args:
            last: the file that readers look for. It is removed first and put in place last, so wherever it exists, all
                other files belong to the same result.
            below: a subfolder. Only files in it are replaced.

        Raises:
            FileExistsError, ValueError: as in `check`, before anything is replaced.
        """
        prefix = f"{below}/" if below else ""
        with scratch_folder(self.path) as scratch:
            yield scratch
            made = [file.relative_to(scratch).as_posix() for file in scratch.rglob("*") if file.is_file()]
            made.sort(key=lambda file: (file == last, file))
            names = [prefix + file for file in made]
            self.check(names)
            former = [name for name in self._own if name.startswith(prefix) and name not in names]
            self.remove(prefix + last)
            for file, name in zip(made, names, strict=True):
                self._put(scratch / file, name)
            for name in former:
                self.remove(name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes that lock this folder out of it during the block. A lock ends with its process.

        Raises:
            FileExistsError: another process has locked the folder. The message says which one.
        """
        new = _make(self.path)
        path, mine = self.path / USE_FILE, f"process {os.getpid()} on {socket.gethostname()}"
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context(open(path, "a+", encoding="utf-8"))
                if hold(file) is False:
                    file.seek(0)
                    raise FileExistsError(
                        f"output {self.path} is in use by {file.read().strip() or 'another process'}; "
                        "wait until it ends, or choose another output"
                    )
                # The process that had it before may just have removed the file.
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.truncate(0)
            file.write(mine)
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                _unmake(new)

    def remove(self, name: str) -> None:
        """Remove a file if the command owns it, and then the folders that are empty."""
        if not self.owns(name):
            return
        (self.path / name).unlink()
        for parent in Path(name).parents[:-1]:
            with contextlib.suppress(OSError):
                (self.path / parent).rmdir()

    def adopt(self, name: str) -> None:
        """List a file as it is, unless it is listed. Only for a file whose content shows that the command wrote it."""
        self._read_list()
        if name not in self._own:
            self._append(name, _version(self.path / name))

    def _put(self, aside: Path, name: str, *, grows: bool = False) -> None:
        """List a file from a scratch folder and move it into place."""
        self.check([name])
        flush(aside)
        self._append(name, (None, None) if grows else _version(aside))
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, path)

    def _append(self, name: str, version: tuple[int | None, str | None]) -> None:
        self._read_list()
        if version in self._own.get(name, ()):
            return
        line: dict[str, Any] = {"foveal": self.command, "file": name}
        line |= {key: value for key, value in zip(("bytes", "sha256"), version, strict=True) if value is not None}
        with open(self.path / LIST_FILE, "ab+") as file:
            if file.tell():
                # End a line that was cut off.
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            else:
                cut = False
            file.write(b"\n" * cut + json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_list(self) -> None:
        """Read the lines that were added since the last time."""
        path = self.path / LIST_FILE
        if not os.path.lexists(path):
            self._own, self._read_to = {}, 0
            return
        foreign = f"{path} is no list that foveal wrote; move it away or choose another output"
        if path.is_symlink() or not path.is_file():
            raise FileExistsError(foreign)
        with open(path, "rb") as file:
            start = file.read(len(LINE_START))
            if start != LINE_START[: len(start)]:
                raise FileExistsError(foreign)
            file.seek(self._read_to)
            added = file.read()
        for text in added[: added.rfind(b"\n") + 1].splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["foveal"] == self.command:
                    self._own.setdefault(line["file"], []).append((line.get("bytes"), line.get("sha256")))
        self._read_to += added.rfind(b"\n") + 1

    def _problem(self, name: str) -> str | None:
        """Say why a file of this name cannot be written; None if it can."""
        path = self.path / name
        for parent in reversed(path.parents[: len(Path(name).parents) - 1]):
            if os.path.lexists(parent) and not parent.is_dir():
                return f"{parent} is no folder"
        if not os.path.lexists(path) or self.owns(name):
            return None
        if name in self._own and path.is_file() and not path.is_symlink():
            return f"{path} was changed after foveal {self.command} wrote it"
        return f"{path} was not written by foveal {self.command}"


def check_folder(path: Path) -> None:
    """Raise a ValueError unless an output is a folder that can be written to, or can be created."""
    for place in (path, *path.parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"output {path} cannot be written: {place} allows no new files")
            return
        if os.path.lexists(place):
            what = "a link to nothing" if place.is_symlink() else "a file"
            where = f"output {path}" if place == path else f"output {path} cannot be made: {place}"
            raise ValueError(f"{where} is {what}; expected a folder")


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder inside `path`, and remove it at the end. If `path` is new and ends up empty, it goes too."""
    new = _make(path)
    _sweep(path)
    place = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=path))
    try:
        with open(place / LOCK_FILE, "w") as lock:
            hold(lock)
            lock.write(LOCK_TEXT.format(os.getpid()))
            lock.flush()
            inside = place / "new"
            inside.mkdir()
            yield inside
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _unmake(new)


def hold(file: Any) -> bool | None:
    """Lock an open file until it is closed or its process ends, even by a kill.

    Returns:
        True on success, False if another process holds the lock, None if the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def flush(path: Path) -> None:
    """Wait until a file's bytes or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(path: Path) -> list[Path]:
    """Create a folder with its parents; return those that are new, the innermost first."""
    new = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return new


def _unmake(new: list[Path]) -> None:
    """Remove the folders that `_make` created, as far as they are empty."""
    for place in new:
        with contextlib.suppress(OSError):
            place.rmdir()


def _sweep(path: Path) -> None:
    """Remove scratch folders that killed processes left."""
    start, mine = LOCK_TEXT[: LOCK_TEXT.index("{")], LOCK_TEXT.format(os.getpid())
    for place in path.glob(f"{SCRATCH_PREFIX}????????"):
        with contextlib.suppress(OSError), open(place / LOCK_FILE, "r+", encoding="utf-8", errors="replace") as lock:
            text = lock.read(len(mine) + 10)
            # Some file systems let a process lock a file twice.
            if text.startswith(start) and text != mine and hold(lock):
                shutil.rmtree(place, ignore_errors=True)


def _version(path: Path) -> tuple[int, str | None]:
    """(bytes, SHA-256) of a file; (bytes, None) of a large one."""
    size = path.stat().st_size
    if size > HASHED_BYTES:
        return size, None
    with open(path, "rb") as file:
        return size, hashlib.file_digest(file, "sha256").hexdigest()
