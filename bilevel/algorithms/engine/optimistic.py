"""The functions of an optimistic bilevel problem in vectors: f, g and all constraints, at any (x, y)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._tree import Tree
from bilevel.algorithms.outer_constraints import entries


@final
@dataclass(frozen=True, eq=False)
class Optimistic:
    """min over x and y of f(x, y)  s.t.  y minimizes g(x, .) under c(x, .) <= 0 and e(x, .) = 0; C(x, y) <= 0, E = 0.

    Every method takes x `(p,)` and y `(q,)`, or `(n, p)` and `(n, q)`, and is differentiable.

    Attributes:
        problem: f, g and the constraints on y.
        inequalities: C, or None.
        equalities: E, or None.
    """

    problem: FlatProblem
    inequalities: Callable[..., Tree] | None
    equalities: Callable[..., Tree] | None

    def outer(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """C and E."""
        C = self._mapped(self.inequalities, "outer_inequalities", "f", x, y)
        return C, self._mapped(self.equalities, "outer_equalities", "f", x, y)

    def inner(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """c and e: the nonlinear ones, then those of the polytope, then finite bounds."""
        own = self.problem.problem
        c = self._mapped(own.inequalities, "inequalities", "g", x, y)
        e = self._mapped(own.equalities, "equalities", "g", x, y)
        if own.constraints is None:
            return c, e
        constraints = own.constraints

        def linear(x: Tree, y: Tensor, *data: Any) -> tuple[Tensor, Tensor]:
            A, b, lower, upper, G, h = called("constraints(x, data)", constraints, x, *data).parts(self.problem.y)
            low, high = lower.isfinite(), upper.isfinite()
            limits = [(lower - y)[low], (y - upper)[high], (G @ y - h)[h.isfinite()]]
            return torch.cat(limits), A @ y - b

        if y.dim() == 1:
            C, E = self.problem.map(linear, "g", x, y)  # type: ignore[arg-type]
        else:
            rows = [self.problem.map(linear, "g", *row) for row in zip(x, y, strict=True)]  # type: ignore[arg-type]
            C, E = (torch.stack(part) for part in zip(*rows, strict=True))
        return torch.cat([c, C], -1), torch.cat([e, E], -1)

    def stationarity(self, x: Tensor, y: Tensor, multipliers: Tensor, nu: Tensor) -> Tensor:
        """grad_y (g + lambda'c + nu'e), with a graph, at y with a graph."""
        c, e = self.inner(x, y)
        total = self.problem.g(x, y) + (multipliers * c).sum() + (nu * e).sum()
        return grad(total, y, create_graph=True)

    def _mapped(self, function: Callable[..., Tree] | None, name: str, level: str, x: Tensor, y: Tensor) -> Tensor:
        if function is None:
            return y.new_zeros(*y.shape[:-1], 0)
        given = function

        def flat(x: Tree, y: Tensor, *data: Any) -> Tensor:
            return entries(given, name, x, self.problem.y.unravel(y), *data)

        return self.problem.map(flat, level, x, y)
