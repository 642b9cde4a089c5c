"""Block-sparse attention for Hopper in Gluon: the copy engine, asynchronous tensor-core products, no atomics.

Importing this package needs neither Triton nor a GPU; `supports` says whether the kernels can run.
"""

from foveal.kernels.hopper.cubes import attend_cubes
from foveal.kernels.hopper.launch import Forward, KeyGradients, VideoGradients, backward, forward
from foveal.kernels.hopper.launch_linear import query_gradients, shared_query_gradients
from foveal.kernels.hopper.support import supports

__all__ = [
    "Forward",
    "KeyGradients",
    "VideoGradients",
    "attend_cubes",
    "backward",
    "forward",
    "query_gradients",
    "shared_query_gradients",
    "supports",
]
