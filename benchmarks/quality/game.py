"""ViZDoom games as `render.py` and `clips.py` play them. This file imports no torch."""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Line types of doors that anyone can open: slow and fast ones, once or again and again.
DOORS = (1, 31, 117, 118)


def new_game(seed: int, scenario: str | None = None, *, scale: int = 1) -> Any:
    """A `vizdoom.DoomGame` without a window, with RGB pictures and their depth.

    Args:
        seed: of the game.
        scenario: one of ViZDoom's, whose settings it starts from; None leaves what is played to the caller.
        scale: 1, 2, or 4; pictures have 144 x 256 pixels times this.
    """
    import vizdoom

    os.chdir(tempfile.mkdtemp(prefix="vizdoom-"))  # the engine leaves a configuration file where it runs
    game = vizdoom.DoomGame()
    if scenario is not None:
        game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
    game.set_window_visible(False)
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{256 * scale}X{144 * scale}"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_render_hud(False)
    game.set_seed(seed)
    return game


@dataclass(frozen=True)
class Door:
    """The middle [2] of a door in a map's units, and the direction [2] from it to the side from which it opens."""

    middle: np.ndarray
    outward: np.ndarray


def read_doors(wad: Path, name: str, width: float = 60) -> list[Door]:
    """The doors of a map, at least `width` wide, from the lines that the file of the game's data has for it."""
    data = wad.read_bytes()
    count, directory = struct.unpack_from("<II", data, 4)
    entries = [struct.unpack_from("<II8s", data, directory + 16 * index) for index in range(count)]
    names = [entry[2].rstrip(b"\0").decode() for entry in entries]
    first = names.index(name.upper())

    def table(lump: str, dtype: str, columns: int) -> np.ndarray:
        start, size, _ = entries[names.index(lump, first)]
        return np.frombuffer(data, dtype, size // np.dtype(dtype).itemsize, start).reshape(-1, columns)

    corners, doors = table("VERTEXES", "<i2", 2).astype(float), []
    for begin, end, _, kind, _, _, back in table("LINEDEFS", "<u2", 7):
        along = corners[end] - corners[begin]
        length = float(np.hypot(*along))
        if kind in DOORS and back != 0xFFFF and length >= width:
            outward = np.array([along[1], -along[0]]) / length
            doors.append(Door((corners[begin] + corners[end]) / 2, outward))
    return doors
