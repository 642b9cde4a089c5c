"""The `foveal` command as it is installed: Ctrl-C ends it in one line from the first moment.

PyTorch takes seconds to load. An interrupt in the middle of that ends in a traceback of whatever was being imported, so
this module stands outside the package, which imports PyTorch, and ends the process itself until the command runs.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Run the command line."""
    former = signal.signal(signal.SIGINT, _leave)
    from foveal.lab import cli

    signal.signal(signal.SIGINT, former)
    return cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing is open yet, and an exception could be caught by what is being imported.
    os.write(2, b"foveal: interrupted\n")
    os._exit(130)
