"""The clips of the quality runs: which games are played, and what their captions say. No game is played here."""

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
    assert len({job.file for found in games.values() for job in found}) == len(clips.jobs(tmp_path))
    page = (QUALITY.parents[1] / "docs" / "tiny.md").read_text()
    assert f"{len(games['train']) * clips.CLIPS_PER_JOB:,} clips of seven scenarios" in page
    assert f"{len(games['held-out']) * clips.CLIPS_PER_JOB} clips of other walks are held out" in page


def test_a_picture_is_the_brightened_mean_of_the_larger_screen(clips):
    screen = np.random.RandomState(0).randint(0, 256, (288, 512, 3)).astype(np.uint8)
    mean = screen.reshape(144, 2, 256, 2, 3).astype(int).sum((1, 3)) // 4
    assert np.array_equal(clips.picture(screen), clips.BRIGHTER[mean])
    assert (clips.BRIGHTER[0], clips.BRIGHTER[255]) == (0, 255)
    assert (np.diff(clips.BRIGHTER.astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("turned", "walked", "seen", "shots", "expected"),
    [
        (0, 400, {}, 0, "first-person view of a cave, walking forward"),
        (40, 200, {}, 2, "first-person view of a cave, moving slowly and turning left"),
        (9, 20, {}, 0, "first-person view of a cave, standing still"),
        (-40, 400, {"DoomImp": 9, "Zombieman": 8}, 3, "first-person view of a cave, walking forward and turning right, "
         "an imp in sight, shooting"),
        (0, 400, {"Zombieman": 20, "ShotgunGuy": 20}, 0, "first-person view of a cave, walking forward, a soldier in "
         "sight"),
    ],
)  # fmt: skip
def test_captions_say_what_the_game_knows(clips, turned, walked, seen, shots, expected):
    assert clips.caption("a cave", turned, walked, seen, shots) == expected
