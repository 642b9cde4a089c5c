"""Sparse-linear attention with a learned router and a learned ratio (SLA2, arXiv 2602.12675); it builds on SLA."""

from foveal.methods.base import register
from foveal.methods.sla2.method import SLA2

register(SLA2)
