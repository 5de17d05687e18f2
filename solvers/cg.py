"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._linear import (
    POSITIVE_DEFINITE,
    AbstractLinearSolver,
    AbstractPreconditioner,
    LinearOperator,
    OperatorProperties,
    demand,
    unknown_error,
)
from bilevel._numerics.conjugate_gradients import conjugate_gradients
from bilevel._numerics.krylov import check_tolerances, solve_by_one_run, solve_by_runs
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.bounds.iterations import cg
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class CG(AbstractLinearSolver):
    """Conjugate gradients: the v of Krylov_k(A, b) nearest to A^-1 b in the energy norm, for A positive definite.

    Converges for symmetric positive definite A: |e_k|_A <= 2 q^k / (1 + q^2k) |e_0|_A with
    q = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), and exactly after as many steps as A has distinct eigenvalues.

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory 4n, 3n while a product is
    formed, and n more once a residual has risen. When the true residual turns out to miss the tolerance that the
    recurrence met, the iteration is restarted from there; it ends with `Status.stagnated` where that no longer helps.

    Differs from the textbook: it stops before dividing by zero; a direction of curvature at most zero ends it
    with `Status.negative_curvature` and the iterate of least residual so far; a preconditioner that is not
    positive definite ends it with `Status.breakdown`; with neither tolerance it takes `max_steps` steps, or fewer
    if it converges exactly, and that is success.

    Source: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. NBS 49 (1952);
    for the bound Saad, "Iterative methods for sparse linear systems" (2003), equation (6.128).

    Args:
        rtol: stop when |b - A v| <= max(rtol |b|, atol).
        atol: the same, absolute.
        max_steps: at most this many steps; None is 10 n.
        preconditioner: builds M^-1 ~ A^-1, symmetric positive definite: `Jacobi`, `NystromPreconditioner`.
        recompute: measure the true residual at the end, and restart from it where it misses the tolerance. False saves
            that one product and reports the residual of the recurrence, which drifts from the true one by some
            kappa units of rounding: certificates and statuses are then worth as much as that residual is.

    Raises:
        ValueError: if a tolerance is negative, or the operator is not declared positive definite.

    Example:
        >>> A = LinearOperator(lambda v: 2 * v, size=2, positive_definite=True)
        >>> CG().solve(A, torch.tensor([2.0, 4.0])).value
        tensor([1., 2.])
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: AbstractPreconditioner | None = None
    recompute: bool = True

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("CG", self.rtol, self.atol, self.max_steps)

    @property
    def demands(self) -> OperatorProperties:
        return POSITIVE_DEFINITE

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0 or self.atol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "CG", self.demands)
        precondition = None if self.preconditioner is None else self.preconditioner.build(operator, b)
        run = partial(conjugate_gradients, precondition=precondition)
        solve = partial(solve_by_runs, floats=True) if self.recompute else solve_by_one_run
        return solve(run, operator, b, guess, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> CG:
        return replace(self, rtol=0.0, atol=tol, recompute=self.recompute and not trusting)

    def with_preconditioner(self, preconditioner: AbstractPreconditioner) -> CG:
        return self if self.preconditioner is not None else replace(self, preconditioner=preconditioner)

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.atol == 0 and self.max_steps is None:
            return self.rtol
        if self.atol == 0 and self.max_steps is not None and self.preconditioner is None:
            return max(self.rtol, cg(constants, steps=self.max_steps, damping=damping))
        raise unknown_error(self)


def accurate_cg(like: Tensor) -> CG:
    """Conjugate gradients, accurate for the dtype: what certificates and references solve with where none is given.

    To 1e-10 (float32: 1e-5) of |b|: small enough not to show beside other errors, and above the rounding floor unless
    the system is so ill-conditioned that no certificate says anything.
    """
    return CG(rtol=1e-10 if like.dtype == torch.float64 else 1e-5, max_steps=10 * like.shape[-1])


def solve_rows(operator: LinearOperator, b: Tensor, rtols: Sequence[float]) -> Solved:
    """`CG(rtol).solve(operator, b)` with a tolerance for each row, so that no row's solution depends on the others."""
    return solve_by_runs(conjugate_gradients, operator, b, None, rtol=rtols, floats=True)
