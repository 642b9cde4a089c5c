"""What ComfyUI's Wan models and its `ModelPatcher` look like to foveal, without ComfyUI: names, calls, and hooks.

`tests/test_comfyui.py` runs the same against ComfyUI itself, which keeps these honest.
"""

import copy
import functools
import types

import torch
from torch import nn
from torch.nn import functional

HEADS, LAYERS = 2, 3


def dense_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False):
    """What ComfyUI runs without an override, with its arguments."""
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def optimized_attention(*args, transformer_options=None, **kwargs):
    override = (transformer_options or {}).get("optimized_attention_override")
    return dense_attention(*args, **kwargs) if override is None else override(dense_attention, *args, **kwargs)


class Attention(nn.Module):
    def __init__(self, dim, mask=None):
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, HEADS, dim // HEADS
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.mask = mask

    def forward(self, x, context=None, transformer_options=None):
        other = x if context is None else context
        qkv = self.q(x), self.k(other), self.v(other)
        more = {} if self.mask is None else {"mask": self.mask}
        heads = getattr(self, "num_heads", HEADS)
        return optimized_attention(*qkv, heads=heads, transformer_options=transformer_options, **more)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim), Attention(dim)

    def forward(self, x, context, options):
        x = x + self.self_attn(x, transformer_options=options)
        return x + self.cross_attn(x, context, transformer_options=options)


class Wan(nn.Module):
    """Latents [B, C, T, H, W] to [B, C, T, H, W]."""

    patch_size = (1, 2, 2)

    def __init__(self, head_dim=64, channels=4, layers=LAYERS):
        super().__init__()
        dim = head_dim * HEADS
        self.patch_embedding = nn.Conv3d(channels, dim, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, channels)
        self.ref_conv = None

    def forward(self, x, timestep, context, transformer_options, reference_latent=None):
        wrappers = transformer_options.get("wrappers", {}).get("diffusion_model", {})
        run = self._forward
        for wrapper in [one for several in wrappers.values() for one in several]:
            run = Executor(wrapper, run, self)
        return run(x, timestep, context, transformer_options, reference_latent=reference_latent)

    def _forward(self, x, timestep, context, options, reference_latent=None):
        tokens = self.patch_embedding(x)
        grid, tokens = tokens.shape[2:], tokens.flatten(2).transpose(1, 2)
        extra = 0
        if reference_latent is not None:
            reference = self.patch_embedding(reference_latent).flatten(2).transpose(1, 2)
            tokens, extra = torch.cat((reference, tokens), 1), reference.shape[1]
        for block in self.blocks:
            tokens = block(tokens, context, options)
        out = self.head(tokens[:, extra:]).transpose(1, 2).unflatten(2, grid)
        return functional.interpolate(out, x.shape[2:], mode="nearest")


class Ltx(nn.Module):
    """The names of LTX-Video, around the same blocks; its timesteps go up to 1, and a token is one latent pixel."""

    def __init__(self, head_dim=64):
        super().__init__()
        inner = Wan(head_dim)
        inner.patch_embedding = nn.Conv3d(4, head_dim * HEADS, 1)
        self.patchifier = types.SimpleNamespace(patch_size=(1, 1, 1))
        self.transformer_blocks = nn.ModuleList(LtxBlock(block) for block in inner.blocks)
        inner.blocks = self.transformer_blocks
        self.run = [inner]  # in a list, so that it is no part of this module

    def forward(self, x, timestep, context, transformer_options):
        run = self.run[0]._forward
        for wrapper in transformer_options["wrappers"]["diffusion_model"]["foveal"]:
            run = Executor(wrapper, run, self)
        return run(x, timestep, context, transformer_options)


class LtxBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.attn1, self.attn2 = block.self_attn, block.cross_attn
        for attention in (self.attn1, self.attn2):
            attention.to_q, attention.heads, attention.dim_head = attention.q, attention.num_heads, attention.head_dim
            del attention.dim, attention.num_heads, attention.head_dim

    def forward(self, x, context, options):
        x = x + self.attn1(x, transformer_options=options)
        return x + self.attn2(x, context, transformer_options=options)


