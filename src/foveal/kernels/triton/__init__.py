"""Block-sparse attention in Triton: any GPU that Triton compiles for."""
