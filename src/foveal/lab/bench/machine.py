"""What results depend on besides the settings: the card, the driver, the versions, and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import foveal


def machine(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """Describe the machine as JSON-ready values; None for what cannot be determined.

    Args:
        device: the device that is timed.
        commit: the commit of this tree where git cannot tell, as in a copy without its history.
    """
    found: dict[str, object] = {
        "device": _processor(),
        "driver": None,
        "power_limit_w": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "foveal": foveal.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        query = ("--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits")
        answer = _run("nvidia-smi", f"--id={device.index or 0}", *query)
        if answer and answer.count(",") == 1:
            driver, limit = (part.strip() for part in answer.split(","))
            found |= {"driver": driver, "power_limit_w": limit}
    else:
        found |= {"logical_cores": os.cpu_count(), "threads": torch.get_num_threads()}
    folder = str(Path(foveal.__file__).parent)
    changes = _run("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    found_commit = _run("git", "-C", folder, "rev-parse", "HEAD") or None
    known = changes is not None and found_commit is not None and commit in (None, found_commit)
    return found | {
        "commit": commit or found_commit,
        "uncommitted_changes": bool(changes) if known else None,
    }


def _processor() -> str:
    """The processor's name, or its architecture where the system reports no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
