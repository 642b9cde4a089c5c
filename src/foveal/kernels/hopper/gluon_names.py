"""What the kernels take from Gluon under names that differ between Triton's releases, 3.6 to 3.9.

The only file that knows of those differences. A release that renames something else gets its line here, and its number
in `support.TRITON_RELEASES`.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# No release has these under a public name.
from triton.language.core import _aggregate as aggregate
from triton.language.core import base_value

__all__ = ["aggregate", "async_load", "async_store", "base_value", "reinterpret"]

if hasattr(tma, "async_load"):
    async_load, async_store = tma.async_load, tma.async_store
else:  # before 3.8
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

if hasattr(gl.shared_memory_descriptor, "reinterpret"):
    reinterpret = gl.shared_memory_descriptor.reinterpret
else:  # before 3.9
    reinterpret = gl.shared_memory_descriptor._reinterpret
