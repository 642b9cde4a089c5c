"""Sparse attention in the other transformers of Wan's blocks, and in the other tasks of the first one."""

import pytest
import torch
from family_checks import FamilyChecks
from tiny_wan import DENSE_SLA, DENSE_VSA, inputs, run, tiny_transformer

from foveal import VideoGrid
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")

SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


class TestWanVACE(FamilyChecks):
    LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1", "vace_blocks.0.attn1", "vace_blocks.1.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0):
        torch.manual_seed(seed)
        settings = SETTINGS | {"vace_layers": [0, 2], "vace_in_channels": 6}
        return diffusers.WanVACETransformer3DModel(**settings).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        shape = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, 4, *shape, generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "control_hidden_states": torch.randn(2, 6, *shape, generator=generator).to(dtype),
        }


class TestWanAnimate(FamilyChecks):
    LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0):
        torch.manual_seed(seed)
        settings = SETTINGS | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 3,
        }
        return diffusers.WanAnimateTransformer3DModel(**settings).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, 12, frames, height, width, generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "pose_hidden_states": torch.randn(2, 4, frames - 1, height, width, generator=generator).to(dtype),
            "face_pixel_values": torch.randn(2, 3, 4 * frames - 7, 16, 16, generator=generator).to(dtype),
        }


class TestSkyReelsV2(FamilyChecks):
    LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0, **settings):
        torch.manual_seed(seed)
        return diffusers.SkyReelsV2Transformer3DModel(**SETTINGS | settings).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        return {
            "hidden_states": torch.randn(2, 4, *(latent or self.LATENTS[0]), generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
        }

    @pytest.mark.parametrize("config", [DENSE_SLA, DENSE_VSA], ids=["sla", "vsa"])
    def test_diffusion_forcing(self, config):
        """A timestep for each latent frame."""
        data = self.inputs(dtype=torch.float64)
        data |= {"timestep": torch.tensor([[3, 103, 203], [403, 403, 403]]), "enable_diffusion_forcing": True}
        self.check_equals_dense(self.model().double(), config, data)

    @torch.no_grad()
    def test_causal_blocks_are_refused(self):
        model = sparsify(self.model(num_frame_per_block=3), DENSE_SLA)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            self.run(model)


class TestChronoEdit(FamilyChecks):
    LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0):
        torch.manual_seed(seed)
        settings = SETTINGS | {"attention_head_dim": 24, "image_dim": 6, "added_kv_proj_dim": 48}
        return diffusers.ChronoEditTransformer3DModel(**settings).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        return {
            "hidden_states": torch.randn(2, 4, *(latent or self.LATENTS[0]), generator=generator).to(dtype),
            "timestep": torch.tensor([3, 403]),
            # Cross-attention takes the last 512 tokens for text.
            "encoder_hidden_states": torch.randn(2, 512, 16, generator=generator).to(dtype),
            "encoder_hidden_states_image": torch.randn(2, 5, 6, generator=generator).to(dtype),
        }

    @pytest.mark.parametrize("config", [DENSE_SLA, DENSE_VSA], ids=["sla", "vsa"])
    def test_two_frames(self, config):
        """Its last steps leave out the frames between the image and the edit."""
        data = self.inputs((2, 10, 12), dtype=torch.float64)
        self.check_equals_dense(self.model().double(), config, data, VideoGrid(2, 5, 6))


class TestAnyFlow(FamilyChecks):
    LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0):
        if not hasattr(diffusers, "AnyFlowTransformer3DModel"):
            pytest.skip("this diffusers has no AnyFlow")
        torch.manual_seed(seed)
        return diffusers.AnyFlowTransformer3DModel(**SETTINGS).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, frames, 4, height, width, generator=generator).to(dtype),
            "timestep": torch.tensor([[403.0], [803.0]]).expand(2, frames),
            "r_timestep": torch.tensor([[3.0], [403.0]]).expand(2, frames),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
        }


@pytest.mark.parametrize("config", [DENSE_SLA, DENSE_VSA], ids=["sla", "vsa"])
@pytest.mark.parametrize("task", ["a timestep per token", "an image condition"])
@torch.no_grad()
def test_other_tasks_of_wan(config, task):
    """Wan 2.2 TI2V-5B, and image to video of Wan 2.1, whose cross-attention has projections for the image."""
    data = inputs(dtype=torch.float64)
    if task == "a timestep per token":
        model = tiny_transformer()
        data["timestep"] = torch.arange(105).repeat(2, 1) * 5
    else:
        model = tiny_transformer(image_dim=6, added_kv_proj_dim=32)
        # Cross-attention takes the last 512 tokens for text.
        data["encoder_hidden_states"] = torch.randn(2, 512, 8, dtype=torch.float64)
        data["encoder_hidden_states_image"] = torch.randn(2, 5, 6, dtype=torch.float64)
    model = model.double()
    expected = run(model, **data)
    sparsify(model, config)
    torch.testing.assert_close(run(model, **data), expected, rtol=0, atol=1e-6)
