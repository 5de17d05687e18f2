"""The system of a fixed point, not solved at all: its right-hand side in the place of its solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import ESTIMATED_CONTRACTION, AbstractLinearSolver, LinearOperator, OperatorProperties, demand
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status, first_statuses
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class JacobianFree(AbstractLinearSolver):
    """w = b in the place of (I - J') w = b: the first term of sum_k (J')^k b, which leaves out the Jacobian J = dT/dy.

    Biased by design, by a relative rho / (1 - rho) at most where |J| <= rho < 1; with T a contraction and a well
    conditioned dT/dx the estimate still is a descent direction. It says so: `Estimate.substitute` names it, with |b -
    (I - J') w| / |b| = |J'b| / |b| measured. Where the spectral radius of J is estimated not to be below 1 there is no
    series that it begins: `Status.expanding`.

    Cost: one product, which measures the residual. Memory n.

    Source: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", AAAI 2022.

    Raises:
        ValueError: from `solve`, if the spectral radius of I - A is not known.

    Example:
        >>> half = torch.tensor(0.5)
        >>> A = LinearOperator(lambda v: 0.5 * v, 1, symmetric=False, contraction=half)
        >>> JacobianFree().solve(A, torch.ones(1)).value
        tensor([1.])
    """

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def demands(self) -> OperatorProperties:
        return ESTIMATED_CONTRACTION

    @property
    def forgets_start(self) -> bool:
        return True

    @property
    def is_approximate(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "JacobianFree", ESTIMATED_CONTRACTION)
        assert operator.contraction is not None
        v = b.clone()
        residual = safe_row_norms(operator.residual(b, v))
        contraction = torch.zeros_like(residual) + operator.contraction
        statuses = first_statuses(
            (~(residual.isfinite() & contraction.isfinite()), Status.nonfinite),
            ((contraction >= 1) & (safe_row_norms(b) > 0), Status.expanding),
        )
        return Solved(v, statuses, residual, 0)
