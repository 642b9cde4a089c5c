"""What FastVideo writes beside the weights of its FastH3 models: how they were trained and are to be run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "fastvideo_inference.json"
SCHEMA = "fasth3-inference-contract-v1"
BACKEND = "VIDEO_SPARSE_ATTN_H3"
# Cubes by the number of their tokens.
TILES = {64: (4, 4, 4), 128: (4, 4, 8)}
# How the first release is run, for files that come without their contract.
V1 = {
    "transformer_forwards": 4,
    "dmd_denoising_steps": (999, 749, 500, 250),
    "guidance_scale": 1.0,
    "video_scheduler_shift": 12.0,
    "audio_scheduler_shift": 3.0,
}


@dataclass(frozen=True)
class Contract:
    """Args:
    fields: the fields of the configuration with which the weights were trained.
    notes: what a pipeline needs to know, in words.
    """

    fields: dict[str, Any]
    notes: tuple[str, ...]


def read_contract(path: Path) -> Contract | None:
    """The contract beside a file of weights, in their folder or in the one above; None without one.

    Raises:
        ValueError: a file of another schema, for dense attention, or for a rule or a tile that VSA here does not have.
    """
    folder = path if path.is_dir() else path.parent
    found = next((place / FILE for place in (folder, folder.parent) if (place / FILE).is_file()), None)
    if found is None:
        return None
    try:
        values = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA:
        got = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{found} must have schema_version {SCHEMA!r}, got {got!r}")
    if values.get("attention_backend") != BACKEND:
        raise ValueError(f"{found} must have attention_backend {BACKEND!r}, got {values.get('attention_backend')!r}")
    if values.get("vsa_ref_policy") is not None:
        raise ValueError(
            f"{found} asks for vsa_ref_policy {values['vsa_ref_policy']!r}: VSA reads references whole, and has no "
            "choice of its own among their tiles"
        )
    sparsity, tokens = values.get("vsa_sparsity"), values.get("vsa_tile_size", 64)
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{found} must have a vsa_sparsity in [0, 1), got {sparsity!r}")
    if tokens not in TILES:
        raise ValueError(f"{found} must have a vsa_tile_size of {' or '.join(map(str, TILES))}, got {tokens!r}")
    # 1 - 0.9 is not 0.1 in binary.
    keep = round(1.0 - sparsity, 12)
    shifts = {
        f"{name}_scheduler_shift": _shift(found.parent / folder / "scheduler_config.json")
        for name, folder in (("video", "scheduler"), ("audio", "audio_scheduler"))
    }
    return Contract({"keep_ratio": keep, "tile": TILES[tokens]}, how_to_run(shifts | values))


def forwards_in_diffusers(forwards: int) -> str:
    """How to ask diffusers' pipeline of MiniMax-H3 for so many forwards."""
    return f"num_inference_steps={forwards + 1} in diffusers, whose MiniMax-H3 counts the end of the schedule"


def how_to_run(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What the entries of a contract mean for a pipeline, in words."""
    notes = []
    steps, forwards = values.get("dmd_denoising_steps"), values.get("transformer_forwards")
    if forwards is not None:
        at = f" at timesteps {', '.join(map(str, steps))}" if steps else ""
        notes.append(f"distilled to {forwards} forwards{at}, with guidance {values.get('guidance_scale', 1.0):g}")
        notes.append(forwards_in_diffusers(forwards))
    shifts = [(name, values.get(f"{name}_scheduler_shift")) for name in ("video", "audio")]
    known = [f"{shift:g} ({name})" for name, shift in shifts if isinstance(shift, int | float) and math.isfinite(shift)]
    if known:
        notes.append(f"shift of the schedule: {', '.join(known)}")
    return tuple(notes)


def _shift(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("shift")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is not a scheduler's configuration") from None