class H3Attention(nn.Module):
    def __init__(self, hidden, head_dim):
        super().__init__()
        self.heads, self.head_dim = HEADS, head_dim
        self.qkv_proj = nn.Linear(hidden, 3 * HEADS * head_dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.out_proj = nn.Linear(HEADS * head_dim, hidden, bias=False)

    def qkv(self, x):
        """[1, H, S, D] each."""
        q, k, v = (y.unflatten(1, (self.heads, self.head_dim)) for y in self.qkv_proj(x).chunk(3, -1))
        return [y.transpose(0, 1)[None] for y in (self.q_norm(q), self.k_norm(k), v)]

    def forward(self, x, rope_freqs=None, transformer_options=None):
        out = optimized_attention(
            *self.qkv(x), self.heads, mask=None, skip_reshape=True, transformer_options=transformer_options
        )
        return self.out_proj(out.squeeze(0))


class H3Block(nn.Module):
    def __init__(self, hidden, head_dim):
        super().__init__()
        self.attn, self.mlp = H3Attention(hidden, head_dim), nn.Linear(hidden, hidden)

    def forward(self, x, t_emb, mod_segments, rope_freqs, transformer_options=None):
        x = x + self.attn(x, rope_freqs=rope_freqs, transformer_options=transformer_options)
        return x + self.mlp(x)


class MiniMaxH3(nn.Module):
    """What ComfyUI's MiniMax-H3 looks like: video [1, C, T, H, W] and sound [1, C, 2, T] in one packed sequence.

    Its own file was read, not run: it needs a ComfyUI that we do not have.
    """

    patch_size = (1, 2, 2)
    audio_latents_dim = 3

    def __init__(self, head_dim=64, hidden=48, channels=4, gate=None):
        super().__init__()
        self.video_patch_proj = nn.Linear(channels * 4, hidden)
        self.audio_patch_proj = nn.Linear(self.audio_latents_dim, hidden)
        self.token_refiner = H3Attention(hidden, head_dim)
        self.blocks = nn.ModuleList(H3Block(hidden, head_dim) for _ in range(LAYERS))
        for block in self.blocks:
            block.attn.to_gate_compress = None if gate is None else gate(hidden, HEADS * head_dim)
        self.head = nn.Linear(hidden, channels * 4)

    def forward(self, x, timestep, context, transformer_options=None, minimax_payload=None):
        run = self._forward
        for wrapper in (transformer_options or {}).get("wrappers", {}).get("diffusion_model", {}).get("foveal", []):
            run = Executor(wrapper, run, self)
        return run(x, timestep, context, transformer_options, minimax_payload=minimax_payload)

    def _forward(self, x, timestep, context, transformer_options=None, minimax_payload=None):
        h = self.packed(x, context, transformer_options)
        for block in self.blocks:
            h = block(h, None, None, None, transformer_options=transformer_options)
        return self.head(h)

    def packed(self, x, context, options):
        """[S, hidden]: text, sound, video."""
        video, sound = x
        channels, frames, height, width = video.shape[1:]
        tokens = video.reshape(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
        text = context[0] + self.token_refiner(context[0], transformer_options=options)
        rows = self.video_patch_proj(tokens.reshape(-1, channels * 4))
        return torch.cat((text, self.audio_patch_proj(sound[0].flatten(1).T), rows))


class Executor:
    """ComfyUI's `WrapperExecutor`: what a wrapper calls to go on, and whose model it is."""

    def __init__(self, wrapper, inner, model):
        self.wrapper, self.inner, self.class_obj = wrapper, inner, model

    def __call__(self, *args, **kwargs):
        inner = self.inner

        def go_on(*args, **kwargs):
            return inner(*args, **kwargs)

        go_on.class_obj = self.class_obj
        return self.wrapper(go_on, *args, **kwargs)


class Patcher:
    """ComfyUI's `ModelPatcher`, as far as a node changes one."""

    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(of) for key, of in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def sample(self, latent, context, sigmas, **more):
        """Every denoising step of a sampler that only looks: the outputs of the model."""
        options = {"wrappers": self.wrappers, "sample_sigmas": sigmas, **self.model_options["transformer_options"]}

        def run():
            outputs = []
            for sigma in sigmas[:-1]:
                now = {**options, "sigmas": sigma[None]}
                outputs.append(self.model(latent, 1000 * sigma[None], context, now, **more))
            return outputs

        for wrapper in self.wrappers.get("outer_sample", {}).get("foveal", []):
            run = functools.partial(wrapper, run)
        return run()
