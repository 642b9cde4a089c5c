"""Policy files: which layers of a model are sparse, how, and when, as JSON without parameters.

`foveal calibrate` writes them, and `sparsify(model, policy=file)` and the commands take them:

    {"foveal_policy": 1, "components": {"transformer": {"family": "wan", "policy": {"dense_first_steps": 2}, "layers": {
        "blocks.0.attn1": {"method": "sla", "config": {"keep_ratio": 0.1, ...}}, ...}}}, ...}

Components are as in the file of `save`. Layers that are not listed stay dense. Other entries are for people to read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.methods.base import Config, method_of
from foveal.models.files.manifest import parse_component
from foveal.models.policy import Policy

FORMAT_KEY, FORMAT = "foveal_policy", 1


@dataclass(frozen=True)
class ComponentPolicy:
    """What one transformer runs.

    Args:
        family: the name of its family.
        layers: the configurations of its sparse layers, by name.
        policy: when they run dense.
    """

    family: str
    layers: dict[str, Config]
    policy: Policy

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        layers = {name: {"method": method_of(c).name, "config": c.to_dict()} for name, c in self.layers.items()}
        return {"family": self.family, "policy": self.policy.to_dict(), "layers": layers}


def policy_text(components: dict[str, ComponentPolicy], **more: Any) -> str:
    """The text of a policy file; `more` are JSON-ready entries for people to read."""
    described = {name: component.to_dict() for name, component in components.items()}
    return json.dumps({FORMAT_KEY: FORMAT, "components": described, **more}, indent=1)


def read_policy(path: str | os.PathLike[str]) -> dict[str, ComponentPolicy]:
    """The components of a policy file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no policy file, or one of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such policy file: {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # also of text that is not UTF-8
        raise ValueError(f"policy file {path} is not JSON") from None
    version = found.get(FORMAT_KEY) if isinstance(found, dict) else None
    if version is None:
        raise ValueError(f"{path} is no policy file; foveal calibrate writes one")
    if version != FORMAT or not isinstance(found.get("components"), dict):
        raise ValueError(f"policy file {path} is of version {version!r}; this version reads {FORMAT}")
    read = {}
    for name, entry in found["components"].items():
        family, layers, policy = parse_component(name, entry)
        if layers:
            read[name] = ComponentPolicy(family, layers, Policy() if policy is None else policy)
    if not read:
        raise ValueError(f"policy file {path} has no sparse layer")
    return read
