"""Sparse attention in a tiny random `FluxTransformer2DModel`, and in a pipeline around it."""

import pytest
import torch
from family_checks import DENSE_METHODS, FamilyChecks, check_pipeline
from tiny_wan import DENSE_SLA, SPARSE_SLA

from foveal import VideoGrid, VSAConfig
from foveal.models import sparsify

diffusers = pytest.importorskip("diffusers")


def ids(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()


class TestFlux(FamilyChecks):
    LAYERS = (
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    )
    LATENTS = ((1, 8, 10), (1, 10, 8))
    GRID = VideoGrid(1, 8, 10)
    TEXT = 7

    def model(self, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 4, 8),
        }
        return diffusers.FluxTransformer2DModel(**settings | overrides).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        _, height, width = latent or self.LATENTS[0]
        return {
            "hidden_states": torch.randn(2, height * width, 4, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(2, self.TEXT, 16, generator=generator).to(dtype),
            "pooled_projections": torch.randn(2, 8, generator=generator).to(dtype),
            "timestep": torch.tensor([0.003, 0.403], dtype=dtype),
            "img_ids": ids(height, width),
            # The released model's are zeros; these show whether each table goes with its tokens.
            "txt_ids": torch.arange(self.TEXT * 3).view(-1, 3).float(),
        }

    @pytest.mark.parametrize("config", [DENSE_SLA, VSAConfig(keep_ratio=1.0, tile="auto")], ids=["sla", "vsa"])
    def test_fused_projections(self, config):
        model = self.model().double()
        model.fuse_qkv_projections()
        data = self.inputs(dtype=torch.float64)
        data["img_ids"] = data["img_ids"][None].expand(2, -1, -1)
        self.check_equals_dense(model, config, data)

    @DENSE_METHODS
    def test_reference_image(self, config):
        """Kontext: the tokens of a reference image of the same size follow, with 1 for their first index."""
        model, data = self.model().double(), self.inputs(dtype=torch.float64)
        reference = data["img_ids"] + torch.tensor([1.0, 0.0, 0.0])
        data["img_ids"] = torch.cat((data["img_ids"], reference))
        data["hidden_states"] = torch.cat((data["hidden_states"], data["hidden_states"].flip(1)), 1)
        self.check_equals_dense(model, config, data, VideoGrid(2, 8, 10))

    @torch.no_grad()
    def test_wrong_inputs(self):
        model, data = sparsify(self.model(), SPARSE_SLA), self.inputs()
        with pytest.raises(ValueError, match="img_ids must be those of one grid of tokens in raster order"):
            self.run(model, **data | {"img_ids": torch.cat((ids(8, 9), ids(2, 4) + 1.0))})
        with pytest.raises(ValueError, match="attention_mask must be None"):
            self.run(model, **data, joint_attention_kwargs={"attention_mask": torch.ones(2, 1, 1, 87)})

    def test_pipeline(self):
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.model(),
        )
        generator = torch.Generator().manual_seed(2)
        text, pooled = torch.randn(1, 7, 16, generator=generator), torch.randn(1, 8, generator=generator)
        prompts = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        check_pipeline(pipeline, self.GRID, **prompts, height=128, width=160)
