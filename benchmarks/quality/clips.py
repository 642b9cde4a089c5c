"""Captioned clips of game video: walks through ViZDoom's scenarios and maps of Freedoom, rendered on all cores.

    python benchmarks/quality/clips.py --output FOLDER

The walker steers by the depth buffer, so it follows corridors, opens doors, and does not stare at walls; in some clips
it stands and looks around. Captions say which place it is, how the walker moved, and who was in sight, all from the
game's own state. The game is drawn at twice the size and averaged, which takes away the flicker of its textures, and
brightened. A job (a scene and a seed) always takes the same walks, with the same captions; pixels of effects differ
from run to run in some scenes. `held-out` has seeds of its own, and maps of its own. Jobs that are on disk are not
rendered again.

FOLDER/PART/JOB.npz holds `frames` uint8 [clips, 49, 144, 256, 3] at 35 frames a second, and `captions`. This file
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
from typing import Any

import numpy as np
from game import new_game

FRAMES, HEIGHT, WIDTH = 49, 144, 256
SCALE = 2  # the game draws this many times larger
TURN = 2.5  # degrees a frame, at most: a faster turn shows a new picture every few frames
BRIGHTER = (255 * np.linspace(0, 1, 256) ** (1 / 1.4)).astype(np.uint8)
CLIPS_PER_JOB = 20
SCENARIOS = {
    "deadly_corridor": "a brown stone corridor",
    "health_gathering": "a green room with mossy walls",
    "health_gathering_supreme": "a green maze of gray walls",
    "defend_the_center": "a round brick arena",
    "defend_the_line": "a long brick hall",
    "deathmatch": "an arena of brick and red pillars",
    "basic": "a brick room",
}
MAPS = {
    "map01": "a gray stone base with lit signs",
    "map04": "a white and gray hall",
    "map07": "a stone hall with screens",
    "map09": "a hall of concrete and blood",
    "map12": "a building by the water",
    "map18": "a sandy courtyard",
    "map21": "a temple under a red sky",
}
# Enemies come to the player here, who often stands where the game begins.
ARENAS = ("deadly_corridor", "defend_the_center", "defend_the_line", "basic")
PLACES = {**SCENARIOS, **MAPS}
HELD_OUT = ("map07",)  # maps that no training clip shows
SEEDS = {"train": range(16), "held-out": range(100, 101)}
IN_SIGHT = {
    "Zombieman": "a soldier",
    "ShotgunGuy": "a soldier",
    "ChaingunGuy": "a soldier",
    "MarineChainsawVzd": "a marine",
    "DoomImp": "an imp",
    "Demon": "a demon",
    "HellKnight": "a hell knight",
    "Cacodemon": "a flying monster",
    "LostSoul": "a flying monster",
    "Revenant": "a skeleton",
    "ExplosiveBarrel": "a barrel",
    "BurningBarrel": "a barrel",
    "CustomMedikit": "a medical kit",
    "Medikit": "a medical kit",
}


@dataclass(frozen=True)
class Job:
    """One game: a scenario or a map, a seed, and the file for its clips."""

    scene: str
    seed: int
    file: Path


def jobs(output: Path) -> list[Job]:
    """All jobs, held-out ones first, then by seed: the first half of them has every scene."""
    return [
        Job(scene, seed, output / part / f"{scene}-{seed}.npz")
        for part in ("held-out", "train")
        for seed in SEEDS[part]
        for scene in PLACES
        if part == "held-out" or scene not in HELD_OUT
    ]


class Walker:
    """Turns away from what is near, keeps turning the same way in a corner, and backs out when it is stuck."""

    def __init__(self, random: np.random.RandomState) -> None:
        self.random, self.turn, self.side = random, 0.0, 1.0
        self.places: list[np.ndarray] = []
        self.stands = False

    def action(self, depth: np.ndarray, place: np.ndarray, *, target: bool) -> list[float]:
        """[forward, degrees to the right, attack, use] from the depth [144, 256] and the position [2]."""
        left, ahead, right = (depth[50:100, a:b].astype(np.float32) for a, b in ((0, 85), (96, 160), (171, 256)))
        near = np.percentile(ahead, 20)
        self.places = [*self.places[-24:], place]
        stuck = len(self.places) > 24 and np.abs(self.places[0] - place).sum() < 24
        if self.random.rand() < 0.005:
            self.side = -self.side
        if self.stands:
            self.turn = 0.97 * self.turn + 0.03 * self.side + 0.05 * self.random.randn()
        elif stuck:
            self.turn = TURN * self.side
        elif near < 14:
            if abs(self.turn) < 0.8:
                self.side = 1.0 if right.mean() > left.mean() else -1.0
            self.turn = 0.8 * self.turn + 0.6 * self.side
        else:
            pull = np.clip((right.mean() - left.mean()) / 12, -1, 1)
            self.turn = 0.93 * self.turn + 0.1 * pull + 0.06 * self.random.randn() + 0.02 * self.side
        attack = target and self.random.rand() < 0.1
        use = near < 8 and self.random.rand() < 0.3
        return [float(not self.stands), float(np.clip(self.turn, -TURN, TURN)), int(attack), int(use)]


def caption(place: str, turned: float, walked: float, seen: dict[str, int], shots: int) -> str:
    """A sentence from what the game knows about a clip."""
    how = "walking forward" if walked > 200 else "moving slowly" if walked > 40 else "standing still"
    if abs(turned) > 15:
        how += f" and turning {'right' if turned < 0 else 'left'}"
    text = f"first-person view of {place}, {how}"
    named = sorted({IN_SIGHT[name] for name, frames in seen.items() if frames > 8})
    if named:
        text += f", {' and '.join(named)} in sight"
    return text + (", shooting" if shots > 2 else "")


def start_game(job: Job) -> Any:
    """The game of a job, running, with a player who cannot die."""
    import vizdoom
    from vizdoom import Button, GameVariable

    game = new_game(
        1000 * job.seed + sum(job.scene.encode()), job.scene if job.scene in SCENARIOS else None, scale=SCALE
    )
    if job.scene in MAPS:
        game.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))
        game.set_doom_scenario_path("")
        game.set_doom_map(job.scene)
        game.set_doom_skill(2)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_available_buttons([Button.MOVE_FORWARD, Button.TURN_LEFT_RIGHT_DELTA, Button.ATTACK, Button.USE])
    game.set_available_game_variables([GameVariable.POSITION_X, GameVariable.POSITION_Y, GameVariable.ANGLE])
    game.set_labels_buffer_enabled(True)
    game.set_render_crosshair(False)
    game.set_render_decals(False)
    game.set_render_messages(False)
    game.set_render_particles(False)
    game.set_render_screen_flashes(False)
    game.set_episode_timeout(0)
    game.add_game_args("+sv_cheats 1 +cl_showsecretmessage 0")
    game.init()
    game.send_game_command("god")
    return game


def picture(screen: np.ndarray) -> np.ndarray:
    """uint8 [144, 256, 3] of a screen that is `SCALE` times larger."""
    rows = sum(screen[row::SCALE].astype(np.uint16) for row in range(SCALE))
    return BRIGHTER[sum(rows[:, column::SCALE] for column in range(SCALE)) // SCALE**2]


def render(job: Job) -> tuple[str, int]:
    """Renders a job's clips; (its file, how many clips it gave)."""
    random = np.random.RandomState([job.seed, *job.scene.encode()])
    game = start_game(job)
    walker, clips, captions = Walker(random), [], []

    def step(draw: bool) -> tuple[np.ndarray | None, np.ndarray, set[str], bool, bool]:
        state = game.get_state()
        x, y, angle = state.game_variables
        depth = state.depth_buffer[::SCALE, ::SCALE]
        names = {x.object_name for x in state.labels if x.width * x.height > 60 * SCALE**2} & set(IN_SIGHT)
        blocked = bool(np.median(depth[30:110, 48:208]) < 8)
        action = walker.action(depth, np.array([x, y]), target=bool(names))
        frame = picture(state.screen_buffer) if draw else None
        game.make_action(action, 1)
        return frame, np.array([x, y, angle]), names, bool(action[2]), blocked

    def skip(frames: int, *, restart: bool = False) -> None:
        if restart:
            game.new_episode()
            game.send_game_command("god")
        for _ in range(frames):
            if not game.is_episode_finished():
                step(draw=False)

    skip(80 + 60 * (job.seed % 12))  # another way into the map for each seed
    for _ in range(6 * CLIPS_PER_JOB):
        if len(clips) == CLIPS_PER_JOB:
            break
        frames, states, seen, shots, blocked = [], [], {}, 0, 0
        arena = job.scene in ARENAS
        walker.stands = random.rand() < (0.5 if arena else 0.15)
        if arena and random.rand() < 0.5:
            skip(random.randint(10, 100), restart=True)
        while len(frames) < FRAMES:
            if game.is_episode_finished():
                skip(random.randint(10, 200), restart=True)
                frames, states, seen, shots, blocked = [], [], {}, 0, 0
                continue
            frame, where, names, shot, wall = step(draw=True)
            frames.append(frame)
            states.append(where)
            shots += shot
            blocked += wall
            for name in names:
                seen[name] = seen.get(name, 0) + 1
        states = np.array(states)
        walked = np.abs(np.diff(states[:, :2], axis=0)).sum()
        turned = ((np.diff(states[:, 2]) + 180) % 360 - 180).sum()
        moved = walker.stands or walked > 120
        lively = any(frames > 8 for frames in seen.values()) or random.rand() < 0.5
        if moved and lively and blocked < FRAMES // 4:
            clips.append(np.stack(frames))
            captions.append(caption(PLACES[job.scene], turned, walked, seen, shots))
    game.close()
    part = job.file.with_suffix(".part")
    shape = (0, FRAMES, HEIGHT, WIDTH, 3)
    with open(part, "wb") as file:
        np.savez(file, frames=np.stack(clips) if clips else np.zeros(shape, np.uint8), captions=np.array(captions))
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
