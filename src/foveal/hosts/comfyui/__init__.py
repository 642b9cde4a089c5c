"""ComfyUI: foveal's attention in its Wan and LTX-Video models.

The nodes are in `integrations_comfyui/` and only pass values on. Nothing here imports ComfyUI. A `SparseAttention` has
two functions that ComfyUI calls: `attend`, which the cloned model's `transformer_options` name as their
`optimized_attention_override`, and `run_forward`, a wrapper around the diffusion model that tells `attend` which layer
and which denoising step it is in.
"""
