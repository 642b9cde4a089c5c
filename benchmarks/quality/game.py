"""ViZDoom games as `render.py` and `clips.py` play them. This file imports no torch."""

from __future__ import annotations

import os
import tempfile
from typing import Any


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
