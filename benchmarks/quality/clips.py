"""Captioned clips of game video, from ViZDoom's scenarios and maps of Freedoom, rendered on all cores.

    python benchmarks/quality/clips.py --output FOLDER
    python benchmarks/quality/clips.py --output FOLDER --frames 97 --times 2 --seeds 4

There are three kinds of clips. In a *walk* the player steers by the depth buffer, so that it follows corridors and
does not stare at walls, or it stands and looks around. In a *meeting* an enemy stands close ahead, where a command of
the game has put it. At a *door* the player sees a door open, and may walk toward it. Captions say which place it is,
how the player moves, and which enemy or door is plainly in sight, all from the game's own state.

The game is drawn at twice the size and averaged, which takes away the flicker of its textures, and brightened. A job (a
scene and a seed) always takes the same walks, with the same captions; pixels of effects differ from run to run in some
scenes. `held-out` has seeds of its own, and a map of its own. Jobs that are on disk are not rendered again.

FOLDER/PART/JOB.npz holds `frames` uint8 [clips, 49, 144, 256, 3] at 35 frames a second, and `captions`. The second
command renders 97 frames of 288 x 512 pixels, of fewer games. This file imports no torch, because each of its processes
would load it.

ViZDoom is under the MIT license, Freedoom's maps, textures, and sprites are under the BSD license.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from game import Door, new_game, read_doors

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
}
MAPS = {
    "map01": "a gray stone base with lit signs",
    "map04": "a white and gray hall",
    "map07": "a stone hall with screens",
    "map09": "a hall of concrete and blood",
    "map12": "a building by the water",
}
PLACES = {**SCENARIOS, **MAPS}
HELD_OUT = ("map07",)  # maps that no training clip shows
SEEDS = {"train": range(20), "held-out": range(100, 102)}
# Of the clips of a job. What is left are walks.
SHARES = {"scenario": {"meeting": 10}, "map": {"meeting": 6, "door": 7}}
ENEMIES = ("Zombieman", "DoomImp", "Demon")
CROWD = "MarineChainsawVzd"  # they surround a player who stands, and hide the enemy
NAMES = {
    "Zombieman": "a soldier",
    "ShotgunGuy": "a soldier",
    "ChaingunGuy": "a soldier",
    "MarineChainsawVzd": "a marine",
    "DoomImp": "an imp",
    "Demon": "a demon",
}
DARK = 24  # the mean of a clip's last picture, of 255, below which it is left out
PLAIN = 1400  # pixels of a picture that an enemy's box takes when a caption names it
SETTLED = 3  # ticks, until the picture shows where the player was put


@dataclass(frozen=True)
class Job:
    """One game: a scenario or a map, a seed, and the file for its clips; and how long and how large they are."""

    scene: str
    seed: int
    file: Path
    frames: int = FRAMES
    times: int = 1

    @property
    def scale(self) -> int:
        """How many times larger than 144 x 256 pixels the game draws."""
        return SCALE * self.times


def jobs(output: Path, *, seeds: int | None = None, frames: int = FRAMES, times: int = 1) -> list[Job]:
    """All jobs, held-out ones first, then by seed: the first half of them has every scene. `seeds` limits training."""
    return [
        Job(scene, seed, output / part / f"{scene}-{seed}.npz", frames, times)
        for part in ("held-out", "train")
        for seed in SEEDS[part][: seeds if part == "train" else None]
        for scene in PLACES
        if part == "held-out" or scene not in HELD_OUT
    ]


class Walker:
    """Turns away from what is near, keeps turning the same way in a corner, and backs out when it is stuck."""

    def __init__(self, random: np.random.RandomState) -> None:
        self.random, self.turn, self.side = random, 0.0, 1.0
        self.places: list[np.ndarray] = []

    def action(self, depth: np.ndarray, place: np.ndarray, *, stands: bool) -> list[float]:
        """[forward, backward, degrees to the right, use] from the depth [144, 256] and the position [2]."""
        left, ahead, right = (depth[50:100, a:b].astype(np.float32) for a, b in ((0, 85), (96, 160), (171, 256)))
        near = np.percentile(ahead, 20)
        self.places = [*self.places[-24:], place]
        stuck = len(self.places) > 24 and np.abs(self.places[0] - place).sum() < 24
        if self.random.rand() < 0.005:
            self.side = -self.side
        if stands:
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
        use = near < 8 and self.random.rand() < 0.3
        return [float(not stands), 0, float(np.clip(self.turn, -TURN, TURN)), int(use)]


@dataclass
class Clip:
    """The frames of a clip, and what the game knew: positions [x, y, angle], how far it is to what is ahead, enemies in
    sight, and in how many frames a wall was near."""

    frames: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    ahead: list[float] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    blocked: int = 0

    def walked(self) -> float:
        return float(np.abs(np.diff(np.array(self.states)[:, :2], axis=0)).sum())

    def turned(self) -> float:
        """Degrees, to the left if positive."""
        return float(((np.diff(np.array(self.states)[:, 2]) + 180) % 360 - 180).sum())


def caption(
    place: str, turned: float, walked: float, seen: dict[str, int], event: str = "", *, frames: int = FRAMES
) -> str:
    """A sentence from what the game knows about a clip of so many frames."""
    pace = walked * FRAMES / frames
    how = "walking forward" if pace > 200 else "moving slowly" if pace > 40 else "standing still"
    if abs(turned) > 15:
        how += f" and turning {'right' if turned < 0 else 'left'}"
    named = sorted({NAMES[name] for name, count in seen.items() if count > frames // 3})
    parts = [f"first-person view of {place}", how]
    if named:
        parts.append(f"{' and '.join(named)} ahead")
    return ", ".join([*parts, event] if event else parts)


class Game:
    """The running game of a job, with a player who has no weapon and cannot die."""

    def __init__(self, job: Job) -> None:
        import vizdoom
        from vizdoom import Button, GameVariable

        self.random = np.random.RandomState([job.seed, *job.scene.encode()])
        self.walker, self.place, self.job = Walker(self.random), PLACES[job.scene], job
        game = new_game(
            1000 * job.seed + sum(job.scene.encode()), job.scene if job.scene in SCENARIOS else None, scale=job.scale
        )
        self.doors: list[Door] = []
        if job.scene in MAPS:
            wad = Path(vizdoom.__file__).with_name("freedoom2.wad")
            self.doors = read_doors(wad, job.scene)
            game.set_doom_game_path(str(wad))
            game.set_doom_scenario_path("")
            game.set_doom_map(job.scene)
            game.set_doom_skill(2)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_available_buttons(
            [Button.MOVE_FORWARD, Button.MOVE_BACKWARD, Button.TURN_LEFT_RIGHT_DELTA, Button.USE]
        )
        game.set_available_game_variables([GameVariable.POSITION_X, GameVariable.POSITION_Y, GameVariable.ANGLE])
        game.set_labels_buffer_enabled(True)
        for set_rendered in (
            game.set_render_crosshair,
            game.set_render_weapon,
            game.set_render_decals,
            game.set_render_messages,
            game.set_render_particles,
            game.set_render_screen_flashes,
        ):
            set_rendered(False)
        game.set_episode_timeout(0)
        game.add_game_args("+sv_cheats 1 +cl_showsecretmessage 0")
        game.init()
        self.game = game
        self.restart()

    def restart(self, *commands: str) -> None:
        self.game.new_episode()
        for command in ("god", *commands):
            self.game.send_game_command(command)

    def step(self, action: list[float]) -> None:
        if self.game.is_episode_finished():
            self.restart()
        self.game.make_action(action, 1)

    def wait(self, ticks: int) -> None:
        for _ in range(ticks):
            self.step([0, 0, 0, 0])

    def where(self) -> np.ndarray:
        """[x, y, angle in degrees]."""
        if self.game.is_episode_finished():
            self.restart()
        return np.array(self.game.get_state().game_variables)

    def depth(self) -> np.ndarray:
        """[144, 256] of the picture."""
        if self.game.is_episode_finished():
            self.restart()
        return self.game.get_state().depth_buffer[:: self.job.scale, :: self.job.scale]

    def walk(self, ticks: int, *, stands: bool = False) -> None:
        for _ in range(ticks):
            self.step(self.walker.action(self.depth(), self.where()[:2], stands=stands))

    def record(self, act: Walk | Slow) -> Clip | None:
        """A clip in which `act` gives each action, or None if the game ended."""
        clip = Clip()
        for _ in range(self.job.frames):
            if self.game.is_episode_finished():
                return None
            state = self.game.get_state()
            depth = state.depth_buffer[:: self.job.scale, :: self.job.scale]
            clip.frames.append(picture(state.screen_buffer))
            clip.states.append(np.array(state.game_variables))
            clip.ahead.append(float(np.median(depth[50:90, 112:144])))
            clip.blocked += bool(np.median(depth[30:110, 48:208]) < 8)
            plain = {x.object_name for x in state.labels if x.width * x.height > PLAIN * self.job.scale**2}
            for name in plain & set(NAMES):
                clip.seen[name] = clip.seen.get(name, 0) + 1
            self.game.make_action(act(depth, clip.states[-1][:2]), 1)
        return clip

    def a_walk(self) -> tuple[Clip, str] | None:
        """A walk through the place, or a look around."""
        stands = self.random.rand() < 0.2
        self.walk(self.random.randint(5, 60))
        clip = self.record(Walk(self.walker, stands))
        if clip is None or clip.blocked >= self.job.frames // 4 or not (stands or clip.walked() > 120):
            return None
        return clip, self.caption(clip)

    def a_meeting(self) -> tuple[Clip, str] | None:
        """An enemy close ahead of a player who stands, or slowly moves."""
        self.walk(self.random.randint(5, 60))
        free = []
        for _ in range(8):
            self.step([0, 0, 45, 0])
            free.append(np.percentile(self.depth()[50:100, 100:156], 20))
        self.step([0, 0, 45 * (int(np.argmax(free)) + 1), 0])
        if max(free) < 14:
            return None
        enemy = ENEMIES[self.random.randint(len(ENEMIES))]
        self.game.send_game_command(f"remove {CROWD}")
        self.game.send_game_command(f"summon {enemy}")
        self.wait(2)
        for _ in range(self.random.randint(0, 8)):
            self.step([0, 1, 0, 0])
        speed = (0.0, 0.0, 0.3, -0.3)[self.random.randint(4)]
        clip = self.record(Slow(speed, float(self.random.uniform(-0.3, 0.3))))
        self.game.send_game_command(f"remove {enemy}")
        self.wait(1)
        if clip is None or clip.seen.get(enemy, 0) < 2 * self.job.frames // 3:
            return None
        return clip, self.caption(clip)

    def a_door(self) -> tuple[Clip, str] | None:
        """A door that opens before the player, who walks toward it."""
        door = self.doors[self.random.randint(len(self.doors))]
        self.restart("notarget")
        self.wait(1)
        self.put(door.middle + 56 * door.outward)
        x, y, angle = self.where()
        if abs(x - door.middle[0] - 56 * door.outward[0]) + abs(y - door.middle[1] - 56 * door.outward[1]) > 8:
            return None
        wanted = math.degrees(math.atan2(-door.outward[1], -door.outward[0]))
        self.step([0, 0, (angle - wanted + 180) % 360 - 180, 0])
        self.step([0, 0, 0, 1])
        self.game.send_game_command("freeze")  # all but the player, until the recording begins
        self.put(door.middle + self.random.uniform(110, 170) * door.outward)
        self.wait(SETTLED)
        self.game.send_game_command("freeze")
        speed = (0.0, 0.3, 0.6)[self.random.randint(3)]
        clip = self.record(Slow(speed, float(self.random.uniform(-0.15, 0.15))))
        if clip is None or max(clip.ahead) < 1.5 * clip.ahead[0] or clip.blocked >= self.job.frames // 4:
            return None
        return clip, self.caption(clip, "a door opens")

    def caption(self, clip: Clip, event: str = "") -> str:
        return caption(self.place, clip.turned(), clip.walked(), clip.seen, event, frames=self.job.frames)

    def put(self, place: np.ndarray) -> None:
        self.game.send_game_command(f"warp {place[0]:.0f} {place[1]:.0f}")
        self.wait(1)


class Walk:
    """The actions of a walker."""

    def __init__(self, walker: Walker, stands: bool) -> None:
        self.walker, self.stands = walker, stands

    def __call__(self, depth: np.ndarray, place: np.ndarray) -> list[float]:
        return self.walker.action(depth, place, stands=self.stands)


class Slow:
    """Actions at a share of the walker's speed, backward if it is negative, with a turn in degrees a frame."""

    def __init__(self, speed: float, turn: float) -> None:
        self.speed, self.turn, self.gone = speed, turn, 0.0

    def __call__(self, depth: np.ndarray, place: np.ndarray) -> list[float]:
        self.gone += abs(self.speed)
        go = self.gone >= 1
        self.gone -= go
        return [float(go and self.speed > 0), float(go and self.speed < 0), self.turn, 0]


