"""Reads the arguments of a command with tyro, and makes one line of what it says about a mistake.

tyro draws a box of several lines: what is wrong, a rule, advice on the options, another rule, and how to get help.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

FRAME = "╭╮╰╯│─- "
ANSI = re.compile(r"\033\[[\d;]*m")


def read_arguments(options: type, arguments: Sequence[str], *, prog: str, **keywords: Any) -> Any:
    """An instance of a dataclass, filled from the arguments of the command line.

    Args:
        options: the dataclass. Each field is an option.
        arguments: what stands after the name of the command.
        prog: the name of the command, for the usage line.
        keywords: more arguments for `tyro.cli`.

    Raises:
        ValueError: an option that does not exist, lacks a value, has a wrong value, or is missing.
        SystemExit: with status 0, after --help.
    """
    import tyro

    said = io.StringIO()
    wide = contextlib.nullcontext() if {"-h", "--help"} & set(arguments) else _unwrapped()
    try:
        with wide, contextlib.redirect_stderr(said):
            return tyro.cli(options, args=list(arguments), prog=prog, **keywords)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(one_line(said.getvalue(), prog)) from None


def one_line(box: str, prog: str) -> str:
    """The message of a box that tyro drew without wrapping its lines."""
    parts = _parts(box)
    what = " ".join(parts[0]).rstrip(".") if parts else "the arguments cannot be read"
    # The options that the advice lists, each with what it takes: "--frames INT".
    listed = [line.partition(" ") for part in parts for line in part if line.startswith("-")]
    if match := re.fullmatch(r"Unrecognized options: (.*)", what):
        # The values of unknown options are listed with them.
        tokens = match[1].split(", ")
        options = [token for token in tokens if token.startswith("-")]
        what = f"unknown option {', '.join(options)}" if options else f"unexpected argument {', '.join(tokens)}"
        near = difflib.get_close_matches(options[0], [option for option, *_ in listed], n=1) if options else []
        what += f", perhaps {near[0]}" if near else ""
    elif what.startswith("Missing from "):
        what = f"expected {' and '.join(option for option, *_ in listed)}"
    elif match := re.fullmatch(r"Missing value for argument '(.*?)'.*", what):
        what = f"{match[1]} needs a value"
    elif match := re.fullmatch(r"Error parsing (--\S+): (.*)", what):
        what = f"{match[1]}: {match[2]}" + (f" (expected {listed[0][2]})" if listed else "")
    elif match := re.fullmatch(r"Error parsing \w+: (.*)", what):
        # What checks the values of a dataclass has named the field.
        return match[1]
    return f"{what}. {prog} --help lists the options"


def _parts(box: str) -> list[list[str]]:
    """The lines between the rules of a box, without its frame and its title."""
    parts: list[list[str]] = [[]]
    for line in ANSI.sub("", box).splitlines():
        text = line.strip(" │")
        if text and not text.strip(FRAME):
            parts.append([])
        elif text and not line.startswith("╭"):
            parts[-1].append(text)
    # Without Unicode there is no frame: the title is a line of its own, with a rule below.
    parts = parts if "╭" in box else parts[1:]
    return [part for part in parts if part]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Lets tyro draw lines of any length: it asks for the terminal's width, of which COLUMNS has the first word."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
