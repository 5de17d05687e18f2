"""A term of a linear image at one x, in vectors, row by row: what splitting solvers take apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class FlatImage:
    """h(y) = k(A y + b) for each problem of a batch.

    Attributes:
        A: `(*batch, m, q)`, with its graph from x.
        b: `(*batch, m)`, likewise.
        prox: (p, step) -> prox_{step k}(p), `(*batch, m)`; differentiable in x too.
        active: (p, step) -> codes of the manifold of k `(*batch, n)`.
        margin: (p, step) -> how far p is from a kink of its map `(*batch,)`, NaN where k is not convex.
    """

    A: Tensor
    b: Tensor
    prox: Callable[[Tensor, Tensor | float], Tensor]
    active: Callable[[Tensor, Tensor | float], Tensor]
    margin: Callable[[Tensor, Tensor | float], Tensor]

    def image(self, y: Tensor) -> Tensor:
        """A y + b."""
        return (self.A @ y.unsqueeze(-1)).squeeze(-1) + self.b

    def back(self, u: Tensor) -> Tensor:
        """A' u."""
        return (self.A.mT @ u.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def squared_norm(self) -> Tensor:
        """|A|^2, of the largest singular value `(*batch, 1)`; without a graph, and one where A is zero."""
        A = self.A.detach()
        gram = A @ A.mT if A.shape[-2] < A.shape[-1] else A.mT @ A
        top = torch.linalg.eigvalsh(torch.where(gram.isfinite(), gram, 0.0))[..., -1:]
        return torch.where(top > 0, top, torch.ones_like(top))
