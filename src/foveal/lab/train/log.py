"""What a run tells: a progress line, `metrics.jsonl`, and the curves of a tracker."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from foveal.lab.terminal import Progress, Stage
from foveal.lab.train.config import TrainingConfig

METRICS_FILE = "metrics.jsonl"
# Lines of progress where there is no terminal to draw a bar on.
LINES = 50


def check_tracker(tracker: str) -> None:
    """Raise an ImportError for a tracker that is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        pip = f"{shlex.quote(sys.executable)} -m pip"
        raise ImportError(f"tracker={tracker!r} is not installed: {pip} install {tracker}")


class RunLog:
    """Where a run's figures and messages go; a context while the run lasts. All but the main process keep silent.

    `metrics.jsonl` has an object a line with its "step": {"loss", "gradient_norm", ...} of a step, and
    {"held_out/sparse", ...} of an evaluation, which comes after the step that it follows.

    Args:
        config: the run.
        accelerator: the run's accelerator.
    """

    def __init__(self, config: TrainingConfig, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output) / METRICS_FILE
        self.progress = Progress(Console(stderr=True), quiet=not accelerator.is_main_process)
        self.stage: Stage | None = None
        self.file: Any = None

    def __enter__(self) -> RunLog:
        self.progress.__enter__()
        return self

    def start(self, step: int) -> None:
        """Begins after `step` steps: what a former process noted of later ones is forgotten."""
        if self.accelerator.is_main_process:
            lines = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            with self.config.output_folder().writing(METRICS_FILE, grows=True) as aside:
                aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        if self.config.tracker != "none":
            tensorboard = self.config.tracker == "tensorboard"
            self.accelerator.init_trackers(
                "tensorboard" if tensorboard else "foveal",
                init_kwargs={"tensorboard": {"purge_step": step + 1}} if tensorboard else {},
            )
        self.stage = self.progress.open("train", self.config.steps, done=step, brief=True)

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.progress.__exit__(kind, *error)
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()  # of the trackers, and of the group of processes

    def note(self, step: int, figures: dict[str, Any]) -> None:
        """Keeps some figures of a step; those that are None are left out."""
        figures = {name: value for name, value in figures.items() if value is not None}
        try:
            if self.file is not None:
                self.file.write(json.dumps({"step": step, **figures}) + "\n")
                self.file.flush()
            self.accelerator.log({name: float(value) for name, value in figures.items()}, step=step)
        except OSError as error:
            # Figures are not worth ending a run for.
            self.warn(f"the figures of step {step} were not written: {error}")

    def show(self, step: int, description: str) -> None:
        """Move the bar; without a terminal, print a line for some of the steps, and at least every 15 seconds."""
        self.stage.reach(step, description)
        steps = self.config.steps
        if self.progress.bar is None and (step == 1 or step == steps or step % max(1, steps // LINES) == 0):
            self.say(f"step {step} of {steps}: {description}")

    def doing(self, activity: str) -> AbstractContextManager:
        """Report something other than steps while the block runs."""
        return self.stage.doing(activity)

    @contextlib.contextmanager
    def before_steps(self, activity: str) -> Iterator[None]:
        """Report an activity before the steps begin, while the block runs."""
        progress = Progress(self.progress.console, quiet=self.progress.quiet)
        with progress, progress.stage(activity, brief=True):
            yield

    def say(self, message: str) -> None:
        self.progress.say(message)

    def warn(self, message: str) -> None:
        self.progress.say(f"warning: {message}", style="yellow")


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that was cut off as it was written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
