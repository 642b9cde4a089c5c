"""Sparse without training: how much each layer needs in each denoising step, measured, and a policy that gives it."""
