"""The Triton backend for `precision="int8"`: which launcher does what, and what eight bits change in it."""

from __future__ import annotations

import functools

from torch import Tensor

from foveal.kernels.backend import BackwardCall
from foveal.kernels.triton import backend as triton
from foveal.kernels.triton.backward import backward
from foveal.kernels.triton.cubes import attend_cubes
from foveal.kernels.triton.forward import Forward
from foveal.kernels.triton.int8 import Int8, key_means, round_trip, write_int8
from foveal.kernels.triton.linear_backward import add_key_gradients
from foveal.kernels.triton.select import pool


class Int8Forward(Forward):
    """`ForwardCall` over keys in int8, which are written before their launch; the kernel rounds queries as it loads."""

    wants_means = True

    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.key, self.key_8 = key, Int8.empty(key, self.selection.block_k)
        super().prepare(query, self.key_8.values, value)
        self.shared |= {"key_step_ptr": self.key_8.steps, "INT8": True}

    def take_means(self, pairs: range, pooled: Tensor) -> None:
        block, sizes = self.selection.block_k, self.selection.key_block_sizes
        write_int8(self.key, block, sizes, key_means(pooled, self.key, block, sizes, pairs), pairs, self.key_8)

    def run_all(self) -> tuple[Tensor, Tensor]:
        pooled = pool(self.key, self.selection.block_k, self.selection.key_block_sizes)
        self.take_means(range(self.pairs), pooled.flatten(0, 1))
        return super().run_all()


class Int8Backend(triton.TritonBackend):
    name = "triton_int8"
    forward = Int8Forward
    centers_keys = True
    attend_cubes = staticmethod(functools.partial(attend_cubes, forward=Int8Forward))

    def backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`: exact for what the forward made of queries and keys, straight through the rounding.

        The linear branch has not seen that, so its gradients are those of the keys themselves.
        """
        query, key, value, selection, *_ = call.problem
        block_k, sizes = selection.block_k, selection.key_block_sizes
        pairs = range(key.shape[0] * key.shape[1])
        mean = key_means(pool(key, block_k, sizes).flatten(0, 1), key, block_k, sizes, pairs)
        query_back, query_8 = round_trip(query, selection.block_q, None, None)
        key_back, key_8 = round_trip(key, block_k, sizes, mean)
        rounded = call.problem._replace(query=query_back, key=key_back)
        grads = backward(call._replace(problem=rounded, linear=None), scored=(query_8, key_8))
        if call.linear is not None:
            add_key_gradients(key, value, call.linear, selection, *grads[1:])
        return grads


BACKEND = Int8Backend()
