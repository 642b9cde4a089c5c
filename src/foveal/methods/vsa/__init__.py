"""Video sparse attention (VSA, arXiv 2505.13389)."""
