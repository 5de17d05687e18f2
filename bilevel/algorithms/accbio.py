"""AccBiO: Nesterov's method for y and for x, the heavy ball for v."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import POSITIVE_DEFINITE, AbstractLinearSolver, LinearOperator, OperatorProperties, demand
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import GROWTH, Solved, Status, first_statuses
from bilevel.algorithms.descent import Descent
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, Range, demand_ranges


@checked(
    mu=POSITIVE,
    L=POSITIVE,
    outer_step=POSITIVE,
    outer_momentum=Range(below=1.0),
    inner_steps=AT_LEAST_1,
    linear_steps=AT_LEAST_1,
)
def accbio(
    mu: float,
    L: float,
    outer_step: float,
    outer_momentum: float | None = None,
    inner_steps: int = 10,
    linear_steps: int = 10,
) -> Descent:
    """AccBiO: N steps of Nesterov's method for y, M of the heavy ball for H v = grad_y f, one of Nesterov's for x.

        y: step 1 / L, momentum r = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), kappa = L / mu, each time from y0
        v <- v - (4 / (sqrt(L) + sqrt(mu))^2) (H v - grad_y f) + r^2 (v - v_before), each time from zero
        z' = P(x - beta (grad_x f - G v));    x <- z' + momentum (z' - z)

    Cost: N + 1 gradients of g, one of f, M products and one cross product a step.

    Converges: where Phi is strongly convex, with beta = 1 / L_Phi and the momentum of its condition number kappa_x,
    like (1 - 1 / sqrt(kappa_x))^k, to within the errors of y and v, which fall like r^N and (1 + 2 M) r^M. For
    problems without noise.

    Source: Ji, Liang, "Lower bounds and accelerated algorithms for bilevel optimization", JMLR 24 (2023).

    Args:
        mu: a lower bound of the eigenvalues of d2g/dy2.
        L: an upper bound of them.
        outer_step: beta.
        outer_momentum: (sqrt(kappa_x) - 1) / (sqrt(kappa_x) + 1); None: (k - 1) / (k + 2), for Phi that is convex only.
        inner_steps: N.
        linear_steps: M.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, or mu > L.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> algorithm = accbio(
        ...     mu=1.0, L=1.0, outer_step=0.5, outer_momentum=0.2, inner_steps=1, linear_steps=1
        ... )
        >>> round(float(minimize(problem, x0, x0, algorithm=algorithm, max_steps=60).x), 6)
        3.0
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.solvers.iterate import Iterate
    from bilevel.solvers.nesterov import Nesterov

    if mu > L:
        raise ValueError(f"`accbio(mu=...)` must be at most L={L:g}, as both bound the same eigenvalues. Got {mu:g}.")
    ratio = (math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))
    inner = Iterate(Nesterov(1 / L, ratio), inner_steps)
    linear = HeavyBallSystem(4 / (math.sqrt(L) + math.sqrt(mu)) ** 2, ratio**2, linear_steps)
    return Descent(AID(inner, linear), Nesterov(outer_step, outer_momentum), warm_start=False)


@final
@dataclass(frozen=True)
class HeavyBallSystem(AbstractLinearSolver):
    """v <- v - step (A v - b) + momentum (v - v_before), from zero or a guess, for a number of steps.

    With step = 4 / (sqrt(L) + sqrt(mu))^2 and momentum = r^2, r = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), the error
    after M steps is at most (1 + 2 M) r^M times that of the start, for A symmetric positive definite.

    Cost: M - 1 products from zero, M from a guess, and one for the true residual. Memory 3 n.

    Args:
        step: the step length.
        momentum: in [0, 1).
        steps: M.
    """

    step: float
    momentum: float
    steps: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE, momentum=Range(below=1.0), steps=AT_LEAST_1)

    @property
    def demands(self) -> OperatorProperties:
        return POSITIVE_DEFINITE

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, type(self).__name__, self.demands)
        v = torch.zeros_like(b) if guess is None else torch.where((safe_row_norms(b) == 0).unsqueeze(-1), 0.0, guess)
        before = v
        residual = first = b if guess is None else b - operator.mv(v)
        for step in range(self.steps):
            if step:
                residual = b - operator.mv(v)
            v, before = v + self.step * residual + self.momentum * (v - before), v
        norms = safe_row_norms(operator.residual(b, v))
        grown = norms > GROWTH * torch.maximum(safe_row_norms(first), safe_row_norms(b))
        statuses = first_statuses((~norms.isfinite(), Status.nonfinite), (grown, Status.diverged))
        return Solved(v, tuple(statuses), norms, self.steps)
