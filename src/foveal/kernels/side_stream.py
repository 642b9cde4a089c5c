"""A second stream for kernels that fit beside those of the current one, in calls that are worked out and in replays."""

from __future__ import annotations

import threading

import torch

from foveal.kernels.host import CACHES, RECORDING


class SideStream:
    """A stream of higher priority, for kernels that fit beside those of the current stream.

    Launches inside `with side:` go to it. When the block ends, the current stream waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._from = threading.local()

    def follow(self) -> None:
        """Makes it wait for everything that the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        if RECORDING.recorder is not None:
            RECORDING.recorder.called(self.follow)

    def __enter__(self) -> None:
        if RECORDING.recorder is not None:
            RECORDING.recorder.entered(self)
        self._from.stream = torch.cuda.current_stream()
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_stream(self._from.stream)
        self._from.stream.wait_stream(self._stream)
        if RECORDING.recorder is not None:
            RECORDING.recorder.left()


_STREAMS: dict[torch.device, SideStream] = {}
CACHES.append(_STREAMS)


def side_stream(device: torch.device) -> SideStream:
    """The side stream of a device. There is one."""
    if device not in _STREAMS:
        _STREAMS[device] = SideStream(device)
    return _STREAMS[device]
