"""Sparse attention in a tiny random `HunyuanVideo15Transformer3DModel`."""

import pytest
import torch
from family_checks import DENSE_METHODS, FamilyChecks, replace_arguments
from tiny_wan import SPARSE_SLA

from foveal import VideoGrid
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")


class TestHunyuanVideo15(FamilyChecks):
    LAYERS = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    LATENTS = ((3, 5, 6), (3, 6, 5))
    GRID = VideoGrid(3, 5, 6)
    # Of the first text encoder, the second, and the image condition: none for text to video, so all of it is masked.
    TEXT = 7 + 5 + 3
    PADDING = 4 + 3
    MASKED = 4

    def model(self, seed=0):
        torch.manual_seed(seed)
        return diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ).eval()

    def inputs(self, latent=None, dtype=torch.float32, image=False):
        generator = torch.Generator().manual_seed(1)
        # No prefix: the model sorts the valid tokens to the front.
        mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1]])
        return {
            "hidden_states": torch.randn(2, 9, *(latent or self.LATENTS[0]), generator=generator).to(dtype),
            "timestep": torch.tensor([3.0, 403.0], dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": torch.randn(2, 5, 8, generator=generator).to(dtype),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
            "image_embeds": torch.randn(2, 3, 8, generator=generator).to(dtype) * image,
        }

    @DENSE_METHODS
    def test_image_to_video(self, config):
        self.check_equals_dense(self.model().double(), config, self.inputs(dtype=torch.float64, image=True))

    @torch.no_grad()
    def test_wrong_mask(self):
        model = sparsify(self.model(), SPARSE_SLA)
        wrong = torch.ones(1, 1, 1, 9)
        replace_arguments(
            model.transformer_blocks[0].attn, torch.randn(1, 90, 32), torch.randn(1, 9, 32), attention_mask=wrong
        )
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 9\), got \(1, 1, 1, 9\)"):
            self.run(model)
