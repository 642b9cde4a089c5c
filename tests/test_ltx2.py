"""Sparse attention in a tiny random `LTX2VideoTransformer3DModel`: only its video's self-attention."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from family_checks import DENSE_METHODS, FamilyChecks
from tiny_wan import DENSE_SLA, DENSE_VSA, SPARSE_SLA

from foveal import VideoGrid
from foveal.models import sparsify
from foveal.models.processor import state_of

diffusers = pytest.importorskip("diffusers")


# What their checkpoints say, beside sizes.
LATER = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
    "rope_type": "split",
}
VERSIONS = {
    "2.3": LATER,
    "2.5": LATER | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True},
    "2.5 with fixed prompts": LATER | {"ff_bias": False, "use_prompt_adaln_single": False},
}


class TestLTX2(FamilyChecks):
    LAYERS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    LATENTS = ((3, 5, 6), (3, 6, 5))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        }
        return diffusers.LTX2VideoTransformer3DModel(**settings | overrides).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, frames * height * width, 4, generator=generator).to(dtype),
            "audio_hidden_states": torch.randn(2, 5, 4, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "audio_encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
            "timestep": torch.tensor([[3.0], [403.0]], dtype=dtype),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "audio_encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": 5,
        }

    @DENSE_METHODS
    @pytest.mark.parametrize("rope_type", ["interleaved", "split"])
    @pytest.mark.parametrize("perturbed", [None, (0.0, 1.0), (0.0, 0.0)])
    def test_gates_rotary_kinds_and_perturbation(self, config, rope_type, perturbed):
        settings = {"rope_type": rope_type, "gated_attn": True, "audio_gated_attn": True}
        model = self.model(perturbed_attn=perturbed is not None, **settings).double()
        data = self.inputs(dtype=torch.float64)
        if perturbed is not None:
            mask = torch.tensor(perturbed, dtype=torch.float64)
            data |= {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": mask}
        self.check_equals_dense(model, config, data)

    @pytest.mark.parametrize("config", [DENSE_SLA, DENSE_SLA.replace(token_order="tile"), DENSE_VSA], ids=str)
    def test_tokens_of_conditioning_frames(self, config):
        model, data = self.model().double(), self.inputs(dtype=torch.float64)
        coords = model.rope.prepare_video_coords(2, 4, 5, 6, torch.device("cpu"))
        data["hidden_states"] = torch.randn(2, 120, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        data["video_coords"] = coords
        self.check_equals_dense(model, config, data)

    @torch.no_grad()
    def test_grid_of_coordinates(self):
        model, data = sparsify(self.model(), SPARSE_SLA), self.inputs()
        expected = self.run(model, **data)
        data["video_coords"] = model.rope.prepare_video_coords(2, 3, 5, 6, torch.device("cpu"))
        for name in ("num_frames", "height", "width"):
            del data[name]
        assert torch.equal(self.run(model, **data), expected)
        assert state_of(model).grid == self.GRID

    @torch.no_grad()
    def test_masks_are_refused(self):
        model = sparsify(self.model(), SPARSE_SLA)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            self.run(model, **self.inputs(), video_self_attention_mask=torch.ones(2, 90, 90))

    @DENSE_METHODS
    @pytest.mark.parametrize("name", VERSIONS)
    def test_later_versions(self, config, name):
        """The arguments that the models of 2.3 and 2.5 are built with, and those that their pipelines pass."""
        settings = VERSIONS[name]
        if not set(settings) <= set(inspect.signature(diffusers.LTX2VideoTransformer3DModel.__init__).parameters):
            pytest.skip(f"this diffusers has no LTX-{name}")
        data = self.inputs(dtype=torch.float64) | {"use_cross_timestep": True}
        data["sigma"] = data["audio_timestep"] = torch.tensor([3.0, 403.0], dtype=torch.float64)
        # The connector projects the text to the widths of video and audio.
        for key, width in (("encoder_hidden_states", 32), ("audio_encoder_hidden_states", 16)):
            data[key] = torch.randn(2, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        if settings.get("use_keyframes_abs_pos_embedding"):
            data["video_keyframes_mask"] = (torch.arange(90) < 30).double()[None, :, None].expand(2, -1, -1)
        model = self.model(**settings).double()
        if hasattr(model, "keyframes_abs_pos_embedding"):
            torch.nn.init.normal_(model.keyframes_abs_pos_embedding)
        self.check_equals_dense(model, config, data)

    @pytest.mark.parametrize("keyframes", [(8, 16), (16,), (1,)], ids=["two", "at the end", "where a frame begins"])
    @pytest.mark.parametrize("config", [DENSE_SLA, DENSE_VSA], ids=str)
    def test_keyframes_and_references_of_2_5(self, config, keyframes):
        """The pipelines of 2.5 give only coordinates, and append single frames and a reference of half the size."""
        pipeline = pytest.importorskip("diffusers.pipelines.ltx2.pipeline_ltx2_dfr").LTX2DFRPipeline
        facts = SimpleNamespace(
            transformer_spatial_patch_size=1,
            transformer_temporal_patch_size=1,
            vae_temporal_compression_ratio=8,
            vae_spatial_compression_ratio=32,
        )
        model, data = self.model().double(), self.inputs(dtype=torch.float64)
        device = torch.device("cpu")
        appended = [
            pipeline._prepare_keyframe_coords(
                facts,
                keyframe_latent_num_frames=1,
                keyframe_latent_height=5,
                keyframe_latent_width=6,
                pixel_frame_idx=index,
                num_pixel_frames=1,
                fps=24.0,
                device=device,
            )
            for index in keyframes
        ]
        reference = model.rope.prepare_video_coords(1, 3, 2, 3, device)
        coords = [model.rope.prepare_video_coords(1, *self.LATENTS[0], device), *appended, reference]
        data["video_coords"] = torch.cat(coords, 2).expand(2, -1, -1, -1)
        length = data["video_coords"].shape[2]
        assert length == 90 + 30 * len(keyframes) + 18
        generator = torch.Generator().manual_seed(1)
        data["hidden_states"] = torch.randn(2, length, 4, dtype=torch.float64, generator=generator)
        for name in ("num_frames", "height", "width"):
            del data[name]
        self.check_equals_dense(model, config, data)
