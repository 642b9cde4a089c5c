"""Read lists of media files and captions in common formats.

- A folder: every video and image in it, at any depth. `cat.mp4` has its caption in `cat.txt`. A single file works too.
- CSV with a header, JSON lines, or a JSON list of objects: one column for the file and one for the caption, with any of
  the names below. FastVideo's `videos2caption.json` is such a list, where `cap` is a list of captions and the files are
  in a folder `videos` next to it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm", ".webp")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
LIST_SUFFIXES = (".csv", ".json", ".jsonl")
# In order of preference, where a list has several.
FILE_COLUMNS = ("video", "video_path", "path", "file_name", "file", "media_path", "video_name", "image", "image_path")
CAPTION_COLUMNS = ("prompt", "caption", "cap", "text")


@dataclass(frozen=True)
class Source:
    """One media file and its caption.

    Args:
        name: unique within its list, and a path relative to the list where possible, so that the list can move.
        path: the file, which may not exist.
        caption: "" if the file has none.
    """

    name: str
    path: Path
    caption: str


def read_sources(location: str | Path) -> list[Source]:
    """The media files of a folder or a list, or a single file, sorted by name.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: the list cannot be read, lacks a column, or names a file twice (with the line); or nothing is found.
    """
    location = Path(location)
    if location.is_dir():
        sources = _read_folder(location)
        if not sources:
            expected = ", ".join(MEDIA_SUFFIXES)
            raise ValueError(f"folder {location} has no video or image; expected files that end in {expected}")
    elif location.suffix.lower() in MEDIA_SUFFIXES and location.is_file():
        return [Source(location.name, location, _sidecar_caption(location))]
    elif location.is_file():
        if location.suffix.lower() not in LIST_SUFFIXES:
            valid = ", ".join((*LIST_SUFFIXES, *MEDIA_SUFFIXES))
            raise ValueError(f"{location} is not a list of videos; expected a folder, or a file that ends in {valid}")
        sources = [_to_source(row, location, line) for line, row in _read_rows(location)]
        if not sources:
            raise ValueError(f"{location} lists no videos")
    else:
        raise FileNotFoundError(f"no such folder or list of videos: {location}")
    seen = set()
    for source in sources:
        if source.name in seen:
            raise ValueError(f"{location} lists {source.name} twice")
        seen.add(source.name)
    return sorted(sources, key=lambda source: source.name)


def _read_folder(folder: Path) -> list[Source]:
    sources = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in MEDIA_SUFFIXES and path.is_file():
            sources.append(Source(path.relative_to(folder).as_posix(), path, _sidecar_caption(path)))
    return sources


def _sidecar_caption(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    return _read_text(sidecar).strip() if sidecar.is_file() else ""


def _read_rows(file: Path) -> Iterable[tuple[int, Any]]:
    """(line or entry number from 1, row) of a list."""
    text = _read_text(file)
    suffix = file.suffix.lower()
    if suffix == ".csv":
        # The header is line 1.
        yield from enumerate(csv.DictReader(text.splitlines(keepends=True), skipinitialspace=True), start=2)
        return
    if suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield number, _parse(line, f"{file}, line {number}")
        return
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a JSON list of objects, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _to_source(row: Any, file: Path, number: int) -> Source:
    where = f"{file}, entry {number}" if file.suffix.lower() == ".json" else f"{file}, line {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    name = _column(row, FILE_COLUMNS, where)
    caption = _column(row, CAPTION_COLUMNS, where)
    if isinstance(caption, list):
        caption = caption[0] if caption else ""
    if not isinstance(name, str) or not name or not isinstance(caption, str):
        raise ValueError(f"{where} must name a file and a caption as text, got {name!r} and {caption!r}")
    path = file.parent / name
    if not path.exists() and (file.parent / "videos" / name).exists():
        path = file.parent / "videos" / name
    return Source(Path(name).as_posix(), path, caption.strip())


def _column(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where} has none of the columns {', '.join(names)}; it has {', '.join(map(str, row))}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
