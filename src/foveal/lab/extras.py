"""How to add the packages that a command needs. foveal is not on PyPI, so its name is no source to install from."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import foveal


def how_to_install(extra: str) -> str:
    """The command that adds an extra of foveal to this environment, whichever environment the shell is in."""
    source = Path(foveal.__file__).parents[2]
    pip = f"{shlex.quote(sys.executable)} -m pip install -e"
    if (source / "pyproject.toml").is_file():
        return f"{pip} {shlex.quote(f'{source}[{extra}]')}"
    return f'in the source folder of foveal, {pip} ".[{extra}]"'


def need(extra: str, *packages: str) -> None:
    """Raise a ValueError that names the packages of a command that are missing, and the extra that brings them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}: {how_to_install(extra)}")
