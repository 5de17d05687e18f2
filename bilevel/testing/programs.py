"""Quadratic programs whose solution and hypergradient are known by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.polytope import Polytope


@final
@dataclass(frozen=True, eq=False)
class Program:
    """y*(x) = argmin_y {y'Qy / 2 + (c + Bx)'y : A y = b, G y <= h + Hx}, f = |y - t|^2 / 2, known near x = 0.

    Made from its solution: c is what a given y, multipliers and active rows leave, so that y*(0), its multipliers and
    the margin of strict complementarity are known without solving anything.

    Attributes:
        Q: `(q, q)`, positive definite.
        B: how c moves `(q, p)`.
        A: rows of equalities `(m, q)`.
        G: rows of inequalities `(k, q)`.
        H: how their right-hand sides move `(k, p)`.
        t: what f compares y with `(q,)`.
        y: y*(0).
        multipliers: of the inequalities, zero where they do not hold `(k,)`.
        slack: how far those are away, zero where they hold `(k,)`.
        nu: multipliers of the equalities `(m,)`.

    Example:
        >>> eye, none = (
        ...     torch.eye(2).double(),
        ...     torch.zeros(0, 2).double(),
        ... )  # min |y|^2 / 2 + c'y, y_1 <= 0, c = (-1, -1)
        >>> held, zero = torch.ones(1).double(), torch.zeros(1).double()
        >>> Program(
        ...     eye, eye, none, eye[:1], 0 * eye[:1], 0 * eye[0], eye[1], held, zero, none[:, 0]
        ... ).gradient()
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """

    Q: Tensor
    B: Tensor
    A: Tensor
    G: Tensor
    H: Tensor
    t: Tensor
    y: Tensor
    multipliers: Tensor
    slack: Tensor
    nu: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def x(self) -> Tensor:
        """The point at which all is known: zero."""
        return torch.zeros_like(self.B[0])

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """|y - t|^2 / 2 + sum x / 2."""
        return (y - self.t).square().sum() / 2 + x.sum() / 2

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """y'Qy / 2 + (c + Bx)'y."""
        c = -(self.Q @ self.y + self.G.T @ self.multipliers + self.A.T @ self.nu)
        return y @ self.Q @ y / 2 + (c + self.B @ x) @ y

    @property
    def linear(self) -> BilevelProblem:
        """The problem with its constraints as a `Polytope`."""
        A, b = (self.A, self.A @ self.y) if len(self.A) else (None, 0.0)
        h = self.G @ self.y + self.slack
        return BilevelProblem(self.f, self.g, constraints=lambda x: Polytope(A=A, b=b, G=self.G, h=h + self.H @ x))

    @property
    def written(self) -> BilevelProblem:
        """The same with its constraints as functions."""
        b, h = self.A @ self.y, self.G @ self.y + self.slack
        return BilevelProblem(
            self.f,
            self.g,
            inequalities=lambda x, y: self.G @ y - h - self.H @ x,
            equalities=(lambda x, y: self.A @ y - b) if len(b) else None,  # noqa: ARG005  (they stay)
        )

    def gradient(self) -> Tensor:
        """The hypergradient at x = 0, by one dense system of the rows that hold."""
        held = self.multipliers > 0
        J, q = torch.cat([self.G[held], self.A]), len(self.y)
        n = len(J)
        K = torch.cat([torch.cat([self.Q, J.T], 1), torch.cat([J, J.new_zeros(n, n)], 1)])
        still = self.H.new_zeros(len(self.A), self.H.shape[1])
        moves: Tensor = torch.linalg.solve(K, torch.cat([-self.B, self.H[held], still]))[:q]
        return moves.T @ (self.y - self.t) + 0.5
