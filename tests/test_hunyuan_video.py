"""Sparse attention in tiny random transformers of HunyuanVideo 1.0 and FramePack."""

import pytest
import torch
from family_checks import DENSE_METHODS, FamilyChecks, check_pipeline, replace_arguments
from tiny_wan import SPARSE_SLA, SPARSE_VSA

from foveal import VideoGrid
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")


class TestHunyuanVideo(FamilyChecks):
    LAYERS = (
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    )
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)
    TEXT = 9
    PADDING = MASKED = 4

    def model(self, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        }
        return diffusers.HunyuanVideoTransformer3DModel(**settings | overrides).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        mask = torch.ones(2, self.TEXT, dtype=torch.long)
        mask[0, -self.PADDING :] = 0
        # No prefix, which the model takes for one of as many tokens.
        mask[1, 2] = 0
        return {
            "hidden_states": torch.randn(2, 4, *(latent or self.LATENTS[0]), generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": torch.randn(2, self.TEXT, 16, generator=generator).to(dtype),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 8, generator=generator).to(dtype),
            "guidance": torch.tensor([6.0, 6.0], dtype=dtype),
        }

    @DENSE_METHODS
    def test_image_to_video_by_token_replacement(self, config):
        model = self.model(image_condition_type="token_replace").double()
        self.check_equals_dense(model, config, self.inputs(dtype=torch.float64))

    def test_compiled_blocks_with_vsa(self):
        self.test_compiled_blocks(SPARSE_VSA)

    def test_wrong_mask(self):
        model = sparsify(self.model(), SPARSE_SLA)
        wrong = torch.ones(1, 99, dtype=torch.bool)
        replace_arguments(
            model.transformer_blocks[0].attn, torch.randn(1, 90, 32), torch.randn(1, 9, 32), attention_mask=wrong
        )
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 1, 1, 99\), got \(1, 99\)"):
            self.run(model)

    def test_pipeline(self):
        pipeline = diffusers.HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=self.model(),
            vae=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder_2=None,
            tokenizer_2=None,
        )
        data = self.inputs()
        prompts = {
            "prompt_embeds": data["encoder_hidden_states"],
            "prompt_attention_mask": data["encoder_attention_mask"],
            "pooled_prompt_embeds": data["pooled_projections"],
        }
        check_pipeline(pipeline, self.GRID, **prompts, height=80, width=96, num_frames=9)


class TestFramepack(FamilyChecks):
    LAYERS = TestHunyuanVideo.LAYERS
    LATENTS = ((3, 16, 16), (6, 16, 8))
    GRID = VideoGrid(3, 8, 8)
    HISTORY = 2 * 64 + 16 + 4
    # With the image condition's tokens, which come before the text's.
    TEXT = HISTORY + 3 + 9
    PADDING = MASKED = 4

    def model(self, seed=0):
        torch.manual_seed(seed)
        return diffusers.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, -self.PADDING :] = 0
        return {
            "hidden_states": randn(2, 4, frames, height, width),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": randn(2, 9, 16),
            "encoder_attention_mask": mask,
            "pooled_projections": randn(2, 8),
            "image_embeds": randn(2, 3, 8),
            "indices_latents": torch.arange(frames) + 8,
            "guidance": torch.tensor([6.0, 6.0], dtype=dtype),
            "latents_clean": randn(2, 4, 2, height, width),
            "indices_latents_clean": torch.tensor([0, 7]),
            "latents_history_2x": randn(2, 4, 2, height, width),
            "indices_latents_history_2x": torch.tensor([5, 6]),
            "latents_history_4x": randn(2, 4, 4, height, width),
            "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
        }

    @DENSE_METHODS
    def test_one_sample_has_no_mask(self, config):
        """The model then cuts the padding off."""
        model, data = self.model().double(), self.inputs(dtype=torch.float64)
        data = {name: x[:1] if x.shape[0] == 2 and not name.startswith("indices") else x for name, x in data.items()}
        self.check_equals_dense(model, config, data)
