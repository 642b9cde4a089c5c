"""Sparse-linear attention (SLA, arXiv 2509.24006)."""

from foveal.methods.base import register
from foveal.methods.sla.method import SLA

register(SLA)
