"""Constraints at a point by products with their gradients: two backward passes, whatever their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._numerics.rows import positive_or_one, row_moduli
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints

_PROBES = 16  # of the lengths of gradients, which come out to within a third of theirs


@final
@dataclass(frozen=True, eq=False)
class ConstraintProducts:
    """E = (c, e) at a point, c(x, y) <= 0 and e(x, y) = 0, with J = dE/dy known by its products.

    J'w is one backward pass with its graph kept. It is linear in w, so that its derivative in w along u is J u, and
    its derivative in y along u the second derivative of w'E times u.

    Attributes:
        y: the point, a leaf `(*batch, q)`.
        values: E `(*batch, k + m)`, with a graph from y, and from x if the constraints have one.
        weights: w, a leaf of the same shape.
        pull: J'w `(*batch, q)`, with a graph.
        inequalities: k.
    """

    y: Tensor
    values: Tensor
    weights: Tensor
    pull: Tensor
    inequalities: int

    @staticmethod
    def at(constraints: FlatConstraints, y: Tensor, weights: Tensor | None = None) -> ConstraintProducts:
        """At y, with multipliers w; None: zeros."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            c, e = constraints.inequalities(leaf), constraints.equalities(leaf)
            values = torch.cat([c, e], -1)
            w = torch.zeros_like(values) if weights is None else weights
            w = w.detach().clone().requires_grad_()
            pull = grad((values * w).sum(), leaf, create_graph=True, checked=True)
        return ConstraintProducts(leaf, values, w, pull, c.shape[-1])

    def times(self, u: Tensor) -> Tensor:
        """J u."""
        return self.both(u)[0]

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """J u, and the second derivative of w'E times u."""
        return _derivatives(self.pull, (self.weights, self.y), u)

    def transposed(self, s: Tensor) -> Tensor:
        """J's."""
        return _derivatives(self.values, (self.y, self.weights), s)[0]

    def lengths(self) -> Tensor:
        """Lengths of the gradients `(*batch, k + m)` as random vectors see them, or what values make of them.

        The mean square of r'g over r with entries -1 and 1 is |g|^2: sixteen give it to a third, which is enough to
        compare constraints of different units.
        """
        generator = torch.Generator(device="cpu").manual_seed(0)
        square = torch.zeros_like(self.values).detach()
        for _ in range(_PROBES if self.values.shape[-1] else 0):
            signs = torch.randint(0, 2, (self.y.shape[-1],), generator=generator, device="cpu").to(self.y) * 2 - 1
            square = square + self.times(signs.expand_as(self.y).contiguous()).square() / _PROBES
        far = 1 + row_moduli(self.y.detach())
        sizes = torch.maximum(square.sqrt(), torch.where(self.values.isfinite(), self.values.detach().abs(), 0.0) / far)
        return positive_or_one(torch.where(sizes.isfinite(), sizes, 1.0))


def _derivatives(of: Tensor, leaves: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    if not of.requires_grad:
        return torch.zeros_like(leaves[0]), torch.zeros_like(leaves[1])
    first, second = torch.autograd.grad(
        of, leaves, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return first, second
