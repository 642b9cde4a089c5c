"""Handle what goes wrong in training: skip bad losses, end the run cleanly on signals, and explain lack of memory."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterator

from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.settings import FaultSettings

RECENT_LOSSES = 50
# No loss counts as a spike until this many losses are known.
MEDIAN_NEEDS = 10


class TrainingError(RuntimeError):
    """A run cannot continue; the message says what to do about it."""


class LossGuard:
    """Refuses steps whose loss or gradient is not finite, or whose loss is a spike.

    Args:
        settings: what counts as a spike, and how many bad steps in a row are too many.
        report: called with a line for every refused step.
    """

    def __init__(self, settings: FaultSettings, report: Callable[[str], None]) -> None:
        self.settings, self.report = settings, report
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT_LOSSES)
        self.refused = 0

    def accept(self, loss: float, gradient_norm: float) -> bool:
        """Whether to take a step with this loss and gradient.

        Raises:
            TrainingError: too many bad steps in a row.
        """
        problem = self._problem(loss, gradient_norm)
        if not problem:
            self.recent.append(loss)
            self.refused = 0
            return True
        self.refused += 1
        self.report(f"step skipped: {problem}")
        if self.refused >= self.settings.max_skipped:
            raise TrainingError(
                f"{self.refused} steps in a row were skipped, the last one since {problem}; lower the learning rates, "
                "or resume from an earlier checkpoint by removing the later ones"
            )
        return False

    def _problem(self, loss: float, gradient_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient's norm is {gradient_norm}"
        if len(self.recent) >= MEDIAN_NEEDS:
            median = statistics.median(self.recent)
            if loss > self.settings.spike_factor * median:
                return f"the loss is {loss:.4g}, {loss / median:.0f} times the median of the last {len(self.recent)}"
        return ""

    def state_dict(self) -> dict:
        return {"recent": list(self.recent), "refused": self.refused}

    def load_state_dict(self, state: dict) -> None:
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.refused = state["refused"]


@contextlib.contextmanager
def stopping_on_signals(report: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that SIGTERM and the first SIGINT set. The second SIGINT interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        report(f"{signal.Signals(number).name}: saving after this step")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def out_of_memory(config: TrainingConfig, error: BaseException) -> TrainingError:
    """Suggest what to change, among the settings that this run has not changed yet."""
    advice = []
    if config.micro_batch_size > 1:
        advice.append(f"micro_batch_size below {config.micro_batch_size} (batch_size stays: gradients accumulate)")
    if not config.model.gradient_checkpointing:
        advice.append("model.gradient_checkpointing")
    elif config.context_parallel > 1 and config.model.compile and config.model.keep_exchanged:
        advice.append("no model.keep_exchanged")
    if config.precision != "bf16":
        advice.append('precision "bf16"')
    if config.parallel != "fsdp":
        advice.append('several devices with parallel "fsdp"')
    if config.optimizer.name != "adamw8bit" and config.parallel != "fsdp":
        advice.append('optimizer.name "adamw8bit"')
    if config.optimizer.ema_decay is not None:
        advice.append("no optimizer.ema_decay")
    if config.optimizer.trainable in ("all", "attention"):
        advice.append('optimizer.trainable "lora" with model.frozen_dtype "bfloat16"')
    if config.objective.distillation and config.objective.teacher == "copy":
        advice.append("no objective.distillation, whose teacher is a second model")
    advice.append("fewer frames or pixels in the data")
    first = str(error).split(". ")[0]
    return TrainingError(f"out of memory ({first}). To use less, try: " + "; ".join(advice))
