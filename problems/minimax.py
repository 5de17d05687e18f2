"""A saddle point as a bilevel problem: the levels are opponents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, SEED, SIZE
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic


@checked(p=SIZE, q=SIZE, kappa=AT_LEAST_1, seed=SEED)
def minimax(*, p: int = 3, q: int = 4, kappa: float = 10.0, seed: int = 0) -> Instance:
    """min_x max_y f(x, y), that is g = -f, with f strongly convex in x and strongly concave in y.

    grad_y f = 0 at y*(x), so that the implicit term vanishes: v = 0 and grad Phi = grad_x f (Danskin). A linear
    solver meets a right-hand side at rounding level, which must not become NaN.

    Args:
        p: number of outer variables.
        q: number of inner variables.
        kappa: condition number of the inner Hessian.
        seed: of the draw.

    Example:
        >>> instance = minimax()
        >>> x, y = instance.x0, instance.y0
        >>> bool(instance.problem.f(x, y) == -instance.problem.g(x, y))
        True
    """
    eigenvalues = (
        torch.logspace(0.0, 1.0, q, base=kappa, dtype=torch.float64, device="cpu").tolist() if q > 1 else [kappa]
    )
    draw = random_quadratic(p, q, eigenvalues=eigenvalues, seed=seed)
    family = QuadraticFamily(
        A=draw.A, B=draw.B, c=draw.A @ draw.t, C=-draw.A, t=draw.t, E=draw.B.T.contiguous(), R=draw.R, s=draw.s
    )
    return replace(
        family.instance(),
        problem=BilevelProblem(family.f, partial(_opposed, family)),
        description="saddle point, g = -f: the implicit term vanishes",
    )


def _opposed(family: QuadraticFamily, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -family.f(x, y)
