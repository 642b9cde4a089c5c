"""SLA and VSA in one: cubes read exactly, a gated coarse branch, and a linear branch over the rest.

It builds on both.
"""

from foveal.methods.base import register
from foveal.methods.sla_vsa.method import SLA_VSA

register(SLA_VSA)
