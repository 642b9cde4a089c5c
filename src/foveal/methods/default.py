"""What a model is converted to if its user does not say."""

from __future__ import annotations

from foveal.methods.base import Config
from foveal.methods.vsa.config import VSAConfig

# Of what docs/evidence.md compares, this ends closest to dense attention.
DEFAULT: Config = VSAConfig(keep_ratio=0.125, router="per_head")
