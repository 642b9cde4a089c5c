"""Reports where a command stands while it runs: a bar on a terminal, elsewhere a line at least every 15 seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Less than the promised 15, so that a busy machine keeps the promise too.
HEARTBEAT_SECONDS = 12.0


class Progress:
    """Reports a command's stages. It is a context manager, entered while the command runs.

    On a terminal it draws bars. Elsewhere it prints a line when a stage begins and another when it is done. In between,
    a thread prints where the stage stands whenever nothing was printed for `every` seconds, so a single step of several
    minutes is reported too.

    Args:
        console: a rich console, or a `PlainConsole`.
        units: the total work of all stages. The stages then share one bar, each step advances it by the step's units,
            and the estimate is for the whole command. None gives each stage its own bar.
        bars: False prints lines on a terminal too.
        quiet: print nothing.
        every: seconds of silence before a line is printed.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        console: Any,
        *,
        units: float | None = None,
        bars: bool = True,
        quiet: bool = False,
        every: float = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.quiet, self.every, self.clock = console, quiet, every, clock
        self.whole = None if units is None else Pace(clock, total=units)
        self.bar = _bar(console, counts=units is None) if bars and console.is_terminal and not quiet else None
        self.task: Any = None
        self.current: Stage | None = None
        self.said_at = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        elif not self.quiet:
            self._thread = threading.Thread(target=self._beats, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None and self.current is not None:
            self.current.close()
        self._ended.set()
        if self.bar is not None:
            self.bar.stop()
        if self._thread is not None:
            self._thread.join()

    def open(
        self, title: str, steps: int | None = None, *, done: int = 0, noun: str = "steps", brief: bool = False
    ) -> Stage:
        """Begin a stage. It is the current one until it is closed or another stage begins.

        Args:
            title: what the stage does.
            steps: the number of steps; None if it is not known.
            done: the number of steps that an earlier run took.
            noun: what the steps are called.
            brief: the stage is usually short. Without a terminal, it is reported only if it lasts.
        """
        self.current = Stage(self, title, steps, done, noun, brief)
        return self.current

    @contextlib.contextmanager
    def stage(
        self, title: str, steps: int | None = None, *, units: float = 0.0, brief: bool = False
    ) -> Iterator[Stage]:
        """A stage that is closed when the block succeeds. Its steps share `units` of the total work."""
        stage = self.open(title, steps, brief=brief)
        stage.units = units
        yield stage
        stage.close()

    def say(self, line: str, *, style: str | None = None) -> None:
        """Print a line, above the bar if there is one."""
        self.said_at = self.clock()
        if not self.quiet:
            self.console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)

    def beat(self) -> None:
        """Print where the current stage stands, if nothing was printed for `every` seconds."""
        stage = self.current
        if stage is not None and self.clock() - self.said_at >= self.every:
            self.say(stage.where())

    def _beats(self) -> None:
        while not self._ended.wait(max(0.0, self.said_at + self.every - self.clock()) or self.every):
            self.beat()


class Pace:
    """Measures how fast work proceeds, and estimates how long the rest will take.

    Args:
        clock: returns the time in seconds.
        total: the amount of work; None if it is not known.
        done: the amount that was done before the clock started.
    """

    def __init__(self, clock: Callable[[], float], *, total: float | None, done: float = 0.0) -> None:
        self.clock, self.total, self.done = clock, total, done
        self._begun = self._last = (clock(), done)
        self._first: tuple[float, float] | None = None

    def reach(self, done: float) -> None:
        self.done = done
        self._last = (self.clock(), done)
        # The first step compiles kernels and fills caches, so the estimate uses only the steps after it.
        self._first = self._first or self._last

    @property
    def elapsed(self) -> float:
        return self.clock() - self._begun[0]

    @property
    def left(self) -> float | None:
        """Estimated seconds until everything is done; None while there is nothing to estimate from."""
        if self.total is None or self._first is None:
            return None
        end, done = self._last
        start, before = self._first if done > self._first[1] else self._begun
        if done <= before:
            return None
        return max(0.0, (self.total - done) * (end - start) / (done - before) - (self.clock() - end))


