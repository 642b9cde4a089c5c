"""Sparse attention in a tiny random `CogVideoXTransformer3DModel`, and in a pipeline around it."""

import pytest
import torch
from family_checks import DENSE_METHODS, FamilyChecks, check_pipeline
from tiny_wan import DENSE_SLA, SPARSE_SLA

from foveal import VideoGrid
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")


class TestCogVideoX(FamilyChecks):
    LAYERS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)
    TEXT = 7

    def model(self, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 10,
            "sample_frames": 9,
            "max_text_seq_length": self.TEXT,
        }
        return diffusers.CogVideoXTransformer3DModel(**settings | overrides).eval()

    def inputs(self, latent=None, dtype=torch.float32, rotary=False):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]
        data = {
            "hidden_states": torch.randn(2, frames, 4, height, width, generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": torch.randn(2, self.TEXT, 16, generator=generator).to(dtype),
        }
        if rotary:
            angles = torch.randn(self.GRID.num_tokens, 8, generator=generator).repeat_interleave(2, -1)
            data["image_rotary_emb"] = (angles.cos(), angles.sin())
        return data

    @DENSE_METHODS
    @pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
    def test_rotary_embedding(self, config, fused):
        model = self.model(use_rotary_positional_embeddings=True).double()
        if fused:
            model.fuse_qkv_projections()
            # As after more training: whoever reads the projections that were fused is found out.
            for block in model.transformer_blocks:
                torch.nn.init.zeros_(block.attn1.to_q.weight)
        self.check_equals_dense(model, config, self.inputs(dtype=torch.float64, rotary=True))

    @DENSE_METHODS
    def test_patches_in_time(self, config):
        """CogVideoX 1.5: patches of two frames."""
        model = self.model(patch_size_t=2, use_rotary_positional_embeddings=True).double()
        data = self.inputs(latent=(4, 10, 12), dtype=torch.float64)
        self.check_equals_dense(model, config, data, VideoGrid(2, 5, 6))

    def test_unfused_projections_are_read_again(self):
        model = self.model()
        model.fuse_qkv_projections()
        model.unfuse_qkv_projections()
        for block in model.transformer_blocks:
            torch.nn.init.zeros_(block.attn1.to_qkv.weight)
        self.check_equals_dense(model, DENSE_SLA, self.inputs())

    @torch.no_grad()
    def test_masks_are_refused(self):
        model = sparsify(self.model(), SPARSE_SLA)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            self.run(model, **self.inputs(), attention_kwargs={"attention_mask": torch.ones(2, 97)})

    def test_pipeline(self):
        pipeline = diffusers.CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=self.model(),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )
        text = torch.randn(2, self.TEXT, 16, generator=torch.Generator().manual_seed(2))
        prompts = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:]}
        check_pipeline(pipeline, self.GRID, **prompts, height=80, width=96, num_frames=9)
