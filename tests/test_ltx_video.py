"""Sparse attention in a tiny random `LTXVideoTransformer3DModel`."""

import pytest
import torch
from family_checks import FamilyChecks, check_pipeline
from tiny_wan import DENSE_SLA, SPARSE_SLA

from foveal import VideoGrid
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")


def coordinates(frames: int, height: int, width: int) -> torch.Tensor:
    """[3, L], in the units of the pipelines: seconds, of which the first frame lasts less, and pixels."""
    axes = (torch.arange(frames) * 8 - 7).clamp(min=0) / 25, torch.arange(height) * 32.0, torch.arange(width) * 32.0
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


class TestLTXVideo(FamilyChecks):
    LAYERS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    LATENTS = ((3, 5, 6), (3, 6, 5))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0):
        torch.manual_seed(seed)
        return diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=16,
        ).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, frames * height * width, 4, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "timestep": torch.tensor([[3], [403]]),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (0.32, 32.0, 32.0),
        }

    def coordinate_inputs(self, coords: torch.Tensor):
        data = self.inputs() | {"video_coords": coords.expand(2, -1, -1)}
        data["hidden_states"] = torch.randn(2, coords.shape[1], 4, generator=torch.Generator().manual_seed(1))
        for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
            del data[name]
        return data

    @pytest.mark.parametrize("shape", [(3, 5, 6), (1, 4, 3), (4, 1, 5), (2, 3, 1), (1, 1, 1)])
    def test_grid_of_coordinates(self, shape):
        self.check_equals_dense(self.model(), DENSE_SLA, self.coordinate_inputs(coordinates(*shape)), VideoGrid(*shape))

    def test_conditioning_frame_before_the_video(self):
        condition = coordinates(1, 5, 6) + torch.tensor([[0.5], [0.0], [0.0]])
        data = self.coordinate_inputs(torch.cat((condition, coordinates(3, 5, 6)), 1))
        self.check_equals_dense(self.model(), DENSE_SLA.replace(token_order="tile"), data, VideoGrid(4, 5, 6))

    @torch.no_grad()
    def test_tokens_that_are_no_grid(self):
        model = sparsify(self.model(), SPARSE_SLA)
        video = coordinates(3, 5, 6)
        for coords in (
            torch.cat((video[:, :30], video), 1),
            torch.cat((video[:, :12], video), 1),
            video[:, :-1],
            video.flip(1)[:, torch.randperm(90, generator=torch.Generator().manual_seed(0))],
        ):
            with pytest.raises(ValueError, match="video_coords must be those of one grid of tokens in raster order"):
                self.run(model, **self.coordinate_inputs(coords))
        data = self.inputs()
        with pytest.raises(ValueError, match=r"the sides of the 90 tokens, got \(3, 5, 7\)"):
            self.run(model, **data | {"width": 7})

    @pytest.mark.parametrize("name", ["LTXPipeline", "LTXConditionPipeline"])
    def test_pipeline(self, name):
        """The second passes the tokens' coordinates, and not the sides of their grid."""
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
        pipeline = getattr(diffusers, name)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model(),
        )
        text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
        prompts = {
            "prompt_embeds": text[:1],
            "prompt_attention_mask": torch.ones(1, 7),
            "negative_prompt_embeds": text[1:],
            "negative_prompt_attention_mask": torch.ones(1, 7),
        }
        check_pipeline(pipeline, self.GRID, **prompts, height=160, width=192, num_frames=17)
