"""Captioned clips of game video: walks through the maps of Freedoom, rendered by ViZDoom on all cores.

    python benchmarks/quality/clips.py --output FOLDER

The walker steers by the depth buffer, so it follows corridors, opens doors, and does not stare at walls. Captions say
which place it is, how the walker moved, and who was in sight, all from the game's own state. `train` and `held-out`
share no map. A job (a map and a seed) always takes the same walks, with the same captions; only sparks and blood, about
one pixel in a thousand, differ from run to run. Jobs that are on disk are not rendered again.

FOLDER/PART/JOB.npz holds `frames` uint8 [clips, 49, 144, 256, 3] at 17.5 frames a second, and `captions`. This file
imports no torch, because each of its processes would load it.

ViZDoom is under the MIT license, Freedoom's maps, textures, and sprites are under the BSD license.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from game import new_game

FRAMES, HEIGHT, WIDTH = 49, 144, 256
GAME_TICKS = 2  # a frame
CLIPS_PER_JOB = 20
PLACES = {
    "map01": "a gray stone base with lit signs",
    "map02": "brown corridors around a blue pool",
    "map03": "a dark computer room",
    "map04": "a white and gray hall",
    "map05": "a green base with metal doors",
    "map07": "a stone hall with screens",
    "map08": "a brick base with bright lamps",
    "map09": "a hall of concrete and blood",
    "map10": "a rocky cave",
    "map11": "a dark green sewer",
    "map12": "a building by the water",
    "map13": "a warehouse of crates",
    "map14": "a night base",
    "map15": "a wooden town under a red sky",
    "map17": "a brown yard under a red sky",
    "map18": "a sandy courtyard",
    "map19": "a gray prison",
    "map20": "a mossy ruin",
    "map21": "a temple under a red sky",
    "map22": "a green factory",
    "map25": "a brown brick fort",
    "map26": "a wooden house",
    "map27": "a black rock castle",
    "map28": "a green stone dungeon",
}
HELD_OUT = ("map07", "map12", "map20", "map25")
SEEDS = {"train": 8, "held-out": 3}
IN_SIGHT = {
    "Zombieman": "a soldier",
    "ShotgunGuy": "a soldier",
    "ChaingunGuy": "a soldier",
    "DoomImp": "an imp",
    "Demon": "a demon",
    "Cacodemon": "a flying monster",
    "LostSoul": "a flying monster",
    "Revenant": "a skeleton",
    "ExplosiveBarrel": "a barrel",
    "BurningBarrel": "a barrel",
}


@dataclass(frozen=True)
class Job:
    """One game: a map, a seed, and the file for its clips."""

    map: str
    seed: int
    file: Path


def jobs(output: Path) -> list[Job]:
    """All jobs, in an order that does not change."""
    found = []
    for name in PLACES:
        part = "held-out" if name in HELD_OUT else "train"
        found += [Job(name, seed, output / part / f"{name}-{seed}.npz") for seed in range(SEEDS[part])]
    return found


class Walker:
    """Turns away from what is near, keeps turning the same way in a corner, and backs out when it is stuck."""

    def __init__(self, random: np.random.RandomState) -> None:
        self.random, self.turn, self.side = random, 0.0, 1.0
        self.places: list[np.ndarray] = []

    def action(self, depth: np.ndarray, place: np.ndarray, *, target: bool) -> list[float]:
        """[forward, degrees to the right, attack, use] from the depth buffer and the position [2]."""
        left, ahead, right = (depth[50:100, a:b].astype(np.float32) for a, b in ((0, 85), (96, 160), (171, 256)))
        near = np.percentile(ahead, 20)
        self.places = [*self.places[-12:], place]
        stuck = len(self.places) > 12 and np.abs(self.places[0] - place).sum() < 24
        if self.random.rand() < 0.01:
            self.side = -self.side
        if stuck:
            self.turn = 9.0 * self.side
        elif near < 12:
            if abs(self.turn) < 3:
                self.side = 1.0 if right.mean() > left.mean() else -1.0
            self.turn = 0.6 * self.turn + 2.4 * self.side
        else:
            pull = np.clip((right.mean() - left.mean()) / 12, -1, 1)
            self.turn = 0.85 * self.turn + 0.5 * pull + 0.35 * self.random.randn() + 0.1 * self.side
        attack = target and self.random.rand() < 0.3
        return [1, float(np.clip(self.turn, -10, 10)), int(attack), int(near < 8 and self.random.rand() < 0.2)]


def caption(place: str, turned: float, walked: float, seen: dict[str, int], shots: int) -> str:
    """A sentence from what the game knows about a clip."""
    how = "walking forward" if walked > 350 else "moving slowly"
    if abs(turned) > 35:
        how += f" and turning {'right' if turned < 0 else 'left'}"
    text = f"first-person view of {place}, {how}"
    named = sorted({IN_SIGHT[name] for name, frames in seen.items() if frames > 8})
    if named:
        text += f", {' and '.join(named)} in sight"
    return text + (", shooting" if shots > 2 else "")


def render(job: Job) -> tuple[str, int]:
    """Renders a job's clips; (its file, how many clips it gave)."""
    import vizdoom
    from vizdoom import Button, GameVariable

    random = np.random.RandomState([job.seed, *job.map.encode()])
    game = new_game(1000 * job.seed + sum(job.map.encode()))
    game.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))
    game.set_doom_scenario_path("")
    game.set_doom_map(job.map)
    game.set_doom_skill(2)
    game.set_available_buttons([Button.MOVE_FORWARD, Button.TURN_LEFT_RIGHT_DELTA, Button.ATTACK, Button.USE])
    game.set_available_game_variables([GameVariable.POSITION_X, GameVariable.POSITION_Y, GameVariable.ANGLE])
    game.set_labels_buffer_enabled(True)
    game.set_render_messages(False)
    game.set_episode_timeout(0)
    game.add_game_args("+sv_cheats 1")
    game.init()
    game.send_game_command("god")
    walker, clips, captions = Walker(random), [], []

    def step() -> tuple[np.ndarray, np.ndarray, set[str], bool]:
        state = game.get_state()
        x, y, angle = state.game_variables
        names = {label.object_name for label in state.labels if label.width * label.height > 60}
        target = bool(names & set(IN_SIGHT))
        action = walker.action(state.depth_buffer, np.array([x, y]), target=target)
        game.make_action(action, GAME_TICKS)
        return state.screen_buffer, np.array([x, y, angle]), names, bool(action[2])

    for _ in range(40 + 60 * job.seed):  # another way into the map for each seed
        if not game.is_episode_finished():
            step()
    for _ in range(3 * CLIPS_PER_JOB):
        if len(clips) == CLIPS_PER_JOB:
            break
        frames, states, seen, shots = [], [], {}, 0
        while len(frames) < FRAMES:
            if game.is_episode_finished():
                game.new_episode()
                game.send_game_command("god")
                frames, states, seen, shots = [], [], {}, 0
            frame, where, names, shot = step()
            frames.append(frame)
            states.append(where)
            shots += shot
            for name in names & set(IN_SIGHT):
                seen[name] = seen.get(name, 0) + 1
        states = np.array(states)
        walked = np.abs(np.diff(states[:, :2], axis=0)).sum()
        turned = ((np.diff(states[:, 2]) + 180) % 360 - 180).sum()
        if walked > 200 and abs(turned) < 300:
            clips.append(np.stack(frames))
            captions.append(caption(PLACES[job.map], turned, walked, seen, shots))
    game.close()
    part = job.file.with_suffix(".part.npz")
    shape = (0, FRAMES, HEIGHT, WIDTH, 3)
    np.savez(part, frames=np.stack(clips) if clips else np.zeros(shape, np.uint8), captions=np.array(captions))
    os.replace(part, job.file)
    return job.file.name, len(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="jobs whose file name starts so")
    options = parser.parse_args()
    started = time.time()
    left = [job for job in jobs(options.output.resolve()) if not job.file.exists()]
    left = [job for job in left if job.file.name.startswith(options.only or "")]
    for job in left:
        job.file.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    with multiprocessing.get_context("spawn").Pool(max(1, min(options.processes, len(left)))) as pool:
        for name, clips in pool.imap_unordered(render, left):
            total += clips
            print(f"{name}: {clips} clips", flush=True)
    print(f"{total} clips of {len(left)} games in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
