"""A tiny random MiniMax-H3 with its text encoder and both VAEs, saved as a user would have it."""

from __future__ import annotations

from pathlib import Path

import torch
from test_h3_pipeline import tiny_pipeline
from tiny_media import diffusers, transformers

# The pipeline reads the 50th layer.
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 51, "num_attention_heads": 2, "head_dim": 8}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 128}
TEXT |= {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
VISION |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}


def save_tiny_h3(folder: Path) -> Path:
    """A folder with a `modular_model_index.json`, without the vision processor, which would need torchvision."""
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Blocks

    made = tiny_pipeline()
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=100, video_token_id=101, vision_start_token_id=102
    )
    characters = {chr(code): code for code in range(33, 126)}
    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config).eval(),
        tokenizer=transformers.Qwen2TokenizerFast(vocab=characters, merges=[], unk_token="~", pad_token="~"),
        **{name: getattr(made, name) for name in ("transformer", "vae", "audio_vae", "scheduler", "audio_scheduler")},
    )
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


__all__ = ["diffusers", "save_tiny_h3"]
