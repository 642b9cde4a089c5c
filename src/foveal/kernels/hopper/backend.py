"""The Gluon backend: which launcher does what."""

from foveal.kernels.backend import Backend
from foveal.kernels.hopper.cubes import attend_cubes
from foveal.kernels.hopper.launch import Forward, backward
from foveal.kernels.hopper.launch_linear import query_gradients, shared_query_gradients


class GluonBackend(Backend):
    name = "gluon"
    forward = Forward
    projects_early = True  # one H for all is cheap to project, and spares the epilogue W
    cube_copies = "kv"
    writes_raster = True
    backward = staticmethod(backward)
    query_gradients = staticmethod(query_gradients)
    shared_query_gradients = staticmethod(shared_query_gradients)
    attend_cubes = staticmethod(attend_cubes)

    def prepares_beside(self, block_q: int) -> bool:
        return block_q == 64


BACKEND = GluonBackend()
