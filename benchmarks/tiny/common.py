"""Clips, devices, and files, as all stages of `make.py` use them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
CUDA = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
DEVICE = torch.device(CUDA if torch.cuda.is_available() else "cpu")


def data_parallel(module: nn.Module) -> nn.Module:
    """A module for training on this process's share of a batch: itself, or under torchrun with averaged gradients."""
    if RANKS == 1:
        return module
    if not dist.is_initialized():
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    return DistributedDataParallel(module)


def first_rank_says(value: float) -> float:
    """Rank 0's value, on all ranks, without waiting for a GPU."""
    if RANKS == 1:
        return value
    said = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(said, 0)
    return said.item()


def read_file(file: Path) -> tuple[np.ndarray, list[str]]:
    """uint8 [clips, F, H, W, 3] and captions of one file of clips."""
    with np.load(file) as content:
        return content["frames"], content["captions"].tolist()


def read_ahead(folder: Path) -> Iterator[tuple[np.ndarray, list[str]]]:
    """What `read_file` gives, in the order of the files' names, with one file more in memory than the caller has."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for file in sorted(folder.glob("*.npz")):
            current, following = following, pool.submit(read_file, file)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def read_clips(folder: Path) -> tuple[np.ndarray, list[str]]:
    """uint8 [clips, F, H, W, 3] and captions of a part of the clips, in the order of the files' names."""
    with ThreadPoolExecutor(8) as pool:
        read_files = list(pool.map(read_file, sorted(folder.glob("*.npz"))))
    return np.concatenate([frames for frames, _ in read_files]), [text for _, texts in read_files for text in texts]


def to_video(frames: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to [B, 3, F, H, W] in [-1, 1] on the device."""
    return frames.to(DEVICE, non_blocking=True).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def mirrored(caption: str) -> str:
    """The caption of a clip whose frames are mirrored."""
    return caption.replace("right", "\0").replace("left", "right").replace("\0", "left")


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def machine(commit: str | None) -> dict[str, str | None]:
    """Where a run takes place, for its record."""
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else platform.machine()
    return {"device": device, "torch": torch.__version__, "commit": commit}


def weights_of(pipeline: Path, part: str, file: str = "diffusion_pytorch_model.safetensors") -> dict[str, Tensor]:
    """A part of a pipeline's folder, in float32."""
    tensors = load_file(pipeline / part / file)
    return {name: value.float() for name, value in tensors.items()}


def write(tensors: dict[str, Tensor], file: Path) -> None:
    aside = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    os.replace(aside, file)
