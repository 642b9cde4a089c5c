"""`sla_attention.pt`, where SimpleTuner keeps what SLA learned, beside a LoRA or the weights of a checkpoint.

    {"settings": {"topk", "feature_map", "blkq", "blkk", "tie_feature_map_qk"},
     "state": {"128:bf16": {"proj_l.weight", "proj_l.bias"}}, "version": 1}

One projection serves all layers of a head size. There is one for each precision that such an attention ran in; one that
is zero was never trained.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from foveal.models.files.contracts import Contract

KEYS = {"settings", "state", "version"}
VERSION = 1
ENTRY = "simpletuner_settings"
FEATURE_MAPS = ("softmax", "elu", "relu")
# Names in its settings, and what they are in an `SLAConfig`.
FIELDS = {"topk": "keep_ratio", "feature_map": "feature_map", "blkq": "block_q", "blkk": "block_k"}


def is_sla_state(loaded: Any) -> bool:
    """Whether an unpickled value is what SimpleTuner saves."""
    return isinstance(loaded, dict) and set(loaded) == KEYS


def flattened(loaded: dict[str, Any], source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors, as "128.proj_l.weight" for heads of 128, and its settings as a metadata entry.

    Raises:
        ValueError: another version, no settings, names of another kind, or several trained projections of a head size.
    """
    if loaded["version"] != VERSION:
        raise ValueError(f"{source} must be of version {VERSION}, got {loaded['version']!r}")
    settings, state = loaded["settings"], loaded["state"]
    if not isinstance(settings, dict) or not isinstance(state, dict) or not state:
        raise ValueError(f"{source} must hold SLA's settings and at least one projection")
    trained: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensors in state.items():
        found = re.fullmatch(r"(\d+):(\w+)", str(key))
        if found is None or not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise ValueError(f"{source} must hold tensors by head size and precision ('128:bf16'), got {key!r}")
        trained.setdefault(found[1], {})[found[2]] = tensors
    flat = {}
    for head_dim, precisions in trained.items():
        in_use = {name: x for name, x in precisions.items() if any(bool(torch.any(part)) for part in x.values())}
        if len(in_use) > 1:
            raise ValueError(
                f"{source} has trained projections of {' and '.join(in_use)} for heads of {head_dim}; keep that of the "
                "precision that counts"
            )
        chosen = next(iter((in_use or precisions).values()))
        flat |= {f"{head_dim}.{name}": tensor for name, tensor in chosen.items()}
    return flat, {ENTRY: json.dumps(settings)}


def read_settings(metadata: dict[str, str], source: str) -> Contract | None:
    """The configuration that the run had, from a file's metadata; None for a file of another kind.

    Raises:
        ValueError: settings that are missing, or that are not SimpleTuner's.
    """
    if ENTRY not in metadata:
        return None
    settings = json.loads(metadata[ENTRY])
    missing = [name for name in FIELDS if name not in settings]
    if missing:
        raise ValueError(f"{source} must have {', '.join(FIELDS)} in its settings, but lacks {', '.join(missing)}")
    if settings["feature_map"] not in FEATURE_MAPS:
        raise ValueError(f"{source} must have a feature_map of {FEATURE_MAPS}, got {settings['feature_map']!r}")
    return Contract({field: settings[name] for name, field in FIELDS.items()}, ())
