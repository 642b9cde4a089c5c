"""The classes that vLLM-Omni builds its attention layers from. This module needs vLLM-Omni.

Shape legend: B batch, L tokens as the model packs them, H heads, D head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.fastvideo_vsa import FastVideoVSABackend, FastVideoVSAImpl

from foveal.hosts.vllm_omni.function import coarse_gate, config_of
from foveal.kernels.api import IMPLS
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.vsa.attention import vsa_attention

H3_TILE = (4, 4, 4)
NAME = "FovealVSA_"  # and an implementation: vLLM-Omni looks a backend up by the path of its class


class FovealVSAImpl(FastVideoVSAImpl):
    """VSA by foveal, where the host's models describe a video, and the host's dense attention elsewhere.

    The constructor is the host's. Its `topk` counts cubes of 4x8x8 tokens in Wan models and of 4x4x4 in MiniMax-H3.
    """

    implementation: ClassVar[str] = "auto"

    def __init__(self, *args: Any, backend_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, backend_kwargs=backend_kwargs, **kwargs)
        self.topk_was_given = "topk" in (backend_kwargs or {})

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """Attention of [B, L, H, D] tensors, on whatever device they are.

        Rows past the valid ones of a packed sequence are 0.
        """
        length = query.shape[1]
        padding = None if attn_metadata is None else attn_metadata.packed_padding
        valid = length if padding is None else padding.q_length
        tensors = tuple(x[:, :valid].transpose(1, 2) for x in (query, key, value))
        why = self._why_dense(tensors, attn_metadata)
        if why is not None:
            return self._fallback(query, key, value, attn_metadata, why)
        gate = coarse_gate(attn_metadata.extra.get("gate_compress"), tensors[0])
        layout = _packed_layout(attn_metadata)
        if layout is None:
            topk, tile = self.topk, self.block_size
            where = VideoGrid(*attn_metadata.extra["vsa_dit_seq_shape"])
        else:
            topk, tile = self._packed_topk(layout, attn_metadata.extra.get("vsa_h3_sparsity")), H3_TILE
            where = layout
        output = vsa_attention(
            *tensors,
            config=config_of(topk=topk, tile=tile, coarse=gate is not None),
            layout=where,
            gate_coarse=gate,
            scale=self.softmax_scale,
            impl=self.implementation,
        ).transpose(1, 2)
        return output if valid == length else torch.nn.functional.pad(output, (0, 0, 0, 0, 0, length - valid))

    def _packed_topk(self, layout: TokenLayout, sparsity: float | None) -> int:
        """MiniMax-H3's, whose checkpoint may bring a sparsity."""
        if sparsity is None or self.topk_was_given:
            return self.topk
        return max(1, math.ceil((1 - sparsity) * layout.grid.num_cubes(H3_TILE)))

    def _why_dense(self, tensors: tuple[Tensor, Tensor, Tensor], metadata: AttentionMetadata | None) -> str | None:
        """Why this call is not sparse; None if it is."""
        query, key, _ = tensors
        if self.causal:
            return "causal attention is not supported"
        if query.shape != key.shape:
            return f"queries and keys must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}"
        if metadata is None:
            return "the model describes no video"
        if metadata.attn_mask is not None:
            return "attention masks are not supported"
        if metadata.full_attn_spans is not None:
            return "piecewise attention is not supported"
        if metadata.packed_padding is not None and metadata.packed_padding.kv_length != query.shape[2]:
            return "packed queries and keys must have one length"
        layout = _packed_layout(metadata)
        if layout is not None:
            tokens = layout.num_tokens
        else:
            shape = metadata.extra.get("vsa_dit_seq_shape")
            if shape is None:
                return "the model describes no video"
            grid = VideoGrid(*shape)
            tokens, cubes = grid.num_tokens, grid.num_cubes(self.block_size)
            if self.topk >= cubes and metadata.extra.get("preserve_vsa_all_blocks") is not True:
                return f"topk {self.topk} keeps all {cubes} blocks"
        if tokens != query.shape[2]:
            return f"the model describes {tokens} tokens, but attention got {query.shape[2]}"
        return None


def _packed_layout(metadata: AttentionMetadata) -> TokenLayout | None:
    """What MiniMax-H3's packed sequence is made of; None for other models, and for its layers without a gate."""
    segments = metadata.extra.get("vsa_h3_prefix_segments")
    if segments is None or metadata.video_layout is None:
        return None
    targets = [span for span in metadata.video_layout.video_spans if span.role == "target"]
    if not targets:
        return None
    before = tuple(int(length) for length in segments if int(length))
    return TokenLayout(VideoGrid(*targets[-1].latent_grid), before=before)


@functools.cache
def backend_class(impl: str) -> type[FastVideoVSABackend]:
    """The backend that runs `impl`, under the name that vLLM-Omni's models ask for."""

    class Implementation(FovealVSAImpl):
        implementation = impl

    class FovealVSABackend(FastVideoVSABackend):
        @classmethod
        def supports_packed_mask_free(cls) -> bool:
            return True

        @classmethod
        def validate_available(cls) -> None:
            """It needs nothing but foveal, where the host's needs fastvideo-kernel."""

        @staticmethod
        def get_impl_cls() -> type[FovealVSAImpl]:
            return Implementation

    FovealVSABackend.__name__ = FovealVSABackend.__qualname__ = NAME + impl
    return FovealVSABackend


def __getattr__(name: str) -> type[FastVideoVSABackend]:
    """`FovealVSA_auto` and so on."""
    if name.startswith(NAME) and name.removeprefix(NAME) in IMPLS:
        return backend_class(name.removeprefix(NAME))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
