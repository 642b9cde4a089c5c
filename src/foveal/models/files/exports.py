"""What `foveal train` exports: a folder with the sparse part, and the model's weights or an adapter beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from foveal.models.files.persist import load

# Where `foveal train` puts the sparse part and, if it trained them, the weights; and where diffusers puts an adapter.
EXPORTED, WEIGHTS = "sparse", "transformer"
LORA_FILE = "pytorch_lora_weights.safetensors"


def load_export(model: Any, folder: str | os.PathLike[str], *, impl: str = "auto") -> Any:
    """A dense model with what `foveal train` exports: sparse attention, and weights or an adapter if it trained them.

    Args:
        model: a pipeline, or a transformer of its own. It is changed in place, but for a transformer whose weights the
            export replaces.
        folder: the export.
        impl: see `block_sparse_attention`.
    """
    folder = Path(folder)
    transformer = getattr(model, "transformer", model)
    if (folder / WEIGHTS).is_dir():
        dtype, device = transformer.dtype, transformer.device
        transformer = type(transformer).from_pretrained(folder / WEIGHTS, dtype=dtype).to(device)
        if hasattr(model, "transformer"):
            model.transformer = transformer
        else:
            model = transformer
    if (folder / "lora").is_dir():
        transformer.load_lora_adapter(folder / "lora", weight_name=LORA_FILE)
    return load(model, folder / EXPORTED, impl=impl)
