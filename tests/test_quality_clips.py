"""The clips of the quality runs: which games are played, and what their captions say. No game is played here."""

import struct
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"


@pytest.fixture
def clips(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    import clips

    yield clips
    for name in ("clips", "game"):
        sys.modules.pop(name, None)


def test_training_and_held_out_clips_share_no_game(clips, tmp_path):
    games = {part: [job for job in clips.jobs(tmp_path) if job.file.parent.name == part] for part in clips.SEEDS}
    scenes = {part: {job.scene for job in found} for part, found in games.items()}
    assert scenes["held-out"] - scenes["train"] == set(clips.HELD_OUT)
    played = {part: {(job.scene, job.seed) for job in found} for part, found in games.items()}
    assert not played["train"] & played["held-out"]
    assert len(games["train"]) * clips.CLIPS_PER_JOB >= 3000
    assert len(games["held-out"]) * clips.CLIPS_PER_JOB >= 200
    page = " ".join((QUALITY.parents[1] / "docs" / "tiny.md").read_text().split())
    assert f"{len(games['train']) * clips.CLIPS_PER_JOB:,} clips of four scenarios" in page
    assert f"{len(games['held-out']) * clips.CLIPS_PER_JOB} clips of other walks are held out" in page
    assert len({job.file for found in games.values() for job in found}) == len(clips.jobs(tmp_path))


def test_a_picture_is_the_brightened_mean_of_the_larger_screen(clips):
    screen = np.random.RandomState(0).randint(0, 256, (288, 512, 3)).astype(np.uint8)
    mean = screen.reshape(144, 2, 256, 2, 3).astype(int).sum((1, 3)) // 4
    assert np.array_equal(clips.picture(screen), clips.BRIGHTER[mean])
    assert (clips.BRIGHTER[0], clips.BRIGHTER[255]) == (0, 255)
    assert (np.diff(clips.BRIGHTER.astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("turned", "walked", "seen", "event", "expected"),
    [
        (0, 400, {}, "", "walking forward"),
        (40, 200, {}, "", "moving slowly and turning left"),
        (9, 20, {}, "a door opens", "standing still, a door opens"),
        (-40, 400, {"DoomImp": 17, "Zombieman": 16}, "", "walking forward and turning right, an imp ahead"),
        (0, 400, {"Zombieman": 20, "ShotgunGuy": 20}, "", "walking forward, a soldier ahead"),
        (
            0,
            0,
            {"Zombieman": 20, "Demon": 20},
            "a door opens",
            "standing still, a demon and a soldier ahead, a door opens",
        ),
    ],
)
def test_captions_say_what_the_game_knows(clips, turned, walked, seen, event, expected):
    assert clips.caption("a cave", turned, walked, seen, event) == f"first-person view of a cave, {expected}"


def test_long_and_large_clips_have_jobs_and_captions_of_their_own(clips, tmp_path):
    found = clips.jobs(tmp_path, seeds=2, frames=97, times=2)
    assert {job.seed for job in found if job.file.parent.name == "train"} == {0, 1}
    assert {job.seed for job in found if job.file.parent.name == "held-out"} == {100, 101}
    assert {(job.frames, job.times, job.scale) for job in found} == {(97, 2, 4)}
    # The same pace over twice the time, and an enemy in a third of the frames.
    assert clips.caption("a cave", 0, 420, {"Demon": 33}, frames=97).endswith("walking forward, a demon ahead")
    assert clips.caption("a cave", 0, 210, {"Demon": 32}, frames=97).endswith("moving slowly")


def test_doors_are_lines_of_their_kinds_that_have_another_side(clips, tmp_path):
    import game

    corners = np.array([[0, 0], [0, 128], [64, 0], [64, 32]], "<i2")
    #        begin, end, flags, kind, tag, front, back
    lines = [
        (0, 1, 0, 1, 0, 0, 1),  # a door 128 wide that opens toward larger x
        (1, 0, 0, 117, 0, 0, 1),  # the same from its other side
        (0, 1, 0, 11, 0, 0, 1),  # a switch
        (0, 1, 0, 31, 0, 0, 0xFFFF),  # nothing behind it
        (2, 3, 0, 31, 0, 0, 1),  # too narrow
    ]
    lumps = {"MAP01": b"", "LINEDEFS": np.array(lines, "<u2").tobytes(), "VERTEXES": corners.tobytes()}
    body = b"".join(lumps.values())
    directory, start = b"", 12
    for name, content in lumps.items():
        directory += struct.pack("<II8s", start, len(content), name.encode())
        start += len(content)
    wad = tmp_path / "game.wad"
    wad.write_bytes(struct.pack("<4sII", b"PWAD", len(lumps), 12 + len(body)) + body + directory)
    doors = game.read_doors(wad, "map01")
    assert [(door.middle.tolist(), door.outward.tolist()) for door in doors] == [([0, 64], [1, 0]), ([0, 64], [-1, 0])]


def test_slow_actions_are_a_share_of_the_walkers_speed(clips):
    for speed, forward, backward in ((0.0, 0, 0), (0.25, 5, 0), (-0.5, 0, 10)):
        act = clips.Slow(speed, 0.5)
        actions = np.array([act(None, None) for _ in range(20)])
        assert actions.sum(0).tolist() == [forward, backward, 10, 0]
