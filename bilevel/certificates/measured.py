"""The norms that a certificate is made of, at a point (x, y, v), with their rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel.certificates.certificate import Constants

ROUNDING = 8.0  # how many units of rounding a sum of products is granted, times the size of its terms


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Norms at (x, y, v) in float64, one row a task, as if each task's system were H_i v_i = grad_y f_i.

    Attributes:
        e: |grad_y g|, with its rounding.
        r: |grad_y f - H v|, with its rounding.
        v: |v|.
        h: the implicit gradient grad_x f - G v at this point `(p,)`.
        rounding: a bound on the rounding of h itself.
        curvature: the least <v, H v> / |v|^2 over the tasks, rounded up, where H v is known and v is not zero; what mu
            cannot be more than.
        coupling: |G v| / |v|, rounded down, where v is not zero; what C_G cannot be less than.
    """

    e: Tensor
    r: Tensor
    v: Tensor
    h: Tensor
    rounding: float
    curvature: float | None = None
    coupling: float | None = None


def measured(
    y: Tensor,
    v: Tensor,
    gradient: Tensor,
    residual: Tensor,
    fx: Tensor,
    fy: Tensor,
    gv: Tensor | None,
    known: Constants,
    hv: Tensor | None = None,
) -> Measured:
    """Norms from what an implicit estimator has at hand anyway: no oracle call.

    The rounding of each is added, as `ROUNDING` units of it times the size of the terms: |H| |y| + |e| for the
    gradient e, |H| |v| + |grad_y f| + L_fyy |y| for the residual, |grad_x f| + L_fxy |y| + |G| |v| for h. Here |H| is
    L, or what H v shows of it where that is more: without either, nothing is granted for it.

    Args:
        y: `(*tasks, q)`.
        v: alike; the solution of the linear system.
        gradient: grad_y g there.
        residual: grad_y f - H v, or its norms `(*tasks, 1)`.
        fx: grad_x f `(p,)`.
        fy: grad_y f `(*tasks, q)`.
        gv: G v `(p,)`, or None for zero.
        known: the constants, as far as they are.
        hv: H v, where it is known.
    """
    rows = y.shape[:-1].numel()  # the mean over tasks put 1 / rows into fy and v
    gv = torch.zeros_like(fx) if gv is None else gv
    eps = ROUNDING * torch.finfo(y.dtype).eps
    size, norm_v, norm_fy = (safe_row_norms(t.double()) for t in (y, v, fy))
    e, r = safe_row_norms(gradient.double()), safe_row_norms(residual.double())
    norm_fx, norm_gv = float(safe_row_norms(fx.double())), float(safe_row_norms(gv.double()))
    L, curvature, coupling = known.L or 0.0, None, None
    if bool((norm_v > torch.finfo(v.dtype).tiny / eps).all()):
        coupling = max(norm_gv - eps * norm_fx, 0.0) / float(norm_v.sum())
        if hv is not None:
            unit, product = (t.double() / norm_v.unsqueeze(-1) for t in (v, hv))
            L = max(L, float(safe_row_norms(product).max()))
            curvature = float(row_dots(unit, product).min()) + eps * L
    e = e + eps * (L * size + e)
    r = rows * (r + eps * (L * norm_v + norm_fy)) + eps * (known.L_fyy or 0.0) * size
    terms = norm_fx + (known.L_fxy or 0.0) * float(size.mean()) + max(norm_gv, (known.C_G or 0.0) * float(norm_v.sum()))
    return Measured(e, r, rows * norm_v, fx - gv, eps * terms, curvature, coupling)
