"""Your own recipes: start from a built-in one and change what differs.

foveal precompute --videos clips --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output latents
foveal train recipes/my_clips.py:sparser --data.folder latents/
"""

import dataclasses

from foveal import SLAConfig
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.recipes import RECIPES
from foveal.lab.train.settings import SparsitySettings


def sparser() -> TrainingConfig:
    """Wan2.1-1.3B to SLA with 3 % of the blocks, more in the first layer, on one GPU."""
    base = RECIPES["wan-1.3b-sla"]()
    return base.replace(
        sparsity=SparsitySettings(SLAConfig(keep_ratio=0.03, drop_ratio=0.10), layer_keep_ratio={0: 0.2}),
        optimizer=dataclasses.replace(base.optimizer, name="adamw8bit"),
        batch_size=16,
    )