class Stage:
    """One stage of a command. `Progress.open` makes it."""

    def __init__(self, progress: Progress, title: str, steps: int | None, done: int, noun: str, brief: bool) -> None:
        self.progress, self.title, self.steps, self.noun, self.brief = progress, title, steps, noun, brief
        self.pace = Pace(progress.clock, total=steps, done=done)
        self.note, self.units = "", 0.0
        self._activity = ""
        if progress.bar is not None:
            if progress.whole is None:
                progress.task = progress.bar.add_task(self._described(), total=steps, completed=done)
            elif progress.task is None:
                progress.task = progress.bar.add_task(self._described(), total=progress.whole.total)
            self.task = progress.task
            self._draw()
        elif not brief:
            progress.say(f"{title}: {steps} {noun}" if steps is not None and steps > 1 else title)

    def advance(self, note: str = "") -> None:
        """Report that a step is done, with an optional note, such as its loss."""
        self.reach(int(self.pace.done) + 1, note)

    def reach(self, done: int, note: str = "") -> None:
        """Report how many steps are done."""
        whole, before = self.progress.whole, self.pace.done
        self.pace.reach(done)
        if whole is not None and self.steps:
            whole.reach(whole.done + self.units * (done - before) / self.steps)
        self.note = note
        self._draw()

    def rename(self, title: str) -> None:
        self.title = title
        self._draw()

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Report an activity other than the steps while the block runs."""
        self._activity = activity
        self._draw()
        try:
            yield
        finally:
            self._activity = ""
            self._draw()

    def close(self) -> None:
        if self.progress.bar is None and not self.brief:
            figures = [f"{self.title}: done", f"{self.pace.elapsed:.1f} s", self.note]
            self.progress.say(", ".join(figure for figure in figures if figure))
        if self.progress.current is self:
            self.progress.current = None

    def where(self) -> str:
        """A line with the step, the time so far, an estimate of the time left, and the last note."""
        whole, parts = self.progress.whole, []
        if self.steps is not None:
            parts.append(f"{int(self.pace.done)} of {self.steps} {self.noun}")
        parts.append(f"{duration(self.pace.elapsed)} so far")
        if whole is not None:
            parts.append(f"{100 * whole.done / whole.total:.0f} % of all")
        left = self.pace.left if whole is None else whole.left
        if left is not None:
            parts.append(f"about {duration(left)} left" + ("" if whole is None else " in all"))
        parts += [part for part in (self.note, self._activity) if part]
        return f"{self.title}: {', '.join(parts)}"

    def _draw(self) -> None:
        if self.progress.bar is not None:
            done = self.pace.done if self.progress.whole is None else self.progress.whole.done
            self.progress.bar.update(self.task, completed=done, description=self._described())

    def _described(self) -> str:
        from rich.markup import escape

        note = self._activity or self.note
        return f"{escape(self.title)} [dim]{escape(note)}[/]" if note else escape(self.title)


def duration(seconds: float) -> str:
    """Minutes and seconds as 12:05, or with hours as 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _bar(console: Any, *, counts: bool) -> Any:
    """A rich progress bar with a count or a percentage, the time so far, and an estimate of the time left."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", justify="left"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn() if counts else progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    )


class PlainConsole:
    """Prints plain lines to standard error, without rich. It has the part of rich's console that `Progress` needs."""

    is_terminal = False

    def print(self, line: str, **style: object) -> None:
        print(line, file=sys.stderr, flush=True)


class FileProgress:
    """Progress over files, for `precompute`; a file that is left out gets a line of its own.

    Args:
        progress: the command's, entered.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress, self.stage = progress, None

    def start(self, files: int, done: int) -> None:
        self.stage = self.progress.open("encode", files, done=done, noun="files")

    def advance(self, source: Any, reason: str | None) -> None:
        if reason is not None:
            self.progress.say(f"left out: {reason}")
        self.stage.advance()


class StepProgress:
    """Progress over the denoising steps of all outputs, for `generate`.

    Args:
        progress: the command's, entered.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress, self.stage, self.jobs, self.begun = progress, None, 0, 0

    def start(self, jobs: int, done: int, steps: int) -> None:
        self.jobs, self.begun = jobs, done
        self.stage = self.progress.open("generate", jobs * steps, done=done * steps)
        if done:
            self.progress.say(f"{done} of {jobs} outputs are there already")

    def begin(self, job: Any, again: str | None) -> None:
        self.begun += 1
        self.stage.rename(f"{job.arm} {self.begun}/{self.jobs}")
        if again is not None:
            self.progress.say(f"{job.name}: made again, {again}")

    def step(self) -> None:
        self.stage.advance()

    def compare(self, pairs: int) -> None:
        self.stage.close()
        self.stage = self.progress.open("compare", pairs, noun="pairs")
