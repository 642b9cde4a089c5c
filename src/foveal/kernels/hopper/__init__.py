"""Block-sparse attention for Hopper in Gluon: TMA, asynchronous tensor-core products, no atomics.

Importing this package needs neither Triton nor a GPU; `support.why_not` says whether the kernels can run.
"""
