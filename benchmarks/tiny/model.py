"""The parts of the tiny model: a Wan pipeline of diffusers, small enough to ship in the package.

Every part is a class of diffusers or transformers, so whatever loads a Wan pipeline loads this one. A video of 49
frames of 144 x 256 becomes latents [16, 13, 18, 32] and 1,872 tokens. The model is trained with a timestep for each
token (`expand_timesteps`, as Wan 2.2 5B), so it makes a video from text, or from text and a first frame.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = 49, 144, 256
LATENT_CHANNELS, TEXT_TOKENS, TEXT_DIM = 16, 512, 64
FLOW_SHIFT = 3.0
# Of 6.3 and 63 million parameters. The smaller one ships.
SIZES = {
    "tiny": {"num_attention_heads": 4, "ffn_dim": 832, "num_layers": 6},
    "large": {"num_attention_heads": 10, "ffn_dim": 2560, "num_layers": 9},
}
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> nn.Module:
    """An `AutoencoderKLWan`, 8 x 8 pixels and 4 frames to a latent pixel, randomly initialized."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


def build_transformer(size: str = "tiny") -> nn.Module:
    """A randomly initialized `WanTransformer3DModel` of one of `SIZES`."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        **SIZES[size],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def vocabulary(captions: list[str]) -> dict[str, int]:
    """The index of every word of the captions, after the special tokens."""
    words = sorted(set(itertools.chain.from_iterable(re.findall(r"\w+|[^\w\s]", text.lower()) for text in captions)))
    return {word: index for index, word in enumerate([*SPECIAL, *words])}


def build_tokenizer(words: dict[str, int]) -> Any:
    """A tokenizer of whole words; unknown ones become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def build_text_encoder(words: dict[str, int], seed: int = 0) -> nn.Module:
    """A `UMT5EncoderModel` of one layer with seeded random weights, which are never trained.

    It only has to tell captions apart: what they mean, the transformer's own text layers learn.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(words), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def assemble(vae: nn.Module, transformer: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> Any:
    """The parts as a `WanPipeline`."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=True,
    )


def encode(vae: nn.Module, video: Tensor) -> Tensor:
    """The moments [B, 2 C, F', H', W'] of a video [B, 3, F, H, W], in two calls of the encoder.

    Equal to the VAE's own encoding, which calls its encoder once for every four frames.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    x = patchify(video, vae.config.patch_size)
    cache = [None] * vae._cached_conv_counts["encoder"]
    parts = [vae.encoder(part, feat_cache=cache, feat_idx=[0]) for part in _first_and_rest(x)]
    return vae.quant_conv(torch.cat(parts, 2))


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """The video [B, 3, F, H, W], not clamped, of latents [B, C, F', H', W'], in two calls of the decoder."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    x = vae.post_quant_conv(latents)
    cache = [None] * vae._cached_conv_counts["decoder"]
    parts = [
        vae.decoder(part, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        for index, part in enumerate(_first_and_rest(x))
    ]
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


def _first_and_rest(x: Tensor) -> list[Tensor]:
    return [x[:, :, :1], x[:, :, 1:]] if x.shape[2] > 1 else [x]
