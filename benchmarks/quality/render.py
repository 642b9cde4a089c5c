"""Game video for `run.py`: clips of ViZDoom's Freedoom scenarios, rendered on all cores into one array on disk.

    python benchmarks/quality/render.py --work FOLDER

The player walks by the depth buffer: it turns where a wall is near, so that it does not stare at walls. A clip is a
function of its number alone, which picks the scenario and seeds the game. What is on disk is not rendered again.
This file imports no torch: each of its processes would load it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
from game import new_game

SCENARIOS = ("my_way_home", "deadly_corridor", "deathmatch", "health_gathering_supreme")
HEIGHT, WIDTH = 128, 224
SEEN = (slice(8, 136), slice(16, 240))  # of a screen of 144 x 256
AHEAD = (slice(60, 84), slice(112, 144))
NEAR = 14  # units of the depth buffer
GAME_TICKS = 2  # a frame


def clip_file(work: Path) -> Path:
    """uint8 [clips, frames, height, width, 3]."""
    return work / "clips.npy"


def render_clip(job: tuple[Path, int, int]) -> None:
    """Renders clip number `job[1]` into the file at `job[0]`, every `job[2]`-th pixel of it."""
    from vizdoom import Button

    path, number, step = job
    clips = np.load(path, mmap_mode="r+")
    random = np.random.RandomState(number)
    game = new_game(number, SCENARIOS[number % len(SCENARIOS)])
    game.set_available_buttons(
        [Button.MOVE_FORWARD, Button.TURN_LEFT, Button.TURN_RIGHT, Button.ATTACK, Button.MOVE_LEFT, Button.MOVE_RIGHT]
    )
    game.init()
    left = True
    for frame in range(clips.shape[1]):
        if game.is_episode_finished():
            game.new_episode()
        state = game.get_state()
        clips[number, frame] = state.screen_buffer[SEEN][::step, ::step]
        if random.rand() < 0.06:
            left = not left
        action = [1, 0, 0, int(random.rand() < 0.1), 0, 0]
        if state.depth_buffer[AHEAD].mean() < NEAR or random.rand() < 0.25:
            action[1 if left else 2] = 1
        game.make_action(action, GAME_TICKS)
    game.close()
    done = np.load(path.with_suffix(".done.npy"), mmap_mode="r+")
    done[number] = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=352)
    parser.add_argument("--frames", type=int, default=260)
    parser.add_argument("--step", type=int, default=1, help="keep every n-th pixel")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    started = time.time()
    path = clip_file(options.work.resolve())
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.with_suffix(".done.npy")
    if not done.exists():
        shape = (options.clips, options.frames, HEIGHT // options.step, WIDTH // options.step, 3)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        np.save(done, np.zeros(options.clips, np.uint8))
    left = np.flatnonzero(np.load(done) == 0).tolist()
    jobs = [(path, number, options.step) for number in left]
    if jobs:
        with multiprocessing.get_context("spawn").Pool(min(options.processes, len(jobs))) as pool:
            for _ in pool.imap_unordered(render_clip, jobs):
                pass
    print(f"render: {len(jobs)} clips of {options.clips} in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
