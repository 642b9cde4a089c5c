"""The Triton backend: which launcher does what."""

from foveal.kernels.backend import Backend
from foveal.kernels.triton.backward import backward
from foveal.kernels.triton.cubes import attend_cubes
from foveal.kernels.triton.forward import Forward
from foveal.kernels.triton.linear_backward import query_gradients, shared_query_gradients


class TritonBackend(Backend):
    name = "triton"
    forward = Forward
    backward = staticmethod(backward)
    query_gradients = staticmethod(query_gradients)
    shared_query_gradients = staticmethod(shared_query_gradients)
    attend_cubes = staticmethod(attend_cubes)


BACKEND = TritonBackend()
