"""Three clocks. A power-limited card runs a burst after a pause faster than the same work over time, and the order of
measurements can shift a result by several percent. Candidates therefore take turns, and all times are kept.

rested: a few calls at a time after a pause, with the L2 cache flushed before each call and the first call of a burst
    dropped. The device is kept busy until the host is ahead with its launches, as in the middle of a model. This is
    device time, including gaps between kernels.
sustained: the mean time of calls back to back, with warm caches and launches included.
host: the time until a call returns, queued behind other work, which is the cost of its launches.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Function = Callable[[], object]

# What is timed of a candidate; "both" is a forward that builds the graph and its backward.
PASSES = ("forward", "backward", "both")
FLUSH_BYTES = 2**28
# Writes before a burst, about 6 ms of them on an H100. While they run, the host gets ahead with its launches.
FLUSHES_AHEAD = 64
# The host's clock counts so many calls, a few at a time behind the writes that keep the device busy meanwhile; fewer of
# those that would take the device longer than this altogether.
HOST_CALLS, HOST_BATCH, HOST_MILLISECONDS = 200, 8, 2000


class Timer(Protocol):
    """How to time one kind of device."""

    def burst(self, function: Function, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls, after a pause and one call that does not count."""

    def sustained(self, function: Function, calls: int) -> float:
        """Mean milliseconds of `calls` calls back to back."""

    def host(self, function: Function, calls: int = HOST_CALLS) -> float:
        """Median milliseconds of `calls` calls until one returns, regardless of what it launched."""


class CudaTimer:
    """Times with CUDA events.

    Args:
        device: a CUDA device.
        pause: seconds of rest before each burst.
    """

    def __init__(self, device: torch.device, pause: float = 0.03) -> None:
        self.device, self.pause = device, pause
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def burst(self, function: Function, calls: int) -> list[float]:
        torch.cuda.synchronize(self.device)
        time.sleep(self.pause)
        for _ in range(FLUSHES_AHEAD):
            self._flush.zero_()
        spans = []
        for _ in range(calls + 1):
            self._flush.zero_()
            spans.append(self._span(function))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) for start, stop in spans[1:]]

    def sustained(self, function: Function, calls: int) -> float:
        torch.cuda.synchronize(self.device)
        time.sleep(self.pause)

        def repeated() -> None:
            for _ in range(calls):
                function()

        start, stop = self._span(repeated)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / calls

    def host(self, function: Function, calls: int = HOST_CALLS) -> float:
        times, batch = [], min(calls, HOST_BATCH)
        for _ in range(calls // batch):
            torch.cuda.synchronize(self.device)
            for _ in range(FLUSHES_AHEAD):
                self._flush.zero_()
            times += [_host_milliseconds(function) for _ in range(batch)]
        torch.cuda.synchronize(self.device)
        return statistics.median(times)

    def _span(self, function: Function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        return start, stop


class CpuTimer:
    """Times with the host's clock, without pauses or flushes."""

    def burst(self, function: Function, calls: int) -> list[float]:
        function()
        return [self.sustained(function, 1) for _ in range(calls)]

    def sustained(self, function: Function, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - start) / calls

    def host(self, function: Function, calls: int = HOST_CALLS) -> float:
        return _host_milliseconds(function)


def _host_milliseconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def in_turns(timer: Timer, functions: dict[Key, Function], *, rounds: int, calls: int) -> dict[Key, list[float]]:
    """Each function's rested milliseconds, from `rounds` bursts of `calls` calls; every round has a burst of each."""
    rested: dict[Key, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            rested[key] += timer.burst(function, calls)
    return rested


def measure(
    timer: Timer, functions: dict[Key, Function], *, rounds: int, calls: int, seconds: float
) -> dict[Key, tuple[list[float], float, float]]:
    """Time every function, in turns.

    Args:
        rounds, calls: bursts per function, and calls that count in each burst.
        seconds: approximate duration of each sustained measurement.

    Returns:
        Each function's (rested milliseconds, one per call; sustained milliseconds; host milliseconds).
    """
    rested = in_turns(timer, functions, rounds=rounds, calls=calls)
    medians = {key: max(statistics.median(times), 1e-3) for key, times in rested.items()}
    sustained = {
        key: timer.sustained(function, max(1, math.ceil(1e3 * seconds / medians[key])))
        for key, function in functions.items()
    }
    host = {
        key: timer.host(function, min(HOST_CALLS, max(2, int(HOST_MILLISECONDS / medians[key]))))
        for key, function in functions.items()
    }
    return {key: (rested[key], sustained[key], host[key]) for key in functions}


def peak_memory(device: torch.device, function: Callable[[], tuple[Tensor, ...]]) -> int:
    """Peak bytes of device memory that `function` needs beyond its inputs and outputs."""
    gc.collect()  # memory freed in the middle of a call would count as its own
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = function()
    torch.cuda.synchronize(device)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return torch.cuda.max_memory_allocated(device) - before - sum(storages.values())