def picture(screen: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a screen that is `SCALE` times larger."""
    rows = sum(screen[row::SCALE].astype(np.uint16) for row in range(SCALE))
    return BRIGHTER[sum(rows[:, column::SCALE] for column in range(SCALE)) // SCALE**2]


def render(job: Job) -> tuple[str, int]:
    """Renders a job's clips; (its file, how many clips it gave)."""
    game = Game(job)
    shares = SHARES["map" if job.scene in MAPS else "scenario"]
    wanted = {**shares, "walk": CLIPS_PER_JOB - sum(shares.values())}
    takes = {"walk": game.a_walk, "meeting": game.a_meeting, "door": game.a_door}
    clips, captions = [], []
    for kind, count in wanted.items():
        game.restart()
        game.walk(60 * (job.seed % 12) if kind != "door" else 0)  # another way into the map for each seed
        done = 0
        for _ in range(8 * count):
            if done == count:
                break
            found = takes[kind]()
            if found is not None and found[0].frames[-1].mean() >= DARK:
                clips.append(np.stack(found[0].frames))
                captions.append(found[1])
                done += 1
    game.game.close()
    part = job.file.with_suffix(".part")
    shape = (0, job.frames, HEIGHT * job.times, WIDTH * job.times, 3)
    with open(part, "wb") as file:
        np.savez(file, frames=np.stack(clips) if clips else np.zeros(shape, np.uint8), captions=np.array(captions))
    os.replace(part, job.file)
    return job.file.name, len(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="jobs whose file name starts so")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a clip; 1 more than a multiple of 4")
    parser.add_argument("--times", type=int, default=1, choices=(1, 2), help="144 x 256 pixels times this")
    parser.add_argument("--seeds", type=int, help="training games of each place, at most")
    options = parser.parse_args()
    started = time.time()
    wanted = jobs(options.output.resolve(), seeds=options.seeds, frames=options.frames, times=options.times)
    left = [job for job in wanted if not job.file.exists()]
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
