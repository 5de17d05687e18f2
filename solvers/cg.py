"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._linear import AbstractLinearSolver, AbstractPreconditioner, LinearOperator, demand
from bilevel._result import Solved, Status
from bilevel._tree import row_dots


@final
@dataclass(frozen=True)
class CG(AbstractLinearSolver):
    """Conjugate gradients: the v of Krylov_k(A, b) nearest to A^-1 b in the energy norm, for A positive definite.

    Converges for symmetric positive definite A: |e_k|_A <= 2 q^k / (1 + q^2k) |e_0|_A with
    q = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), and exactly after as many steps as A has distinct eigenvalues.

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory 4n. When the true
    residual turns out to miss the tolerance that the recurrence met, the iteration is restarted from there.

    Differs from the textbook: it stops before dividing by zero; a direction of curvature at most zero ends it
    with `Status.negative_curvature` and the iterate of least residual so far; with neither tolerance it takes
    `max_steps` steps, or fewer if it converges exactly, and that is success.

    Source: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. NBS 49 (1952);
    for the bound Saad, "Iterative methods for sparse linear systems" (2003), equation (6.128).

    Args:
        rtol: stop when |b - A v| <= max(rtol |b|, atol).
        atol: the same, absolute.
        max_steps: at most this many steps; None is 10 n.
        preconditioner: builds M^-1 ~ A^-1, symmetric positive definite: `Jacobi`, `NystromPreconditioner`.

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

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`CG({name}=...)` must be at least 0. Got {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"`CG(max_steps=...)` must be at least 0. Got {self.max_steps}.")

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "CG", positive_definite=True)
        max_steps = 10 * operator.size if self.max_steps is None else self.max_steps
        return _solve(self, operator, b, guess, max_steps)


# How a run ended, as a number for each row.
_CONVERGED, _OUT_OF_STEPS, _STALLED, _CURVATURE, _NONFINITE = range(5)
_STATUS = {
    _CONVERGED: Status.successful,
    _OUT_OF_STEPS: Status.max_steps,
    _STALLED: Status.stagnated,
    _CURVATURE: Status.negative_curvature,
    _NONFINITE: Status.nonfinite,
}


def _solve(solver: CG, operator: LinearOperator, b: Tensor, guess: Tensor | None, max_steps: int) -> Solved:
    """Runs of the recurrence, each from the true residual of the one before, until that one meets the target."""
    precondition = None if solver.preconditioner is None else solver.preconditioner.build(operator, b)
    run = _run_one if b.dim() == 1 else _run_batch
    norm_b = torch.linalg.vector_norm(b, dim=-1)
    target = (solver.rtol * norm_b).clamp_min(solver.atol)
    # Systems are scaled to |b| = 1, so that squared norms neither overflow nor underflow in float32.
    scale = torch.where(norm_b > 0, norm_b, torch.ones_like(norm_b))
    solved_by_zero = norm_b == 0

    if guess is None:
        v, r = torch.zeros_like(b), b
    else:
        v = torch.where(solved_by_zero.unsqueeze(-1), torch.zeros_like(b), guess)
        r = b - operator.mv(v)
    codes, steps = torch.full_like(norm_b, _CONVERGED, dtype=torch.int64), 0
    running, before = ~solved_by_zero, torch.full_like(norm_b, math.inf)
    while True:
        correction, new, used = run(operator, r / scale.unsqueeze(-1), target / scale, max_steps - steps, precondition)
        v = (
            torch.addcmul(v, scale.unsqueeze(-1), correction)
            if guess is not None or steps
            else correction.mul_(scale.unsqueeze(-1))
        )
        steps += used
        codes = torch.where(running, new, codes)
        r = operator.residual(b, v)
        residual = torch.linalg.vector_norm(r, dim=-1)
        codes = torch.where(running & ~residual.isfinite(), _NONFINITE, codes)
        missed = running & (codes == _CONVERGED) & (target > 0) & (residual > target)
        codes = torch.where(missed & (residual > 0.5 * before), _STALLED, codes)
        running = missed & (codes == _CONVERGED)
        if not running.any():
            break
        if steps >= max_steps:
            codes = torch.where(running, _OUT_OF_STEPS, codes)
            break
        r, before = torch.where(running.unsqueeze(-1), r, torch.zeros_like(r)), residual
    # Out of steps is a failure only for those who gave a tolerance, and did not meet it.
    codes = torch.where((codes == _OUT_OF_STEPS) & ((target == 0) | (residual <= target)), _CONVERGED, codes)
    return Solved(v, tuple(_STATUS[code] for code in codes.reshape(-1).tolist()), residual, steps)


Precondition: TypeAlias = Callable[[Tensor], Tensor] | None


def _run_one(
    operator: LinearOperator, r: Tensor, target: Tensor, max_steps: int, precondition: Precondition
) -> tuple[Tensor, Tensor, int]:
    """One system: Python floats and in-place updates, so that little beside the products costs time."""
    eps = torch.finfo(r.dtype).eps
    d, r = torch.zeros_like(r), r.clone()
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = torch.dot(r, z).item()
    rr = rz if precondition is None else torch.dot(r, r).item()
    pp = rz if precondition is None else torch.dot(p, p).item()
    stop = max(float(target), 0.1 * eps)  # below: converged exactly, as far as this dtype can tell
    best, best_rr, largest, code = None, rr, 0.0, _OUT_OF_STEPS
    steps = 0
    while True:
        if not math.isfinite(rr):
            code = _NONFINITE
            break
        if math.sqrt(rr) <= stop:
            code = _CONVERGED
            break
        if steps == max_steps:
            break
        Ap = operator.mv(p)
        steps += 1
        pAp = torch.dot(p, Ap).item()
        if not math.isfinite(pAp):
            code = _NONFINITE
            break
        largest = max(largest, pAp / pp)
        if pAp <= eps * largest * pp:
            code = _CURVATURE
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
            p.mul_(beta).add_(r)
            pp = rr + beta * beta * pp  # the new residual is orthogonal to the old direction
        else:
            z = precondition(r)
            before_rz, rz = rz, torch.dot(r, z).item()
            p.mul_(rz / before_rz).add_(z)
            pp = torch.dot(p, p).item()
    return d, torch.tensor(code, device=r.device), steps


def _run_batch(
    operator: LinearOperator, r: Tensor, target: Tensor, max_steps: int, precondition: Precondition
) -> tuple[Tensor, Tensor, int]:
    """Independent systems side by side: a step length for each row; rows that ended stand still."""
    eps = torch.finfo(r.dtype).eps
    d = torch.zeros_like(r)
    z = r if precondition is None else precondition(r)
    p, rz, rr = z, row_dots(r, z), row_dots(r, r)
    stop = target.clamp_min(0.1 * eps)
    codes = torch.full_like(rr, _OUT_OF_STEPS, dtype=torch.int64)
    best, best_rr, largest, zero = d, rr, torch.zeros_like(rr), torch.zeros_like(rr)
    steps = 0
    while True:
        codes = torch.where((codes == _OUT_OF_STEPS) & ~rr.isfinite(), _NONFINITE, codes)
        codes = torch.where((codes == _OUT_OF_STEPS) & (rr.sqrt() <= stop), _CONVERGED, codes)
        active = codes == _OUT_OF_STEPS
        if steps == max_steps or not active.any():
            break
        p = torch.where(active.unsqueeze(-1), p, torch.zeros_like(p))
        Ap = operator.mv(p)
        steps += 1
        pAp, pp = row_dots(p, Ap), row_dots(p, p)
        largest = torch.maximum(largest, torch.where(active, pAp / pp, zero))
        codes = torch.where(active & ~pAp.isfinite(), _NONFINITE, codes)
        concave = (codes == _OUT_OF_STEPS) & (pAp <= eps * largest * pp)
        codes = torch.where(concave, _CURVATURE, codes)
        d = torch.where((concave & (best_rr < rr)).unsqueeze(-1), best, d)
        active = codes == _OUT_OF_STEPS
        alpha = torch.where(active, rz / pAp, zero).unsqueeze(-1)
        better = active & (rr < best_rr)
        best, best_rr = torch.where(better.unsqueeze(-1), d, best), torch.where(better, rr, best_rr)
        d = d + alpha * p
        r = torch.where(active.unsqueeze(-1), r - alpha * Ap, r)
        rr = row_dots(r, r)
        z = r if precondition is None else precondition(r)
        before, rz = rz, row_dots(r, z)
        p = z + torch.where(active, rz / before, zero).unsqueeze(-1) * p
    return d, codes, steps
