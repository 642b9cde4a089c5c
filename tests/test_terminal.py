"""What long commands say while they run, on a terminal and off it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("rich")

from rich.console import Console

from foveal.lab.terminal import HEARTBEAT_SECONDS, Progress, duration


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock():
    return Clock()


def told(clock, **options):
    """(progress that is not entered, so that only the test beats; what it has said)."""
    file = io.StringIO()
    return Progress(Console(file=file), clock=clock, **options), lambda: file.getvalue().splitlines()


def test_a_silence_ends_in_time(clock):
    progress, lines = told(clock)
    with progress.stage("train", 100):
        said = 1
        for _ in range(3):
            clock.passes(HEARTBEAT_SECONDS - 1)
            progress.beat()
            assert len(lines()) == said
            clock.passes(1)
            progress.beat()
            assert len(lines()) == said + 1
            progress.say("another sign of life")
            said = len(lines())
    assert HEARTBEAT_SECONDS < 15


def test_a_line_has_step_time_estimate_and_note(clock):
    progress, lines = told(clock)
    with progress.stage("train", 10) as stage:
        clock.passes(30)
        progress.beat()
        assert lines()[-1] == "train: 0 of 10 steps, 0:30 so far"
        stage.advance("loss 2.000")
        # After one step only that step is known.
        clock.passes(30)
        progress.beat()
        assert lines()[-1] == "train: 1 of 10 steps, 1:00 so far, about 4:00 left, loss 2.000"
        stage.advance("loss 1.000")
        # The first step compiles: the 25 s of each later one count.
        clock.passes(20)
        stage.advance("loss 0.500")
        progress.beat()
        assert lines()[-1] == "train: 3 of 10 steps, 1:20 so far, about 2:55 left, loss 0.500"
        with stage.doing("held-out loss"):
            clock.passes(20)
            progress.beat()
        assert lines()[-1] == "train: 3 of 10 steps, 1:40 so far, about 2:35 left, loss 0.500, held-out loss"
    assert lines()[0] == "train: 10 steps"
    assert lines()[-1] == "train: done, 100.0 s, loss 0.500"


def test_a_run_that_goes_on_counts_its_own_steps_for_the_estimate(clock):
    progress, lines = told(clock)
    progress.open("encode", 100, done=90, noun="files").reach(90)
    clock.passes(20)
    progress.current.advance()
    progress.beat()
    assert lines() == ["encode: 100 files", "encode: 91 of 100 files, 0:20 so far, about 3:00 left"]


def test_stages_of_a_whole_share_one_estimate(clock):
    progress, lines = told(clock, units=100)
    with progress.stage("first", 2, units=60) as stage:
        clock.passes(30)
        stage.advance()
        clock.passes(30)
        stage.advance("loss 1.000")
    with progress.stage("second", 4, units=40) as stage:
        clock.passes(10)
        stage.advance()
        clock.passes(HEARTBEAT_SECONDS)
        progress.beat()
    # 40 units in the 40 seconds after the first step, 30 are left, 12 seconds of them are over.
    assert lines()[-2] == "second: 1 of 4 steps, 0:22 so far, 70 % of all, about 0:18 left in all"


def test_brief_stages_are_told_of_only_if_they_last(clock):
    progress, lines = told(clock)
    with progress.stage("load", brief=True):
        clock.passes(1)
        progress.beat()
    assert lines() == []
    with progress.stage("load", brief=True):
        clock.passes(60)
        progress.beat()
    assert lines() == ["load: 1:00 so far"]
    # Nothing is going on.
    clock.passes(60)
    progress.beat()
    assert len(lines()) == 1


def test_a_quiet_one_says_nothing(clock):
    progress, lines = told(clock, quiet=True)
    with progress, progress.stage("train", 10) as stage:
        clock.passes(60)
        stage.advance()
        progress.beat()
        progress.say("line")
    assert lines() == []


def test_a_terminal_gets_one_bar_for_the_whole(clock):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with Progress(console, units=100) as progress:
        for title in ("first [one]", "second"):
            with progress.stage(title, 2, units=50) as stage:
                stage.advance("loss 1.000")
                stage.advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    # A bar is drawn over the one before: only the end of the last one is a new line.
    assert shown.count("\n") == 1
    assert re.search(r"\rfirst \[one\] .*\rsecond .* 100% ", shown)


def test_a_pipe_hears_from_a_step_that_lasts():
    """The thread speaks while the command computes or sleeps, and ends with it, whatever way it ends."""
    script = """
import time
from rich.console import Console
from foveal.lab.terminal import Progress
with Progress(Console(stderr=True), every=0.2) as progress, progress.stage("compile", 3) as stage:
    stage.advance("loss 1.000")
    time.sleep(0.9)
    raise SystemExit(5)
"""
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 5
    assert time.monotonic() - started < 30
    first, *beats = run.stderr.splitlines()
    assert first == "compile: 3 steps"
    # One is the least on a machine that is busy.
    assert 1 <= len(beats) <= 4
    assert all(re.fullmatch(r"compile: 1 of 3 steps, 0:0\d so far, about 0:0\d left, loss 1\.000", b) for b in beats)
    assert run.stdout == ""


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 725, 3725)] == ["0:00", "1:00", "12:05", "1:02:05"]
