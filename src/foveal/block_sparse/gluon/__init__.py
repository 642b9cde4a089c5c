"""Block-sparse attention for Hopper in Gluon: the copy engine, asynchronous tensor-core products, no atomics.

Importing this package needs neither Triton nor a GPU; `supports` says whether the kernels can run.
"""

from foveal.block_sparse.gluon.launch import backward, forward
from foveal.block_sparse.gluon.support import supports

__all__ = ["backward", "forward", "supports"]
