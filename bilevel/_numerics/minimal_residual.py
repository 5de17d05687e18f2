"""The recurrence of the minimal residual method."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.krylov import BREAKDOWN, CONVERGED, NONFINITE, OUT_OF_STEPS
from bilevel._numerics.rows import divided_rows, row_dots, safe_row_norms


def minimal_residual(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor
) -> tuple[Tensor, list[int], int, Tensor]:
    """Solve A d = r from d = 0 with the least |r - A d|, for A symmetric; a run, in the sense of `solve_by_runs`.

    Lanczos vectors q, the rotations (c, s) that triangularize their tridiagonal matrix, directions w.
    """
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
