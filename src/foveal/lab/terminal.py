"""What the commands draw while they run."""

from __future__ import annotations

from typing import Any


def progress_bar(console: Any) -> Any:
    """A rich progress bar with a count, the time so far and an estimate of what is left, for `with`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class FileProgress:
    """A bar over files, for `precompute`; a file that is left out gets a line of its own.

    Args:
        bar: from `progress_bar`, started.
    """

    def __init__(self, bar: Any) -> None:
        self.bar, self.task = bar, None

    def start(self, files: int, done: int) -> None:
        self.task = self.bar.add_task("encode", total=files, completed=done)

    def advance(self, source: Any, reason: str | None) -> None:
        if reason is not None:
            self.bar.console.print(f"left out: {reason}", markup=False, highlight=False)
        self.bar.advance(self.task)


class StepProgress:
    """A bar over the denoising steps of all outputs, for `generate`.

    Args:
        bar: from `progress_bar`, started.
    """

    def __init__(self, bar: Any) -> None:
        self.bar, self.task, self.jobs, self.begun = bar, None, 0, 0

    def start(self, jobs: int, done: int, steps: int) -> None:
        self.jobs, self.begun = jobs, done
        self.task = self.bar.add_task("generate", total=jobs * steps, completed=done * steps)
        if done:
            self.bar.console.print(f"{done} of {jobs} outputs are there already", highlight=False)

    def begin(self, job: Any, again: str | None) -> None:
        self.begun += 1
        self.bar.update(self.task, description=f"{job.arm} {self.begun}/{self.jobs}")
        if again is not None:
            self.bar.console.print(f"{job.name}: made again, {again}", markup=False, highlight=False)

    def step(self) -> None:
        self.bar.advance(self.task)
