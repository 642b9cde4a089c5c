"""Video sparse attention (VSA, arXiv 2505.13389)."""

from foveal.methods.base import register
from foveal.methods.vsa.method import VSA

register(VSA)
