"""The router of VSA's cubes: learned projections of their means, which rank them in place of the coarse scores.

It is that of SLA2 (`foveal.methods.routing`), over cubes. VSA's paper has none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import pooled_scores
from foveal.methods.routing import Router, check_projections


class CubeRouter(NamedTuple):
    """The router of one call.

    query, key: the projections, [D, D] or [H, D, D].
    temperature: of the soft top-k that they learn by.
    """

    query: Tensor
    key: Tensor
    temperature: float

    @classmethod
    def of(
        cls, proj_query: Tensor | None, proj_key: Tensor | None, query: Tensor, temperature: float
    ) -> CubeRouter | None:
        """The router of a call's arguments, None without one; the identity where only one is given.

        Raises:
            ValueError: naming the projection that does not fit the query [B, H, L, D].
        """
        if proj_query is None and proj_key is None:
            return None
        check_projections(Router(proj_query, proj_key), query)
        eye = torch.eye(query.shape[-1], device=query.device)
        return cls(eye if proj_query is None else proj_query, eye if proj_key is None else proj_key, temperature)

    def learns(self) -> bool:
        """Whether the projections get a gradient. A method, see `SelectionRule.ragged`."""
        return torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad)

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Means of cubes [B, H, C, D], float32 or float64, projected; they get no gradient by this."""
        return Router(self.query, self.key).project(query.detach(), key.detach())

    def scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Scores of cubes [B, H, C, C'] from their means; differentiable in the projections."""
        return pooled_scores(*self.project(query, key), scale)
