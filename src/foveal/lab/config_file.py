"""Config files: the options of a command in a TOML, YAML, or JSON file, for `--config FILE`.

The file's entries become arguments in front of those of the command line, so the same parser reads both, and the
command line wins. Names are those of the options, with `-` or `_`; a part of the training configuration is a table:

    steps = 500
    [data]
    folder = "latents"
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTION = "--config"
SUFFIXES = (".toml", ".yaml", ".yml", ".json")


@dataclass(kw_only=True)
class Command:
    """A command whose options can come from a file."""

    config: Path | None = None
    """A TOML, YAML, or JSON file with options by their names here; those on the command line win."""


def take_config(arguments: list[str]) -> tuple[dict[str, Any], list[str], str]:
    """Take `--config FILE` out of the arguments of a command.

    Returns:
        The file's entries, empty without the option; the other arguments; the file's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the option is given twice or without a file, or the file is not a table of entries.
    """
    rest, files = [], []
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        if name == OPTION:
            if not equals:
                position += 1
                value = arguments[position] if position < len(arguments) else ""
            if not value or value.startswith("-"):
                raise ValueError(f"{OPTION} needs a file: one of {', '.join(SUFFIXES)}")
            files.append(value)
        else:
            rest.append(arguments[position])
        position += 1
    if len(files) > 1:
        raise ValueError(f"give {OPTION} once, got {', '.join(files)}")
    return (read_config(Path(files[0])), rest, files[0]) if files else ({}, rest, "")


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a config file, whose suffix names its format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a suffix of no known format, a file that cannot be parsed, or one that is no table of entries.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"config file {path} must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            entries = tomllib.loads(text)
        elif path.suffix == ".json":
            entries = json.loads(text)
        else:
            entries = _yaml(text)
    except ValueError as error:  # of each format, and of bytes that are not UTF-8
        raise ValueError(f"cannot read config file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"config file {path} must hold names and values, got {type(entries).__name__}")
    return entries


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs the package pyyaml; TOML and JSON need none") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def arguments_of(entries: dict[str, Any], file: str, options: Any) -> list[str]:
    """The command-line arguments that a config file stands for.

    Args:
        entries: from `take_config`.
        file: its name, for errors.
        options: the command's dataclass, or an instance whose own dataclasses are the file's tables.

    Raises:
        ValueError: a name that is no option, or a value of a kind that no option takes. The message names it.
    """
    return [argument for name, value in _flat(entries, file, options, "") for argument in _option(name, value, file)]


def _flat(entries: dict[str, Any], file: str, options: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name of the option, value) of each entry."""
    known = {field.name for field in dataclasses.fields(options)} - {"config"}
    for written, value in entries.items():
        name = str(written).replace("-", "_")
        if name not in known:
            raise ValueError(f"config file {file}: unknown key {prefix}{written}; expected some of {sorted(known)}")
        current = None if isinstance(options, type) else getattr(options, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"config file {file}: {prefix}{name} must be a table, got {value!r}")
            yield from _flat(value, file, current, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _option(name: str, value: Any, file: str) -> list[str]:
    *parents, last = name.replace("_", "-").split(".")
    option = "--" + ".".join((*parents, last))
    if isinstance(value, bool):
        return [option if value else "--" + ".".join((*parents, f"no-{last}"))]
    if value is None or isinstance(value, str | int | float):
        return [f"{option}={value}"]
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if not isinstance(value, list) or not all(type(item) in (str, int, float) for item in value):
        raise ValueError(
            f"config file {file}: {name} must be text, a number, true or false, or a list of these, got {value!r}"
        )
    if any(isinstance(item, str) and item.startswith("-") for item in value):
        raise ValueError(f"config file {file}: {name} has a text that begins with a hyphen, like an option: {value!r}")
    return [option, *map(str, value)]
