"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._linear import SYMMETRIC, AbstractLinearSolver, LinearOperator, OperatorProperties, demand, unknown_error
from bilevel._numerics.krylov import (
    BREAKDOWN,
    CONVERGED,
    NONFINITE,
    OUT_OF_STEPS,
    check_tolerances,
    relative,
    solve_by_runs,
)
from bilevel._numerics.rows import divided_rows, row_dots, safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class MINRES(AbstractLinearSolver):
    """MINRES: the v of Krylov_k(A, b) with the least |b - A v|, for A symmetric, positive definite or not.

    The residual never grows. Converges for invertible symmetric A: with the eigenvalues in [-b, -a] and [a, b] like
    ((kappa - 1) / (kappa + 1))^(k/2), for A positive definite like CG, and exactly after as many steps as A has
    distinct eigenvalues. If A is singular and b not in its range, it ends with `Status.breakdown` and a v of least
    residual.

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory 7n. When the true
    residual turns out to miss the tolerance that the recurrence met, the iteration is restarted from there.

    Source: Paige, Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 12
    (1975).

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.

    Raises:
        ValueError: if `rtol` is negative, or the operator is not declared symmetric.

    Example:
        >>> A = LinearOperator(lambda v: v * torch.tensor([1.0, -2.0]), size=2)
        >>> v = MINRES().solve(A, torch.tensor([3.0, 4.0])).value
        >>> bool(torch.allclose(v, torch.tensor([3.0, -2.0])))
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("MINRES", self.rtol, 0.0, self.max_steps)

    @property
    def demands(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "MINRES", self.demands)
        return solve_by_runs(_run, operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> MINRES:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol


def _run(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor
) -> tuple[Tensor, list[int], int, Tensor]:
    """Lanczos vectors q, the rotations (c, s) that triangularize their tridiagonal matrix, directions w."""
    rounding = 10 * torch.finfo(r.dtype).eps
    d = w = w_old = q_old = torch.zeros_like(r)
    phi = safe_row_norms(r)  # signed; |phi| is the norm of the residual
    zero, one = torch.zeros_like(phi), torch.ones_like(phi)
    codes = torch.full_like(phi, OUT_OF_STEPS, dtype=torch.int64)
    codes = torch.where(phi.isfinite(), codes, NONFINITE)
    codes = torch.where(phi <= stop, CONVERGED, codes)
    q = divided_rows(r, phi, codes == OUT_OF_STEPS)
    del r
    beta = zero
    c_old, s_old, c, s = one, zero, one, zero
    steps = 0
    while steps < max_steps:
        active = codes == OUT_OF_STEPS
        if not bool(active.any()):
            break
        Aq = operator.mv(q)
        steps += 1
        alpha = row_dots(q, Aq)
        next_q = Aq - alpha.unsqueeze(-1) * q - beta.unsqueeze(-1) * q_old
        del Aq  # what a step leaves is not to be held while the next product is formed
        next_beta = safe_row_norms(next_q)
        norm_A = torch.maximum(norm_A, torch.hypot(torch.hypot(alpha, beta), next_beta))
        # An exhausted Krylov space leaves rounding errors: the residual is then exactly what the rotation leaves.
        next_beta = torch.where(next_beta <= rounding * norm_A, zero, next_beta)

        delta = c * alpha - c_old * s * beta
        rho_1 = torch.hypot(delta, next_beta)
        rho_2 = s * alpha + c_old * c * beta
        rho_3 = s_old * beta
        # |A r| / |r| is the length of (delta, c next_beta): at rounding level r is a least residual and not small.
        codes = torch.where(active & (torch.hypot(delta, c * next_beta) <= rounding * norm_A), BREAKDOWN, codes)
        codes = torch.where(active & ~(alpha.isfinite() & next_beta.isfinite()), NONFINITE, codes)
        active = codes == OUT_OF_STEPS

        next_w = divided_rows(q - rho_3.unsqueeze(-1) * w_old - rho_2.unsqueeze(-1) * w, rho_1, active)
        c_old, s_old, c, s = c, s, delta / rho_1, next_beta / rho_1
        d = torch.where(active.unsqueeze(-1), d + (c * phi).unsqueeze(-1) * next_w, d)
        phi = torch.where(active, -s * phi, phi)
        codes = torch.where(active & (phi.abs() <= stop), CONVERGED, codes)
        w_old, w = w, next_w
        q_old, q, beta = q, divided_rows(next_q, next_beta, codes == OUT_OF_STEPS), next_beta
        del next_q, next_w
    return d, codes.reshape(-1).tolist(), steps, norm_A
