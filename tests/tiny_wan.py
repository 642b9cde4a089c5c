"""A tiny random `WanTransformer3DModel`, a pipeline around two of them, and what to feed them."""

import pytest
import torch

from foveal import SLAConfig, VSAConfig, sparsify

diffusers = pytest.importorskip("diffusers")

DENSE_SLA = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, block_q=16, block_k=16)
DENSE_VSA = VSAConfig(keep_ratio=1.0, tile=(2, 4, 4))
SPARSE_SLA = SLAConfig(keep_ratio=0.3, drop_ratio=0.1, block_q=16, block_k=16)
SPARSE_VSA = VSAConfig(keep_ratio=0.3, tile=(2, 2, 4))


def tiny_transformer(num_layers: int = 2, seed: int = 0, **overrides) -> torch.nn.Module:
    torch.manual_seed(seed)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": num_layers,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**settings | overrides).eval()


def inputs(batch: int = 2, latent=(3, 10, 14), dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, *latent, generator=generator).to(dtype),
        "timestep": torch.arange(batch) * 400 + 3,
        "encoder_hidden_states": torch.randn(batch, 7, 8, generator=generator).to(dtype),
    }


def run(model, **kwargs) -> torch.Tensor:
    return model(**(kwargs or inputs())).sample


def randomize(model) -> None:
    """Sparse parameters that leave their neutral start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".processor." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def check_compiled_over_grids(config) -> None:
    """A compiled model gives over several grids what it gives uncompiled, and is not compiled for each of them."""
    model = sparsify(tiny_transformer(num_layers=1), config)
    randomize(model)
    data = [inputs(batch=1, latent=latent) for latent in ((3, 10, 14), (2, 12, 10), (4, 8, 8))]
    with torch.no_grad():
        expected = [run(model, **one) for one in data]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for one, output in zip(data, expected, strict=True):
            torch.testing.assert_close(run(model, **one), output, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def tiny_pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.config.latents_mean, vae.config.latents_std = [0.0] * 4, [1.0] * 4
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(seed=0),
        transformer_2=tiny_transformer(seed=1),
        boundary_ratio=0.6,
    )


def generate(pipeline, **settings) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(4)).to(pipeline._execution_device)
    return pipeline(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        height=80,
        width=112,
        num_frames=9,
        **{"num_inference_steps": 2} | settings,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames
