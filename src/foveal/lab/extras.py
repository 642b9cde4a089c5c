"""How to add the packages that a command needs. foveal is not on PyPI, so its name is no source to install from."""

from __future__ import annotations

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
