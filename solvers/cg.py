"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, final

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
from bilevel._numerics.krylov import (
    BREAKDOWN,
    CONVERGED,
    CURVATURE,
    NONFINITE,
    OUT_OF_STEPS,
    check_tolerances,
    solve_by_one_run,
    solve_by_runs,
)
from bilevel._numerics.rows import row_dots
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

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory 4n. When the true
    residual turns out to miss the tolerance that the recurrence met, the iteration is restarted from there; it
    ends with `Status.stagnated` where that no longer helps.

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

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "CG", self.demands)
        precondition = None if self.preconditioner is None else self.preconditioner.build(operator, b)
        run = partial(_run_one if b.dim() == 1 else _run_batch, precondition=precondition)
        solve = solve_by_runs if self.recompute else solve_by_one_run
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
    run = partial(_run_one if b.dim() == 1 else _run_batch, precondition=None)
    return solve_by_runs(run, operator, b, None, rtol=rtols)


Precondition: TypeAlias = Callable[[Tensor], Tensor] | None


def _run_one(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, largest_seen: Tensor, precondition: Precondition
) -> tuple[Tensor, list[int], int, Tensor]:
    """One system: Python floats and in-place updates, so that little beside the products costs time."""
    eps, target = torch.finfo(r.dtype).eps, float(stop)
    d = torch.zeros_like(r)
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rr = torch.dot(r, r).item()
    rz = pp = rr
    if precondition is not None:
        rz, pp = torch.dot(r, z).item(), torch.dot(p, p).item()
    best, best_rr, largest = None, rr, float(largest_seen)
    steps, code = 0, OUT_OF_STEPS
    while True:
        if not (math.isfinite(rr) and math.isfinite(rz)):
            code = NONFINITE
            break
        if math.sqrt(rr) <= target:
            code = CONVERGED
            break
        if rz <= 0:
            code = BREAKDOWN
            break
        if steps == max_steps:
            break
        Ap = operator.mv(p)
        steps += 1
        pAp = torch.dot(p, Ap).item()
        if not math.isfinite(pAp):
            code = NONFINITE
            break
        largest = max(largest, pAp / pp)
        if pAp <= eps * largest * pp:
            code = CURVATURE
            if best is not None and best_rr < rr:
                d = best
            break
        alpha = rz / pAp
        r.add_(Ap, alpha=-alpha)
        before, rr = rr, torch.dot(r, r).item()
        if before <= best_rr and rr > before:  # the residual is about to rise: keep where it was least
            best, best_rr = d.clone(), before
        d.add_(p, alpha=alpha)
        if precondition is None:
            beta = rr / rz
            rz = rr
            torch.add(r, p, alpha=beta, out=p)  # one pass over memory, where `mul_` and `add_` take two
            pp = rr + beta * beta * pp  # the new residual is orthogonal to the old direction
        else:
            z = precondition(r)
            before_rz, rz = rz, torch.dot(r, z).item()
            torch.add(z, p, alpha=rz / before_rz, out=p)
            pp = torch.dot(p, p).item()
    return d, [code], steps, torch.full_like(largest_seen, largest)


def _run_batch(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, largest_seen: Tensor, precondition: Precondition
) -> tuple[Tensor, list[int], int, Tensor]:
    """Independent systems side by side: a step length for each row; rows that ended stand still."""
    eps, given = torch.finfo(r.dtype).eps, r
    d = torch.zeros_like(r)
    z = r if precondition is None else precondition(r)
    p, rz, rr = z, row_dots(r, z), row_dots(r, r)
    codes = torch.full_like(rr, OUT_OF_STEPS, dtype=torch.int64)
    best, best_rr, largest, zero = d, rr, largest_seen, torch.zeros_like(rr)
    steps = 0
    while True:
        codes = torch.where((codes == OUT_OF_STEPS) & ~(rr.isfinite() & rz.isfinite()), NONFINITE, codes)
        codes = torch.where((codes == OUT_OF_STEPS) & (rr.sqrt() <= stop), CONVERGED, codes)
        codes = torch.where((codes == OUT_OF_STEPS) & (rz <= 0), BREAKDOWN, codes)
        active = codes == OUT_OF_STEPS
        if steps == max_steps or not active.any():
            break
        p = torch.where(active.unsqueeze(-1), p, torch.zeros_like(p))
        Ap = operator.mv(p)
        steps += 1
        pAp, pp = row_dots(p, Ap), row_dots(p, p)
        largest = torch.maximum(largest, torch.where(active, pAp / pp, zero))
        codes = torch.where(active & ~pAp.isfinite(), NONFINITE, codes)
        concave = (codes == OUT_OF_STEPS) & (pAp <= eps * largest * pp)
        codes = torch.where(concave, CURVATURE, codes)
        d = torch.where((concave & (best_rr < rr)).unsqueeze(-1), best, d)
        active = codes == OUT_OF_STEPS
        alpha = torch.where(active, rz / pAp, zero).unsqueeze(-1)
        better = active & (rr < best_rr)
        best, best_rr = torch.where(better.unsqueeze(-1), d, best), torch.where(better, rr, best_rr)
        d = d + alpha * p
        r = torch.where(active.unsqueeze(-1), r - alpha * Ap, r)
        rr = row_dots(r, r)
        z = r if precondition is None else precondition(r)
        before, rz = rz, row_dots(r, z)
        p = z + torch.where(active, rz / before, zero).unsqueeze(-1) * p
    given.copy_(r)
    return d, codes.reshape(-1).tolist(), steps, largest
