"""Clips and precomputed latents."""
