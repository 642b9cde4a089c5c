"""The Triton backend with eight-bit products of queries and keys: `precision="int8"`."""
