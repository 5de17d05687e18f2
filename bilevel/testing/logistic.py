"""A logistic problem in which every derivative up to the third is there, with its constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants

_THIRD = 1 / (6 * math.sqrt(3))  # the greatest |third derivative| of log(1 + exp(t))


@final
@dataclass(frozen=True, eq=False)
class Logistic:
    """g = mean_i s(x_i) log(1 + exp(-b_i z_i'y)) + sum_j exp(x_j) y_j^2 / 2, f a validation loss and terms in x.

    The first q entries of x are log-penalties, the n others weigh the samples by s(x_i) = sigmoid(x_i).

    Args:
        Z: training inputs `(n, q)`.
        b: their labels -1 and 1 `(n,)`.
        U: validation inputs `(m, q)`.
        c: their labels `(m,)`.

    Example:
        >>> data = Logistic(torch.ones(2, 1), torch.ones(2), torch.ones(1, 1), torch.ones(1))
        >>> round(float(data.g(torch.zeros(3), torch.zeros(1))), 4)  # log(2) / 2
        0.3466
    """

    Z: Tensor
    b: Tensor
    U: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"Z": Shape("n q"), "b": Shape("n"), "U": Shape("m q"), "c": Shape("m")}
        demand_shapes("Logistic", axes, vars(self))

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        q = self.Z.shape[1]
        loss = softplus(-self.b * (self.Z @ y))
        return (torch.sigmoid(x[q:]) * loss).mean() + (x[:q].exp() * y.square()).sum() / 2

    @fitting
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return softplus(-self.c * (self.U @ y)).mean() + x.sin().sum() / 10 + x[0] * y[0] / 5

    def problem(self) -> BilevelProblem:
        """The pair (f, g)."""
        return BilevelProblem(self.f, self.g)

    @fitting
    def constants(self, x: Tensor, solution: Tensor, radius: float = 1.0) -> Constants:
        """The constants at x within a radius of y*(x); only C_G depends on the radius.

        Args:
            x: where.
            solution: y*(x).
            radius: how far the iterates go.
        """
        n, q = self.Z.shape
        penalties, weights = x[:q].exp(), torch.sigmoid(x[q:])
        slopes = weights * (1 - weights) / n
        norms = torch.linalg.vector_norm(self.Z, dim=1)
        moment = (self.Z.T * (weights / n)) @ self.Z
        top = float(penalties.max())
        from_penalties = top * (float(torch.linalg.vector_norm(solution, math.inf)) + radius)
        up = 1 + 1e-10  # more than the rounding of these formulas

        def largest(matrix: Tensor) -> float:
            return float(torch.linalg.matrix_norm(matrix, 2))

        def norm(vector: Tensor) -> float:
            return float(torch.linalg.vector_norm(vector))

        return Constants(
            mu=float(penalties.min()) / up,
            L=(top + largest(moment) / 4) * up,
            L_fyy=largest(self.U.T @ self.U / len(self.U)) / 4 * up,
            L_fxy=0.2 * up,
            M_yy=_THIRD * float((weights * norms**3).mean()) * up,
            M_xy=math.hypot(top, norm(slopes * norms**2) / 4) * up,
            C_G=math.hypot(from_penalties, norm(slopes * norms)) * up,
            L_f_minus=0.0,
            radius=radius,
            source="structural",
        )
