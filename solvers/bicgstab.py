"""The stabilized method of biconjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._linear import ANY, AbstractLinearSolver, LinearOperator, OperatorProperties, unknown_error
from bilevel._numerics.krylov import (
    BREAKDOWN,
    CONVERGED,
    NONFINITE,
    OUT_OF_STEPS,
    RESTART,
    check_tolerances,
    relative,
    solve_by_runs,
)
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class BiCGStab(AbstractLinearSolver):
    """BiCGStab: r_k = Q_k(A) P_k(A) r_0, P_k of biconjugate gradients, Q_k a product of steps of least residual.

    For any invertible A, without the transpose, in fixed memory. There is no bound: the residual may jump, and for A
    whose eigenvalues are near the imaginary axis it stands still; `GMRES` is the safer choice where its memory is no
    matter. The v of least residual is returned. A breakdown of the recurrence starts a new one from the true residual,
    while that gets smaller; then it ends with `Status.breakdown` or `Status.stagnated`.

    Cost: two products a step, one for the true residual at the end and one for a guess. Memory 9n.

    Source: van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of nonsymmetric
    linear systems", SIAM J. Sci. Stat. Comput. 13 (1992).

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.

    Raises:
        ValueError: if `rtol` is not in [0, 1) or `max_steps` negative.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
        >>> v = (
        ...     BiCGStab()
        ...     .solve(
        ...         LinearOperator(lambda v: v @ A.mT, 2, symmetric=False), torch.tensor([3.0, 0.0])
        ...     )
        ...     .value
        ... )
        >>> bool(torch.allclose(v, torch.ones(2)))
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("BiCGStab", self.rtol, 0.0, self.max_steps)

    @property
    def demands(self) -> OperatorProperties:
        return ANY

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        return solve_by_runs(_run, operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> BiCGStab:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol


def _run(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor
) -> tuple[Tensor, list[int], int, Tensor]:
    """One recurrence from zero; a breakdown of it is a RESTART where it has got anywhere."""
    eps = torch.finfo(r.dtype).eps
    shadow, p, d, best = r.clone(), r.clone(), torch.zeros_like(r), torch.zeros_like(r)
    first = norm = least = safe_row_norms(r)
    rho = row_dots(shadow, r)
    codes = torch.full_like(norm, OUT_OF_STEPS, dtype=torch.int64)
    codes = torch.where(norm <= stop, CONVERGED, codes)
    codes = torch.where(norm.isfinite(), codes, NONFINITE)
    steps = 0

    def safe(value: Tensor, going: Tensor) -> Tensor:
        return torch.where(going & (value != 0), value, 1.0)

    while steps < max_steps:
        going = codes == OUT_OF_STEPS
        if not bool(going.any()):
            break
        Ap = operator.mv(p)
        norm_A = torch.maximum(norm_A, safe_row_norms(Ap) / safe(safe_row_norms(p), going))
        against = row_dots(shadow, Ap)
        broken = going & (against.abs() <= eps * safe_row_norms(shadow) * safe_row_norms(Ap))
        alpha = torch.where(going & ~broken, rho / safe(against, going), 0.0).unsqueeze(-1)
        s = r - alpha * Ap
        As = operator.mv(s)
        size = row_dots(As, As)
        omega = torch.where(going & ~broken & (size > 0), row_dots(As, s) / safe(size, going), 0.0).unsqueeze(-1)
        steps += 1
        d = d + alpha * p + omega * s
        r = s - omega * As
        norm = safe_row_norms(r)
        better = norm < least
        best, least = torch.where(better.unsqueeze(-1), d, best), torch.where(better, norm, least)
        new = row_dots(shadow, r)
        broken = broken | going & ((new.abs() <= eps * safe_row_norms(shadow) * norm) | (omega.squeeze(-1) == 0))
        beta = torch.where(going & ~broken, new / safe(rho, going), 0.0).unsqueeze(-1)
        beta = beta * alpha / torch.where(omega != 0, omega, 1.0)
        p, rho = r + beta * (p - omega * Ap), new
        codes = torch.where(broken, torch.where(least < 0.5 * first, RESTART, BREAKDOWN), codes)
        codes = torch.where(going & (norm <= stop), CONVERGED, codes)
        codes = torch.where(going & ~norm.isfinite(), NONFINITE, codes)
    d = torch.where((codes == NONFINITE).unsqueeze(-1), d, best)
    return d, codes.reshape(-1).tolist(), steps, norm_A
