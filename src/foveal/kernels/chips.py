"""What the launch code knows of a GPU before it chooses tiles, stages and warps. Importing it needs torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from foveal.checks import cached_constant

# Where the GPU tests have passed, and where all kernels have only been compiled, within the chip's shared memory.
RAN = ("sm_90",)
COMPILED = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942", "gfx1100")
OLDEST = 8  # the major number of the compute capability of the oldest NVIDIA GPU that kernels are written for


@dataclass(frozen=True)
class Chip:
    """A GPU as compilers see it.

    name: their own name of the architecture, such as "sm_90" or "gfx942"; "cpu" where kernels are interpreted.
    shared_memory: bytes that one program may have.
    warp_size: threads of a warp.
    """

    name: str
    shared_memory: int
    warp_size: int = 32

    @functools.cached_property
    def major(self) -> int:
        """The major number of an NVIDIA GPU's compute capability; 0 elsewhere."""
        return int(self.name.removeprefix("sm_")) // 10 if self.name.startswith("sm_") else 0

    @property
    def standing(self) -> str:
        """How well the kernels are known there, a sentence without its period."""
        if self.name in RAN:
            return f"the kernels were tested on a GPU like this ({self.name})"
        if self.name in COMPILED:
            return f"the kernels compile for this GPU ({self.name}), and were never tested on one"
        return f"the kernels were neither compiled for a GPU like this ({self.name}) nor tested on one"

    @functools.cached_property
    def uses_tma(self) -> bool:
        """Whether kernels take TMA descriptors: where tensor cores read what TMA writes (wgmma and tcgen05).

        GPUs of compute capability 12 have TMA too, but their products read registers (mma.sync). The stages and warps
        that go with TMA elsewhere would spill hundreds of bytes a thread there.
        """
        return 9 <= self.major <= 11

    @functools.cached_property
    def starts_early(self) -> bool:
        """Whether kernels start before the one before them has ended, and so must await it."""
        return self.major >= 9


@cached_constant
def capability(device: torch.device) -> str:
    """The compute capability of an NVIDIA GPU, such as "9.0".

    A string: torch.compile takes one as a constant, and stumbles over comparing tuples that it took as constants.
    """
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device. For a CPU, where kernels are interpreted, it has an H100's shared memory and no TMA."""
    if device.type != "cuda":
        return Chip("cpu", 227 * 1024)
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared_memory = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(index)
        return Chip(properties.gcnArchName.partition(":")[0], shared_memory, properties.warp_size)
    return Chip("sm_{}{}".format(*torch.cuda.get_device_capability(index)), shared_memory)


class Plan(NamedTuple):
    """Constants and options of a launch, and the shared memory that they take.

    shared_memory: bytes, the most that a supported release of Triton makes of it on NVIDIA's GPUs.
    options: the launch options, by name.
    """

    shared_memory: int
    options: dict[str, Any]


def fitting(device: torch.device, plans: Sequence[Plan]) -> dict[str, Any]:
    """The options of the first plan that surely fits the device; of the last one, the smallest, if none does."""
    limit = chip_of(device).shared_memory
    return next((plan.options for plan in plans if plan.shared_memory <= limit), plans[-1].options)
