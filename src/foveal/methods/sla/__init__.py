"""Sparse-linear attention (SLA, arXiv 2509.24006)."""
